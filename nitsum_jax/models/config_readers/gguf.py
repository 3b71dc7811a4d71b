"""The config in the metadata of a GGUF file, read as llama.cpp reads it.

Everything the decoder does not implement is refused here, by name, so that a model is never served wrongly.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.config_readers.rope import rope_of_gguf
from nitsum_jax.models.config_readers.values import positive, readable, says_nothing, shown, unsupported
from nitsum_jax.models.families.registry import GGUF_FAMILIES
from nitsum_jax.models.text.special_ids import ids_of_gguf

# Keys that are read here, without the architecture in front.
_USED = """
    context_length embedding_length block_count feed_forward_length expert_count attention.head_count
    attention.head_count_kv attention.key_length attention.value_length attention.layer_norm_rms_epsilon
    attention.sliding_window rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor rope.scale_linear
"""
# Keys that change nothing in a dense model with full attention and RMSNorm.
_HARMLESS = """
    vocab_size tensor_data_layout pooling_type expert_used_count expert_shared_count expert_feed_forward_length
    leading_dense_block_count attention.layer_norm_epsilon attention.sliding_window_pattern attention.key_length_swa
    attention.value_length_swa rope.dimension_count_swa rope.freq_base_swa rope.scaling.finetuned
    rope.scaling.original_context_length rope.scaling.yarn_ext_factor rope.scaling.yarn_beta_fast
    rope.scaling.yarn_beta_slow rope.scaling.yarn_log_multiplier
"""
_UNDERSTOOD = {*_USED.split(), *_HARMLESS.split()}
# Keys that ask for nothing with these values; any other key does with null, false, 0 and empty.
_NEUTRAL = {
    "attention.causal": (True,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
}


class GgufReader(Protocol):
    """What is needed of an open GGUF file; `GgufFile` of this package and `gguf.GGUFReader` have it."""

    tensors: Any

    @property
    def fields(self) -> Mapping[str, Any]:
        """All fields by key."""

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
    if architecture not in GGUF_FAMILIES:
        raise unsupported(f"GGUF architecture '{architecture}'", ", ".join(GGUF_FAMILIES))
    family, form = GGUF_FAMILIES[architecture]
    if int(gguf_field(reader, "split.count", 1)) > 1:
        raise unsupported("a GGUF file in several parts", "one file; join them with `llama-gguf-split --merge`")

    def get(key: str, default: Any = None, required: bool = False) -> Any:
        value = gguf_field(reader, f"{architecture}.{key}", default)
        if value is None and required:
            raise InvalidInputError(f"GGUF file has no '{architecture}.{key}'; convert the model again")
        return value

    _refuse_unknown_keys(reader, architecture, form.keys)
    if int(get("expert_count", 0)) > 0:
        raise unsupported("mixture of experts", "dense models")
    max_context = int(get("context_length", required=True))
    d_model, num_heads = int(get("embedding_length", required=True)), get("attention.head_count", required=True)
    num_kv_heads, d_mlp = get("attention.head_count_kv", num_heads), get("feed_forward_length", required=True)
    for what, value in (("heads", num_heads), ("KV heads", num_kv_heads), ("MLP width", d_mlp)):
        if isinstance(value, list):
            raise unsupported(f"a number of {what} that varies by layer", "the same number in every layer")
    if int(num_heads) < 1:
        raise InvalidInputError(f"GGUF file has {architecture}.attention.head_count={num_heads}; convert it again")
    head_dim = int(get("attention.key_length", d_model // int(num_heads)))
    for key in ("attention.value_length", "rope.dimension_count"):
        turns_in_part = key == "rope.dimension_count" and family.partial_rotary
        if int(get(key, head_dim)) != head_dim and not turns_in_part:
            raise unsupported(f"{key}={get(key)} with head width {head_dim}", "one width for q, k, v and RoPE")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise InvalidInputError("GGUF file has no tensor 'token_embd.weight'; it is cut short or not a whole model")
    turning = int(get("rope.dimension_count", head_dim))
    theta, scaling = rope_of_gguf(get, tensors, architecture, turning, max_context, family.default_theta)
    # llama.cpp refuses a file without this key, too; in the file it is a float32.
    eps = positive(get("attention.layer_norm_rms_epsilon", required=True), "attention.layer_norm_rms_epsilon")
    rows = int(tensors["token_embd.weight"].shape[1])
    # The tokenizer warns of ids that are beyond its vocabulary.
    known = min(rows, len(gguf_field(reader, "tokenizer.ggml.tokens") or range(rows)))
    special = ids_of_gguf(lambda key: gguf_field(reader, key), known, warn=False)
    config = ModelConfig(
        name=name or str(gguf_field(reader, "general.name", "")),
        architecture=family.architecture,
        num_layers=int(get("block_count", required=True)),
        d_model=d_model,
        d_mlp=int(d_mlp),
        num_heads=int(num_heads),
        num_kv_heads=int(num_kv_heads),
        head_dim=head_dim,
        vocab_size=rows,
        max_context=max_context,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(f"{eps:.7g}"),
        tied_head="output.weight" not in tensors,
        eos_ids=special.ends,
        bos_id=special.bos,
        dtype={"F16": "float16", "BF16": "bfloat16"}.get(tensors["token_embd.weight"].tensor_type.name, "float32"),
        **form.differences(get, tensors),
    )
    window = int(get("attention.sliding_window", 0))
    if 0 < window < max_context and config.window is None:
        raise unsupported(
            f"sliding window attention ({window} tokens) in a file of {architecture}", "full attention there"
        )
    return config


def gguf_field(reader: GgufReader, key: str, default: Any = None) -> Any:
    """The value of one metadata key of a GGUF file (str, number or list), or `default` if it is not there."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _refuse_unknown_keys(reader: GgufReader, architecture: str, more: frozenset[str]) -> None:
    """Refuses keys of the model (not of the file or the tokenizer) that may change what it computes."""
    for key in reader.fields:
        family, _, rest = key.partition(".")
        if family != architecture or rest in _UNDERSTOOD or rest in more:
            continue
        value = gguf_field(reader, key)
        if not (value in _NEUTRAL[rest] if rest in _NEUTRAL else says_nothing(value)):
            raise InvalidInputError(
                f"the GGUF file has {key}={shown(value)}, which is not understood and may change what the model "
                "computes; use a file of the model without it"
            )
