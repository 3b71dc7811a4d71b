"""The static layouts that searches go through.

Cells of more than a node repeat the node's layout: an instance does not reach beyond the links of a node.  Enumerations
are exhaustive in the ways to cut a node into instances.  Of the ways to keep instances for tiers they hold those that
are monotone in TP (the largest instances for some tiers, the rest for the others or for all): what is left out keeps
small and large instances for one tier and those in between for another.
"""

from collections.abc import Iterator, Sequence

from nitsum_jax.control.plan import DECODE, MIXED, PREFILL, Shape, partitions, place
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.meshes.layout import Layout


def node_size(num_devices: int, devices_of_node: int) -> int:
    """Devices that a layout is made for; the rest repeats it.

    Raises:
      InvalidInputError: the cell is larger than a node and no multiple of it.
    """
    if num_devices <= devices_of_node:
        return num_devices
    if num_devices % devices_of_node:
        raise InvalidInputError(
            f"{num_devices} devices: give a multiple of {devices_of_node}, the devices of a node, or fewer than that"
        )
    return devices_of_node


def plan_of(shapes: Sequence[Shape], num_devices: int, node: int) -> Layout:
    """The plan of a node's shapes, repeated for every node."""
    return place(tuple(shapes) * max(1, num_devices // node), num_devices)


def cuts(node: int, tps: Sequence[int]) -> list[tuple[int, ...]]:
    """All ways to cut a node into TPs, homogeneous ones first."""
    return sorted(partitions(node, tps), key=lambda cut: (len(set(cut)), len(cut)))


def homogeneous_tps(node: int, tps: Sequence[int]) -> list[int]:
    """TPs that a node can be filled with."""
    return [tp for tp in tps if tp <= node]


def tier_groups(tiers: TierSet) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Ways to part the tiers in two by how tight their TPOT targets are: (tight, relaxed)."""
    names = [tier.name for tier in sorted(tiers, key=lambda tier: (tier.tpot_ms, tier.ttft_ms))]
    return [(tuple(names[:i]), tuple(names[i:])) for i in range(1, len(names))]


def placements(cut: Sequence[int], tiers: TierSet) -> Iterator[tuple[Shape, ...]]:
    """A cut with its instances kept for tiers in all ways that are monotone in TP; first the one that keeps none."""
    yield tuple(Shape(tp) for tp in cut)
    seen = set()
    for tight, relaxed in tier_groups(tiers):
        for first in range(1, len(cut)):
            for large, small in (
                (tight, relaxed),
                (relaxed, tight),
                (tight, ()),
                (relaxed, ()),
                ((), tight),
                ((), relaxed),
            ):
                shapes = tuple(Shape(tp, MIXED, large if i < first else small) for i, tp in enumerate(cut))
                key = tuple(sorted(map(str, shapes)))
                if key not in seen:
                    seen.add(key)
                    yield shapes


def splits(node: int, tps: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Ways to give devices to two kinds of instances: (TP of the first, devices of the first, TP of the second)."""
    for first_tp in tps:
        for second_tp in tps:
            for devices in range(first_tp, node, first_tp):
                if (node - devices) % second_tp == 0:
                    yield first_tp, devices, second_tp


def role_splits(node: int, tps: Sequence[int]) -> Iterator[tuple[Shape, ...]]:
    """Prefill instances of one TP beside decode instances of one TP."""
    for prefill_tp, devices, decode_tp in splits(node, tps):
        yield (
            *(Shape(prefill_tp, PREFILL),) * (devices // prefill_tp),
            *(Shape(decode_tp, DECODE),) * ((node - devices) // decode_tp),
        )


def tier_splits(node: int, tps: Sequence[int], tiers: TierSet) -> Iterator[tuple[Shape, ...]]:
    """Instances of one TP for some tiers beside instances of one TP for the others."""
    for tight, relaxed in tier_groups(tiers):
        for tight_tp, devices, relaxed_tp in splits(node, tps):
            yield (
                *(Shape(tight_tp, MIXED, tight),) * (devices // tight_tp),
                *(Shape(relaxed_tp, MIXED, relaxed),) * ((node - devices) // relaxed_tp),
            )
