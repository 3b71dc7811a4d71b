"""OLMo 2: norms behind attention and MLP alone, and norms of q and k over all heads together."""

from collections.abc import Mapping
from typing import Any

from nitsum_jax.models.config_readers.layers import full_attention
from nitsum_jax.models.families.family import COMMON_KEYS, LLAMA_PARTS, Family, GgufForm

_FIELDS = {"pre_norms": False, "post_norms": True, "qk_norm": True, "wide_qk_norm": True}


def _olmo2(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_FIELDS, **full_attention(config)}


OLMO2 = Family(
    architecture="olmo2",
    title="OLMo 2",
    variants="norms after, not before; norms of q and k over all heads",
    hf_class="Olmo2ForCausalLM",
    defaults={
        **COMMON_KEYS,
        "vocab_size": 50304,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    },
    differences=_olmo2,
    parts={
        **LLAMA_PARTS,
        "attn.post_norm": "post_attention_layernorm",
        "mlp.post_norm": "post_feedforward_layernorm",
    },
    gguf=GgufForm(architecture="olmo2", differences=lambda *_: dict(_FIELDS)),
)
