"""Matrices in few bits, on the host: whole numbers with a scale per output channel or per group of inputs.

`value = number * scale + minimum`, or without minimum `(number - 8) * scale` for 4 bits and `number * scale` for 8.
Formats of checkpoints are brought to this one form without rounding anything (`gguf_blocks`, `hf_blocks`), and what is
not quantised yet is quantised to it here.
"""

import dataclasses

import numpy as np

from nitsum_jax.errors import InvalidInputError

# Subtracted from a number of 4 bits that has no minimum.
OFFSET = 8


@dataclasses.dataclass(frozen=True, slots=True)
class QuantFormat:
    """How one parameter is kept.

    Attributes:
      bits: of a number, 4 or 8.
      group: neighbouring inputs that share a scale; 0: all of a vshard's.
      minimum: whether groups have a minimum beside their scale.
      scale: type of scales and minimums, "float16" or "float32".
    """

    bits: int
    group: int = 0
    minimum: bool = False
    scale: str = "float32"

    def leaves(self, outputs: int, inputs: int) -> dict[str, tuple[tuple[int, int], np.dtype]]:
        """Shapes and types of the arrays that `[outputs, inputs]` are kept as, by name; see `QuantisedWeight`.

        Raises:
          InvalidInputError: the inputs are not made of whole groups.
        """
        group = self.group or inputs
        if inputs % group:
            raise InvalidInputError(f"{inputs} inputs are not made of groups of {group}")
        scales = (outputs, inputs // group), np.dtype(self.scale)
        found: dict[str, tuple[tuple[int, int], np.dtype]] = {}
        if self.bits == 4:
            found["values"] = (outputs, inputs // 2), np.dtype(np.uint8)
        else:
            found["values"] = (outputs, inputs), np.dtype(np.int8)
        found["scales"] = scales
        if self.minimum:
            found["minimums"] = scales
        if self.group:
            found["peaks"] = (outputs, 1), np.dtype(np.float32)
        return found

    def __str__(self) -> str:
        per = f"groups of {self.group}" if self.group else "output channels"
        return f"int{self.bits} by {per}{' with minimums' if self.minimum else ''}"


INT8 = QuantFormat(8)
INT4 = QuantFormat(4, 32, True, "float16")


@dataclasses.dataclass(frozen=True, slots=True)
class QuantisedBlocks:
    """A matrix `[O, I]` in groups of inputs, in numbers of at most 8 bits.

    Attributes:
      numbers: int8 or uint8 [O, I], not packed.
      scales: f32 [O, I/group].
      minimums: f32 [O, I/group], or None.
    """

    numbers: np.ndarray
    scales: np.ndarray
    minimums: np.ndarray | None = None

    def take(self, rows: "slice | np.ndarray", columns: slice = slice(None)) -> "QuantisedBlocks":
        """Some outputs, and inputs from a slice that begins and ends with a group.

        Raises:
          InvalidInputError: the slice cuts a group.
        """
        group = self.numbers.shape[1] // self.scales.shape[1]
        if self.scales.shape[1] == 1:
            minimums = None if self.minimums is None else self.minimums[rows]
            return QuantisedBlocks(self.numbers[rows, columns], self.scales[rows], minimums)
        start, stop, _ = columns.indices(self.numbers.shape[1])
        if start % group or stop % group:
            raise InvalidInputError(f"inputs {start} to {stop} cut a group of {group}")
        groups = slice(start // group, stop // group)
        minimums = None if self.minimums is None else self.minimums[rows, groups]
        return QuantisedBlocks(self.numbers[rows, start:stop], self.scales[rows, groups], minimums)

    def values(self, *, centred: bool) -> np.ndarray:
        """f32 [O, I]; `centred`: numbers without minimum are of 4 bits, 8 being zero."""
        group = self.numbers.shape[1] // self.scales.shape[1]
        numbers = self.numbers.astype(np.float32)
        if self.minimums is None and centred:
            numbers -= OFFSET
        found: np.ndarray = numbers * self.scales.repeat(group, axis=1)
        if self.minimums is not None:
            found += self.minimums.repeat(group, axis=1)
        return found


def common(formats: "list[QuantFormat]") -> QuantFormat:
    """The least format that holds matrices of all these formats without rounding them, side by side."""
    bits = max(f.bits for f in formats)
    minimum = any(f.minimum for f in formats) or len({f.bits for f in formats}) > 1
    group = int(np.gcd.reduce([f.group for f in formats]))
    scale = "float32" if any(f.scale == "float32" for f in formats) else "float16"
    return QuantFormat(bits, group, minimum, scale)


def holds(fmt: QuantFormat, other: QuantFormat) -> bool:
    """Whether a format holds what is in another one without rounding it."""
    group = other.group == 0 or (fmt.group > 0 and other.group % fmt.group == 0)
    minimum = fmt.minimum or not (other.minimum or (other.bits == 4 and fmt.bits == 8))
    return other.bits <= fmt.bits and group and minimum and (fmt.scale == "float32" or other.scale == "float16")


def fitted(blocks: QuantisedBlocks, of: QuantFormat, to: QuantFormat) -> QuantisedBlocks:
    """Blocks of one format in a wider one that `common` found."""
    group = to.group or blocks.numbers.shape[1]
    times = blocks.numbers.shape[1] // blocks.scales.shape[1] // group
    minimums = blocks.minimums
    if minimums is None and to.minimum:
        minimums = blocks.scales * np.float32(-OFFSET if of.bits == 4 else 0)
    if times > 1:
        minimums = None if minimums is None else minimums.repeat(times, axis=1)
        return QuantisedBlocks(blocks.numbers, blocks.scales.repeat(times, axis=1), minimums)
    return QuantisedBlocks(blocks.numbers, blocks.scales, minimums)


def quantised(values: np.ndarray, to: QuantFormat) -> QuantisedBlocks:
    """The nearest numbers to f32 `[O, I]`: 8 bits around zero, 4 bits between least and greatest of a group."""
    outputs, inputs = values.shape
    group = to.group or inputs
    grouped = values.astype(np.float32).reshape(outputs, inputs // group, group)
    if to.bits == 8:
        scales = (np.abs(grouped).max(axis=2) / np.float32(127)).astype(to.scale).astype(np.float32)
        numbers = np.rint(grouped / np.where(scales > 0, scales, 1)[:, :, None])
        return QuantisedBlocks(np.clip(numbers, -127, 127).astype(np.int8).reshape(outputs, inputs), scales)
    low, high = grouped.min(axis=2), grouped.max(axis=2)
    # Rounded first: numbers are to be the nearest ones for the scale and minimum that are kept.
    low = low.astype(to.scale).astype(np.float32)
    scales = ((high - low) / np.float32(15)).astype(to.scale).astype(np.float32)
    numbers = np.rint((grouped - low[:, :, None]) / np.where(scales > 0, scales, 1)[:, :, None])
    return QuantisedBlocks(np.clip(numbers, 0, 15).astype(np.uint8).reshape(outputs, inputs), scales, low)


def leaves_of(blocks: QuantisedBlocks, fmt: QuantFormat) -> dict[str, np.ndarray]:
    """The arrays of `QuantFormat.leaves`."""
    inputs = blocks.numbers.shape[1]
    group = fmt.group or inputs
    found = {}
    if fmt.bits == 4:
        halves = blocks.numbers.reshape(-1, inputs // group, 2, group // 2)
        found["values"] = (halves[:, :, 0] | halves[:, :, 1] << 4).astype(np.uint8).reshape(-1, inputs // 2)
    else:
        found["values"] = blocks.numbers.astype(np.int8)
    found["scales"] = blocks.scales.astype(fmt.scale)
    if fmt.minimum:
        assert blocks.minimums is not None, "a format with minimums has them"
        found["minimums"] = blocks.minimums.astype(fmt.scale)
    if fmt.group:
        peaks = np.abs(blocks.values(centred=fmt.bits == 4)).max(axis=1, keepdims=True)
        found["peaks"] = np.where(peaks > 0, peaks, 1).astype(np.float32)
    return found


def blocks_of(leaves: "dict[str, np.ndarray]", fmt: QuantFormat) -> QuantisedBlocks:
    """The inverse of `leaves_of`."""
    values = np.asarray(leaves["values"])
    if fmt.bits == 4:
        halves = values.reshape(len(values), -1, (fmt.group or 2 * values.shape[1]) // 2)
        values = np.stack([halves & 15, halves >> 4], axis=2).reshape(len(values), -1)
    minimums = np.asarray(leaves["minimums"]).astype(np.float32) if fmt.minimum else None
    return QuantisedBlocks(values, np.asarray(leaves["scales"]).astype(np.float32), minimums)
