"""Cells of many nodes: what fits a node, and which nodes keep what they have.

An instance never spans nodes, since collectives need the links of one.  TPs are powers of two, and an instance of TP t
lies on a run of t devices that begins at a multiple of t.  Then a multiset of instances fits some nodes exactly if for
every TP t those of t and more, counted in runs of t, are no more than the free runs of t (the buddy rule): placing the
largest first never goes wrong.  So a plan of a cell is a count of instances of each kind, however many nodes there
are, and where they lie is found afterwards: as many nodes as possible keep all they have, and the others are paired
with what is left so that the fewest devices change.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import optimize, sparse

from nitsum_jax.control.plan import Shape, place
from nitsum_jax.meshes.layout import InstanceSpec, Layout

Kind = tuple[int, str]
"""TP and role of an instance: what a switch would have to change."""


def kinds_of(shapes: Iterable[Shape] | Mapping[Shape, int]) -> collections.Counter[Kind]:
    """How many instances of each kind these are (a list of shapes, or counts of them), whatever their tiers."""
    found: collections.Counter[Kind] = collections.Counter()
    for shape, count in (shapes if isinstance(shapes, Mapping) else collections.Counter(shapes)).items():
        found[shape.tp, shape.role] += count
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One node of a cell.

    Attributes:
      first: number of its first device.
      size: how many it has.
      lost: of these, numbered from 0, those that cannot be used.
      instances: of the plan in force, that lie on usable devices, devices numbered from 0.
    """

    first: int
    size: int
    lost: tuple[int, ...]
    instances: tuple[InstanceSpec, ...]

    @property
    def kinds(self) -> tuple[tuple[Kind, int], ...]:
        """What it has, as a key."""
        return tuple(sorted(kinds_of(instance.shape for instance in self.instances).items()))

    def runs(self, tp: int) -> int:
        """Free runs of `tp` devices when nothing is on it."""
        return _runs(self.size, self.lost, tp)


@functools.cache
def _runs(size: int, lost: tuple[int, ...], tp: int) -> int:
    gone = {device // tp for device in lost}
    return sum(run not in gone for run in range(size // tp))


def nodes_of(plan: Layout, num_devices: int, node: int, lost: Sequence[int] = ()) -> list[Node]:
    """The nodes of a cell, the last one smaller if the devices are no multiple of a node's.

    Args:
      plan: in force; instances that span nodes or lie on lost devices are left out.
      num_devices: of the cell.
      node: devices of a node.
      lost: devices that cannot be used.
    """
    there: dict[int, list[InstanceSpec]] = collections.defaultdict(list)
    gone = set(lost)
    for instance in plan.instances:
        number = instance.devices[0] // node
        if instance.devices[-1] // node == number and gone.isdisjoint(instance.devices):
            devices = tuple(device - number * node for device in instance.devices)
            there[number].append(InstanceSpec(devices, instance.role, instance.tiers))
    found = []
    for number in range(-(-num_devices // node)):
        first = number * node
        size = min(node, num_devices - first)
        away = tuple(device - first for device in sorted(gone) if first <= device < first + size)
        found.append(Node(first, size, away, tuple(there[number])))
    return found


def runs_of(nodes: Iterable[Node], tps: Sequence[int]) -> dict[int, int]:
    """Free runs of every TP when nothing is on these nodes."""
    nodes = list(nodes)
    return {tp: sum(node.runs(tp) for node in nodes) for tp in tps}


def fits(kinds: Mapping[Kind, int], runs: Mapping[int, int]) -> bool:
    """The buddy rule: whether so many instances fit nodes with so many free runs (of all TPs in question)."""
    return all(sum(count * tp // size for (tp, _), count in kinds.items() if tp >= size) <= runs[size] for size in runs)


def room_for(tp: int, kinds: Mapping[Kind, int], runs: Mapping[int, int]) -> int:
    """How many more instances of a TP fit beside these."""
    return min(
        (runs[size] - sum(count * other // size for (other, _), count in kinds.items() if other >= size))
        // (tp // size)
        for size in runs
        if size <= tp
    )


def place_fleet(
    shapes: Sequence[Shape], num_devices: int, node: int, before: Layout, lost: Sequence[int] = ()
) -> Layout:
    """Gives the instances of a cell of many nodes their devices; most nodes keep what they have.

    Args:
      shapes: what is wanted; TPs are powers of two, at most a node's devices.
      num_devices: of the cell.
      node: devices of a node.
      before: the plan in force.
      lost: devices that cannot be used.

    Returns:
      A plan, largest TP first.

    Raises:
      ValueError: the shapes do not fit.
    """
    nodes = nodes_of(before, num_devices, node, lost)
    wanted = kinds_of(shapes)
    tps = sorted({tp for tp, _ in wanted})
    if not fits(wanted, runs_of(nodes, tps)):
        raise ValueError(f"{len(shapes)} instances do not fit {num_devices} devices in nodes of {node}")
    kept = _kept(nodes, wanted, tps)
    left = wanted.copy()
    for number in kept:
        left.subtract(dict(nodes[number].kinds))
    changed = [number for number in range(len(nodes)) if number not in kept]
    placed = {number: nodes[number].instances for number in kept}
    placed |= _pair(nodes, changed, _packed([nodes[number] for number in changed], left))
    moved = [
        InstanceSpec(tuple(device + nodes[number].first for device in i.devices), i.role, i.tiers)
        for number in sorted(placed)
        for i in placed[number]
    ]
    return Layout(tuple(sorted(_with_tiers(moved, shapes), key=lambda i: (-i.tp, i.devices))))


def changed_devices(before: Layout, after: Layout) -> int:
    """Devices of instances that a switch would have to stop."""
    kept = {instance.group for instance in after.instances}
    return sum(instance.tp for instance in before.instances if instance.group not in kept)


def _kept(nodes: Sequence[Node], wanted: Mapping[Kind, int], tps: Sequence[int]) -> set[int]:
    """Numbers of the nodes that keep all they have: as many devices as the wanted instances allow.

    An integer program over classes of equal nodes, with the buddy rule for what the others must hold.
    """
    classes: dict[tuple, list[int]] = collections.defaultdict(list)
    for number, one in enumerate(nodes):
        if one.instances and all(kind in wanted for kind, _ in one.kinds):
            classes[one.kinds, one.lost, one.size].append(number)
    if not classes:
        return set()
    members = list(classes.values())
    rows, limits = [], []
    for kind, count in wanted.items():
        rows.append([dict(nodes[numbers[0]].kinds).get(kind, 0) for numbers in members])
        limits.append(count)
    total = runs_of(nodes, tps)
    for tp in tps:  # what is not kept must fit the nodes that are free
        need = sum(count * kind[0] // tp for kind, count in wanted.items() if kind[0] >= tp)
        row = []
        for numbers in members:
            one = nodes[numbers[0]]
            held = sum(count * kind[0] // tp for kind, count in one.kinds if kind[0] >= tp)
            row.append(one.runs(tp) - held)
        rows.append(row)
        limits.append(total[tp] - need)
    found = optimize.milp(
        [-sum(kind[0] * count for kind, count in nodes[numbers[0]].kinds) for numbers in members],
        integrality=np.ones(len(members)),
        bounds=optimize.Bounds(0, [len(numbers) for numbers in members]),
        constraints=optimize.LinearConstraint(sparse.csr_array(np.array(rows, float)), -np.inf, limits),
        options={"node_limit": 200},
    )
    if found.x is None:
        return set()
    return {n for numbers, x in zip(members, found.x, strict=True) for n in numbers[: round(x)]}


def _packed(nodes: Sequence[Node], kinds: Mapping[Kind, int]) -> list[tuple[Kind, ...]]:
    """What each of these nodes gets, largest first; nodes that can hold the same are filled in order."""
    free = [{tp: node.runs(tp) for tp, _ in kinds} for node in nodes]
    packed: list[list[Kind]] = [[] for _ in nodes]
    start = dict.fromkeys((tp for tp, _ in kinds), 0)
    for kind in sorted((+collections.Counter(kinds)).elements(), key=lambda kind: (-kind[0], kind[1])):
        tp = kind[0]
        while free[start[tp]][tp] < 1:
            start[tp] += 1
        number = start[tp]
        packed[number].append(kind)
        for size in free[number]:  # larger ones are placed by now
            free[number][size] -= tp // size
    return [tuple(kinds) for kinds in packed]


def _pair(
    nodes: Sequence[Node], changed: Sequence[int], packed: Sequence[tuple[Kind, ...]]
) -> dict[int, tuple[InstanceSpec, ...]]:
    """Gives each changed node one of the packed lists, so that the fewest devices change."""

    @functools.cache
    def local(instances: tuple[InstanceSpec, ...], size: int, lost: tuple[int, ...], kinds: tuple[Kind, ...]) -> tuple:
        before = Layout(instances)
        after = place([Shape(tp, role) for tp, role in kinds], size, before, lost)
        return changed_devices(before, after), after.instances

    placed: dict[int, tuple[InstanceSpec, ...]] = {}
    alike: dict[tuple, list[int]] = collections.defaultdict(list)  # any of them can hold what another can
    for i, number in enumerate(changed):
        alike[nodes[number].size, nodes[number].lost].append(i)
    for (size, lost), indices in alike.items():
        options = [[local(nodes[changed[i]].instances, size, lost, packed[j]) for j in indices] for i in indices]
        rows, columns = optimize.linear_sum_assignment([[cost for cost, _ in row] for row in options])
        for row, column in zip(rows, columns, strict=True):
            placed[changed[indices[row]]] = options[row][column][1]
    return placed


def _with_tiers(instances: Sequence[InstanceSpec], shapes: Sequence[Shape]) -> list[InstanceSpec]:
    """The instances with the tiers of the wanted shapes; one that has wanted tiers keeps them."""
    left = collections.Counter(shapes)
    kept: list[InstanceSpec] = []
    others: list[InstanceSpec] = []
    for instance in instances:
        if left[instance.shape] > 0:
            left[instance.shape] -= 1
            kept.append(instance)
        else:
            others.append(instance)
    waiting: dict[Kind, list[Shape]] = collections.defaultdict(list)
    for shape in sorted(left.elements(), key=str):
        waiting[shape.tp, shape.role].append(shape)
    for instance in others:
        shape = waiting[instance.tp, instance.role].pop()
        kept.append(shape.on(instance.devices))
    return kept
