"""How many operations a compiled step launches: what is left when XLA has fused all it can."""

import collections
import dataclasses

from nitsum_jax.bench.compile.hlo import Computation, HloModule, parse

# They only name what is there already.
_NOTHING = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "opt-barrier",
}


@dataclasses.dataclass(frozen=True)
class OperationCounts:
    """Operations of a program; branches of conditionals are not looked into.

    Attributes:
      straight: by kind, those that run once.
      looped: by kind, those in the bodies of loops, each body counted once.
    """

    straight: dict[str, int]
    looped: dict[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.straight.values()) + sum(self.looped.values())

    @property
    def fusions(self) -> int:
        """Those that XLA made of several instructions, or wrapped, and products that a library makes."""
        return self.straight.get("fusion", 0) + self.looped.get("fusion", 0)


def operations(text: str) -> OperationCounts:
    """Counts what stands in optimised HLO, as `jax.stages.Compiled.as_text` gives it."""
    module = parse(text)
    straight: collections.Counter[str] = collections.Counter()
    looped: collections.Counter[str] = collections.Counter()
    _count(module, module.computations[module.entry], straight, looped)
    return OperationCounts(dict(straight), dict(looped))


def _count(
    module: HloModule, within: Computation, into: collections.Counter[str], looped: collections.Counter[str]
) -> None:
    for one in within.instructions:
        if one.opcode not in _NOTHING:
            into[one.opcode] += 1
        if one.opcode == "while":
            for name in one.called("body"):
                _count(module, module.computations[name], looped, looped)
