"""A tiny model with random weights: real tokens for almost no arithmetic, and nothing sensible in them.

It stands in for a large model where the runtime around it is of interest: paced runs, demonstrations, load tests.
Weights come from a fixed seed, so it says the same everywhere.
"""

import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nitsum_jax.models.known.registry import cache_folder

NAME = "tiny-random"
_VERSION = 1  # of what is written: another folder for another one
_D, _F, _L, _H, _A = 32, 64, 1, 8, 4
_VOCABULARY = 320
_CONTEXT = 16384
_END = 256


def folder() -> Path:
    """The model as a Hugging Face folder, written into the user's cache if it is not there."""
    where = cache_folder() / f"{NAME}-{_VERSION}"
    if not where.is_dir():
        where.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=where.parent))
        write(beside)
        try:
            os.rename(beside, where)  # all at once: another process may do the same
        except OSError:
            shutil.rmtree(beside)
            if not where.is_dir():
                raise
    return where


def write(path: Path) -> None:
    """Writes config, weights and tokenizer into a folder."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": _D,
        "intermediate_size": _F,
        "num_hidden_layers": _L,
        "num_attention_heads": _H,
        "num_key_value_heads": _H,
        "head_dim": _A,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": _CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": _END,
        "torch_dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(_weights(), path / "model.safetensors", metadata={"format": "pt"})
    _tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}) + "\n", encoding="utf-8")


def _weights() -> dict[str, np.ndarray]:
    shapes = {"model.embed_tokens.weight": (_VOCABULARY, _D), "model.norm.weight": (_D,)}
    for layer in range(_L):
        at = f"model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (_D,)
        for name in "qkv":
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (_H * _A, _D)
        shapes[f"{at}.self_attn.o_proj.weight"] = (_D, _H * _A)
        shapes[f"{at}.mlp.gate_proj.weight"] = shapes[f"{at}.mlp.up_proj.weight"] = (_F, _D)
        shapes[f"{at}.mlp.down_proj.weight"] = (_D, _F)
    rng = np.random.default_rng(0)
    return {
        name: np.ones(shape, np.float32)
        if "norm" in name
        else (rng.standard_normal(shape) * (2 / math.sqrt(shape[-1]))).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }


def _tokenizer() -> Tokenizer:
    """A token for each byte, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<end>", special=True)])
    return inner
