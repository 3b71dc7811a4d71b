"""Rotary settings of a checkpoint: `rope_parameters` and `rope_scaling` of config.json, `rope.*` of GGUF.

Plain, linear, Llama 3, YaRN and LongRoPE scaling are understood, and dynamic scaling, which changes nothing within the
context that a config states.  Every other kind, and every setting that the named kind does not use,
is refused by name: a model run with other frequencies than it was trained for talks almost well.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.config_readers.values import positive, says_nothing, shown, unsupported
from nitsum_jax.models.layers.rope_scaling import AnyScaling, LongRopeScaling, RopeScaling, YarnScaling

_DEFAULT_THETA = 10000.0  # of transformers and of llama.cpp alike
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "linear_attention"}
ORIGINAL_CONTEXT = "original_max_position_embeddings"
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL_CONTEXT),
    "yarn": ("factor", ORIGINAL_CONTEXT),
    "longrope": ("short_factor", "long_factor", ORIGINAL_CONTEXT),
}
_OPTIONAL = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor"),
}
_OLD_NAMES = {"su": "longrope"}
# The only frequency factors in published Llama 3 checkpoints; GGUF keeps the resulting tensor, not these numbers.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192

ThetaAndScaling = tuple[float, AnyScaling | None]


def rope_of_hf(
    config: Mapping[str, Any], max_context: int, default_theta: float = _DEFAULT_THETA, *, partial: bool = False
) -> ThetaAndScaling:
    """Theta and scaling of a config.json, in the order of transformers 5.

    Values inside `rope_parameters` (or the older `rope_scaling`) come before those beside it.  Where a file has both,
    transformers 5 reads the older one alone and transformers 4 too, so they have to agree.

    Args:
      config: the file.
      max_context: of the model.
      default_theta: where nothing is said.
      partial: whether `partial_rotary_factor` may be less than 1; who calls reads it.

    Raises:
      InvalidInputError: a kind or a key that is not understood, or values that contradict each other.
    """
    config = {"rope_theta": default_theta, **config}
    if not partial:
        _refuse_partial(config)
    found: dict[str, ThetaAndScaling] = {}
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


def sliding_rope_of_hf(config: Mapping[str, Any], max_context: int, default_theta: float) -> ThetaAndScaling:
    """Theta and scaling of layers with a window, where they have their own: `rope_local_base_freq`, or a table."""
    theta = config.get("rope_local_base_freq")
    config = {**config, "rope_theta": default_theta if theta is None else theta}
    table = config.get("rope_parameters") or {}
    own = table.get("sliding_attention") if isinstance(table, Mapping) else None
    return _rope_of_table("rope_parameters", own or {}, config, max_context)


def refuse_other_local_rope(config: Mapping[str, Any], max_context: int, found: ThetaAndScaling) -> None:
    """Raises InvalidInputError if layers with a window turn otherwise than `found`, in a family that has one way."""
    table = config.get("rope_parameters")
    own = table.get("sliding_attention") if isinstance(table, Mapping) else None
    if isinstance(own, Mapping) and _rope_of_table("rope_parameters", own, config, max_context) != found:
        raise unsupported("rope_parameters of sliding_attention that differ from full_attention", "one RoPE here")


def rope_scaling_to_hf(scaling: AnyScaling) -> dict[str, Any]:
    """The `rope_scaling` that `rope_of_hf` and transformers read back."""
    if isinstance(scaling, YarnScaling):
        return {"rope_type": "yarn", ORIGINAL_CONTEXT: scaling.original_max_context} | {
            key: getattr(scaling, key) for key in ("factor", "attention_factor", "beta_fast", "beta_slow", "truncate")
        }
    if isinstance(scaling, LongRopeScaling):
        return {
            "rope_type": "longrope",
            "short_factor": list(scaling.short),
            "long_factor": list(scaling.long),
            "attention_factor": scaling.attention_factor,
            ORIGINAL_CONTEXT: scaling.original_max_context,
        }
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
    get: Callable[..., Any],
    tensors: Mapping[str, Any],
    architecture: str,
    width: int,
    max_context: int,
    default_theta: float = _DEFAULT_THETA,
) -> ThetaAndScaling:
    """Theta and scaling of a GGUF file, as llama.cpp reads them.

    A factor without a kind is linear, and `rope.scale_linear` is the older name of `rope.scaling.factor`.

    Args:
      get: (key without the architecture, default) -> value.
      tensors: of the file, by name.
      architecture: of the file, for messages.
      width: features of a head that turn.
      max_context: of the model.
      default_theta: where nothing is said.

    Raises:
      InvalidInputError: a kind that is not understood, or values that contradict each other.
    """
    theta = positive(get("rope.freq_base", default_theta), f"{architecture}.rope.freq_base")
    kind = get("rope.scaling.type", "linear")
    if kind == "longrope" and "rope_factors_long.weight" in tensors:
        kind = "none"
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
    if "rope_factors_long.weight" in tensors:
        if linear is not None:
            raise unsupported("LongRoPE beside linear scaling in the GGUF file", "one of the two")
        return theta, _longrope_of_gguf(get, tensors, max_context)
    if "rope_freqs.weight" not in tensors:
        return theta, linear
    wanted = np.asarray(tensors["rope_freqs.weight"].data, np.float64).reshape(-1)
    if wanted.shape == (width // 2,) and np.allclose(wanted, 1.0):
        return theta, linear
    llama3 = RopeScaling(float(wanted.max(initial=1.0)), _LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT)
    alike = wanted.shape == (width // 2,) and np.allclose(wanted, llama3.divisors(width, theta), rtol=1e-4)
    if linear is None and alike:
        return theta, llama3
    raise unsupported("this rope_freqs.weight in the GGUF file", "the Llama 3 factors (low 1, high 4, context 8192)")


def _longrope_of_gguf(get: Callable[..., Any], tensors: Mapping[str, Any], max_context: int) -> LongRopeScaling:
    sets = []
    for name in ("rope_factors_short.weight", "rope_factors_long.weight"):
        if name not in tensors:
            raise InvalidInputError(f"GGUF file has no tensor '{name}'; convert the model again")
        sets.append(tuple(float(f"{one:.7g}") for one in np.asarray(tensors[name].data, np.float64).reshape(-1)))
    original = int(positive(get("rope.scaling.original_context_length"), "rope.scaling.original_context_length"))
    attention = positive(get("rope.scaling.attn_factor", 1.0), "rope.scaling.attn_factor")
    return LongRopeScaling(sets[0], sets[1], original, float(f"{attention:.7g}"), max_context)


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


def _rope_of_table(key: str, table: Mapping[str, Any], config: Mapping[str, Any], max_context: int) -> ThetaAndScaling:
    kind = table.get("rope_type", table.get("type", "default"))
    kind = _OLD_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in _KEYS:
        raise unsupported(f"{key} of type '{kind}'", ", ".join(_KEYS))
    if "type" in table and _OLD_NAMES.get(table["type"], table["type"]) != kind:
        raise InvalidInputError(f"{key} in config.json has type='{table['type']}' and rope_type='{kind}'")
    _refuse_unused(key, kind, table)
    theta = positive(table.get("rope_theta", config.get("rope_theta", _DEFAULT_THETA)), "rope_theta of config.json")
    if kind == "default":
        return theta, None
    table = _with_context(key, kind, table, config, max_context)
    if kind == "longrope":
        return theta, _longrope(key, table, max_context)
    numbers = _numbers(key, kind, table)
    match kind:
        case "linear":
            return theta, RopeScaling.linear(numbers["factor"], max_context)
        case "dynamic":
            return theta, None  # it begins behind `max_position_embeddings`, where requests are refused
        case "yarn":
            return theta, _yarn(key, numbers, table)
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    if low >= high:
        raise InvalidInputError(f"{key} in config.json has low_freq_factor={low:g}, not less than high_freq_factor")
    return theta, RopeScaling(numbers["factor"], low, high, int(numbers[ORIGINAL_CONTEXT]))


def _yarn(key: str, numbers: Mapping[str, float], table: Mapping[str, Any]) -> YarnScaling:
    def optional(name: str) -> float | None:
        return positive(table[name], f"{name} of {key} in config.json") if table.get(name) else None

    def magnitude(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(numbers["factor"]) + 1.0 if numbers["factor"] > 1 else 1.0

    attention, scale, scale_all = (optional(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if attention is None:
        attention = magnitude(scale) / magnitude(scale_all) if scale and scale_all else magnitude()
    truncate = table.get("truncate", True)
    if not isinstance(truncate, bool):
        raise InvalidInputError(f"{key} in config.json has truncate={shown(truncate)}; give true or false")
    fast, slow = optional("beta_fast") or 32.0, optional("beta_slow") or 1.0
    return YarnScaling(numbers["factor"], int(numbers[ORIGINAL_CONTEXT]), attention, fast, slow, truncate)


def _longrope(key: str, table: Mapping[str, Any], max_context: int) -> LongRopeScaling:
    sets = []
    for name in ("short_factor", "long_factor"):
        values = table.get(name)
        if not isinstance(values, list):
            raise InvalidInputError(f"{key} of type 'longrope' has {name}={shown(values)}; give a list of numbers")
        sets.append(tuple(positive(value, f"{name} of {key} in config.json") for value in values))
    original = int(positive(table[ORIGINAL_CONTEXT], f"{ORIGINAL_CONTEXT} of {key} in config.json"))
    factor = table.get("factor")
    factor = max_context / original if factor is None else positive(factor, f"factor of {key} in config.json")
    attention = table.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    attention = positive(attention, f"attention_factor of {key} in config.json")
    return LongRopeScaling(sets[0], sets[1], original, attention, max_context)


def _refuse_partial(config: Mapping[str, Any]) -> None:
    """Refuses RoPE over a part of the head."""
    tables = [table for key in ("rope_parameters", "rope_scaling") if isinstance(table := config.get(key), Mapping)]
    by_type = [inner for table in tables for inner in table.values() if isinstance(inner, Mapping)]
    for holder in (config, *tables, *by_type):
        factor = holder.get("partial_rotary_factor")
        if factor not in (None, 1):
            raise unsupported(f"partial_rotary_factor={shown(factor)}", "RoPE over the whole head")


def _refuse_unused(key: str, kind: str, table: Mapping[str, Any]) -> None:
    """Refuses settings that this kind does not use, unless they ask for nothing."""
    understood = {"type", "rope_type", "rope_theta", "partial_rotary_factor", ORIGINAL_CONTEXT}
    understood.update(_KEYS[kind], _OPTIONAL.get(kind, ()))
    for name, value in table.items():
        nothing = says_nothing(value) or (name in ("factor", "attention_factor") and value == 1)
        if name not in understood and not nothing:
            raise InvalidInputError(
                f"{key} in config.json has {name}={shown(value)}, which type '{kind}' does not use; "
                "say the type that is meant, or remove the key"
            )


def _with_context(
    key: str, kind: str, table: Mapping[str, Any], config: Mapping[str, Any], max_context: int
) -> dict[str, Any]:
    """The settings of a table with the original context, which may be beside it, or be that of the model."""
    values = {name: value for name, value in table.items() if value is not None}
    if ORIGINAL_CONTEXT in _KEYS[kind]:
        beside = config.get(ORIGINAL_CONTEXT)
        if beside is not None and values.setdefault(ORIGINAL_CONTEXT, beside) != beside:
            raise InvalidInputError(
                f"config.json has {ORIGINAL_CONTEXT}={shown(beside)}, and {shown(values[ORIGINAL_CONTEXT])} in {key}; "
                "remove the one that is wrong"
            )
        values.setdefault(ORIGINAL_CONTEXT, max_context)
    return values


def _numbers(key: str, kind: str, table: Mapping[str, Any]) -> dict[str, float]:
    for name in _KEYS[kind]:
        if name not in table:
            raise InvalidInputError(f"{key} of type '{kind}' lacks '{name}' in config.json")
    return {name: positive(table[name], f"{name} of {key} in config.json") for name in _KEYS[kind]}
