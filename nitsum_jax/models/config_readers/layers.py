"""Which layers of a config.json see a window only, and how wide it is."""

from collections.abc import Mapping, Sequence
from typing import Any

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.config_readers.values import shown, unsupported, whole

_FULL, _SLIDING = "full_attention", "sliding_attention"


def layer_types(config: Mapping[str, Any]) -> list[bool] | None:
    """Whether each layer sees a window only, as `layer_types` says; None if it says nothing.

    Raises:
      InvalidInputError: there are layers of other kinds, or too few or too many.
    """
    found, count = config.get("layer_types") or [], whole(config, "num_hidden_layers")
    if not isinstance(found, list) or not all(isinstance(kind, str) for kind in found):
        raise InvalidInputError(f"config.json has layer_types={shown(found)}; give a list of names")
    kinds = [_FULL if kind == "attention" else kind for kind in found]
    if other := sorted(set(kinds) - {_SLIDING, _FULL}):
        raise unsupported(f"layer types {other}", f"{_FULL}, {_SLIDING}")
    if kinds and len(kinds) != count:
        raise InvalidInputError(f"config.json has {len(kinds)} layer_types but num_hidden_layers={count}")
    return [kind == _SLIDING for kind in kinds] or None


def window_fields(config: Mapping[str, Any], windowed: Sequence[bool], *, keep: bool = False) -> dict[str, Any]:
    """The fields of `ModelConfig` for a model whose layers see `sliding_window` tokens, where `windowed` says so.

    Args:
      config: a config.json with its defaults.
      windowed: one for each layer.
      keep: also of a window that is never shorter than the context: its layers differ in something else as well.

    Raises:
      InvalidInputError: some layers have a window, and it has no width.
    """
    if not any(windowed):
        return {}
    window = whole(config, "sliding_window")
    if window < 1:
        raise InvalidInputError(f"config.json has sliding_window={window}; give a positive number")
    if window >= whole(config, "max_position_embeddings") and not keep:
        return {}
    return {"window": window, "windowed": tuple(windowed)}


def window_everywhere(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a model with a window in every layer, unless `sliding_window` is null.

    Raises:
      InvalidInputError: `layer_types` says otherwise.
    """
    windowed, said = config["sliding_window"] is not None, layer_types(config)
    if said is not None and any(one != windowed for one in said):
        raise unsupported(
            f"layer_types of {config['model_type']} with sliding_window={shown(config['sliding_window'])}",
            "a window in every layer or in none",
        )
    return window_fields(config, [windowed] * whole(config, "num_hidden_layers"))


def full_attention(config: Mapping[str, Any]) -> dict[str, Any]:
    """No fields, for a model whose layers see all of the context.

    Raises:
      InvalidInputError: the config says otherwise.
    """
    window, said = config["sliding_window"], layer_types(config)
    if any(said or ()) or window is not None:
        wide = window is not None and whole(config, "sliding_window") >= whole(config, "max_position_embeddings")
        if not wide:
            raise unsupported(
                f"sliding window attention in a model of type {config['model_type']} (sliding_window={shown(window)})",
                "full attention there",
            )
    return {}


def written_window(window: int | None, windowed: Sequence[bool], num_layers: int) -> dict[str, Any]:
    """`sliding_window` and `layer_types` that are read back."""
    kinds = [_SLIDING if one else _FULL for one in windowed[:num_layers]] or [_FULL] * num_layers
    return {"sliding_window": window, "layer_types": kinds}
