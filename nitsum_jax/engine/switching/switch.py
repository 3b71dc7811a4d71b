"""Going from one layout to another while sequences live.

1. The executables of the new instances are compiled in the background; until then nothing stops.
2. Instances that the new layout keeps go on.  The others start no step any more; those in flight run to their end.
3. Blocks whose virtual shard now lies on another device are copied behind those steps; all others stay where they are.
   Weights are only wrapped anew.
4. The new instances take over the pools, and their first steps are launched behind the copies.

Nothing in this waits for a device: pools and token histories are futures.  Until the last moment the old instances and
their blocks are whole, so an error at any stage leads back to the old layout (see `rollback`).
"""

import collections
import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from nitsum_jax.engine.cell import Cell
from nitsum_jax.engine.executables.compiling import ASKED_FOR
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.kv.history import is_ready
from nitsum_jax.engine.kv.transfer import Copy
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.step.dispatched import IncomingRequest, Step
from nitsum_jax.engine.switching.migration import (
    Ahead,
    Destination,
    Leaving,
    Moves,
    Seats,
    free,
    least_bytes,
    moved_shards,
    plan_moves,
)
from nitsum_jax.engine.switching.precopy import PreCopy
from nitsum_jax.engine.switching.residency import Prefetch
from nitsum_jax.engine.switching.rollback import CellSnapshot, SavedPlace
from nitsum_jax.errors import NitsumError, PreconditionError
from nitsum_jax.meshes.layout import InstanceSpec, Layout

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SwitchReport:
    """What a switch did.

    Attributes:
      from_layout: text form of the layout before.
      to_layout: text form of the layout after.
      sequences: live sequences whose instance changed.
      kv_bytes_moved: bytes of KV cache copied between devices.
      weight_bytes_moved: bytes of weights copied between devices.
      stall_ms: from the end of the last step of the stopped instances to the end of the copies.
      requeued: sequences without room in the new layout, which are computed again.
      kv_bytes_minimum: least number of bytes that must move: for every sequence the blocks that change their device, on
        the new instance where these are fewest.
      kv_bytes_ahead: part of kv_bytes_moved that was copied before, while the sequences still decoded.
      host_ms: time for planning, remapping, wrapping and seating; while the last steps run it stalls no stream.
      transfer_ms: time for launching the copies, and from the end of those steps, or of the host's part, to the end of
        the copies.
    """

    from_layout: str
    to_layout: str
    sequences: int
    kv_bytes_moved: int
    weight_bytes_moved: int
    stall_ms: float
    requeued: int
    kv_bytes_minimum: int = 0
    kv_bytes_ahead: int = 0
    host_ms: float = 0.0
    transfer_ms: float = 0.0


class PendingSwitch:
    """A switch that was asked for."""

    def __init__(self, layout: Layout, *, listed: bool = True):
        """Asks for `layout`, which the cell can take.

        Args:
          layout: wanted.
          listed: whether it must be on the allow-list; what makes the best of the devices that are left need not be.
        """
        self.layout = layout
        self.since_s = time.monotonic()
        self.paced_stall_s: float | None = None  # what a paced cell makes of the stall
        self._listed = listed
        self.future: concurrent.futures.Future[SwitchReport] = concurrent.futures.Future()
        self.weights_before: int | None = None
        self.precopy: PreCopy | None = None
        self.stopping = False
        self._prefetch: Prefetch | None = None

    def prepare(self, cell: Cell, wake: Callable[[], None]) -> bool:
        """Asks for executables, then for weights; returns whether the switch can begin, or has failed.

        Args:
          cell: whose layout is to change.
          wake: called on another thread when there is news.
        """
        groups = cell.groups(self.layout)
        try:
            cell.check(self.layout, listed=self._listed)
        except NitsumError as error:  # a device was lost since it was asked for
            self.future.set_exception(error)
            return True
        cell.executables.want(groups, ASKED_FOR)
        for group in groups:
            failure = cell.executables.failure(group)
            if failure is not None:
                self.future.set_exception(PreconditionError(f"layout {self.layout} cannot be compiled: {failure}"))
                return True
        if not all(cell.executables.ready(group) for group in groups):
            return False
        if self._prefetch is None:
            self.weights_before = cell.bank.counters.bytes_moved
            self._prefetch = Prefetch(cell.bank, self.layout.instances, wake)
        if self._prefetch.error is not None:
            _LOG.error("the weights of layout %s could not be copied: %s", self.layout, self._prefetch.error)
            self.future.set_exception(PreconditionError(f"the weights of {self.layout}: {self._prefetch.error}"))
        return self._prefetch.done

    def copied_ahead(self, cell: Cell, instances: Sequence[Instance], guest: Instance | None, seats: Seats) -> bool:
        """Copies KV blocks ahead, if the cell is to; returns whether enough of it is done for the switch to begin."""
        if not cell.precopy:
            return True
        if self.precopy is None:
            wanted, there = set(self.layout.instances), {instance.spec for instance in instances}
            leaving = [instance for instance in instances if instance.spec not in wanted]
            destinations = [_destination(cell, spec) for spec in self.layout.instances if spec not in there]
            self.precopy = PreCopy(cell, leaving, destinations, seats)
        return self.precopy.advance(instances, guest)

    def slowed_down(self, cell: Cell, instances: Sequence[Instance]) -> bool:
        """Whether the instances that must go have one step in flight at most; none, if the cell is to drain them.

        They do not end at the same moment, and the sequences of the first wait for the last where they come together;
        with one step in flight instead of two that is half as long.
        """
        wanted = set(self.layout.instances)
        leaving = [instance for instance in instances if instance.spec not in wanted]
        for instance in leaving:
            instance.depth = min(instance.depth, 1)
        if any(instance.in_flight > 1 for instance in leaving):
            return False
        if cell.drain:
            for instance in leaving:
                instance.depth = 0
        return not cell.drain or not any(instance.in_flight for instance in leaving)


def _destination(cell: Cell, spec: InstanceSpec) -> Destination:
    device_of, pool = cell.geometries.of(spec.devices).device_of, cell.pool
    pages = min(pool.allocators[device].total // count for device, count in collections.Counter(device_of).items())
    return Destination(spec, device_of, cell.program.max_batch, pages, pool.shape.page_size)


@dataclasses.dataclass
class SwitchOutcome:
    """State after a switch.

    Attributes:
      layout: in force now.
      instances: of it.
      homeless: sequences that lost their blocks.
      reporter: to be started when this state is in force; it gives the future its report.  None: the switch failed, and
        its future has the error.
      lost: devices that went with a failed one.
      fresh: instances that were not there before.
      kv_tokens_per_link: KV cache that went over the busiest pair of devices, in tokens with all their heads.
    """

    layout: Layout
    instances: list[Instance]
    homeless: list[LiveRequest]
    reporter: threading.Thread | None
    lost: list[int] = dataclasses.field(default_factory=list)
    fresh: list[Instance] = dataclasses.field(default_factory=list)
    kv_tokens_per_link: float = 0.0


def perform_switch(
    cell: Cell,
    before: Layout,
    instances: Sequence[Instance],
    pending: PendingSwitch,
    on_step: Callable[[Instance, Step], None],
    seats: Seats,
) -> SwitchOutcome:
    """Carries a prepared switch out, or leads back to the old layout; the future gets its report after the copies."""
    stopped = _stop(cell, instances, pending)
    fresh: list[Instance] = []
    try:
        plan = _plan(cell, stopped, seats)
        launch = _copy(cell, plan)
        _seat(cell, stopped, plan, fresh, on_step)
    except Exception as error:
        _LOG.exception("switching from %s to %s failed; %s stays", before, pending.layout, before)
        pending.future.set_exception(PreconditionError(f"the switch failed and {before} stays: {error}"))
        return _go_back(cell, before, stopped, fresh)
    return _commit(cell, before, pending, stopped, plan, launch, fresh)


@dataclasses.dataclass(frozen=True)
class _Stopped:
    """The cell when the instances that must go have stopped.

    Attributes:
      start_s: when the switch began.
      kept: instances that the new layout keeps.
      gone: those that it does not.
      specs: what it brings.
      running: token histories of steps that still run.
      ahead: what was copied ahead, by id of the sequence.
      snapshot: what there is to go back to.
    """

    start_s: float
    kept: list[Instance]
    gone: list[Instance]
    specs: list[InstanceSpec]
    running: list[jax.Array]
    ahead: Mapping[int, Ahead]
    snapshot: CellSnapshot


@dataclasses.dataclass(frozen=True)
class _MovePlan:
    """Which sequence goes where.

    Attributes:
      moves: the blocks that move, and the host of every place of the snapshot.
      minimum: bytes that must move at least.
      ahead: bytes that were copied ahead.
    """

    moves: Moves
    minimum: int
    ahead: int


@dataclasses.dataclass(frozen=True)
class _Launch:
    """The copies under way, and how long it took to launch them."""

    copies: list[Copy]
    seconds: float

    @property
    def bytes(self) -> int:
        """What they move."""
        return sum(copy.bytes for copy in self.copies)


def _stop(cell: Cell, instances: Sequence[Instance], pending: PendingSwitch) -> _Stopped:
    """First step: instances that the new layout does not keep give their pools back, and all is noted."""
    start_s = time.monotonic()
    wanted = set(pending.layout.instances)
    kept = [instance for instance in instances if instance.spec in wanted]
    gone = [instance for instance in instances if instance.spec not in wanted]
    there = {instance.spec for instance in kept}
    specs = [spec for spec in pending.layout.instances if spec not in there]
    running = [instance.history for instance in gone if not is_ready(instance.history)]
    for instance in gone:
        instance.lend_pool()
    cell.switch_mover.settle(device for instance in gone for device in instance.order)
    ahead = {} if pending.precopy is None else pending.precopy.take()
    return _Stopped(start_s, kept, gone, specs, running, ahead, CellSnapshot(cell, gone))


def _plan(cell: Cell, stopped: _Stopped, seats: Seats) -> _MovePlan:
    """Second step: chooses an instance for every sequence, takes its blocks there, and remaps its table."""
    travellers = [Leaving(place.sequence, place.home.device_of) for place in stopped.snapshot.places]
    destinations = [_destination(cell, spec) for spec in stopped.specs]
    minimum = least_bytes(travellers, destinations, cell.pool)
    ahead = _bytes_of(travellers, destinations, stopped.ahead, cell)
    return _MovePlan(plan_moves(travellers, destinations, cell.pool, stopped.ahead, seats), minimum, ahead)


def _copy(cell: Cell, plan: _MovePlan) -> _Launch:
    """Third step: launches the copies, behind the steps in flight."""
    start_s = time.monotonic()
    copies = [
        cell.switch_mover.move(source, target, np.concatenate(old), np.concatenate(new))
        for (source, target), (old, new) in plan.moves.blocks.items()
    ]
    return _Launch(copies, time.monotonic() - start_s)


def _seat(
    cell: Cell, stopped: _Stopped, plan: _MovePlan, fresh: list[Instance], on_step: Callable[[Instance, Step], None]
) -> None:
    """Fourth step: the new instances take over pools and sequences; each is in `fresh` as soon as it exists."""
    for spec in stopped.specs:
        cell.bank.fetch(spec)
        fresh.append(cell.instance(spec, on_step))
    seats = list(zip(stopped.snapshot.places, plan.moves.assigned, strict=True))
    for index, instance in enumerate(fresh):
        instance.adopt(
            [IncomingRequest(p.sequence, p.home.history, p.row) for p, destination in seats if destination == index]
        )


def _commit(
    cell: Cell,
    before: Layout,
    pending: PendingSwitch,
    stopped: _Stopped,
    plan: _MovePlan,
    launch: _Launch,
    fresh: list[Instance],
) -> SwitchOutcome:
    """Fifth step, in which nothing can fail: what the old instances held is let go, and the new ones are in force."""
    places, moves = stopped.snapshot.places, plan.moves
    free(moves.freed, cell.pool)
    homeless = [place for place, destination in zip(places, moves.assigned, strict=True) if destination is None]
    for place in homeless:
        _evict(cell, place)
    outstanding = [step for instance in stopped.gone for step in instance.outstanding]
    for instance in fresh:
        instance.follow(outstanding)
    for instance in stopped.gone:
        instance.retire()
    kv_bytes = launch.bytes + plan.ahead
    report = SwitchReport(
        from_layout=str(before),
        to_layout=str(pending.layout),
        sequences=len(places),
        kv_bytes_moved=kv_bytes,
        kv_bytes_ahead=plan.ahead,
        weight_bytes_moved=cell.bank.counters.bytes_moved - (pending.weights_before or 0),
        stall_ms=0.0,
        requeued=len(homeless),
        kv_bytes_minimum=min(plan.minimum, kv_bytes),  # shared pages move once
        host_ms=1000 * (time.monotonic() - stopped.start_s - launch.seconds),
        transfer_ms=1000 * launch.seconds,
    )
    flags = [copy.done for copy in launch.copies if copy.done is not None]
    arguments = (pending, report, stopped.start_s if places else None, stopped.running, flags)
    by_spec = {instance.spec: instance for instance in (*stopped.kept, *fresh)}
    busiest = max((sum(map(len, old)) for old, _ in moves.blocks.values()), default=0)
    return SwitchOutcome(
        pending.layout,
        [by_spec[spec] for spec in pending.layout.instances],
        [place.sequence for place in homeless],
        threading.Thread(target=_report, args=arguments, name="nitsum-report", daemon=True),
        fresh=fresh,
        kv_tokens_per_link=busiest * cell.pool.shape.page_size / cell.vmap.num_vshards,
    )


def _go_back(cell: Cell, before: Layout, stopped: _Stopped, fresh: list[Instance]) -> SwitchOutcome:
    """Instead, if one of the steps before failed: the old instances go on."""
    places = stopped.snapshot.places
    copies_ahead = [(place.home.device_of, stopped.ahead.get(id(place.sequence))) for place in places]
    restored = stopped.snapshot.restore(fresh)
    for old, there_already in copies_ahead:
        if there_already is not None:
            there_already.release(old, cell.pool)
    alive = {instance.spec: instance for instance in (*stopped.kept, *restored.alive)}
    specs = [spec for spec in before.instances if spec in alive]
    return SwitchOutcome(Layout(tuple(specs)), [alive[spec] for spec in specs], restored.victims, None, restored.lost)


def _report(
    pending: PendingSwitch,
    report: SwitchReport,
    start: float | None,
    running: list[jax.Array],
    flags: list[jax.Array],
) -> None:
    """Waits for the copies, off the engine's thread, and tells how long they took."""
    try:
        jax.block_until_ready(running)
        begin = time.monotonic()
        jax.block_until_ready(flags)
        end = time.monotonic()
    except Exception as error:  # the steps behind it fail too, and their instances deal with that
        pending.future.set_exception(PreconditionError(f"copying KV blocks failed: {error}"))
        return
    # While the last steps of the old layout run, no stream waits for the switch.
    stall_s = 0.0 if start is None else end - (begin if running else start)
    if pending.paced_stall_s is not None and start is not None:
        stall_s = pending.paced_stall_s
    pending.future.set_result(
        dataclasses.replace(
            report,
            stall_ms=1000 * stall_s,
            transfer_ms=report.transfer_ms + (1000 * (end - begin) if flags else 0.0),
        )
    )


def _bytes_of(
    travellers: Sequence[Leaving], destinations: Sequence[Destination], ahead: Mapping[int, Ahead], cell: Cell
) -> int:
    """What was copied ahead, bytes."""
    blocks = 0
    for sequence, old in travellers:
        there = ahead.get(id(sequence))
        if there is not None:
            blocks += there.pages * moved_shards(old, destinations[there.destination].device_of)
    return blocks * cell.pool.shape.block_bytes


def _evict(cell: Cell, place: SavedPlace) -> None:
    sequence = place.sequence
    for vshard, device in enumerate(place.home.device_of):
        cell.pool.allocators[device].give(sequence.page_table[vshard, : sequence.pages])
    sequence.pages = 0
    sequence.row = -1
    sequence.home = None
