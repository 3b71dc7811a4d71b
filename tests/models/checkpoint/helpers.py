"""Small random models in every checkpoint format, for the tests of this room."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers

from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.config_readers.hf import config_to_hf
from nitsum_jax.models.families.tensors import checkpoint_shapes

CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def tiny_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "name": "tiny",
        "architecture": "llama",
        "num_layers": 2,
        "d_model": 32,
        "d_mlp": 64,
        "num_heads": 6,
        "num_kv_heads": 3,
        "head_dim": 8,
        "vocab_size": 300,
        "max_context": 128,
        "eos_ids": (2,),
        "bos_id": 1,
    }
    values |= changes
    if values["architecture"] == "qwen2":
        values["qkv_bias"] = True
    if values["architecture"] == "qwen3":
        values["qk_norm"] = True
    return ModelConfig(**values)


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Values that bfloat16 and float16 hold exactly, so that formats can be compared bit by bit."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.integers(-64, 65, shape) / 64).astype(np.float32)
        for name, shape in checkpoint_shapes(config).items()
    }


class DictSource:
    """A TensorSource over arrays that remembers what was read."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self.tensors = dict(tensors)
        self.read_elements: dict[str, int] = dict.fromkeys(tensors, 0)
        self.largest_read = 0

    def names(self) -> Iterable[str]:
        return self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        return self._count(name, self.tensors[name])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.shape(name)[0]
        return self._count(name, self.tensors[name][start:stop])

    def read_columns(self, name: str, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.shape(name)[1]
        return self._count(name, self.tensors[name][:, start:stop])

    def _count(self, name: str, value: np.ndarray) -> np.ndarray:
        self.read_elements[name] += value.size
        self.largest_read = max(self.largest_read, value.nbytes)
        return value


def byte_alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write_tokenizer(folder: Path) -> None:
    specials = ["<unk>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate([*specials, *byte_alphabet()])}
    tokenizer = HfTokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_hf(
    folder: Path, config: ModelConfig, tensors: Mapping[str, np.ndarray], *, files: int = 1, dtype: Any = np.float32
) -> Path:
    """A Hugging Face model folder, its tensors dealt out over several files."""
    write_tokenizer(folder)
    dtype = np.dtype(dtype)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config) | {"torch_dtype": str(dtype)}))
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i in range(files):
        file = "model.safetensors" if files == 1 else f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = {name: tensors[name].astype(dtype) for name in names[i::files]}
        safetensors.numpy.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


_GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_GGUF_LAYER_NAMES[module]}.{kind}"


def to_interleaved_rope(value: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of llama models."""
    halves = value.reshape(num_heads, 2, value.shape[0] // num_heads // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    quantised: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    fields: Mapping[str, object] | None = None,
    rope_freqs: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Writes a GGUF file; returns the tensors as quantised, under Hugging Face names and in HF order."""
    architecture = config.architecture
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(config.name)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_mlp)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    kinds = {
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
        str: gguf.GGUFValueType.STRING,
    }
    for key, setting in (fields or {}).items():
        writer.add_key_value(key, setting, kinds[type(setting)])
    _add_gguf_tokenizer(writer)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    stored: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        module = name.split(".")[-2]
        permuted = architecture == "llama" and module in heads
        source = to_interleaved_rope(value, heads[module]) if permuted else value
        kind = quantised if value.ndim > 1 else gguf.GGMLQuantizationType.F32
        if value.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.F16  # as llama.cpp does with rows that are not whole blocks
        raw = gguf.quants.quantize(np.ascontiguousarray(source), kind)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=kind)
        plain = gguf.quants.dequantize(raw, kind)
        stored[name] = plain if not permuted else _from_interleaved_rope(plain, heads[module])
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _from_interleaved_rope(value: np.ndarray, num_heads: int) -> np.ndarray:
    pairs = value.reshape(num_heads, value.shape[0] // num_heads // 2, 2, *value.shape[1:])
    return pairs.swapaxes(1, 2).reshape(value.shape)


def _add_gguf_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens = ["<unk>", "<s>", "</s>", *byte_alphabet(), "he"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([int(gguf.TokenType.CONTROL)] * 3 + [int(gguf.TokenType.NORMAL)] * (len(tokens) - 3))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def bf16(value: np.ndarray) -> np.ndarray:
    return value.astype(ml_dtypes.bfloat16)
