"""Tiny random models of every config variant, made of numpy alone, so that weights need not be stored.

Each is what Hugging Face would publish: a config dict, tensors under their canonical names, a tokenizer.  Weights come
from the raw bits of PCG64 seeded with the variant's and the tensor's name; numpy guarantees that stream for good.
`tiny_logits.npz` holds what transformers makes of `token_ids(variant)`; see README.md.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

NUM_SEQUENCES = 2
SEQUENCE_LENGTH = 24
BOS, EOS = 1, 2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
_WORDS = "▁the ▁and ▁of ▁to ▁in ▁is ▁it ▁you ing er"


def _config(model_type: str, heads: int, kv_heads: int, *, tied: bool = False, **more: Any) -> dict[str, Any]:
    """A published config; what `more` does not say: D=48, F=96, L=2, V=96, head width 8."""
    config = {
        "architectures": [_CLASSES[model_type]],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 8,
        "vocab_size": 96,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
    }
    return config | more


# Rotary wavelengths at theta 100 and head width 16 run from 6 to 350 tokens, so that with these bounds some stay, some
# are interpolated and some scaled in full, and 24 tokens are enough to tell.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
}
# Keys of Gemma alone; windows of 8 tokens in the first of two layers.
_GEMMA: dict[str, Any] = {
    "tied": True,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 20,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama_mha": _config("llama", 8, 8),
    "llama_gqa_tied": _config("llama", 8, 2, tied=True),
    "llama_mqa": _config("llama", 4, 1),
    # SmolLM2's head counts, and no other size that divides by 4 either.
    "llama_odd": _config("llama", 9, 3, tied=True, hidden_size=54, head_dim=6, intermediate_size=90, vocab_size=93),
    "llama_six_heads": _config("llama", 6, 6),
    "llama_three_heads": _config("llama", 3, 3, head_dim=16),
    "llama3_rope": _config("llama", 4, 2, head_dim=16, rope_theta=100.0, rope_scaling=_LLAMA3_ROPE),
    "llama3_rope_tied": _config("llama", 4, 4, tied=True, head_dim=16, rope_theta=100.0, rope_scaling=_LLAMA3_ROPE),
    "llama_linear_rope": _config("llama", 4, 2, head_dim=16, rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "mistral": _config("mistral", 8, 4, sliding_window=None),
    "mistral_wide_heads": _config("mistral", 4, 2, head_dim=16, sliding_window=None),  # as Mistral Nemo
    "qwen2_tied": _config("qwen2", 6, 2, tied=True, use_sliding_window=False, sliding_window=64, max_window_layers=2),
    "qwen2": _config(
        "qwen2", 4, 2, use_sliding_window=False, sliding_window=64, max_window_layers=2, rms_norm_eps=1e-6
    ),
    "qwen2_mha": _config("qwen2", 8, 8, use_sliding_window=False, sliding_window=None),
    "qwen3_tied": _config("qwen3", 4, 2, tied=True, head_dim=16, attention_bias=False, use_sliding_window=False),
    "qwen3": _config("qwen3", 6, 3, head_dim=16, attention_bias=False, use_sliding_window=False, rms_norm_eps=1e-6),
    "qwen3_mqa": _config("qwen3", 4, 1, head_dim=16, attention_bias=False, use_sliding_window=False),
    "llama_yarn": _config("llama", 4, 2, head_dim=16, rope_theta=100.0, rope_scaling=_YARN_ROPE),
    "llama_dynamic": _config("llama", 4, 2, rope_scaling={"rope_type": "dynamic", "factor": 4.0}),
    "mistral_window": _config("mistral", 4, 2, sliding_window=8),
    "qwen2_window": _config("qwen2", 4, 2, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "gemma2": _config("gemma2", 4, 2, attn_logit_softcapping=3.0, final_logit_softcapping=6.0, **_GEMMA),
    "gemma3": _config(
        "gemma3_text",
        4,
        2,
        rope_local_base_freq=10.0,
        rope_theta=1000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        **_GEMMA,
    ),
    "phi3": _config(
        "phi3",
        4,
        2,
        hidden_size=64,
        head_dim=16,
        partial_rotary_factor=0.75,
        rope_scaling=_LONG_ROPE,
        original_max_position_embeddings=16,
        sliding_window=10,
        pad_token_id=None,
    ),
    "olmo2": _config("olmo2", 4, 2, head_dim=12, pad_token_id=None),
    "granite": _config(
        "granite",
        4,
        2,
        head_dim=12,
        embedding_multiplier=5.0,
        residual_multiplier=0.4,
        attention_multiplier=0.1,
        logits_scaling=0.7,
    ),
    "smollm3": _config(
        "smollm3",
        4,
        2,
        tied=True,
        head_dim=12,
        no_rope_layers=[1, 0],
        use_sliding_window=True,
        sliding_window=8,
        pad_token_id=None,
    ),
}


# What a family calls its norms of [D] in a layer, and the tensors that it fuses.
_NORMS = {
    "gemma2": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
    "gemma3_text": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
    "olmo2": ("post_attention", "post_feedforward"),
}
_FUSED = {"phi3": {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}}


def shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by its Hugging Face name, in the order of the model."""
    config = VARIANTS[variant]
    kind = config["model_type"]
    D, F, A, V = (config[key] for key in ("hidden_size", "intermediate_size", "head_dim", "vocab_size"))
    H, G = config["num_attention_heads"], config["num_key_value_heads"]
    rows = {"q": H * A, "k": G * A, "v": G * A, "gate": F, "up": F}
    of: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(config["num_hidden_layers"]):
        inside = f"model.layers.{layer}"
        attention, mlp = f"{inside}.self_attn", f"{inside}.mlp"
        first, *norms = _NORMS.get(kind, ("input", "post_attention"))
        of[f"{inside}.{first}_layernorm.weight"] = (D,)
        if kind in _FUSED:
            for name, parts in _FUSED[kind].items():
                of[f"{inside}.{name}.weight"] = (sum(rows[part] for part in parts), D)
        else:
            for name in ("q", "k", "v"):
                of[f"{attention}.{name}_proj.weight"] = (rows[name], D)
                if kind == "qwen2":
                    of[f"{attention}.{name}_proj.bias"] = (rows[name],)
        if kind in ("qwen3", "gemma3_text", "olmo2"):
            of[f"{attention}.q_norm.weight"] = (H * A if kind == "olmo2" else A,)
            of[f"{attention}.k_norm.weight"] = (G * A if kind == "olmo2" else A,)
        of[f"{attention}.o_proj.weight"] = (D, H * A)
        for name in norms:
            of[f"{inside}.{name}_layernorm.weight"] = (D,)
        if kind not in _FUSED:
            of[f"{mlp}.gate_proj.weight"] = (F, D)
            of[f"{mlp}.up_proj.weight"] = (F, D)
        of[f"{mlp}.down_proj.weight"] = (D, F)
    of["model.norm.weight"] = (D,)
    if not config["tie_word_embeddings"]:
        of["lm_head.weight"] = (V, D)
    return of


def tensors(variant: str) -> dict[str, np.ndarray]:
    """Every tensor of the model, float32, by its Hugging Face name.

    The scales make logits spread over about -8 to 8, attention far from uniform and every layer matter.
    """
    return {name: _tensor(variant, name, shape) for name, shape in shapes(variant).items()}


def token_ids(variant: str) -> np.ndarray:
    """Input of the golden logits: int64 [NUM_SEQUENCES, SEQUENCE_LENGTH], all within the vocabulary."""
    count = NUM_SEQUENCES * SEQUENCE_LENGTH
    ids = (_bits(variant, "token_ids", count) % np.uint64(VARIANTS[variant]["vocab_size"])).astype(np.int64)
    return ids.reshape(NUM_SEQUENCES, SEQUENCE_LENGTH)


def checksum(variant: str) -> int:
    """CRC-32 over all tensors and the token ids, to see that this module still makes what the golden logits are of."""
    crc = zlib.crc32(token_ids(variant).tobytes())
    for name, tensor in tensors(variant).items():
        crc = zlib.crc32(tensor.tobytes(), zlib.crc32(name.encode(), crc))
    return crc


def tokenizer(vocab_size: int = 93) -> Tokenizer:
    """A tokenizer that covers lower-case ASCII text (upper case is lowered, the rest is unknown); BOS is put in front.

    It follows sentencepiece's way with spaces.  Every id is below `vocab_size`.
    """
    tokens = ["<unk>", "<s>", "</s>", "▁", *map(chr, range(0x21, 0x41)), *"[\\]^_`", *map(chr, range(0x61, 0x7F)), "\n"]
    merges = []
    for word in _WORDS.split():
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    if len(tokens) > vocab_size:
        raise ValueError(f"the tokenizer has {len(tokens)} tokens, more than {vocab_size}")
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in tokens[:3]])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return inner


def write_hf_folder(variant: str, path: str | Path, *, shards: int = 1, dtype: str = "float32") -> Path:
    """Writes the model as a Hugging Face folder; returns it.

    Args:
      variant: a key of VARIANTS.
      path: the folder, made if it is not there.
      shards: number of safetensors files; with more than one there is an index beside them.
      dtype: of the tensors in the files, "float32" or "float16" (rounded from the float32 ones).
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.astype(dtype) for name, tensor in tensors(variant).items()}
    _write_json(folder / "config.json", VARIANTS[variant] | {"torch_dtype": dtype})
    tokenizer(VARIANTS[variant]["vocab_size"]).save(str(folder / "tokenizer.json"))
    tokenizer_config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHAT_TEMPLATE}
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(weights)
    per_file = math.ceil(len(names) / shards)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = {name: weights[name] for name in names[number * per_file : (number + 1) * per_file]}
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return folder


def _tensor(variant: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    # Uniform with variance 1: 24 bits are exact in float32.
    unit = (_bits(variant, name, math.prod(shape)) >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - 1
    noise = unit.reshape(shape) * np.float32(math.sqrt(3))
    if "norm" in name:
        return np.float32(0 if variant.startswith("gemma") else 1) + np.float32(0.2) * noise  # Gemma adds 1 itself
    if name.endswith("bias"):
        return np.float32(0.5) * noise
    # Matrices: rows of a normalised input give about unit outputs; queries and keys more, so that attention is sharp.
    gain = (
        1.5
        if "q_proj" in name or "k_proj" in name or "qkv" in name
        else 2.5
        if "embed" in name or "head" in name
        else 1.0
    )
    return np.float32(gain / math.sqrt(shape[-1])) * noise


def _bits(variant: str, name: str, count: int) -> np.ndarray:
    seed = np.random.SeedSequence(list(f"nitsum tiny {variant} {name}".encode()))
    return np.asarray(np.random.PCG64(seed).random_raw(count), dtype=np.uint64)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
