"""Which parameters of a model are kept in few bits, and in which format."""

import collections
import math
from collections.abc import Iterable, Mapping

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.blocks import INT4, INT8, QuantFormat, common
from nitsum_jax.models.checkpoint.source import TensorSource, block_format
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.pack import PlannedParam, plan

QUANTIZATIONS = ("none", "auto", "int8", "int4")
_REFUSED = ("fp8", "float8")
# Groups of fewer inputs would cost more bits for their scales than they save.
_LEAST_GROUP = 16
# Sums of products of bytes are i32.
_MOST_INPUTS = 1 << 17


def check_quantization(name: str) -> None:
    """Raises InvalidInputError if this is none of `QUANTIZATIONS`."""
    if name in _REFUSED:
        raise InvalidInputError(
            f"quantization={name} is not possible: no step multiplies float8 weights; use int8, as many bits"
        )
    if name not in QUANTIZATIONS:
        raise InvalidInputError(f"quantization={name} is not known: give one of {', '.join(QUANTIZATIONS)}")


def choose_formats(
    quantization: str, config: ModelConfig, cut: ModelCut, source: TensorSource
) -> dict[str, QuantFormat]:
    """Formats of the parameters that are kept in few bits, by name.

    Args:
      quantization: "none"; "auto": what the checkpoint has in few bits stays in them; "int8": every matrix by output
        channels; "int4": the matrices of the layers in groups of 32 inputs (or as the checkpoint has them in 4 bits),
        embedding and head as with "int8".
      config: the model.
      cut: how it is cut.
      source: the checkpoint.

    Raises:
      InvalidInputError: groups do not fit the vshards.
    """
    check_quantization(quantization)
    if quantization == "none":
        return {}
    params: dict[str, list[PlannedParam]] = {}
    for param in plan(config, cut):
        if len(param.shape) > 1:
            params.setdefault(param.name, []).append(param)
    found = {}
    for name, members in params.items():
        fmt = _format(quantization, name, _kept(members, source))
        if fmt is not None:
            found[name] = _fitting(fmt, name, members)
    return found


def described(formats: Mapping[str, QuantFormat]) -> str:
    """How many parameters are kept in which formats, for people."""
    counts = collections.Counter(map(str, formats.values()))
    return ", ".join(f"{count} as {fmt}" for fmt, count in counts.items())


def _kept(members: Iterable[PlannedParam], source: TensorSource) -> QuantFormat | None:
    """The format in which a parameter can stay as the checkpoint has it; None: it has it in many bits."""
    formats = [block_format(source, piece.tensor) for param in members for piece in param.pieces]
    known = [fmt for fmt in formats if fmt is not None]
    return common(known) if len(known) == len(formats) else None


def _format(quantization: str, name: str, kept: QuantFormat | None) -> QuantFormat | None:
    match quantization:
        case "auto":
            return kept
        case "int8":
            return INT8
    if not name.startswith("layers."):
        return INT8
    return kept if kept is not None and kept.bits == 4 else INT4


def _fitting(fmt: QuantFormat, name: str, members: list[PlannedParam]) -> QuantFormat:
    """The format with groups so small that none lies in two vshards: they get the same scale, so nothing changes."""
    transposed = any(param.row_parallel for param in members)
    inputs = members[0].shape[0 if transposed else 1]
    if inputs > _MOST_INPUTS:
        raise InvalidInputError(
            f"{name} has {inputs} inputs in a vshard, and quantised weights {_MOST_INPUTS} at most: use more --vshards "
            "or --quantization=none"
        )
    if fmt.group == 0:
        return fmt
    ends = [inputs]
    if transposed:
        ends += [end for param in members for piece in param.pieces for end in (piece.start, piece.stop, piece.row)]
    group = math.gcd(fmt.group, *ends)
    if group < min(fmt.group, _LEAST_GROUP):
        raise InvalidInputError(
            f"groups of {fmt.group} inputs do not fit {name}, of which a vshard has {inputs}: use fewer --vshards, "
            "--quantization=int8 or --quantization=none"
        )
    return QuantFormat(fmt.bits, group, fmt.minimum, fmt.scale)
