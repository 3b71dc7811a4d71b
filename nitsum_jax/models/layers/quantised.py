"""Weights in 8 and 4 bits, as a step holds and multiplies them.

A weight is kept as its product reads it, outputs first whatever the axis it is cut along: `y[o] = sum x[i] w[o, i]`.
Its scales lie beside it, cut like it, so a virtual shard multiplies with nothing of another.
"""

import dataclasses
import enum
import functools
from collections.abc import Mapping
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nitsum_jax.meshes.mesh import TP_AXIS
from nitsum_jax.models.checkpoint.blocks import OFFSET, QuantFormat
from nitsum_jax.models.layers.fixed_sums import computed_once, largest

# Numbers of 16 bits with a sign, as two of 8 bits: one more, and the upper one would not fit.
_LARGEST = 32512
_BYTE = 256
_EXPONENT_MASK = 0x7F800000
_SIGNIFICAND_MASK = -0x7F800001  # as an i32: with the sign
_ONE = 0x3F800000


class QuantisedForm(enum.StrEnum):
    """How quantised weights are multiplied.

    INTEGER: in whole numbers.  Rows become numbers of 16 bits, groups numbers of 8 bits of their channel, and sums of
      products are exact, in whatever order.  A CPU multiplies bytes faster than anything else.
    WIDENED: the weights are widened to the type of the model, and what they are multiplied with rounded to it.
    """

    INTEGER = "integer"
    WIDENED = "widened"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantisedWeight:
    """One weight `[O, I]`; see `QuantFormat` for what its numbers mean.

    Attributes:
      values: i8[O, I], or u8[O, I/2] with two numbers of 4 bits each: byte j of a group has number j in its lower half
        and number j + group/2 in its upper one.
      scales: [O, I/group].
      minimums: [O, I/group], or None.
      peaks: f32[O, 1], the largest |weight| of a channel, of formats with groups.
      format: which it is.
    """

    values: jax.Array
    scales: jax.Array
    minimums: jax.Array | None
    peaks: jax.Array | None
    format: QuantFormat = dataclasses.field(metadata={"static": True})

    @property
    def inputs(self) -> int:
        """I."""
        return self.values.shape[1] * (2 if self.format.bits == 4 else 1)

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.format.group or self.inputs

    def rows(self, index: jax.Array) -> jax.Array:
        """`i32[...] -> f32[..., I]`: some outputs' weights; every index is in bounds."""
        some: QuantisedWeight = jax.tree.map(
            lambda array: array.at[index.reshape(-1)].get(mode="promise_in_bounds"), self
        )
        return some.widened().reshape(*index.shape, self.inputs)

    def widened(self) -> jax.Array:
        """f32[O, I].

        The product is exact (at most 24 bits), so it does not matter whether it is rounded before a minimum is added.
        """
        outputs = len(self.values)
        scales = self.scales.astype(jnp.float32)[:, :, None]
        minimums = None if self.minimums is None else self.minimums.astype(jnp.float32)[:, :, None]
        parts = []
        for part in self._numbers():
            if self.format.bits == 4 and minimums is None:
                part = part - OFFSET
            part = part.astype(jnp.float32) * scales
            parts.append(part if minimums is None else part + minimums)
        return jnp.concatenate(parts, axis=2).reshape(outputs, self.inputs)

    def _numbers(self) -> list[jax.Array]:
        """i16[O, I/group, n] whose numbers side by side are those of the groups."""
        outputs, group = len(self.values), self.group
        if self.format.bits == 8:
            return [self.values.reshape(outputs, -1, group).astype(jnp.int16)]
        packed = self.values.reshape(outputs, -1, group // 2)
        lower, upper = packed & jnp.uint8(15), packed >> jnp.uint8(4)
        return [lower.astype(jnp.int16), upper.astype(jnp.int16)]

    def bytes_of_channel(self) -> tuple[list[jax.Array], jax.Array]:
        """The weights as bytes of one scale per channel: parts i8[O, I/n], side by side in groups, and f32[O]."""
        if self.peaks is None:
            return [self.values], self.scales.astype(jnp.float32)[:, 0]
        unit = self.peaks * jnp.float32(1 / _LARGEST)
        inverse = jnp.float32(_LARGEST) / self.peaks
        step = _wrapped(self.scales.astype(jnp.float32) * inverse)
        if self.minimums is not None:
            start = _wrapped(self.minimums.astype(jnp.float32) * inverse)
        else:
            start = step * jnp.int16(-OFFSET if self.format.bits == 4 else 0)
        # What is added up may lie beyond 16 bits, a minimum too; the sum lies within, and so it comes out right.
        half = jnp.int16(_BYTE // 2)
        parts = [
            jax.lax.shift_right_arithmetic(part * step[:, :, None] + (start + half)[:, :, None], jnp.int16(8))
            .astype(jnp.int8)
            .reshape(len(self.values), -1)
            for part in self._numbers()
        ]
        return parts, unit[:, 0] * jnp.float32(_BYTE)


@functools.partial(jax.jit, static_argnames=("form", "dtype", "least_rows"))  # traced once for all layers
def quantised_product(
    x: jax.Array, weight: QuantisedWeight, form: QuantisedForm, dtype: str, least_rows: int = 1
) -> jax.Array:
    """`f32[R, I] -> f32[R, O]`.

    Args:
      x: rows.
      weight: `[O, I]`.
      form: how it is multiplied.
      dtype: to which the form WIDENED widens.
      least_rows: as in `MatmulChoice`, for the form WIDENED.
    """
    if form is QuantisedForm.INTEGER:
        return _integer_product(x, weight)
    missing = max(0, least_rows - x.shape[0])
    rows = jnp.pad(x, ((0, missing), (0, 0))).astype(dtype)
    by_channel = weight.peaks is None
    wide = (weight.values.astype(jnp.float32) if by_channel else weight.widened()).astype(dtype)
    y = jax.lax.dot_general(
        rows,
        wide,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if wide.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )[: x.shape[0]]
    return _scaled(y, weight.scales[:, 0].astype(jnp.float32)[None, :]) if by_channel else y


def _integer_product(x: jax.Array, weight: QuantisedWeight) -> jax.Array:
    count, inputs = x.shape
    size = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(0x7FFFFFFF)
    # As integers the largest is the largest in whatever order, and a NaN is the largest of all.
    peak = jax.lax.bitcast_convert_type(largest(size), jnp.float32)[:, None]
    peak = jnp.maximum(peak, jnp.float32(1e-30))
    unit = jnp.where(peak < jnp.inf, peak * jnp.float32(1 / _LARGEST), jnp.float32(jnp.nan))
    whole = jnp.round(x * (jnp.float32(_LARGEST) / peak)).astype(jnp.int32)
    upper = (whole + _BYTE // 2) >> 8
    planes = jnp.concatenate([upper, whole - (upper << 8)]).astype(jnp.int8)
    parts, scales = weight.bytes_of_channel()
    # The two parts of a group, where it has two, lie in two arrays.
    if len(parts) > 1:
        halves = planes.reshape(2 * count, inputs // weight.group, 2, weight.group // 2)
        taken = [halves[:, :, part].reshape(2 * count, -1) for part in range(2)]
    else:
        taken = [planes]
    y = _whole_dot(taken[0], parts[0])
    for rows, part in zip(taken[1:], parts[1:], strict=True):
        y = y + _whole_dot(rows, part)
    # A product with a power of two is exact, and so is what it becomes when it is added.
    y = y[:count].astype(jnp.float32) * jnp.float32(_BYTE) + y[count:].astype(jnp.float32)
    return _scaled(y * scales[None, :], unit)


def _wrapped(x: jax.Array) -> jax.Array:
    """The nearest whole numbers, of which the lower 16 bits are kept; once for each and not in every use of it."""
    return computed_once(jnp.round(x)).astype(jnp.int32).astype(jnp.int16)


def _whole_dot(rows: jax.Array, weight: jax.Array) -> jax.Array:
    return jax.lax.dot_general(rows, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def _scaled(y: jax.Array, scale: jax.Array) -> jax.Array:
    """`y * scale`, rounded as it is, whatever is done with it.

    A compiler may multiply and add in one go, without rounding the product, where it finds both in one loop; what that
    is depends on the layout.  So the last product is with a power of two, which needs no rounding.
    """
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    power = jax.lax.bitcast_convert_type(bits & jnp.int32(_EXPONENT_MASK), jnp.float32)
    significand = jax.lax.bitcast_convert_type((bits & jnp.int32(_SIGNIFICAND_MASK)) | jnp.int32(_ONE), jnp.float32)
    # That of a broken row is NaN and stays it.
    return (y * jnp.where(scale == scale, significand, scale)) * power


class QuantisedParam(nnx.Module):
    """One slot of a quantised parameter; `param[...]` is its `QuantisedWeight`."""

    def __init__(self, outputs: int, inputs: int, fmt: QuantFormat):
        self.format = fmt
        leaves = fmt.leaves(outputs, inputs)

        def new(name: str) -> nnx.Param:
            return nnx.Param(jnp.zeros(*leaves[name]), out_sharding=(TP_AXIS, None), eager_sharding=False)

        self.values, self.scales = new("values"), new("scales")
        if fmt.minimum:
            self.minimums = new("minimums")
        if fmt.group:
            self.peaks = new("peaks")

    def __getitem__(self, everything: EllipsisType) -> QuantisedWeight:
        """The weight, as `nnx.Param` gives its array."""
        minimums = self.minimums[everything] if self.format.minimum else None
        peaks = self.peaks[everything] if self.format.group else None
        return QuantisedWeight(self.values[everything], self.scales[everything], minimums, peaks, self.format)


def quantise_modules(model: nnx.Module, formats: Mapping[str, QuantFormat], row_parallel: "frozenset[str]") -> None:
    """Puts quantised parameters in the place of the plain ones that the formats name, such as `layers.0.mlp.down`.

    Args:
      model: made with plain parameters.
      formats: of the parameters that are quantised.
      row_parallel: names whose plain parameters have the inputs first.
    """
    for name, fmt in formats.items():
        slots: Any = model
        for part in name.split("."):
            slots = slots[int(part)] if part.isdecimal() else getattr(slots, part)
        for index, plain in enumerate(slots):
            outputs, inputs = plain.shape[::-1] if name in row_parallel else plain.shape
            slots[index] = QuantisedParam(outputs, inputs, fmt)
