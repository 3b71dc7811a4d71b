"""Plans of a cell: shapes of instances, and the devices that they get.

A plan is a `Layout`, with the tiers that its instances are kept for.
"""

import collections
from collections.abc import Iterator, Sequence

from nitsum_jax.meshes.layout import InstanceSpec, Layout, Role, Shape, shapes_text

MIXED = Role.MIXED.value
PREFILL = Role.PREFILL.value
DECODE = Role.DECODE.value


def place(shapes: Sequence[Shape], num_devices: int, before: Layout | None = None, lost: Sequence[int] = ()) -> Layout:
    """Gives shapes their devices: runs of neighbours, as far as possible where they are already.

    Args:
      shapes: what is wanted.
      num_devices: devices of the cell, numbered from 0.
      before: the plan in force; instances of it that are wanted again stay where they are.
      lost: devices that cannot be used.

    Returns:
      A plan, largest TP first.

    Raises:
      ValueError: the shapes do not fit the devices that are left.
    """
    taken = set(lost)
    wanted = collections.Counter(shapes)
    placed: list[InstanceSpec] = []
    # 1. what is there already, tiers and all; 2. what is there under other tiers: only routing changes.
    for same in (lambda a, b: a == b, lambda a, b: (a.tp, a.role) == (b.tp, b.role)):
        for old in before.instances if before else ():
            if not taken.isdisjoint(old.devices):
                continue
            match = next((s for s in wanted if wanted[s] > 0 and same(s, old.shape)), None)
            if match is not None:
                wanted[match] -= 1
                taken.update(old.devices)
                placed.append(match.on(old.devices))
    # An old instance in the way of a larger new one gives way: drop the smallest until everything fits.
    while True:
        rest = sorted(wanted.elements(), key=lambda shape: -shape.tp)
        fresh = _fill(rest, num_devices, taken)
        if fresh is not None:
            break
        if not placed:
            raise ValueError(f"{shapes_text(shapes)} does not fit {num_devices} devices without {sorted(lost)}")
        loser = min(placed, key=lambda instance: instance.tp)
        placed.remove(loser)
        wanted[loser.shape] += 1
        taken.difference_update(loser.devices)
    return Layout(tuple(sorted((*placed, *fresh), key=lambda i: (-i.tp, i.devices))))


def kinds(shapes: Sequence[Shape]) -> tuple[tuple[int, str], ...]:
    """TPs and roles, in an order that does not depend on how they were written: a layout, whatever its tiers."""
    return tuple(sorted((shape.tp, shape.role) for shape in shapes))


def _fill(shapes: Sequence[Shape], num_devices: int, taken: set[int]) -> list[InstanceSpec] | None:
    used = set(taken)
    out = []
    for shape in shapes:
        devices = _free_group(shape.tp, num_devices, used)
        if devices is None:
            return None
        used.update(devices)
        out.append(shape.on(devices))
    return out


def _free_group(tp: int, num_devices: int, used: set[int]) -> tuple[int, ...] | None:
    """The first aligned run that is free; else, where devices are lost, any whose ranks differ (numbers modulo TP)."""
    for start in range(0, num_devices - tp + 1, tp):
        run = range(start, start + tp)
        if used.isdisjoint(run):
            return tuple(run)
    group = [next((d for d in range(rank, num_devices, tp) if d not in used), None) for rank in range(tp)]
    return None if None in group else tuple(sorted(d for d in group if d is not None))


def partitions(num_devices: int, tps: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All ways to cut devices into TPs, each descending, leaving as few devices idle as possible.

    Args:
      num_devices: how many there are.
      tps: the TPs that may be used, powers of two.
    """
    sizes = sorted((tp for tp in tps if tp <= num_devices), reverse=True)
    if not sizes:
        return
    total = num_devices - num_devices % sizes[-1]

    def cut(left: int, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
        if left == 0:
            yield ()
            return
        for i, size in enumerate(sizes):
            if size <= left:
                for rest in cut(left - size, sizes[i:]):
                    yield (size, *rest)

    yield from cut(total, sizes)


def fits(shapes: Sequence[Shape], num_devices: int, lost: Sequence[int] = ()) -> bool:
    """Whether `place` would find devices."""
    return _fill(sorted(shapes, key=lambda shape: -shape.tp), num_devices, set(lost)) is not None


def homogeneous(num_devices: int, tp: int) -> Layout:
    """Every device in an instance of this TP, as far as they go round."""
    return place([Shape(tp)] * (num_devices // tp), num_devices)
