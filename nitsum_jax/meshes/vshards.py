"""Which device holds which virtual shards (vshards) at which tensor-parallel degree (TP).

A model is cut once into K vshards.  An instance of t devices gives each of them K/t neighbouring vshards; *which* ones
is decided by the rank of a device, and ranks are the bits of the device's number in reverse order:

    rank(device, t) = bit_reverse(device % t, log2 t)

Why reversed?  Two wishes pull at the numbering.  Ranges should *nest*: what a device holds at TP=2t should be a part of
what it holds at TP=t, so that growing TP moves no weight byte.  And an instance should be a run of *neighbouring*
devices, because those share the fast links.  Plain numbering (rank = device % t) gives neighbours but does not nest:
device 1 would hold the second half at TP=2 and the second quarter at TP=4.  Reversing the bits appends one bit at the
*low* end of the rank when TP doubles, and a low bit only splits the range it already had:

    K=4       device 0   device 1   device 2   device 3
    TP=1      0 1 2 3    0 1 2 3    0 1 2 3    0 1 2 3
    TP=2      0 1        2 3        0 1        2 3
    TP=4      0          2          1          3

So any t devices whose numbers differ modulo t can form an instance; every run of t neighbours does, wherever it starts.

Pure: no JAX in here.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from nitsum_jax.errors import InvalidInputError, PreconditionError


def is_power_of_two(number: int) -> bool:
    """True for 1, 2, 4, 8, ..."""
    return number > 0 and number & (number - 1) == 0


def bit_reverse(number: int, bits: int) -> int:
    """The lowest `bits` bits of number (>= 0), read backwards: of 0b001 and 3 it makes 0b100."""
    reversed_ = 0
    for _ in range(bits):
        reversed_ = reversed_ << 1 | number & 1
        number >>= 1
    return reversed_


def ranks_differ(devices: Sequence[int]) -> bool:
    """True if each device would have a rank of its own in an instance of exactly these devices."""
    return len({device % len(devices) for device in devices}) == len(devices) > 0


@dataclasses.dataclass(frozen=True, slots=True)
class VshardMap:
    """The map from vshards to devices, for every TP that a cell can use.

    Attributes:
      num_vshards: K, a power of two; also the largest TP.
      min_tp: m, a power of two; the smallest TP (more than 1 where the weights do not fit one device).

    Raises:
      InvalidInputError: K or m is no power of two, or m > K.
    """

    num_vshards: int
    min_tp: int = 1

    def __post_init__(self) -> None:
        if not is_power_of_two(self.num_vshards):
            raise InvalidInputError(f"vshards={self.num_vshards} is not a power of two: give 1, 2, 4, 8, ...")
        if not is_power_of_two(self.min_tp) or self.min_tp > self.num_vshards:
            raise InvalidInputError(
                f"a smallest TP of {self.min_tp} does not fit {self.num_vshards} vshards: give a power of two, "
                f"at most {self.num_vshards}"
            )

    @property
    def tps(self) -> tuple[int, ...]:
        """All TPs of the map, ascending: m, 2m, ..., K."""
        first, last = self.min_tp.bit_length(), self.num_vshards.bit_length()
        return tuple(1 << bit - 1 for bit in range(first, last + 1))

    def slots(self, tp: int) -> int:
        """How many vshards each device of an instance of this TP holds: K / tp.

        Raises:
          InvalidInputError: tp is no power of two.
          PreconditionError: tp is outside m to K.
        """
        if not is_power_of_two(tp):
            raise InvalidInputError(f"tp{tp} is not a power of two: use tp1, tp2, tp4, ...")
        if not self.min_tp <= tp <= self.num_vshards:
            raise PreconditionError(
                f"tp{tp} is not possible with {self.num_vshards} vshards: use tp{self.min_tp} to tp{self.num_vshards}"
            )
        return self.num_vshards // tp

    def rank_of(self, device: int, tp: int) -> int:
        """The rank, 0 to tp-1, of a device in any instance of this TP; raises as `slots` does."""
        self.slots(tp)
        return bit_reverse(device % tp, tp.bit_length() - 1)

    def vshards_of(self, device: int, tp: int) -> range:
        """The K/tp neighbouring vshards that a device holds in any instance of this TP; raises as `slots` does."""
        slots = self.slots(tp)
        rank = self.rank_of(device, tp)
        return range(rank * slots, (rank + 1) * slots)

    def resident(self, device: int, tps: Iterable[int]) -> tuple[int, ...]:
        """The vshards, ascending, that a device needs so that it can serve at any of these TPs."""
        return tuple(sorted({vshard for tp in tps for vshard in self.vshards_of(device, tp)}))

    def residency(self, groups: Iterable[Sequence[int]]) -> dict[int, frozenset[int]]:
        """The vshards each device needs so that each of these groups of devices can be an instance.

        Args:
          groups: devices of the instances of all layouts that shall be ready at any time.

        Returns:
          Per device that is in some group, its vshards.
        """
        tps: dict[int, set[int]] = {}
        for devices in groups:
            self.check_group(devices)
            for device in devices:
                tps.setdefault(device, set()).add(len(devices))
        return {device: frozenset(self.resident(device, tps[device])) for device in sorted(tps)}

    def check_group(self, devices: Sequence[int]) -> None:
        """Checks that these devices can form an instance.

        Raises:
          InvalidInputError: their number is no power of two, or two of them would have the same rank.
          PreconditionError: their number is outside m to K.
        """
        self.slots(len(devices))
        if not ranks_differ(devices):
            raise InvalidInputError(
                f"devices {', '.join(map(str, devices))} cannot form a tp{len(devices)} instance, since two of them "
                f"hold the same vshards: use devices whose numbers differ modulo {len(devices)}, such as neighbours"
            )

    def ordered(self, devices: Sequence[int]) -> tuple[int, ...]:
        """The devices of an instance in order of rank, which is the order of its mesh; raises as `check_group` does."""
        self.check_group(devices)
        return tuple(sorted(devices, key=lambda device: self.rank_of(device, len(devices))))

    def device_of(self, devices: Sequence[int], vshard: int) -> int:
        """The one device of an instance that holds this vshard.

        Raises:
          ValueError: vshard is outside 0 to K-1.
          InvalidInputError, PreconditionError: as `check_group` does.
        """
        if not 0 <= vshard < self.num_vshards:
            raise ValueError(f"vshard {vshard} is outside 0 to {self.num_vshards - 1}")
        return self.ordered(devices)[vshard // self.slots(len(devices))]
