"""The config in the metadata of a GGUF file, read as llama.cpp reads it.

Everything the decoder does not implement is refused here, by name, so that a model is never served wrongly.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.config import ModelConfig, RopeScaling
from nitsum_jax.models.config_values import readable, unsupported
from nitsum_jax.models.special_ids import ids_of_gguf

GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral files call themselves llama
# The only frequency factors in published Llama 3 checkpoints; GGUF keeps the resulting tensor, not these numbers.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192


class GgufReader(Protocol):
    """What is needed of an open GGUF file; `GgufFile` of this package and `gguf.GGUFReader` have it."""

    tensors: Any

    def get_field(self, key: str) -> Any:
        """The field under a key (its `contents()` is the value), or None."""


def config_from_gguf(reader: GgufReader, name: str = "") -> ModelConfig:
    """The config in the metadata of an open GGUF file.

    Raises:
      InvalidInputError: a feature the decoder lacks, or a missing or impossible value; it names the feature or key.
    """
    with readable("the metadata of the GGUF file"):
        return _config_from_gguf(reader, name)


def _config_from_gguf(reader: GgufReader, name: str) -> ModelConfig:
    architecture = str(gguf_field(reader, "general.architecture", "of unknown type"))
    if architecture not in GGUF_ARCHITECTURES:
        raise unsupported(f"GGUF architecture '{architecture}'", ", ".join(GGUF_ARCHITECTURES))
    if int(gguf_field(reader, "split.count", 1)) > 1:
        raise unsupported("a GGUF file in several parts", "one file; join them with `llama-gguf-split --merge`")

    def get(key: str, default: Any = None, required: bool = False) -> Any:
        value = gguf_field(reader, f"{architecture}.{key}", default)
        if value is None and required:
            raise InvalidInputError(f"GGUF file has no '{architecture}.{key}'; convert the model again")
        return value

    if int(get("expert_count", 0)) > 0:
        raise unsupported("mixture of experts", "dense models")
    max_context = int(get("context_length", required=True))
    window = int(get("attention.sliding_window", 0))
    if 0 < window < max_context:
        raise unsupported(f"sliding window attention ({window} tokens)", "full attention")
    d_model, num_heads = int(get("embedding_length", required=True)), get("attention.head_count", required=True)
    num_kv_heads, d_mlp = get("attention.head_count_kv", num_heads), get("feed_forward_length", required=True)
    for what, value in (("heads", num_heads), ("KV heads", num_kv_heads), ("MLP width", d_mlp)):
        if isinstance(value, list):
            raise unsupported(f"a number of {what} that varies by layer", "the same number in every layer")
    head_dim = int(get("attention.key_length", d_model // max(1, int(num_heads))))
    for key in ("attention.value_length", "rope.dimension_count"):
        if int(get(key, head_dim)) != head_dim:
            raise unsupported(f"{key}={get(key)} with head width {head_dim}", "one width for q, k, v and RoPE")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise InvalidInputError("GGUF file has no tensor 'token_embd.weight'; it is cut short or not a whole model")
    theta = float(get("rope.freq_base", 10000.0))
    rows = int(tensors["token_embd.weight"].shape[1])
    # The tokenizer tells of ids that are beyond its vocabulary.
    known = min(rows, len(gguf_field(reader, "tokenizer.ggml.tokens") or range(rows)))
    special = ids_of_gguf(lambda key: gguf_field(reader, key), known, warn=False)
    return ModelConfig(
        name=name or str(gguf_field(reader, "general.name", "")),
        architecture=architecture,
        num_layers=int(get("block_count", required=True)),
        d_model=d_model,
        d_mlp=int(d_mlp),
        num_heads=int(num_heads),
        num_kv_heads=int(num_kv_heads),
        head_dim=head_dim,
        vocab_size=rows,
        max_context=max_context,
        rope_theta=theta,
        rope_scaling=_gguf_rope_scaling(get, tensors, head_dim, theta, max_context),
        norm_eps=float(f"{get('attention.layer_norm_rms_epsilon', 1e-5):.7g}"),  # a float32 in the file
        tied_head="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        eos_ids=special.ends,
        bos_id=special.bos,
        dtype={"F16": "float16", "BF16": "bfloat16"}.get(tensors["token_embd.weight"].tensor_type.name, "float32"),
    )


def gguf_field(reader: GgufReader, key: str, default: Any = None) -> Any:
    """The value of one metadata key of a GGUF file (str, number or list), or `default` if it is not there."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _gguf_rope_scaling(
    get: Any, tensors: Mapping[str, Any], head_dim: int, theta: float, max_context: int
) -> RopeScaling | None:
    kind = get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise unsupported(f"GGUF rope scaling '{kind}'", "none, linear, and Llama 3 by rope_freqs.weight")
    factor = float(get("rope.scaling.factor", 1.0))
    linear = RopeScaling.linear(factor, max_context) if kind == "linear" and factor != 1.0 else None
    if "rope_freqs.weight" not in tensors:
        return linear
    wanted = np.asarray(tensors["rope_freqs.weight"].data, np.float64).reshape(-1)
    if np.allclose(wanted, 1.0):
        return linear
    llama3 = RopeScaling(float(wanted.max()), _LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT)
    alike = wanted.shape == (head_dim // 2,) and np.allclose(wanted, llama3.divisors(head_dim, theta), rtol=1e-4)
    if linear is None and alike:
        return llama3
    raise unsupported("this rope_freqs.weight in the GGUF file", "the Llama 3 factors (low 1, high 4, context 8192)")
