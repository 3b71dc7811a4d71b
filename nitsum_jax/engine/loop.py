"""The engine's own thread: admits, dispatches, takes results in, and switches layouts.

One thread owns all state.  Others post events to it: new requests, cancellations, finished steps, finished
compilations, layout switches.  Programs are launched by this thread alone, hence in one order on all devices, so
collectives of different instances cannot deadlock.
"""

import collections
import dataclasses
import enum
import heapq
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from nitsum_jax.engine.batching.admission import Admission, Counters
from nitsum_jax.engine.batching.allowed import AllowedTokens, MadeMask, MaskMaker
from nitsum_jax.engine.batching.handover import PrefillHandover
from nitsum_jax.engine.batching.intake import Intake
from nitsum_jax.engine.batching.loss import layout_with, layout_without, write_off
from nitsum_jax.engine.batching.pacing import Pace, Pacer
from nitsum_jax.engine.batching.step_log import StepLog
from nitsum_jax.engine.batching.wide_prefill import WidePrefill
from nitsum_jax.engine.cell import Cell
from nitsum_jax.engine.executables.compiling import Group
from nitsum_jax.engine.executables.progress import WantedLayout
from nitsum_jax.engine.instance import MAX_IN_FLIGHT, Instance
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.policy import Policy, leave_instance
from nitsum_jax.engine.request import MAX_SEED, FinishReason, Request, TokenDelta
from nitsum_jax.engine.step.dispatched import PrefillChoice, Step
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.engine.switching.residency import give_up_others
from nitsum_jax.engine.switching.switch import PendingSwitch, perform_switch
from nitsum_jax.errors import PreconditionError, UnavailableError
from nitsum_jax.meshes.layout import Layout

_LOG = logging.getLogger(__name__)

Sink = Callable[[Sequence[TokenDelta]], None]
# Between deadlines; threads cannot wait for ever longer times.
_LONGEST_SLEEP_S = 3600.0
# How long the steps in flight may take at the end.
_LAST_STEPS_S = 10.0


class _Phase(enum.Enum):
    """Of the engine's thread."""

    RUNNING = enum.auto()
    CLOSING = enum.auto()
    ENDED = enum.auto()


class _Deadline(NamedTuple):
    """When a sequence gives up; the number orders those at the same time."""

    time_s: float
    number: int
    sequence: LiveRequest


class Loop:
    """State of a running cell."""

    def __init__(self, cell: Cell, policy: Policy, sink: Sink, *, deterministic: bool, pace: Pace | None = None):
        """Starts with the cell's first layout, whose executables must be ready.

        Args:
          cell: devices, weights, pool, executables.
          policy: decides which and where; its `push` is called under `lock`.
          sink: takes the deltas of a step.
          deterministic: reserve all blocks of a sequence at admission, and recompute outputs token by token.
          pace: at whose pace results are delivered; None: as they come.
        """
        self.cell = cell
        self.layout = self.wanted = cell.first
        self.counters = Counters()
        self.lock = threading.Lock()
        self.alive: dict[str, LiveRequest] = {}
        self.idle = threading.Condition(self.lock)
        self._policy = policy
        self._deterministic = deterministic
        self._sink = sink
        self.log = StepLog()
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._deltas: list[TokenDelta] = []
        self._deadlines: list[_Deadline] = []
        self._retired: list[Instance] = []
        self._switches: collections.deque[PendingSwitch] = collections.deque()
        self._phase = _Phase.RUNNING
        self._wide = WidePrefill(cell, self._on_step)
        self.pacer = None if pace is None else Pacer(pace)
        self._masks = MaskMaker(cell.program.config.vocab_size, lambda made: self.post(lambda: self._take_masks(made)))
        self._admission = Admission(
            cell, policy, self.lock, self.counters, self._wide, self._masks, self._finish, deterministic=deterministic
        )
        self.handover = PrefillHandover(cell, policy, self.pacer, deterministic=deterministic)
        self._intake = Intake(
            cell,
            policy,
            self.pacer,
            self._admission,
            self.counters,
            self.log,
            self._masks,
            say=self._deltas.append,
            finish=self._finish,
            retire=self._retire,
        )
        self.instances = [cell.instance(spec, self._on_step) for spec in cell.first.instances]
        policy.relaid(self.instances, time.monotonic())
        self._thread = threading.Thread(target=self._run, name="nitsum-engine", daemon=True)
        self._thread.start()

    # ---- called by other threads

    def post(self, event: Callable[[], None]) -> None:
        """Has the engine's thread call `event` soon."""
        self._events.put(event)

    def wake(self) -> None:
        """Has the engine's thread look around."""
        self._events.put(lambda: None)

    def add(self, request: Request) -> None:
        """Queues a valid request.

        Raises:
          OverloadedError: the queue is full.
          PreconditionError: a request of this id is alive, or its form does not allow what was generated.
          UnavailableError: the loop has ended.
        """
        seed = request.sampling.seed
        sequence = LiveRequest(
            request,
            seed if seed is not None else secrets.randbelow(MAX_SEED + 1),
            # Deterministic mode makes the output anew: keys and values of a prefill differ in their last bits.
            [*request.prompt_ids, *(() if self._deterministic else request.generated)],
            np.zeros((self.cell.vmap.num_vshards, self.cell.program.pages), np.int32),
            min(len(request.prompt_ids) + request.max_tokens, self.cell.program.max_model_len),
            delivered=len(request.generated),
        )
        if request.form is not None or request.forced_ids:
            sequence.allowed = AllowedTokens(request, self.cell.program.config.vocab_size, sequence)
            if not self._deterministic:
                try:
                    sequence.allowed.go_on(request.generated)
                except ValueError as error:
                    raise PreconditionError(f"the output cannot go on from its tokens: {error}") from None
        # Whoever made its tokens was lost before it could say that nothing follows.
        complete = sequence.awaits_mask
        with self.lock:
            if self._phase is _Phase.ENDED:
                raise UnavailableError("the server is stopping and takes no new requests: try another one")
            if request.id in self.alive:
                raise PreconditionError(f"a request with id {request.id} is alive: choose another id")
            self._policy.push(sequence)
            self.alive[request.id] = sequence
        if request.deadline_s is not None:
            deadline = request.deadline_s
            # The sequence, not its id: that may live again by then.
            self.post(lambda: heapq.heappush(self._deadlines, _Deadline(deadline, id(sequence), sequence)))
        if complete:
            self.post(lambda: self._end(request.id, FinishReason.STOP))
        self.wake()

    def cancel(self, request_id: str) -> None:
        """Ends a request, if it lives."""
        self.post(lambda: self._end(request_id, FinishReason.CANCELLED))

    def switch(self, pending: PendingSwitch) -> None:
        """Queues a layout switch.

        Raises:
          UnavailableError: the loop has ended.
        """
        with self.lock:
            if self._phase is _Phase.ENDED:
                raise UnavailableError("the server is stopping: no layout switch any more")
            self._switches.append(pending)
            self.wanted = pending.layout
        self.wake()

    def wanted_layouts(self) -> list[WantedLayout]:
        """The layouts of the switches that were asked for and are not done."""
        return [WantedLayout(p.layout, tuple(self.cell.groups(p.layout)), p.since_s) for p in self._switches.copy()]

    def stop(self) -> None:
        """Ends everything that is alive, and the threads."""
        self._events.put(None)
        self._thread.join()

    # ---- the engine's thread

    def _run(self) -> None:
        while self._phase is _Phase.RUNNING:
            try:
                self._turn()
            except Exception as error:  # a bug here must not leave streams hanging
                _LOG.exception("the engine failed; all requests that are alive end")
                self._end_all(FinishReason.ERROR, f"internal error: {type(error).__name__}")
                self._flush()
        with self.lock:
            self._phase = _Phase.ENDED  # what came before is ended below, and nothing comes after
        self._end_all(FinishReason.CANCELLED, None)
        self._flush()
        for pending in self._switches:
            if pending.future.set_running_or_notify_cancel():
                pending.future.set_exception(UnavailableError("the server is stopping: no layout switch any more"))
        for instance in self.instances:
            instance.release()
        for instance in (*self.instances, *self._retired):
            instance.wait_closed(_LAST_STEPS_S)
        self._wide.close(_LAST_STEPS_S)
        self._masks.close()

    def _turn(self) -> None:
        """One round: processes events, decides which sequence goes where, launches steps, and passes deltas on."""
        if not self._take_events():
            return
        now = time.monotonic()
        self._take_results(now)
        self._schedule(now)
        self._launch(now)
        self._flush()
        self.log.flush()
        self._launch_trials()

    def _take_events(self) -> bool:
        """Waits for events, and does what they say; returns whether to go on."""
        timeout = self._timeout()
        try:
            event = self._events.get(timeout=timeout)
            while True:
                if event is None:
                    self._phase = _Phase.CLOSING
                    return False
                event()
                event = self._events.get_nowait()
        except queue.Empty:
            return True

    def _take_results(self, now_s: float) -> None:
        """Takes in what is due by the clock: results that were held back, and deadlines.  Others came as events."""
        self._intake.take_due(now_s)
        self._expire()

    def _schedule(self, now_s: float) -> None:
        """Changes the layout if that is due, and seats waiting requests."""
        self._advance_switch()
        self._admission.admit(self.instances, now_s, switching=bool(self._switches))
        self.handover.advance(self.instances, now_s)

    def _launch(self, now_s: float) -> None:
        """Starts all steps that can be started."""
        # In turns: where instances share their processors, as emulated devices do, each gets every n-th step, and none
        # two in a row while the others wait.
        busy = True
        while busy:
            busy = False
            for instance in self.instances:
                busy |= self._dispatch(instance)
            if not self.cell.drain and busy:
                self.handover.advance(self.instances, now_s)
        while (launched := self._wide.prefill(self._admission.make_room)) is not None:
            self._launched(*launched)
        if (moved := self._wide.hand_over()) is not None:
            self._policy.moved(*moved)

    def _timeout(self) -> float | None:
        """How long the engine's thread may sleep, seconds."""
        times = [
            self._deadlines[0].time_s if self._deadlines else None,
            None if self.pacer is None else self.pacer.next_s(),
            self._policy.wake_s(),
        ]
        due = min((time_s for time_s in times if time_s is not None), default=None)
        return None if due is None else min(_LONGEST_SLEEP_S, max(0.0, due - time.monotonic()))

    def _choose(self, instance: Instance) -> PrefillChoice | None:
        choice = self._policy.prefill(instance)
        # Another cut of the prompt would round otherwise.
        return choice if choice is None or not self._deterministic else dataclasses.replace(choice, tokens=None)

    def _dispatch(self, instance: Instance) -> bool:
        before = instance.steps
        alone = self.pacer is None or not instance.in_flight
        changed = alone and instance.dispatch(self._admission.make_room, self._choose)
        if instance.steps != before:
            self._launched(instance, instance.outstanding[-1])
        return changed

    def _launched(self, instance: Instance, step: Step) -> None:
        if self.pacer is not None:
            self.pacer.launched(instance, step, step.launched_s)
        self._policy.launched(instance, step, step.launched_s)

    def _launch_trials(self) -> None:
        """Lets executables run for the first time: those that are of use now, and all when no request is alive."""
        self.cell.executables.launch_trial(self._trial, idle=not self.alive)

    def _trial(self, group: Group, shape: StepShape, compiled: jax.stages.Compiled) -> object:
        lenders = [instance for instance in self.instances if not set(group).isdisjoint(instance.order)]
        if any(instance.broken for instance in lenders):
            return None
        for instance in lenders:
            instance.lend_pool()
        try:
            return self.cell.trial_run(group, shape, compiled)
        finally:
            for instance in lenders:
                instance.regain_pool()

    def _flush(self) -> None:
        if self._deltas:
            deltas = list(self._deltas)
            self._deltas.clear()
            try:
                self._sink(deltas)
            except Exception:  # a fault in a listener must not stop the streams of others
                _LOG.exception("the sink failed; %d deltas are lost", len(deltas))
        with self.lock:
            if not self.alive:
                self.idle.notify_all()

    # ---- results

    def _on_step(self, instance: Instance, step: Step) -> None:
        self.post(lambda: self._intake.take(instance, step))

    def _take_masks(self, made: Sequence[MadeMask]) -> None:
        for one in made:
            sequence = one.allowed.owner
            if one.version != one.allowed.version or sequence.finish is not None:
                continue
            if one.mask is not None:
                one.allowed.made(one.mask)
            elif one.error is None:
                self._finish(sequence, FinishReason.STOP, None)  # the form is complete
            else:
                self._finish(sequence, FinishReason.ERROR, f"the output cannot be held to its form: {one.error}")

    # ---- ends

    def _expire(self) -> None:
        now = time.monotonic()
        while self._deadlines and self._deadlines[0].time_s <= now:
            sequence = heapq.heappop(self._deadlines).sequence
            if sequence.finish is None:
                self._finish(sequence, FinishReason.DEADLINE, None)

    def _end(self, request_id: str, reason: FinishReason) -> None:
        with self.lock:
            sequence = self.alive.get(request_id)
        if sequence is not None:
            self._finish(sequence, reason, None)

    def _end_all(self, reason: FinishReason, error: str | None) -> None:
        with self.lock:
            sequences = list(self.alive.values())
        for sequence in sequences:
            self._finish(sequence, reason, error)

    def _finish(self, sequence: LiveRequest, reason: FinishReason, error: str | None) -> None:
        sequence.finish = reason
        self._admission.drop(sequence)
        self._retire(sequence)
        delta = TokenDelta(sequence.request.id, (), time.monotonic(), reason, error, cached_tokens=sequence.shared)
        self._deltas.append(delta)

    def _retire(self, sequence: LiveRequest) -> None:
        leave_instance(sequence, self._policy)
        with self.lock:
            ended = self.alive.pop(sequence.request.id, None)
        if ended is not None:
            self._policy.ended(sequence, time.monotonic())

    # ---- switching

    def _advance_switch(self) -> None:
        while self._switches:
            pending = self._switches[0]
            if not pending.prepare(self.cell, self.wake) or any(instance.broken for instance in self.instances):
                return
            if self._wide.sequence is not None and not pending.future.done():
                return  # it takes a few steps more, for which no stream waits
            ended = pending.future.done()
            if (
                not ended
                and not pending.stopping
                and not pending.copied_ahead(self.cell, self.instances, self._wide.running, self._policy.place)
            ):
                if not any(instance.in_flight for instance in self.instances):
                    self.wake()  # no step will end and bring the next round about
                return
            # From here on instances stop one by one: what is written meanwhile is left to the switch.
            pending.stopping = True
            if not ended and not pending.slowed_down(self.cell, self.instances):
                return
            self._switches.popleft()
            for instance in self.instances:
                instance.depth = MAX_IN_FLIGHT
            if pending.future.done() or not pending.future.set_running_or_notify_cancel():
                if pending.precopy is not None:
                    pending.precopy.give_up()
                continue
            self._retired = [instance for instance in (*self._retired, *self.instances) if instance.in_flight]
            outcome = perform_switch(self.cell, self.layout, self.instances, pending, self._on_step, self._policy.place)
            self.layout, self.instances = outcome.layout, outcome.instances
            self._relaid()
            if self.pacer is not None and outcome.fresh:
                devices = [device for instance in outcome.fresh for device in instance.order]
                pending.paced_stall_s = self.pacer.switched(devices, outcome.kv_tokens_per_link, time.monotonic())
            if self.cell.lean:
                give_up_others(self.cell.bank, self.cell.vmap, self.layout)
            self.counters.switches += outcome.reporter is not None
            for sequence in outcome.homeless:
                self.counters.sent_back += 1
                if not sequence.pending:
                    self._admission.await_again(sequence)
            if outcome.reporter is not None:
                outcome.reporter.start()
            for device in outcome.lost:
                self._lose(device)

    def _relaid(self) -> None:
        """Other instances are in force."""
        self._policy.relaid(self.instances, time.monotonic())
        self.log.keep(self.instances)
        if self.pacer is not None:
            self.pacer.forget(self.instances)
        if not self._switches:
            self._admission.refuse_hopeless(self.instances)

    def lose_device(self, device: int) -> None:
        """Goes on without a device: whatever is on it is computed anew elsewhere."""
        self.post(lambda: self._lose(device))

    def restore_device(self, device: int) -> None:
        """A lost device is back, empty: it may be used again."""
        self.post(lambda: self._restore(device))

    def _restore(self, device: int) -> None:
        if device not in self.cell.lost:
            return
        self.cell.lost.discard(device)
        self.cell.pool.reset(device)
        _LOG.warning("device %d is back", device)
        wanted = layout_with(self.cell, device, self.layout, self.wanted)
        if wanted is not None:
            self._switches.append(PendingSwitch(wanted, listed=False))

    def _lose(self, device: int) -> None:
        if device in self.cell.lost:
            return
        self.cell.lost.add(device)
        _LOG.error("device %d is lost; its sequences are computed again on the others", device)
        # Results of an instance that a switch has taken away may be outstanding there, too.
        for retired in [i for i in self._retired if i.retired and device in i.order]:
            self._write_off(retired)
        wide = self._wide.lose(device)
        if wide is not None:
            self._write_off(wide)
        for instance in [instance for instance in self.instances if device in instance.order]:
            self._write_off(instance)
            instance.close()
            self.instances.remove(instance)
            for other in set(instance.order) - self.cell.lost:
                self.cell.pool.reset(other)  # its array went along with the step in flight
        if self.cell.prefixes is not None:
            self.cell.prefixes.forget([device])
        self.layout = Layout(tuple(instance.spec for instance in self.instances))
        self._relaid()
        rest = layout_without(self.cell, self.layout)
        if rest is not None:
            self._switches.appendleft(PendingSwitch(rest, listed=False))
        if not self.instances and not self._switches:
            self._end_all(FinishReason.ERROR, "no device is left that can serve: restart the server")

    def _write_off(self, instance: Instance) -> None:
        for sequence in write_off(instance, self._policy):
            self.counters.sent_back += 1
            self._admission.await_again(sequence)
