"""Which weights stay on which device: all that any layout needs, or only what the layout in force needs.

`resident`: every device keeps what every allowed layout needs of it.  A switch moves no weight byte.
`lean`: a device keeps what the layout in force needs of it.  A switch copies the missing vshards first, layer by
layer in the background while the old layout serves, and gives up the rest when it is done.

Because vshards nest (see `meshes.vshards`), the layout of the smallest TP needs as much as all layouts together: lean
saves memory while layouts of higher TP are in force, not at its peak, and the memory plan reckons with the peak.
"""

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence

import jax

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.meshes.layout import InstanceSpec, Layout
from nitsum_jax.meshes.vshards import VshardMap
from nitsum_jax.meshes.weight_bank import WeightBank

_LOG = logging.getLogger(__name__)
POLICIES = ("auto", "resident", "lean")
# What is under way at a time while a lean switch is prepared: small beside any layer's share of a large model.
PIECE_BYTES = 64 << 20
_GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Residency:
    """The policy of a cell.

    Attributes:
      lean: whether only the layout in force is kept.
      first: device -> vshards that are loaded at the start.
      bytes_per_device: most weights that a device holds.
      why: what was chosen, and why, in a line.
    """

    lean: bool
    first: dict[int, frozenset[int]]
    bytes_per_device: int
    why: str


def choose_residency(
    policy: str,
    budget_gib: float | None,
    *,
    vmap: VshardMap,
    devices: int,
    first: Layout,
    groups: Sequence[Sequence[int]],
    shard_bytes: int,
    replicated_bytes: int,
) -> Residency:
    """Chooses what stays on the devices.

    Args:
      policy: "resident", "lean", or "auto": resident unless it takes more than the budget.
      budget_gib: weights that may stay on a device, GiB; None: whatever fits.
      vmap: which vshards lie where.
      devices: N.
      first: the layout of the start.
      groups: devices of all instances that there may ever be.
      shard_bytes: of a vshard.
      replicated_bytes: of what every device holds.

    Raises:
      InvalidInputError: the policy is not known, or the first layout alone takes more than the budget.
    """
    if policy not in POLICIES:
        raise InvalidInputError(f"residency={policy} is not known: give one of {', '.join(POLICIES)}")
    everything = {d: frozenset[int]() for d in range(devices)} | vmap.residency(groups)
    current = {d: frozenset[int]() for d in range(devices)} | vmap.residency([i.devices for i in first.instances])

    def size(held: dict[int, frozenset[int]]) -> int:
        return max(len(vshards) for vshards in held.values()) * shard_bytes + replicated_bytes

    peak, now = size(everything), size(current)
    budget = None if budget_gib is None else int(budget_gib * _GIB)
    lean = policy == "lean" or (policy == "auto" and budget is not None and peak > budget)
    if budget is not None and now > budget and lean:
        raise InvalidInputError(
            f"layout {first} takes {_gib(now)} GiB of weights per device, more than the budget of {budget_gib:g} GiB: "
            "raise --weight_budget_gib or start with a higher TP"
        )
    reason = "asked for" if policy != "auto" else "no budget was set"
    if policy == "auto" and budget is not None:
        reason = f"{_gib(peak)} GiB is {'more than' if lean else 'within'} the budget of {budget_gib:g} GiB"
    what = (
        f"lean, {_gib(now)} GiB now and {_gib(peak)} GiB at most while a switch copies"
        if lean
        else f"resident, {_gib(peak)} GiB for all layouts at any time"
    )
    return Residency(lean, current if lean else everything, peak, f"weights per device: {what} ({reason})")


class Prefetch:
    """Copies the weights that a layout lacks, in the background, layer by layer."""

    def __init__(self, bank: WeightBank, specs: Sequence[InstanceSpec], on_done: Callable[[], None]):
        """Starts, if anything is missing.

        Args:
          bank: the weights.
          specs: instances of the layout.
          on_done: called on another thread at the end.
        """
        self.error: Exception | None = None
        self.done = not any(bank.missing(spec) for spec in specs)
        self._bank, self._specs, self._on_done = bank, specs, on_done
        if not self.done:
            threading.Thread(target=self._run, name="nitsum-fetch", daemon=True).start()

    def _run(self) -> None:
        try:
            for spec in self._specs:
                while moved := self._bank.fetch_some(spec, PIECE_BYTES):
                    jax.block_until_ready(moved)
        except Exception as error:  # the switch fails with it, and the layout in force stays
            self.error = error
        self.done = True
        self._on_done()


def give_up_others(bank: WeightBank, vmap: VshardMap, layout: Layout) -> int:
    """Gives up what this layout does not need; returns the bytes."""
    needed = vmap.residency([instance.devices for instance in layout.instances])
    freed = 0
    for device in range(bank.num_devices):
        freed += bank.drop(device, bank.resident(device) - needed.get(device, frozenset()))
    return freed


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f}"
