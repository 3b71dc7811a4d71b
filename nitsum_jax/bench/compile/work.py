"""What a compiled step does: bytes of memory, cycles, launches, collectives, and large arrays that it writes.

XLA's own `cost_analysis` counts the body of a loop once, and the scratch memory of a TPU as if it were main memory; for
a GPU it says nothing.  So it is counted here, from the optimised HLO, instruction by instruction:

- An instruction reads its operands and writes its results, where these lie in main memory.  A gather or a slice reads
  what it gives; an update in place writes what is new.  A fusion is taken apart for that.
- A loop counts as often as it runs: as the compiler knows, or else as often as attention goes over old tokens.
- Of the branches of a conditional the one with the least traffic counts, messages among it: all rows are greedy, none
  asks for log probabilities.
- Launches of a GPU are its fusions, custom calls, copies and collectives.
- A kernel of Pallas reads of the pool what it is said to read; XLA cannot know.
- Time: straight code, the body of a loop and a kernel each take as long as their bytes, or on a TPU as long as the
  cycles that the compiler expects, whichever is more.  Messages between devices, and launches, take none.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Sequence

from nitsum_jax.bench.compile.hlo import Buffer, Computation, HloModule, Instruction
from nitsum_jax.bench.compile.targets import Chip

_NOTHING = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "constant",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "while",
    "conditional",
    "call",
    "copy-done",
    "slice-done",
    "async-done",
    "async-update",
    "all-gather-done",
    "all-reduce-done",
    "collective-permute-done",
    "send-done",
    "recv-done",
}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ASYNC = {"copy-start", "slice-start"}
_SLICES = {"gather", "dynamic-slice", "slice"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is new
_SEEN_THROUGH = {"bitcast", "reshape", "get-tuple-element", "opt-barrier"}
_MARKERS = ("Assume", "GatherScatterIndices", "AllocateBuffer", "ConcatBitcast", "Sharding", "annotate")
_LIBRARY = ("__cublas", "__cudnn")  # their last result is scratch memory


@dataclasses.dataclass(frozen=True)
class Written:
    """An array that an instruction writes anew, in whatever memory.

    Attributes:
      name: of the instruction.
      opcode: what it does.
      dims: shape of the largest.
      bytes: of all its results.
    """

    name: str
    opcode: str
    dims: tuple[int, ...]
    bytes: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does.

    Attributes:
      read: bytes of main memory.
      written: likewise.
      cycles: that XLA:TPU expects; 0 for a GPU.
      launches: kernels, for a GPU.
      straight_bytes: of these bytes, those of straight code.
      straight_cycles: of these cycles, likewise.
      inner_s: what loops and kernels take at least, seconds.
      collectives: by kind, how many and bytes that the device receives.
    """

    read: float = 0
    written: float = 0
    cycles: float = 0
    straight_bytes: float = 0
    straight_cycles: float = 0
    inner_s: float = 0
    launches: float = 0
    collectives: tuple[tuple[str, float, float], ...] = ()

    @property
    def bytes(self) -> float:
        """Read and written."""
        return self.read + self.written

    @property
    def received(self) -> float:
        """Bytes from other devices."""
        return sum(size for _, _, size in self.collectives)

    @property
    def exchanges(self) -> float:
        """How many collectives."""
        return sum(count for _, count, _ in self.collectives)

    def seconds(self, chip: Chip) -> float:
        """What it takes at least."""
        cycles_s = self.straight_cycles / chip.clock_hz if chip.clock_hz else 0.0
        return self.inner_s + max(self.straight_bytes / chip.bytes_per_s, cycles_s)

    def inner(self, chip: Chip) -> "Work":
        """The same as a loop's body or a kernel: no bytes of it go on beside the cycles of others."""
        return dataclasses.replace(self, straight_bytes=0, straight_cycles=0, inner_s=self.seconds(chip))

    def plus(self, other: "Work", times: float = 1) -> "Work":
        """Both, the other so many times."""
        counts: dict[str, tuple[float, float]] = collections.defaultdict(lambda: (0, 0))
        for factor, one in ((1.0, self), (times, other)):
            for kind, count, size in one.collectives:
                counts[kind] = counts[kind][0] + factor * count, counts[kind][1] + factor * size
        return Work(
            self.read + times * other.read,
            self.written + times * other.written,
            self.cycles + times * other.cycles,
            self.straight_bytes + times * other.straight_bytes,
            self.straight_cycles + times * other.straight_cycles,
            self.inner_s + times * other.inner_s,
            self.launches + times * other.launches,
            tuple((kind, *both) for kind, both in sorted(counts.items()) if both[0]),
        )


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a program is read.

    Attributes:
      module: the program.
      chip: the device.
      trips: how often a loop runs of which the compiler does not know.
      pool_bytes: size of the KV pool: a kernel that takes an array of this size reads part of it,
      kernel_bytes: namely so much,
      kernel_cycles: and takes so long.
    """

    module: HloModule
    chip: Chip
    trips: float
    pool_bytes: int = 0
    kernel_bytes: float = 0
    kernel_cycles: float = 0

    def work(self) -> Work:
        """Of the whole program."""
        return self._of(self.module.computations[self.module.entry])

    def instructions(self) -> Iterator[tuple[Instruction, Work, float]]:
        """What the program does one by one: an instruction, its work, and how often it runs."""
        yield from self._each(self.module.computations[self.module.entry])

    def _each(self, computation: Computation) -> Iterator[tuple[Instruction, Work, float]]:
        for one in computation.instructions:
            if one.opcode == "while":
                for inner, work, times in self._each(self._body(one)):
                    yield inner, work, times * self._trips(one)
            elif one.opcode in ("conditional", "call"):
                yield from self._each(self._body(one))
            elif one.opcode not in _NOTHING:
                yield one, self._one(one, computation), 1.0

    def _body(self, one: Instruction) -> Computation:
        """What a loop or a call runs, or of the branches of a conditional the cheapest."""
        names = one.called("body") + one.called("to_apply")
        names = names or one.called("branch_computations")
        names = names or one.called("true_computation") + one.called("false_computation")
        bodies = [self.module.computations[name] for name in names]
        if len(bodies) == 1:
            return bodies[0]
        works = [self._of(body) for body in bodies]
        return bodies[min(range(len(bodies)), key=lambda i: (works[i].bytes + works[i].received, works[i].cycles))]

    def _trips(self, loop: Instruction) -> float:
        return self.trips if loop.trips is None else loop.trips

    def _of(self, computation: Computation) -> Work:
        total = Work()
        for one in computation.instructions:
            if one.opcode == "while":
                total = total.plus(self._of(self._body(one)).inner(self.chip), self._trips(one))
            elif one.opcode in ("conditional", "call"):
                total = total.plus(self._of(self._body(one)))
            elif one.opcode not in _NOTHING:
                work = self._one(one, computation)
                kernel = one.opcode == "custom-call" and self._reads_pool(one, computation)
                total = total.plus(work.inner(self.chip) if kernel else work)
        return total

    def _reads_pool(self, one: Instruction, within: Computation) -> bool:
        return any(self._hbm(within.by_name[name]) == self.pool_bytes for name in one.operands)

    def _one(self, one: Instruction, within: Computation) -> Work:
        kind = collective_kind(one, self.module)
        read, written = self._traffic(one, within)
        launches = float(self.chip.platform == "gpu" and not (one.opcode == "custom-call" and _is_marker(one)))
        collectives: tuple[tuple[str, float, float], ...] = ()
        if kind is not None:
            collectives = ((kind, 1.0, received_bytes(kind, one, within, self.module)),)
        cycles = self.kernel_cycles if one.opcode == "custom-call" and self._reads_pool(one, within) else one.cycles
        return Work(read, written, cycles, read + written, cycles, 0, launches, collectives)

    def _traffic(self, one: Instruction, within: Computation) -> tuple[float, float]:
        return sum(size for _, size in self._reads(one, within)), self._writes(one, within)

    def _reads(self, one: Instruction, within: Computation) -> list[tuple[str, float]]:
        """Bytes of main memory that an instruction reads of each operand."""
        taken = [within.by_name[name] for name in one.operands]
        if _is_marker(one) or not taken:
            return []
        first = taken[0]
        if one.opcode in _ASYNC:
            source, target = _ends(one)
            size = target.bytes if one.opcode == "slice-start" else min(source.bytes, target.bytes)
            return [(first.name, size if self._main(source) else 0)]
        if one.opcode == "fusion":
            (name,) = one.called("calls")
            body = self.module.computations[name]
            return [
                (operand.name, min(self._hbm(operand), self._read_of(body, index)) if self._hbm(operand) else 0)
                for index, operand in enumerate(taken)
            ]
        if one.opcode in _SLICES:
            return [(first.name, sum(b.bytes for b in one.buffers) if self._hbm(first) else 0)]
        if one.opcode in _UPDATES:
            new = taken[_UPDATES[one.opcode]]
            return [(new.name, sum(b.bytes for b in new.buffers))]
        size_of = self._kernel_read if one.opcode == "custom-call" else self._hbm
        return [(operand.name, size_of(operand)) for operand in taken]

    def _writes(self, one: Instruction, within: Computation) -> float:
        """Bytes of main memory that an instruction writes."""
        if _is_marker(one):
            return 0
        if one.opcode in _ASYNC:
            source, target = _ends(one)
            return min(source.bytes, target.bytes) if self._main(target) else 0
        if one.opcode == "fusion":
            (name,) = one.called("calls")
            body = self.module.computations[name]
            return self._written_by(body, body.result, one.buffers)
        if one.opcode in _UPDATES:
            new = within.by_name[one.operands[_UPDATES[one.opcode]]]
            return sum(b.bytes for b in new.buffers) if self._hbm(one) else 0
        if one.opcode == "custom-call":
            return sum(b.bytes for b in _results(one) if self._main(b) and b.bytes != self.pool_bytes)
        return self._hbm(one)

    def _main(self, buffer: Buffer) -> bool:
        return buffer.space == 0 or self.chip.platform == "gpu"

    def _hbm(self, one: Instruction) -> int:
        return sum(b.bytes for b in one.buffers if self._main(b))

    def _kernel_read(self, operand: Instruction) -> float:
        size = self._hbm(operand)
        return self.kernel_bytes if self.pool_bytes and size == self.pool_bytes else size

    def _read_of(self, body: Computation, index: int) -> float:
        """Bytes that a fusion reads of its parameter."""
        parameter = body.parameters.get(index)
        return 0 if parameter is None else self._read_by_users(body, parameter)

    def _read_by_users(self, body: Computation, one: Instruction) -> float:
        total = float(sum(b.bytes for b in one.buffers)) if one.root else 0.0
        for user in body.users.get(one.name, []):
            if user.opcode in _SEEN_THROUGH:
                total += self._read_by_users(body, user)
            elif user.opcode in _SLICES and user.operands[0] == one.name:
                total += sum(b.bytes for b in user.buffers)
            elif user.opcode in _UPDATES and user.operands[0] == one.name:
                continue
            elif user.opcode == "fusion":
                (name,) = user.called("calls")
                inner = self.module.computations[name]
                for index in (i for i, n in enumerate(user.operands) if n == one.name):
                    passed = _origin(inner, inner.result) is inner.parameters.get(index)
                    total += self._read_by_users(body, user) if passed else self._read_of(inner, index)
            else:
                total += sum(b.bytes for b in one.buffers)
        return total

    def _written_by(self, body: Computation, root: Instruction, buffers: tuple[Buffer, ...]) -> float:
        """Bytes of main memory that a fusion writes."""
        if root.opcode == "tuple":
            parts = [body.by_name[name] for name in root.operands]
            return sum(self._written_by(body, part, (b,)) for part, b in zip(parts, buffers, strict=True))
        if not any(self._main(b) for b in buffers):
            return 0
        if root.opcode in _UPDATES:
            new = body.by_name[root.operands[_UPDATES[root.opcode]]]
            return sum(b.bytes for b in new.buffers)
        if root.opcode in _SEEN_THROUGH and root.operands[0] in body.by_name:
            return self._written_by(body, body.by_name[root.operands[0]], buffers)
        if root.opcode == "fusion":
            (name,) = root.called("calls")
            inner = self.module.computations[name]
            return self._written_by(inner, inner.result, buffers)
        return sum(b.bytes for b in buffers if self._main(b))

    def kernels(self) -> Iterator[Instruction]:
        """Kernels that read the pool."""
        for computation in self._reached(self.module.entry):
            for one in computation.instructions:
                if one.opcode == "custom-call" and self._reads_pool(one, computation):
                    yield one

    @property
    def _everywhere(self) -> "Reading":
        """The same where scratch memory counts as main memory."""
        return dataclasses.replace(self, chip=dataclasses.replace(self.chip, platform="gpu"))

    def read_of(self, arguments: Sequence[int]) -> float:
        """Bytes that straight code reads of these arguments, each time that it does."""
        entry = self.module.computations[self.module.entry]
        names = {one.name for number, one in entry.parameters.items() if number in arguments}
        total = 0.0
        for one in entry.instructions:
            if one.opcode in _SEEN_THROUGH and one.operands and one.operands[0] in names:
                names.add(one.name)
            elif one.opcode not in _NOTHING:
                total += sum(size for name, size in self._reads(one, entry) if name in names)
        return total

    def copies_of(self, arguments: Sequence[int]) -> Iterator[Written]:
        """Arrays as large as one of these arguments (by number) that are made of it, in straight code.

        What only goes from main memory to scratch memory as it is, does not count.
        """
        entry = self.module.computations[self.module.entry]
        sizes: dict[str, int] = {}
        for one in entry.instructions:
            if one.opcode == "parameter":
                if one.parameter in arguments:
                    sizes[one.name] = sum(b.bytes for b in one.buffers)
                continue
            known = [sizes[name] for name in one.operands if name in sizes]
            if not known:
                continue
            moved = one.opcode in _ASYNC or one.opcode.endswith("-done") or one.target == "ConcatBitcast"
            if moved or one.opcode in _SEEN_THROUGH - {"reshape"}:
                sizes[one.name] = max(known)
            elif (size := self._made(one)) >= min(known):
                yield Written(one.name, one.opcode, max(one.buffers, key=lambda b: b.bytes).dims, size)

    def _made(self, one: Instruction) -> int:
        """Bytes that an instruction writes, in whatever memory."""
        if one.opcode != "fusion":
            return sum(b.bytes for b in _results(one))
        (name,) = one.called("calls")
        body = self.module.computations[name]
        return int(self._everywhere._written_by(body, body.result, one.buffers))

    def large_writes(self, least: int) -> Iterator[Written]:
        """Arrays of `least` bytes or more that are computed or copied, in branches that are rarely taken, too.

        What only goes from main memory to scratch memory as it is, and what is updated in place, does not count.
        """
        for computation in self._reached(self.module.entry):
            for one in computation.instructions:
                if one.opcode in _NOTHING | _ASYNC or _is_marker(one):
                    continue
                if one.opcode in _UPDATES or "output_to_operand_aliasing" in one.attributes:
                    continue
                if (size := self._made(one)) >= least:
                    dims = max(one.buffers, key=lambda b: b.bytes).dims
                    yield Written(one.name, one.opcode, dims, size)

    def _reached(self, name: str) -> Iterator[Computation]:
        computation = self.module.computations[name]
        yield computation
        for one in computation.instructions:
            if one.opcode in ("while", "conditional", "call"):
                inner = (*one.called("body"), *one.called("branch_computations"), *one.called("to_apply"))
                for other in inner or one.called("true_computation") + one.called("false_computation"):
                    yield from self._reached(other)


def _ends(one: Instruction) -> tuple[Buffer, Buffer]:
    """Where a copy that runs beside others is from, and where it goes."""
    first, second = one.buffers[:2]
    return (second, first) if one.opcode == "copy-start" else (first, second)


def _results(one: Instruction) -> tuple[Buffer, ...]:
    """What an instruction gives, without scratch memory."""
    return one.buffers[:1] if one.target.startswith(_LIBRARY) else one.buffers


def _origin(body: Computation, one: Instruction) -> Instruction:
    """What an instruction is another view of."""
    while one.opcode in _SEEN_THROUGH and one.operands and one.operands[0] in body.by_name:
        one = body.by_name[one.operands[0]]
    return one


def _is_marker(one: Instruction) -> bool:
    """Whether a custom call of XLA:TPU is only a note to the compiler."""
    return one.target.startswith(_MARKERS)


def collective_kind(one: Instruction, module: HloModule) -> str | None:
    """Which collective an instruction is, if it is one; one that runs beside others counts where it starts."""
    opcode = one.opcode.removesuffix("-start")
    if opcode in _COLLECTIVES:
        return opcode
    if one.opcode in ("fusion", "async-start"):
        for name in one.called("calls"):
            for inner in module.computations[name].instructions:
                if inner.opcode in _COLLECTIVES:
                    return inner.opcode
    return None


def received_bytes(kind: str, one: Instruction, within: Computation, module: HloModule) -> float:
    """Bytes that a device gets from others in a collective, as rings and trees of messages move them."""
    size = max(float(sum(b.bytes for b in within.by_name[name].buffers)) for name in one.operands)
    ranks = _group_size(one, module)
    match kind:
        case "all-gather":
            return size * (ranks - 1)
        case "all-reduce":
            return 2 * size * (ranks - 1) / ranks
        case "reduce-scatter" | "all-to-all":
            return size * (ranks - 1) / ranks
    return size


def _group_size(one: Instruction, module: HloModule) -> int:
    text = one.attributes
    if "replica_groups" not in text:
        for name in one.called("calls"):
            text += "".join(inner.attributes for inner in module.computations[name].instructions)
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", text)
    return int(iota[2]) if iota else 1
