"""Which keys of a config.json are understood.

A key is one of three kinds.  *Used*: it is read, or refused where it asks for something that the decoder lacks; a
family says which these are.
*Harmless*: transformers computes the same whatever it says (training, labels, sampling, bookkeeping).  *Anything else*
may change the numbers, so the model is refused unless the value says "nothing": null, false, 0, or empty.
"""

from collections.abc import Mapping
from typing import Any

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.config_readers.values import says_nothing, shown
from nitsum_jax.models.families.family import Family

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
QUANTISATION = ("quantization_config", "quantization", "compression_config")
# Keys that are read, or refused with words of their own, whatever the family.
_USED = {
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


def refuse_unknown_keys(config: Mapping[str, Any], family: Family) -> None:
    """Raises InvalidInputError for a key that this family does not know and that may change what is computed."""
    for key, value in config.items():
        known = key in family.defaults or key in _USED or key in _HARMLESS
        if known or key.startswith("_") or "dropout" in key or says_nothing(value):
            continue
        raise InvalidInputError(
            f"config.json has {key}={shown(value)}, which is not understood and may change what the model computes; "
            "if it does not, remove the key"
        )
