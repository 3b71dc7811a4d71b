"""Rotary settings of a checkpoint: `rope_parameters` and `rope_scaling` of config.json, `rope.*` of GGUF.

Plain, linear and Llama 3 scaling are understood.  Every other kind, and every setting that the named kind does not use,
is refused by name: a model run with other frequencies than it was trained for talks almost well.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.config import RopeScaling
from nitsum_jax.models.config_readers.values import positive, says_nothing, shown, unsupported

_DEFAULT_THETA = 10000.0  # of transformers and of llama.cpp alike
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "linear_attention"}
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# The only frequency factors in published Llama 3 checkpoints; GGUF keeps the resulting tensor, not these numbers.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192

Rope = tuple[float, RopeScaling | None]  # (base of the frequencies, scaling)


def rope_of_hf(config: Mapping[str, Any], max_context: int) -> Rope:
    """Theta and scaling of a config.json, in the order of transformers 5.

    Values inside `rope_parameters` (or the older `rope_scaling`) come before those beside it.  Where a file has both,
    transformers 5 reads the older one alone and transformers 4 too, so they have to agree.

    Raises:
      InvalidInputError: a kind or a key that is not understood, or values that contradict each other.
    """
    found: dict[str, Rope] = {}
    for key in ("rope_scaling", "rope_parameters"):
        table = config.get(key)
        if table is None or table == {}:
            continue
        if not isinstance(table, Mapping):
            raise InvalidInputError(f"config.json has {key}={shown(table)}; give an object")
        found[key] = _rope_of_table(key, _of_full_attention(key, table), config, max_context)
    if len(set(found.values())) > 1:
        raise InvalidInputError(
            "config.json has rope_scaling and rope_parameters that say different things; remove the one that is wrong"
        )
    return next(iter(found.values()), None) or _rope_of_table("rope_parameters", {}, config, max_context)


def rope_scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    """The `rope_scaling` that `rope_of_hf` and transformers read back."""
    if scaling.is_linear:
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_context,
    }


def rope_of_gguf(
    get: Callable[..., Any], tensors: Mapping[str, Any], architecture: str, head_dim: int, max_context: int
) -> Rope:
    """Theta and scaling of a GGUF file, as llama.cpp reads them.

    A factor without a kind is linear, and `rope.scale_linear` is the older name of `rope.scaling.factor`.

    Args:
      get: (key without the architecture, default) -> value.
      tensors: of the file, by name.
      architecture: of the file, for messages.
      head_dim: A.
      max_context: of the model.

    Raises:
      InvalidInputError: a kind that is not understood, or values that contradict each other.
    """
    theta = positive(get("rope.freq_base", _DEFAULT_THETA), f"{architecture}.rope.freq_base")
    kind = get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise unsupported(f"GGUF rope scaling '{kind}'", "none, linear, and Llama 3 by rope_freqs.weight")
    factors = [(key, get(key)) for key in ("rope.scaling.factor", "rope.scale_linear")]
    # 0 says "not scaled" there
    stated = [positive(value, f"{architecture}.{key}") for key, value in factors if value is not None and value != 0]
    if len(set(stated)) > 1:
        raise InvalidInputError(
            f"{architecture}.rope.scaling.factor and {architecture}.rope.scale_linear of the GGUF file differ "
            f"({stated[0]:g}, {stated[1]:g}); convert the model again"
        )
    factor = stated[0] if stated and kind == "linear" else 1.0
    linear = RopeScaling.linear(factor, max_context) if factor != 1.0 else None
    if "rope_freqs.weight" not in tensors:
        return theta, linear
    wanted = np.asarray(tensors["rope_freqs.weight"].data, np.float64).reshape(-1)
    if wanted.shape == (head_dim // 2,) and np.allclose(wanted, 1.0):
        return theta, linear
    llama3 = RopeScaling(float(wanted.max(initial=1.0)), _LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT)
    alike = wanted.shape == (head_dim // 2,) and np.allclose(wanted, llama3.divisors(head_dim, theta), rtol=1e-4)
    if linear is None and alike:
        return theta, llama3
    raise unsupported("this rope_freqs.weight in the GGUF file", "the Llama 3 factors (low 1, high 4, context 8192)")


def _of_full_attention(key: str, table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of full attention layers: of a table by layer type, or of a flat one."""
    by_type = [name for name, value in table.items() if name in _LAYER_TYPES or isinstance(value, Mapping)]
    if not by_type:
        return table
    wrong = [name for name in table if name not in _LAYER_TYPES]
    if wrong:
        raise InvalidInputError(
            f"{key} in config.json has '{wrong[0]}' beside settings by layer type; that is not understood"
        )
    full = table.get("full_attention")
    if not isinstance(full, Mapping):
        raise InvalidInputError(f"{key} in config.json says nothing of full_attention layers; only these are supported")
    return full


def _rope_of_table(key: str, table: Mapping[str, Any], config: Mapping[str, Any], max_context: int) -> Rope:
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in _KEYS:
        raise unsupported(f"{key} of type '{kind}'", "default, llama3, linear")
    if "type" in table and table["type"] != kind:
        raise InvalidInputError(f"{key} in config.json has type='{table['type']}' and rope_type='{kind}'")
    _refuse_unused(key, kind, table)
    for name, holder in (("partial_rotary_factor", table), ("partial_rotary_factor", config)):
        if holder.get(name) not in (None, 1):
            raise unsupported(f"{name}={shown(holder[name])}", "RoPE over the whole head")
    theta = positive(table.get("rope_theta", config.get("rope_theta", _DEFAULT_THETA)), "rope_theta of config.json")
    if kind == "default":
        return theta, None
    numbers = _numbers(key, kind, table, config, max_context)
    if kind == "linear":
        return theta, RopeScaling.linear(numbers["factor"], max_context)
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    if low >= high:
        raise InvalidInputError(f"{key} in config.json has low_freq_factor={low:g}, not less than high_freq_factor")
    return theta, RopeScaling(numbers["factor"], low, high, int(numbers["original_max_position_embeddings"]))


def _refuse_unused(key: str, kind: str, table: Mapping[str, Any]) -> None:
    """Refuses settings that this kind does not use, unless they ask for nothing."""
    understood = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
    for name, value in table.items():
        nothing = says_nothing(value) or (name in ("factor", "attention_factor") and value == 1)
        if name not in understood and name not in _KEYS[kind] and not nothing:
            raise InvalidInputError(
                f"{key} in config.json has {name}={shown(value)}, which type '{kind}' does not use; "
                "say the type that is meant, or remove the key"
            )


def _numbers(
    key: str, kind: str, table: Mapping[str, Any], config: Mapping[str, Any], max_context: int
) -> dict[str, float]:
    values = {name: table[name] for name in _KEYS[kind] if table.get(name) is not None}
    if kind == "llama3":
        context = "original_max_position_embeddings"
        beside = config.get(context)
        if beside is not None and values.setdefault(context, beside) != beside:
            raise InvalidInputError(
                f"config.json has {context}={shown(beside)}, and {shown(values[context])} in {key}; "
                "remove the one that is wrong"
            )
        values.setdefault(context, max_context)
    for name in _KEYS[kind]:
        if name not in values:
            raise InvalidInputError(f"{key} of type '{kind}' lacks '{name}' in config.json")
    return {name: positive(value, f"{name} of {key} in config.json") for name, value in values.items()}
