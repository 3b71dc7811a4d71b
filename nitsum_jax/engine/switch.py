"""Going from one layout to another while sequences live.

1. The executables of the new instances are compiled in the background; until then nothing stops.
2. Instances that the new layout keeps go on.  The others start no step any more; when those in flight are read, they
   are gone.
3. Blocks whose virtual shard now lies on another device are copied; all others stay where they are.  Weights are only
   wrapped anew.
4. The new instances take over the pools, and the sequences go on with their next token.
"""

import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np

from nitsum_jax.engine.cell import Cell
from nitsum_jax.engine.executables import ASKED_FOR
from nitsum_jax.engine.instance import Instance, Step
from nitsum_jax.engine.migration import Host, free, least_bytes, plan_moves
from nitsum_jax.engine.sequence import Sequence
from nitsum_jax.errors import PreconditionError
from nitsum_jax.meshes.layout import Instance as InstanceSpec
from nitsum_jax.meshes.layout import Layout

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SwitchReport:
    """What a switch did.

    Attributes:
      from_layout: text form.
      to_layout: text form.
      sequences: live sequences whose instance changed.
      kv_bytes_moved: between devices.
      weight_bytes_moved: between devices.
      stall_ms: from the last result of the stopped instances to the end of the copies.
      requeued: sequences without room in the new layout, to be computed anew.
      kv_bytes_minimum: what must move at least: for every sequence the blocks that change their device on that new
        instance where these are fewest.
      host_ms: the part of the stall that plans, remaps, wraps and seats.
      transfer_ms: the part that starts the copies and waits for them.
    """

    from_layout: str
    to_layout: str
    sequences: int
    kv_bytes_moved: int
    weight_bytes_moved: int
    stall_ms: float
    requeued: int
    kv_bytes_minimum: int = 0
    host_ms: float = 0.0
    transfer_ms: float = 0.0


class PendingSwitch:
    """A switch that was asked for."""

    def __init__(self, layout: Layout):
        """Asks for `layout`, which the cell can take."""
        self.layout = layout
        self.future: concurrent.futures.Future[SwitchReport] = concurrent.futures.Future()
        self._stopped: frozenset[InstanceSpec] | None = None

    def stops(self, instance: Instance) -> bool:
        """Whether this instance starts no step any more because of this switch."""
        return self._stopped is not None and instance.spec in self._stopped

    def prepare(self, cell: Cell, instances: Seq[Instance]) -> bool:
        """Asks for executables, then slows down what must stop; returns whether all has stopped to start steps.

        That is so too if the switch has failed; its future says so.
        """
        if self._stopped is not None:
            return True
        groups = cell.groups(self.layout)
        cell.executables.want(groups, ASKED_FOR)
        for group in groups:
            failure = cell.executables.failure(group)
            if failure is not None:
                self.future.set_exception(PreconditionError(f"layout {self.layout} does not compile: {failure}"))
                self._stopped = frozenset()
                return True
        if not all(cell.executables.ready(group) for group in groups):
            return False
        wanted = set(self.layout.instances)
        leaving = [instance for instance in instances if instance.spec not in wanted]
        # They do not come to a halt at the same moment, and the first waits for the last.  With one step in flight
        # instead of two that is half as long, so they slow down before they stop.
        for instance in leaving:
            instance.depth = 1
        if any(instance.in_flight > 1 for instance in leaving):
            return False
        self._stopped = frozenset(instance.spec for instance in leaving)
        return True


@dataclasses.dataclass
class SwitchOutcome:
    """State after a switch; `report` is None if it failed, and then its future has the error."""

    layout: Layout
    instances: list[Instance]
    homeless: list[Sequence]
    report: SwitchReport | None


def perform_switch(
    cell: Cell,
    before: Layout,
    instances: Seq[Instance],
    pending: PendingSwitch,
    on_step: Callable[[Instance, Step], None],
) -> SwitchOutcome:
    """Carries a prepared switch out; no step of a stopped instance may be in flight."""
    start = time.monotonic()
    kept = [instance for instance in instances if not pending.stops(instance)]
    gone = [instance for instance in instances if pending.stops(instance)]
    travellers: list[tuple[Sequence, list[int]]] = []
    for instance in gone:
        for sequence in list(instance.rows.values()):
            instance.part(sequence)
            travellers.append((sequence, instance.device_of))
        instance.release()
    there = {instance.spec for instance in kept}
    specs = [spec for spec in pending.layout.instances if spec not in there]
    weights_before = cell.bank.counters.bytes_moved
    fresh: list[Instance] = []
    try:
        hosts = [Host(tuple(_devices_of(cell, spec)), cell.program.max_batch, spec.tp) for spec in specs]
        minimum = least_bytes(travellers, hosts, cell.pool)
        moves = plan_moves(travellers, hosts, cell.pool)
        moved = 0
        transfer_s = -time.monotonic()
        for (source, target), (old, new) in moves.blocks.items():
            moved += cell.mover.move(source, target, np.concatenate(old), np.concatenate(new))
        transfer_s += time.monotonic()
        free(moves.freed, cell.pool)
        homeless = []
        for (sequence, devices), host in zip(travellers, moves.assigned, strict=True):
            if host is None:
                _free_all(cell, sequence, devices)
                homeless.append(sequence)
        for spec in specs:
            cell.bank.fetch(spec)
        transfer_s -= time.monotonic()
        cell.mover.settle(sorted({target for _, target in moves.blocks}))
        transfer_s += time.monotonic()
        for spec in specs:
            fresh.append(cell.instance(spec, on_step))
        for index, instance in enumerate(fresh):
            instance.adopt([s for (s, _), host in zip(travellers, moves.assigned, strict=True) if host == index])
    except Exception as error:
        _LOG.exception("switching from %s to %s failed; its sequences are computed anew", before, pending.layout)
        pending.future.set_exception(PreconditionError(f"the switch failed and {before} stays: {error}"))
        for instance in fresh:
            instance.close()
        return _start_over(cell, before, kept, gone, [sequence for sequence, _ in travellers], on_step)
    by_spec = {instance.spec: instance for instance in (*kept, *fresh)}
    stall_s = time.monotonic() - start if travellers else 0.0
    report = SwitchReport(
        from_layout=str(before),
        to_layout=str(pending.layout),
        sequences=len(travellers),
        kv_bytes_moved=moved,
        weight_bytes_moved=cell.bank.counters.bytes_moved - weights_before,
        stall_ms=1000 * stall_s,
        requeued=len(homeless),
        kv_bytes_minimum=minimum,
        host_ms=1000 * max(0.0, stall_s - transfer_s),
        transfer_ms=1000 * transfer_s,
    )
    ordered = [by_spec[spec] for spec in pending.layout.instances]
    return SwitchOutcome(pending.layout, ordered, homeless, report)


def _devices_of(cell: Cell, spec: InstanceSpec) -> list[int]:
    return [cell.vmap.device_of(spec.devices, vshard) for vshard in range(cell.vmap.num_vshards)]


def _free_all(cell: Cell, sequence: Sequence, devices: Seq[int]) -> None:
    for vshard, device in enumerate(devices):
        cell.pool.allocators[device].give(sequence.table[vshard, : sequence.pages])
    sequence.pages = 0


def _start_over(
    cell: Cell,
    before: Layout,
    kept: Seq[Instance],
    gone: Seq[Instance],
    sequences: list[Sequence],
    on_step: Callable[[Instance, Step], None],
) -> SwitchOutcome:
    """The old layout with empty pools on the devices of the failed switch."""
    # Devices that were idle count too: the new layout may have taken blocks there.
    for device in set(range(len(cell.devices))).difference(*(instance.order for instance in kept)):
        cell.pool.reset(device)
    for sequence in sequences:
        sequence.pages = 0
        sequence.row = -1
        sequence.home = None
    back = [*kept, *(cell.instance(instance.spec, on_step) for instance in gone)]
    by_spec = {instance.spec: instance for instance in back}
    return SwitchOutcome(before, [by_spec[spec] for spec in before.instances], sequences, None)
