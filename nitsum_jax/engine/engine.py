"""The engine of one cell: requests in, tokens out, and the layout changed in between."""

import atexit
import concurrent.futures
import dataclasses
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

from nitsum_jax.engine.batching.load import InstanceLoad, instance_loads
from nitsum_jax.engine.batching.pacing import PaceStats
from nitsum_jax.engine.batching.step_log import StepListener
from nitsum_jax.engine.batching.waiting import FifoPolicy
from nitsum_jax.engine.cell import Cell, build_cell
from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.executables.compiling import ASKED_FOR, LIKELY, compile_counter
from nitsum_jax.engine.executables.progress import CompileProgress, WantedLayout
from nitsum_jax.engine.loop import Loop
from nitsum_jax.engine.policy import Policy
from nitsum_jax.engine.request import Request, RequestLimits, TokenDelta, check_request
from nitsum_jax.engine.switching.switch import PendingSwitch, SwitchReport
from nitsum_jax.errors import InvalidInputError, NitsumError, PreconditionError, UnavailableError
from nitsum_jax.meshes.layout import Layout, parse_layout
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.loading import OpenModel

T = TypeVar("T")

_PROGRESS_S = 0.5


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """A snapshot of counters and gauges.

    Attributes:
      waiting: requests that no instance has taken yet.
      running: requests that an instance works on.
      queue_capacity: most requests that may wait.
      blocks_free: free KV blocks of all devices.
      blocks_total: all KV blocks.
      tokens_generated: output tokens so far.
      steps: steps finished so far.
      switches: layout switches so far.
      sent_back: sequences that lost their blocks and had to be computed again.
      compiles: XLA compilations of this process.
      weight_bytes_wrapped: bytes of weights put into parameter trees without a copy.
      weight_bytes_moved: bytes of weights copied between devices.
      weight_bytes_freed: bytes of weights freed by devices that no longer need them.
      wide_prefills: prompts prefilled at the widest TP between the steps of others.
      hand_overs: sequences that went from a prefill instance to one that decodes.
      paced: whether results are delivered at the pace of other hardware; times are not of this machine then.
      pace_late_share: share of the steps that came later than their pace.
      pace_late_steps: number of these steps.
      pace_worst_late_ms: largest lateness of a step, milliseconds.
      pace_valid: whether the share is within the limit; if not, measurements are invalid.
      blocks_cached: free KV blocks that still hold pages which later requests can use.
      prefix_queried_tokens: prompt tokens looked up in the prefix cache.
      prefix_hit_tokens: prompt tokens found in the prefix cache.
      broken_logits: requests that failed because the model produced NaN or infinite logits.
      page_size: tokens of a KV block.
      pages_total: pages that the cell has room for; each takes a block for every virtual shard.
    """

    waiting: int
    running: int
    queue_capacity: int
    blocks_free: int
    blocks_total: int
    tokens_generated: int
    steps: int
    switches: int
    sent_back: int
    compiles: int
    weight_bytes_wrapped: int = 0
    weight_bytes_moved: int = 0
    weight_bytes_freed: int = 0
    wide_prefills: int = 0
    hand_overs: int = 0
    paced: bool = False
    pace_late_share: float = 0.0
    pace_late_steps: int = 0
    pace_worst_late_ms: float = 0.0
    pace_valid: bool = True
    blocks_cached: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    broken_logits: int = 0
    page_size: int = 0
    pages_total: int = 0


class Engine:
    """The thread-safe face of a running cell; made by `start_engine`."""

    def __init__(
        self,
        model: OpenModel,
        config: EngineConfig,
        sink: Callable[[Sequence[TokenDelta]], None],
        policy: Policy,
        on_progress: Callable[[CompileProgress], None] | None = None,
    ):
        self._counter = compile_counter()
        self.config = config
        self.model_config: ModelConfig = model.config
        self.tier_names = config.tier_names
        self._policy = policy
        self._accepting = True
        self._closed = threading.Lock()
        self._preparing: dict[concurrent.futures.Future[SwitchReport], WantedLayout] = {}
        self._loop: Loop | None = None
        self._cell = build_cell(model, config, self._on_compiled)
        self.memory_report = self._cell.memory.text
        self.device_names = tuple(str(device) for device in self._cell.devices)
        first = self._cell.groups(self._cell.first)
        self._wait(WantedLayout(self._cell.first, tuple(first), time.monotonic()), on_progress)
        self._cell.executables.serve()
        self._loop = Loop(self._cell, policy, sink, deterministic=config.deterministic, pace=config.pace)
        for layout in self._cell.known_layouts():
            self._cell.executables.want(self._cell.groups(layout), LIKELY)
        # An engine that was not closed, in a notebook for instance, ends quietly all the same.
        atexit.register(_close, weakref.ref(self))

    def _wait(self, first: WantedLayout, on_progress: Callable[[CompileProgress], None] | None) -> None:
        """Until the first layout can serve."""
        executables = self._cell.executables
        if on_progress is None:
            executables.wait(first.groups)
            return
        while not executables.wait(first.groups, timeout_s=_PROGRESS_S):
            on_progress(executables.progress([first]))

    @property
    def cell(self) -> Cell:
        """Devices, weights and pool, for those who measure them; the engine's thread changes them meanwhile."""
        return self._cell

    def submit(self, request: Request) -> None:
        """Queues a request; its deltas go to the sink.

        Raises:
          InvalidInputError: the request is wrong in itself.
          PreconditionError: it cannot be served by this engine: longer than context or pool.
          OverloadedError: the queue is full.
          UnavailableError: the engine drains or is closed.
        """
        if not self._accepting:
            raise UnavailableError("the server is stopping and takes no new requests: try another one")
        check_request(request, self.request_limits())
        self._running.add(request)

    def cancel(self, request_id: str) -> None:
        """Ends a request within a step and frees its blocks; unknown ids are ignored."""
        self._running.cancel(request_id)

    def set_layout(self, layout: str | Layout) -> "concurrent.futures.Future[SwitchReport]":
        """Asks for another layout; the future is done when it is in force.

        Raises:
          InvalidInputError: the layout is malformed.
          PreconditionError: this cell cannot take it.
          UnavailableError: the engine is closed.
        """
        pending = PendingSwitch(self._checked(layout))
        self._running.switch(pending)
        return pending.future

    def lose_device(self, device: int) -> None:
        """Tells that a device failed for good: its sequences are computed anew elsewhere, and no layout may use it.

        Raises:
          InvalidInputError: there is no such device.
        """
        if not 0 <= device < len(self._cell.devices):
            raise InvalidInputError(f"there is no device {device}: give one from 0 to {len(self._cell.devices) - 1}")
        self._running.lose_device(device)

    def restore_device(self, device: int) -> None:
        """Tells that a lost device is back, with nothing on it but its weights.

        The cell goes back to the last layout that was asked for, if all of its devices are there.

        Raises:
          InvalidInputError: there is no such device, or it is not lost.
        """
        if device not in self._cell.lost:
            raise InvalidInputError(f"device {device} is not lost: {sorted(self._cell.lost) or 'none'} are")
        self._running.restore_device(device)

    def lost_devices(self) -> tuple[int, ...]:
        """Devices that are lost."""
        return tuple(sorted(self._cell.lost))

    def on_step(self, listener: StepListener) -> None:
        """Adds a listener for finished steps, called with batches on the engine's thread; it must be quick."""
        self._running.log.listeners.append(listener)

    def ask(self, call: Callable[[], T]) -> "concurrent.futures.Future[T]":
        """Has the engine's thread call something quick between two turns; what it says is the future's result.

        A future of an engine that ends meanwhile may stay undone.
        """
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(call())
                except Exception as error:  # the caller's fault, not the engine's
                    answer.set_exception(error)

        self._running.post(run)
        return answer

    def prepare_layout(self, layout: str | Layout) -> "concurrent.futures.Future[SwitchReport]":
        """Compiles what a layout needs; the future is done, with an empty report, when a switch would start at once.

        Raises:
          InvalidInputError: the layout is malformed.
          PreconditionError: this cell cannot take it.
        """
        target = self._checked(layout)
        future: concurrent.futures.Future[SwitchReport] = concurrent.futures.Future()
        groups = self._cell.groups(target)
        self._preparing[future] = WantedLayout(target, tuple(groups), time.monotonic())
        future.add_done_callback(self._preparing.pop)
        self._cell.executables.want(groups, ASKED_FOR)
        self._running.wake()

        def wait() -> None:
            try:
                self._cell.executables.wait(groups)
            except NitsumError as error:
                future.set_exception(error)
            except RuntimeError as error:
                future.set_exception(PreconditionError(f"layout {target} is not possible: {error}"))
            else:
                future.set_result(SwitchReport(str(self.layout()), str(target), 0, 0, 0, 0.0, 0))

        threading.Thread(target=wait, name="nitsum-prepare", daemon=True).start()
        return future

    def layout(self) -> Layout:
        """The layout in force."""
        return self._running.layout

    def allowed_layouts(self) -> tuple[str, ...]:
        """The allow-list in text form; empty: every layout that fits."""
        return tuple(map(str, self._cell.allowed or ()))

    def ready_layouts(self) -> tuple[str, ...]:
        """Known layouts whose executables are compiled: a switch to them starts at once."""
        ready = self._cell.executables.ready
        return tuple(str(layout) for layout in self._cell.known_layouts() if all(map(ready, self._cell.groups(layout))))

    def compiling(self) -> CompileProgress:
        """What is being compiled, and the progress of the layouts that are waited for."""
        preparing = list(self._preparing.values())
        return self._cell.executables.progress([*self._running.wanted_layouts(), *preparing])

    def wait_for_layouts(self, layouts: Sequence[str | Layout] | None = None) -> None:
        """Blocks until the executables of these layouts (all known ones if None) are compiled."""
        count = len(self._cell.devices)
        wanted = self._cell.known_layouts() if layouts is None else layouts
        for layout in wanted:
            groups = self._cell.groups(parse_layout(layout, count) if isinstance(layout, str) else layout)
            self._cell.executables.want(groups, ASKED_FOR, everything=True)
            self._cell.executables.wait(groups, everything=True)

    def request_limits(self) -> RequestLimits:
        """What a request must keep to be taken, at the layout in force."""
        vocab_size, longest = self.model_config.vocab_size, self._cell.program.max_model_len
        pooling = self._cell.program.pooling
        return RequestLimits(vocab_size, self.tier_names, longest, self._pool_tokens(), pooling)

    def context_limit(self) -> int:
        """Most tokens that prompt and output of one request may have together, at the layout in force."""
        return min(self._cell.program.max_model_len, self._pool_tokens())

    def stats(self) -> EngineStats:
        """Counters and gauges now."""
        loop = self._running
        with loop.lock:
            waiting, alive = len(self._policy), len(loop.alive)
        pace = PaceStats() if loop.pacer is None else loop.pacer.stats()
        weights, prefixes = self._cell.bank.counters, self._cell.prefixes
        return EngineStats(
            waiting=waiting,
            running=alive - waiting,
            queue_capacity=self._policy.capacity,
            blocks_free=self._cell.pool.free,
            blocks_total=self._cell.pool.total,
            tokens_generated=loop.counters.tokens,
            steps=loop.counters.steps,
            switches=loop.counters.switches,
            sent_back=loop.counters.sent_back,
            compiles=self._counter.count,
            weight_bytes_wrapped=weights.bytes_wrapped,
            weight_bytes_moved=weights.bytes_moved,
            weight_bytes_freed=weights.bytes_freed,
            wide_prefills=loop.counters.wide_prefills,
            hand_overs=loop.handover.count,
            paced=loop.pacer is not None,
            pace_late_share=pace.late_share,
            pace_late_steps=pace.late,
            pace_worst_late_ms=1000 * pace.worst_s,
            pace_valid=pace.valid,
            blocks_cached=self._cell.pool.idle,
            prefix_queried_tokens=0 if prefixes is None else prefixes.queried_tokens,
            prefix_hit_tokens=0 if prefixes is None else prefixes.hit_tokens,
            broken_logits=loop.counters.broken_logits,
            page_size=self.config.page_size,
            pages_total=self._cell.pool.total // self._cell.vmap.num_vshards,
        )

    def loads(self) -> tuple[InstanceLoad, ...]:
        """How busy each instance is now."""
        return instance_loads(tuple(self._running.instances), self._cell.pool)

    def drain(self, timeout_s: float) -> bool:
        """Takes no new requests and waits for those alive; returns whether all ended in time."""
        self._accepting = False
        loop = self._running
        end = time.monotonic() + timeout_s
        with loop.lock:
            while loop.alive:
                left = end - time.monotonic()
                if left <= 0:
                    return False
                loop.idle.wait(left)
        return True

    def close(self) -> None:
        """Ends what is alive with CANCELLED, stops all threads; a second call does nothing."""
        self._accepting = False
        if self._closed.acquire(blocking=False):
            self._running.stop()
            self._cell.executables.close()

    @property
    def _running(self) -> Loop:
        if self._loop is None:
            raise UnavailableError("the engine is starting")
        return self._loop

    def _checked(self, layout: str | Layout) -> Layout:
        if isinstance(layout, str):
            layout = parse_layout(layout, len(self._cell.devices))
        self._cell.check(layout)
        if self._closed.locked():
            raise UnavailableError("the server is stopping: no layout switch any more")
        return layout

    def _pool_tokens(self) -> int:
        """Most tokens of one sequence that an instance has blocks for."""
        return max((i.total_pages() for i in self._running.instances), default=0) * self.config.page_size

    def _on_compiled(self) -> None:
        if self._loop is not None:
            self._loop.wake()


def _close(engine: "weakref.ref[Engine]") -> None:
    there = engine()
    if there is not None:
        there.close()


def start_engine(
    model: OpenModel,
    config: EngineConfig,
    sink: Callable[[Sequence[TokenDelta]], None],
    policy: Policy | None = None,
    on_progress: Callable[[CompileProgress], None] | None = None,
) -> Engine:
    """Loads a model and starts serving it.

    Args:
      model: from `open_model`.
      config: settings.
      sink: called on the engine's thread once per step with all deltas of the step.
      policy: decides which request goes where and when; first come, first served if None.
      on_progress: called about twice a second with the progress of compiling, until the first layout can serve.

    Raises:
      NitsumError: devices, layout, lengths or memory do not fit.
    """
    # Not `policy or ...`: a policy without waiting requests is false.
    return Engine(model, config, sink, FifoPolicy(config.max_queue) if policy is None else policy, on_progress)
