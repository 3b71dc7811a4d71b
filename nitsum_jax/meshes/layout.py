"""Layouts: how a cell is cut into instances, in memory and as text.

The text form names instances from left to right, joined by `+`:

    tpT[xN][@DEVICES][:ROLE][/TIERS]    T devices per instance, a power of two
                                        N such instances (1 if left out)
                                        DEVICES explicitly, with commas (T*N of them); else the first free run of T
                                        neighbours
                                        ROLE prefill, decode or mixed (mixed if left out)
                                        TIERS that each of them is kept for, with commas; all alike if left out

`tp4`, `tp2+tp1x2`, `tp2:prefill+tp1x2:decode`, `tp2@2,3+tp1x2`, `tp4/interactive+tp1x4/standard,batch`.
`str(layout)` writes the canonical form: equal neighbours are joined with `x`, and devices are named only where the
parser would choose others.  Reading it back gives an equal layout.  `shapes_text` and `parse_shapes` are the same
language for instances that have no place yet.

All reading and writing of layouts is done here: for flags, gRPC, logs, the planner and the simulator.

Pure: no JAX in here.
"""

import collections
import dataclasses
import enum
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.meshes.vshards import is_power_of_two, ranks_differ

GRAMMAR = (
    "write instances as tpT[xN][@devices][:prefill|decode|mixed][/tiers] joined by +, such as tp4, "
    "tp2:prefill+tp1x2:decode or tp4/chat+tp1x4/code,batch"
)
TIER_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"  # a regular expression

_TOKEN = re.compile(
    r"tp(?P<tp>[0-9]{1,6})(?:x(?P<count>[0-9]{1,6}))?(?:@(?P<devices>[0-9]{1,6}(?:,[0-9]{1,6})*))?(?::(?P<role>[a-z]+))?"
    rf"(?:/(?P<tiers>{TIER_NAME}(?:,{TIER_NAME})*))?",
    re.IGNORECASE | re.ASCII,
)
_MAX_TEXT = 10_000  # characters; no cell needs more
MOST_DEVICES = 1 << 20  # more than any cell has; for texts whose cell is not known


class Role(enum.StrEnum):
    """What an instance does: prompts only, tokens after the first only, or both."""

    MIXED = "mixed"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """What an instance is, wherever it lies.

    Attributes:
      tp: tensor-parallel degree, the number of its devices.
      role: mixed, prefill or decode.
      tiers: names of the tiers that it is kept for; empty: all alike.
    """

    tp: int
    role: str = Role.MIXED.value
    tiers: tuple[str, ...] = ()

    def __str__(self) -> str:
        return shapes_text((self,))


@dataclasses.dataclass(frozen=True, slots=True)
class InstanceSpec:
    """A group of devices that runs one batch loop at one TP.

    Attributes:
      devices: indices into the cell's devices, kept ascending whatever order they are given in (which device has which
        rank is the vshard map's business).
      role: what it does.
      tiers: names of the tiers that it is kept for; empty: all alike.
    """

    devices: tuple[int, ...]
    role: Role = Role.MIXED
    tiers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", tuple(sorted(self.devices)))

    @property
    def tp(self) -> int:
        """The tensor-parallel degree: the number of devices."""
        return len(self.devices)

    @property
    def shape(self) -> Shape:
        """What it is, without its place."""
        return Shape(self.tp, self.role.value, self.tiers)

    def __str__(self) -> str:
        """The text form with its devices, such as `tp2@0,1:decode/chat`."""
        return _part(self.shape, devices=self.devices)


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """A partition of a cell, or of a part of it, into instances.

    Attributes:
      instances: in the order of the text form.
    """

    instances: tuple[InstanceSpec, ...]

    @property
    def devices(self) -> tuple[int, ...]:
        """All devices in use, ascending."""
        return tuple(sorted(device for instance in self.instances for device in instance.devices))

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes of the instances in order."""
        return tuple(instance.shape for instance in self.instances)

    @property
    def tiers(self) -> tuple[str, ...]:
        """All tiers that instances are kept for, each once."""
        return tuple(dict.fromkeys(tier for instance in self.instances for tier in instance.tiers))

    def without_tiers(self) -> "Layout":
        """The same instances, kept for no tier."""
        return Layout(tuple(dataclasses.replace(instance, tiers=()) for instance in self.instances))

    def idle(self, num_devices: int) -> tuple[int, ...]:
        """The devices of a cell of num_devices that no instance uses, ascending."""
        return tuple(sorted(set(range(num_devices)).difference(self.devices)))

    def validate(self, num_devices: int, max_tp: int, min_tp: int = 1) -> None:
        """Checks that a cell can run this layout.  Idle devices are no error.

        Args:
          num_devices: how many devices the cell has.
          max_tp: the largest TP (the number of vshards).
          min_tp: the smallest TP that the model's weights fit.

        Raises:
          InvalidInputError: it is wrong on any cell: empty, a TP that is no power of two, a device named twice, devices
            that cannot share an instance, no instance to prefill or none to decode.
          PreconditionError: it is wrong on this cell: a device that is not there, a TP below min_tp or above max_tp.
        """
        if not self.instances:
            raise InvalidInputError(f"the layout has no instance: {GRAMMAR}")
        for instance in self.instances:
            _check_tp(instance.tp)
        for device, count in collections.Counter(self.devices).items():
            if count > 1:
                raise InvalidInputError(f"layout {self} names device {device} {count} times: name each device once")
            if not 0 <= device < num_devices:
                raise PreconditionError(
                    f"layout {self} uses device {device}, but the cell has {num_devices}: use 0 to {num_devices - 1}"
                )
        for instance in self.instances:
            if not min_tp <= instance.tp <= max_tp:
                raise PreconditionError(
                    f"layout {self} has tp{instance.tp}, but this model on this cell runs tp{min_tp} to tp{max_tp}: "
                    "choose a TP in between"
                )
            if not ranks_differ(instance.devices):
                raise InvalidInputError(
                    f"devices of {instance} would hold the same vshards: use devices whose numbers differ modulo "
                    f"{instance.tp}, such as neighbours"
                )
        for role in (Role.PREFILL, Role.DECODE):
            if all(instance.role not in (role, Role.MIXED) for instance in self.instances):
                raise InvalidInputError(f"layout {self} has no instance to {role}: add one with role {role} or mixed")

    def __str__(self) -> str:
        """The canonical text form; `parse_layout` reads it back to an equal layout."""
        tps = [instance.tp for instance in self.instances]
        named: set[int] = set()  # positions of the instances whose devices must be written
        while True:
            placed = _place([x.devices if i in named else None for i, x in enumerate(self.instances)], tps)
            wrong = [i for i, x in enumerate(self.instances) if placed[i] != x.devices]
            if not wrong:
                break
            named.add(wrong[0])  # naming one device group may put all later ones right
        parts = []
        for is_named, run in itertools.groupby(enumerate(self.instances), lambda item: item[0] in named):
            if is_named:
                parts += [str(instance) for _, instance in run]
            else:
                parts.append(shapes_text(instance.shape for _, instance in run))
        return "+".join(parts)


def shapes_text(shapes: Iterable[Shape]) -> str:
    """Text of shapes in order, equal neighbours joined: `tp2x2:decode+tp1x4/chat`; `parse_shapes` reads it back."""
    return "+".join(_part(shape, count=len(list(run))) for shape, run in itertools.groupby(shapes))


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Reads what the text form says about the instances, wherever they lie.

    Devices that it names are counted and then forgotten.

    Raises:
      InvalidInputError: the text is malformed.
    """
    shapes: list[Shape] = []
    for token in _tokens(text, MOST_DEVICES):
        shapes += [token.shape] * token.count
    return tuple(shapes)


def parse_layout(text: str, num_devices: int) -> Layout:
    """Reads the text form of a layout for a cell of num_devices.

    Devices that the text does not name are assigned from left to right: each instance gets the first run of neighbours
    that is still free.

    Raises:
      InvalidInputError: the text is malformed or wrong on any cell (see `Layout.validate`).
      PreconditionError: the cell has too few devices.
    """
    shapes: list[Shape] = []
    given: list[tuple[int, ...] | None] = []
    for token in _tokens(text, num_devices):
        tp, devices = token.shape.tp, token.devices
        shapes += [token.shape] * token.count
        given += [None if devices is None else devices[i * tp : (i + 1) * tp] for i in range(token.count)]
    instances = []
    for shape, placed in zip(shapes, _place(given, [shape.tp for shape in shapes], num_devices), strict=True):
        if placed is None:
            raise InvalidInputError(
                f"layout {_shorten(text)} leaves no {shape.tp} free neighbours for a tp{shape.tp}: name its devices, "
                "as in tp2@0,3"
            )
        instances.append(InstanceSpec(placed, Role(shape.role), shape.tiers))
    layout = Layout(tuple(instances))
    layout.validate(num_devices, max_tp=num_devices)
    return layout


def enumerate_layouts(num_devices: int, max_tp: int, min_tp: int = 1, roles: bool = False) -> Iterator[Layout]:
    """All layouts of a cell: every multiset of TPs once, in one canonical placement (largest TP first, from device 0).

    As few devices as possible are idle: num_devices % min_tp.

    Args:
      num_devices: how many devices the cell has.
      max_tp: the largest TP to use; need not be a power of two nor fit the cell.
      min_tp: the smallest TP, a power of two.
      roles: also every multiset of roles that can both prefill and decode; else every instance is mixed.

    Yields:
      Valid layouts, those with larger TPs first.

    Raises:
      InvalidInputError: min_tp is no power of two.
      PreconditionError: no TP is possible at all.
    """
    _check_tp(min_tp)
    largest = min(max_tp, num_devices)
    if largest < min_tp:
        raise PreconditionError(
            f"no layout is possible: {num_devices} devices, TP at least {min_tp} and at most {max_tp}; use more devices"
        )
    tps = [tp for tp in (1 << bit for bit in reversed(range(largest.bit_length()))) if tp >= min_tp]
    kinds = [(tp, role) for tp in tps for role in (Role if roles else (Role.MIXED,))]
    return _enumerate(kinds, num_devices)


def _enumerate(kinds: Sequence[tuple[int, Role]], num_devices: int) -> Iterator[Layout]:
    for counts in _counts([tp for tp, _ in kinds], num_devices):
        present = {role for (_, role), count in zip(kinds, counts, strict=True) if count}
        if Role.MIXED not in present and len(present) < 2:
            continue  # prefill alone or decode alone serves no request
        instances = []
        start = 0
        for (tp, role), count in zip(kinds, counts, strict=True):
            for _ in range(count):
                instances.append(InstanceSpec(tuple(range(start, start + tp)), role))
                start += tp
        yield Layout(tuple(instances))


def _counts(sizes: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    """How often to take each size (descending powers of two) so that as much of total as possible is used."""
    if len(sizes) == 1:
        yield (total // sizes[0],)
        return
    for count in reversed(range(total // sizes[0] + 1)):
        for rest in _counts(sizes[1:], total - count * sizes[0]):
            yield (count, *rest)


@dataclasses.dataclass(frozen=True, slots=True)
class _Token:
    """A part of the text: `count` instances of a shape, on these devices if they are named."""

    shape: Shape
    count: int
    devices: tuple[int, ...] | None


def _tokens(text: str, num_devices: int) -> Iterator[_Token]:
    """The parts of a text form, each checked by itself, for no more than so many devices."""
    if len(text) > _MAX_TEXT:
        raise InvalidInputError(f"the layout has {len(text)} characters, more than {_MAX_TEXT}: {GRAMMAR}")
    if not text.strip():
        raise InvalidInputError(f"the layout is empty: {GRAMMAR}")
    total = 0
    for part in text.split("+"):
        token = _token(part)
        total += token.shape.tp * token.count
        if total > num_devices:  # before anything of that size is built
            raise PreconditionError(
                f"layout {_shorten(text)} needs more than the {num_devices} devices of the cell: use fewer or smaller "
                "instances, or start with more devices"
            )
        if token.devices is not None and len(token.devices) != token.shape.tp * token.count:
            raise InvalidInputError(
                f"{_shorten(part)} names {len(token.devices)} devices but needs {token.shape.tp * token.count}: name "
                "as many"
            )
        yield token


def _token(part: str) -> _Token:
    match = _TOKEN.fullmatch(part.strip())
    if match is None:
        raise InvalidInputError(f"{_shorten(part)} is not part of a layout: {GRAMMAR}")
    tp, count, role = int(match["tp"]), int(match["count"] or 1), (match["role"] or Role.MIXED).lower()
    _check_tp(tp)
    if count < 1:
        raise InvalidInputError(f"{_shorten(part)} asks for no instance: give x1 or more, or leave it out")
    if role not in list(Role):
        raise InvalidInputError(f"{_shorten(part)} has an unknown role: use {', '.join(Role)}")
    tiers = tuple(match["tiers"].split(",")) if match["tiers"] else ()
    if len(set(tiers)) < len(tiers):
        raise InvalidInputError(f"{_shorten(part)} names a tier twice: name each once")
    devices = tuple(int(device) for device in match["devices"].split(",")) if match["devices"] else None
    return _Token(Shape(tp, Role(role).value, tiers), count, devices)


def _part(shape: Shape, count: int = 1, devices: Sequence[int] = ()) -> str:
    """A part of the text form, as `_token` reads it."""
    times = f"x{count}" if count > 1 else ""
    places = f"@{','.join(map(str, devices))}" if devices else ""
    role = "" if shape.role == Role.MIXED else f":{shape.role}"
    tiers = f"/{','.join(shape.tiers)}" if shape.tiers else ""
    return f"tp{shape.tp}{times}{places}{role}{tiers}"


def _place(
    given: Sequence[tuple[int, ...] | None], tps: Sequence[int], num_devices: int | None = None
) -> list[tuple[int, ...] | None]:
    """Gives each instance without devices, from left to right, the first run of neighbours that is free.

    Args:
      given: per instance its devices, or None.
      tps: per instance its TP.
      num_devices: where the cell ends; None has no end.

    Returns:
      Per instance its devices, or None where no run is free.
    """
    taken = {device for devices in given if devices is not None for device in devices}
    end = num_devices if num_devices is not None else max(taken, default=0) + 1 + sum(tps)
    placed: list[tuple[int, ...] | None] = []
    for devices, tp in zip(given, tps, strict=True):
        if devices is None:
            starts = range(end - tp + 1)
            devices = next((r for s in starts if taken.isdisjoint(r := tuple(range(s, s + tp)))), None)
            taken.update(devices or ())
        placed.append(devices)
    return placed


def _check_tp(tp: int) -> None:
    if not is_power_of_two(tp):
        raise InvalidInputError(f"tp{tp} is not a power of two: use tp1, tp2, tp4, ...")


def _shorten(token: str) -> str:
    token = token.strip()
    return repr(token if len(token) <= 60 else token[:57] + "...")
