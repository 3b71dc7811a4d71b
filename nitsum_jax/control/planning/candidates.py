"""The plans a planner chooses from: all ways to cut a cell, with the tiers laid over the instances.

Instances stand in order of TP, the largest first, and tiers in order of tightness.  Each tier gets a run of
instances, so that the tight ones have the fast instances; neighbouring runs may share some.  That leaves a few
hundred plans of eight devices out of millions.
"""

import itertools
from collections.abc import Iterator, Sequence

from nitsum_jax.control.plan import DECODE, MIXED, PREFILL, Shape, partitions


def mixed_plans(num_devices: int, tps: Sequence[int], tiers: Sequence[str]) -> Iterator[tuple[Shape, ...]]:
    """Plans in which all instances both prefill and decode.

    Args:
      num_devices: of the cell.
      tps: TPs that may be used.
      tiers: names, the tightest first.
    """
    for cut in partitions(num_devices, tps):
        yield tuple(Shape(tp) for tp in cut)
        if len(tiers) < 2:
            continue
        seen: set[tuple[Shape, ...]] = set()
        for runs in _runs(len(cut), len(tiers)):
            shapes = []
            for i, tp in enumerate(cut):
                there = tuple(tier for tier, (start, end) in zip(tiers, runs, strict=True) if start <= i < end)
                shapes.append(Shape(tp, tiers=() if len(there) == len(tiers) else there))
            key = tuple(sorted(shapes, key=str))
            if key not in seen and any(shape.tiers for shape in shapes):
                seen.add(key)
                yield tuple(shapes)


def split_plans(num_devices: int, tps: Sequence[int]) -> Iterator[tuple[Shape, ...]]:
    """Plans with prefill and decode apart: one TP for each role, as many instances as the devices allow."""
    for prefill, decode in itertools.product(sorted(tps, reverse=True), repeat=2):
        for count in range(1, num_devices // prefill + 1):
            rest = (num_devices - count * prefill) // decode
            used = count * prefill + rest * decode
            if rest < 1 or num_devices - used >= min(prefill, decode):
                continue
            yield (Shape(prefill, PREFILL),) * count + (Shape(decode, DECODE),) * rest


def joint_plans(num_devices: int, tps: Sequence[int]) -> Iterator[tuple[Shape, ...]]:
    """Plans with instances of all three roles, one TP for each: those that do both even out what the split does not."""
    for prefill, both, decode in itertools.product(sorted(tps, reverse=True), repeat=3):
        for first in range(1, num_devices // prefill + 1):
            for second in range(1, (num_devices - first * prefill) // both + 1):
                rest = num_devices - first * prefill - second * both
                if rest > 0 and rest % decode == 0:
                    yield (
                        *(Shape(prefill, PREFILL),) * first,
                        *(Shape(both, MIXED),) * second,
                        *(Shape(decode, DECODE),) * (rest // decode),
                    )


def _runs(instances: int, tiers: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Runs [start, end) of instances for every tier: in order, covering all, neighbours overlapping at most."""

    def extend(tier: int, start: int, end: int) -> Iterator[tuple[tuple[int, int], ...]]:
        if tier == tiers - 1:
            yield ((start, instances),)
            return
        for stop in range(start + 1, instances + 1):
            for following in range(start if tier == 0 else max(start, end), stop + 1):
                if following < instances:
                    for rest in extend(tier + 1, following, stop):
                        yield ((start, stop), *rest)

    yield from extend(0, 0, 0)
