"""Optimised HLO text as a structure: computations, their instructions, and what these take and give."""

import dataclasses
import functools
import math
import re

_SIZES = {"pred": 1, "token": 0, "opaque": 0}
_BUFFER = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_NAMES = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array.

    Attributes:
      kind: type of its elements, as HLO names it.
      dims: its shape.
      space: number of the memory that it lies in; 0 is the main memory.
    """

    kind: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Without the padding of its layout."""
        if self.kind in _SIZES:
            return math.prod(self.dims) * _SIZES[self.kind]
        bits = re.search(r"\d+", self.kind)
        return math.prod(self.dims) * max(1, int(bits[0]) // 8) if bits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    Attributes:
      name: its own.
      opcode: what it does.
      buffers: what it gives; several if it is a tuple.
      operands: names of what it takes.
      attributes: the rest of the line.
      root: whether it is the computation's result.
    """

    name: str
    opcode: str
    buffers: tuple[Buffer, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def cycles(self) -> int:
        """That XLA:TPU expects it to take; 0 where it says nothing."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0

    @property
    def trips(self) -> int | None:
        """Of a loop, if the compiler knows how often it runs."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.attributes)
        return int(found[1]) if found else None

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def parameter(self) -> int:
        """Which parameter of its computation it is."""
        return int(self.attributes.split(")")[0])

    def called(self, attribute: str) -> tuple[str, ...]:
        """Names of computations that an attribute such as `calls` or `body` has."""
        found = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|%([\w.\-]+))", self.attributes)
        if not found:
            return ()
        return (found[2],) if found[2] else tuple(_NAMES.findall(found[1]))


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order of execution."""

    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Its instructions."""
        return {one.name: one for one in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """By name, those that take it."""
        found: dict[str, list[Instruction]] = {}
        for one in self.instructions:
            for name in dict.fromkeys(one.operands):
                found.setdefault(name, []).append(one)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        return {one.parameter: one for one in self.instructions if one.opcode == "parameter"}

    @property
    def result(self) -> Instruction:
        """Its root."""
        return next(one for one in self.instructions if one.root)


@dataclasses.dataclass(frozen=True)
class HloModule:
    """A program of one device."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> HloModule:
    """Reads what `jax.stages.Compiled.as_text` gives."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if (head := _COMPUTATION.match(line)) is not None:
                current = found.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif (head := _INSTRUCTION.match(line)) is not None:
            current.append(_instruction(head[2], head[1] is not None, line[head.end() :]))
    return HloModule({name: Computation(tuple(lines)) for name, lines in found.items()}, entry)


def _instruction(name: str, root: bool, rest: str) -> Instruction:
    shape, rest = _split(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, _, rest = rest.strip().partition("(")
    operands, attributes = _split("(" + rest)
    if opcode in ("parameter", "constant"):  # what stands in the parentheses is no name
        operands, attributes = "", operands[1:] + attributes
    return Instruction(name, opcode, _buffers(shape), tuple(_NAMES.findall(operands)), attributes, root)


def _split(text: str) -> tuple[str, str]:
    """What stands in the parentheses that `text` begins with, and the rest."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: index + 1], text[index + 1 :]
    return text, ""


def _buffers(shape: str) -> tuple[Buffer, ...]:
    found = []
    for kind, dims, layout in _BUFFER.findall(shape):
        space = _SPACE.search(layout)
        found.append(Buffer(kind, tuple(int(n) for n in dims.split(",") if n), int(space[1]) if space else 0))
    return tuple(found)
