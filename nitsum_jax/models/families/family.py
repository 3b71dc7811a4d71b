"""What a family of models states: names, defaults, and how it differs from Llama.

Everything that is not stated is as in Llama.  docs/models.md tells how to add one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from nitsum_jax.models.config import ModelConfig

# A part of a layer -> its tensor in a checkpoint, behind `model.layers.N.`.  Parts of the same tensor are fused: their
# rows lie one below the other in the order of `families.tensors`.
PartNames = Mapping[str, str]
LLAMA_PARTS: PartNames = {
    "attn.norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.out": "self_attn.o_proj",
    "attn.post_norm": "",  # Llama has none
    "mlp.norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "mlp.post_norm": "",
}
# What every config class of transformers has, with its default where one is common to all.
COMMON_KEYS: Mapping[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as query heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "is_causal": True,
    "sliding_window": None,
    "use_sliding_window": False,
}


def _no_differences(*_: Any) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GgufForm:
    """How llama.cpp's files hold models of a family.

    Attributes:
      architecture: `general.architecture` there.
      interleaved: rows of q and k lie in the order of interleaved RoPE, and are put back.
      keys: of the file, without the architecture, that `differences` reads.
      differences: from (key without the architecture, default) -> value, and the file's tensors by name, to the fields
        of `ModelConfig` that differ from Llama's.
    """

    architecture: str
    interleaved: bool = False
    keys: frozenset[str] = frozenset()
    differences: Callable[[Callable[..., Any], Mapping[str, Any]], dict[str, Any]] = _no_differences


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Family:
    """One kind of model.

    Attributes:
      architecture: `model_type` of its config.json.
      title: for people: the models that it covers.
      variants: for people: what differs from Llama, in words.
      hf_class: what transformers calls it.
      defaults: all keys of its config.json that say what is computed, with what transformers takes where one is
        missing.  Any other key is refused, unless it is harmless or says nothing.
      differences: from a config.json with its defaults to the fields of `ModelConfig` that differ from Llama's.
      written: from a config to the keys of config.json that say these differences.
      default_theta: base of the rotary frequencies where nothing is said.
      partial_rotary: `partial_rotary_factor` may be less than 1.
      activation_key: what names the activation.
      parts: names of the tensors.
      gguf: None: there are no such files, or none are read.
    """

    architecture: str
    title: str
    variants: str
    hf_class: str
    defaults: Mapping[str, Any]
    differences: Callable[[Mapping[str, Any]], dict[str, Any]] = _no_differences
    written: Callable[[ModelConfig], dict[str, Any]] = _no_differences
    default_theta: float = 10000.0
    partial_rotary: bool = False
    activation_key: str = "hidden_act"
    parts: PartNames = dataclasses.field(default_factory=lambda: LLAMA_PARTS)
    gguf: GgufForm | None = None
