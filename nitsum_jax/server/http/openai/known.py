"""Fields that clients of OpenAI, vLLM, SGLang, llama.cpp and Ollama send and that do nothing here.

Some cannot change an answer: they are taken, whatever they say.  The others would change it: only the values that ask
for nothing are taken, and the rest is refused with the reason.  docs/server/http.md lists all of them, and a test holds
the two to each other.
"""

from collections.abc import Mapping

from nitsum_jax.server.http.fields import Unsupported

_OFF = (0,)
_NO_BEAMS = "there is no beam search"
_NO_IMAGES = "the model reads text only"
_ONE_MODEL = "the server has one model without adapters"

HARMLESS: Mapping[str, str] = {
    "user": "names the caller",
    "priority": "the latency tier decides who goes first: service_tier",
    "request_id": "the header x-request-id is used",
    "rid": "the header x-request-id is used",
    "cache_salt": "the prefix cache is shared",
    "cache_prompt": "the prefix cache is the server's to decide",
    "prompt_cache_key": "the prefix cache finds prompts by their tokens",
    "prompt_cache_retention": "the prefix cache keeps what there is room for",
    "safety_identifier": "names the caller",
    "keep_alive": "the model stays loaded",
    "guided_decoding_backend": "there is one: llguidance",
    "spaces_between_special_tokens": "tokens say what they say",
    "mirostat_tau": "counts only with mirostat",
    "mirostat_eta": "counts only with mirostat",
    "id_slot": "sequences are placed by the server",
    "data_parallel_rank": "sequences are placed by the server",
}
"""Taken, whatever the value; name to reason."""

COMMON: Mapping[str, Unsupported] = {
    "store": Unsupported("nothing is kept", (False,)),
    "best_of": Unsupported("use n, and choose among the outputs", (1,)),
    "use_beam_search": Unsupported(_NO_BEAMS, (False,)),
    "length_penalty": Unsupported(_NO_BEAMS, (1, 0)),
    "early_stopping": Unsupported(_NO_BEAMS, (False,)),
    "allowed_token_ids": Unsupported("use structured_outputs, or logit_bias"),
    "bad_words": Unsupported("use logit_bias", ([],)),
    "structural_tag": Unsupported("use tools, or a grammar"),
    "guided_whitespace_pattern": Unsupported("between the parts of JSON, up to 20 white characters are allowed"),
    "guided_json_object": Unsupported('use response_format={"type": "json_object"}', (False,)),
    "logits_processors": Unsupported("no code of a client is run", ([],)),
    "custom_logit_processor": Unsupported("no code of a client is run"),
    "truncate_prompt_tokens": Unsupported("prompts are not cut"),
    "return_token_ids": Unsupported("ids are not sent: use /tokenize", (False,)),
    "return_tokens_as_token_ids": Unsupported("tokens are told by what they say", (False,)),
    "return_hidden_states": Unsupported("hidden states stay on the device", (False,)),
    "detokenize": Unsupported("outputs are text", (True,)),
    "kv_transfer_params": Unsupported("the KV cache is not passed between servers"),
    "vllm_xargs": Unsupported("there are no extensions", ({},)),
    "mm_processor_kwargs": Unsupported(_NO_IMAGES, ({},)),
    "lora_path": Unsupported(_ONE_MODEL),
    "session_params": Unsupported("sessions are not kept", ({},)),
    "min_new_tokens": Unsupported("use min_tokens", _OFF),
    "max_new_tokens": Unsupported("use max_tokens"),
    "n_predict": Unsupported("use max_tokens", (-1,)),
    "num_predict": Unsupported("use max_tokens", (-1,)),
    "repeat_penalty": Unsupported("use repetition_penalty", (1,)),
    "repeat_last_n": Unsupported("penalties count prompt and output whole"),
    "typical_p": Unsupported("use top_p or min_p", (1,)),
    "tfs_z": Unsupported("use top_p or min_p", (1,)),
    "top_a": Unsupported("use top_p or min_p", _OFF),
    "mirostat": Unsupported("use temperature and top_p", _OFF),
    "dynatemp_range": Unsupported("use temperature", _OFF),
    "dry_multiplier": Unsupported("use repetition_penalty or frequency_penalty", _OFF),
    "xtc_probability": Unsupported("use temperature and min_p", _OFF),
    "samplers": Unsupported("the order of filters is fixed: top_k, top_p, min_p"),
    "stop_regex": Unsupported("use stop", ([],)),
    "no_stop_trim": Unsupported("use include_stop_str_in_output", (False,)),
    "options": Unsupported("give its fields beside the others, by the names that /openapi.json has", ({},)),
    "extra_body": Unsupported("give its fields beside the others: OpenAI's client does so by itself", ({},)),
}
"""Of both endpoints."""

OF_COMPLETIONS: Mapping[str, Unsupported] = {
    "suffix": Unsupported("text cannot be filled in before a suffix", ("",)),
}

OF_CHAT: Mapping[str, Unsupported] = {
    "functions": Unsupported("use tools", ([],), {"anyOf": [{"type": "array", "maxItems": 0}, {"type": "null"}]}),
    "function_call": Unsupported("use tool_choice", ("none", "auto")),
    "modalities": Unsupported("the model reads and writes text only", (["text"],)),
    "audio": Unsupported("the model reads and writes text only"),
    "prediction": Unsupported("outputs cannot be predicted"),
    "verbosity": Unsupported(
        "the length of an answer cannot be asked for, only limited by max_completion_tokens", ("medium",)
    ),
    "web_search_options": Unsupported("the server searches no web"),
    "chat_template": Unsupported("the template is the model's"),
    "documents": Unsupported("put them into a message", ([],)),
    "think": Unsupported("use chat_template_kwargs, such as enable_thinking"),
}
