"""Which keys of a config.json are understood, and what transformers 5 takes where one is missing.

A key is one of three kinds.  *Used*: it is read, or refused where it asks for something that the decoder lacks.
*Harmless*: transformers computes the same whatever it says (training, labels, sampling, bookkeeping).  *Anything else*
may change the numbers, so the model is refused unless the value says "nothing": null, false, 0, or empty.
"""

from collections.abc import Mapping
from typing import Any

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.config_readers.values import shown

_COMMON: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "is_causal": True,
    "head_dim": None,  # hidden_size / num_attention_heads
    "sliding_window": None,
    "use_sliding_window": False,
}
_QWEN: dict[str, Any] = _COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
# The fields of LlamaConfig, MistralConfig, Qwen2Config and Qwen3Config and their defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON
    | {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,  # as many as query heads
        "max_position_embeddings": 2048,
    },
    "mistral": _COMMON
    | {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
QUANTISATION = ("quantization_config", "quantization", "compression_config")
_USED = {
    *_COMMON,
    *DEFAULTS["llama"],
    *EXPERTS,
    *QUANTISATION,
    "model_type",
    "layer_types",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "bos_token_id",
    "eos_token_id",
    "dtype",
    "torch_dtype",
}
_BOOKKEEPING = """
    architectures auto_map transformers_version name_or_path tokenizer_class is_llama_config transformers.js_config
    torchscript use_cache cache_implementation attn_implementation output_attentions output_hidden_states return_dict
    problem_type id2label label2id num_labels finetuning_task task_specific_params license language
    unsloth_fixed unsloth_version model_max_length max_sequence_length max_seq_length max_seq_len seq_length
    use_flash_attention use_flash_attn use_flash_attention_2 use_bfloat16 chunk_size_feed_forward pretraining_tp
    pad_token_id unk_token_id sep_token_id mask_token_id decoder_start_token_id pad_token prefix tie_last_hidden_states
    is_decoder max_window_layers
"""
_TRAINING = """
    initializer_range gradient_checkpointing router_aux_loss_coef output_router_logits z_loss_coeff embd_pdrop
    resid_pdrop attn_pdrop
"""
_SAMPLING = """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    min_length min_p no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    target_lookbehind temperature top_k top_p typical_p
"""
_HARMLESS = {*_BOOKKEEPING.split(), *_TRAINING.split(), *_SAMPLING.split()}


def refuse_unknown_keys(config: Mapping[str, Any]) -> None:
    """Raises InvalidInputError for a key that is not understood and may change what the model computes."""
    for key, value in config.items():
        if key in _USED or key in _HARMLESS or key.startswith("_") or "dropout" in key or says_nothing(value):
            continue
        raise InvalidInputError(
            f"config.json has {key}={shown(value)}, which is not understood and may change what the model computes; "
            "if it does not, remove the key"
        )


def says_nothing(value: Any) -> bool:
    """Whether a value of an unknown key switches nothing on: null, false, 0, or empty."""
    return value is None or (isinstance(value, bool | int | float | str | list | Mapping) and not value)
