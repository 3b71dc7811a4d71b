"""Step executables, compiled ahead of time in background threads, never in a request's way."""

import atexit
import dataclasses
import heapq
import itertools
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Sequence

import jax
from jax.sharding import Mesh

from nitsum_jax.engine.executables.progress import (
    Activity,
    CompileProgress,
    Group,
    WantedLayout,
    Worksheet,
    distinct,
    layout_progress,
)
from nitsum_jax.engine.executables.rebind import Blueprint, can_rebind, without_jax_cache
from nitsum_jax.engine.executables.step_store import StepStore
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.engine.step.program import Program, compile_step
from nitsum_jax.errors import UnavailableError

_LOG = logging.getLogger(__name__)
_BACKGROUND_NICENESS, _LEAST_PRIORITY = 10, 19
_CLOSING_S = 0.5
_TAKEN = -1  # in place of the priority of a job: a thread has it
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

# Priorities: what the first layout cannot do without, what somebody waits for, the buckets that make it faster, and
# what may come next.
FIRST, ASKED_FOR, FASTER, LIKELY = 0, 1, 5, 10


# Those that may still have threads in the compiler.
_OPEN: "weakref.WeakSet[Executables]" = weakref.WeakSet()


def _finish() -> None:
    """Waits for the compilations under way: a thread inside XLA does not survive the end of the interpreter."""
    for executables in list(_OPEN):
        executables.close(wait_s=None)


# Runs an executable once with inputs that change nothing, and returns what it returned (without waiting for it).
TrialRun = Callable[[Group, StepShape, jax.stages.Compiled], object]


@dataclasses.dataclass(order=True)
class _CompileJob:
    """Something for a thread to do: compile, try, or wait for the outputs of a trial run that the engine launched."""

    priority: int
    order: int
    group: Group = dataclasses.field(compare=False)
    shape: StepShape = dataclasses.field(compare=False)
    compiled: jax.stages.Compiled | None = dataclasses.field(compare=False, default=None)
    outputs: object = dataclasses.field(compare=False, default=None)


class CompileCounter:
    """Counts what XLA compiles in this process, by JAX's monitoring events; hits of the persistent cache count too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    @property
    def count(self) -> int:
        """Compilations so far."""
        with self._lock:
            return self._count

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == _COMPILE_EVENT:
            with self._lock:
                self._count += 1


_COUNTER: CompileCounter | None = None


def compile_counter() -> CompileCounter:
    """The process's counter; listeners cannot be taken off again, so there is one."""
    global _COUNTER
    if _COUNTER is None:
        _COUNTER = CompileCounter()
    return _COUNTER


class Executables:
    """Compiles steps per device group and bucket, and tells when a group has all that it needs.

    A group is an instance's devices in rank order.  Thread-safe.

    Where the first run of an executable is slow (XLA:CPU plans its matrix products then, most of a second for a model
    of 30 layers), each is tried once before its group counts as ready.  A trial borrows the pools of its devices, and
    programs with collectives must be launched in one order; so once `serve` was called, trials wait for the engine's
    thread to call `launch_trial`.
    """

    def __init__(
        self,
        program: Program,
        shapes: Sequence[StepShape],
        mesh_of: Callable[[Group], Mesh],
        on_ready: Callable[[], None],
        *,
        essential: Collection[StepShape] = (),
        trials: bool = False,
        threads: int = 2,
    ):
        """Starts the compiling threads.

        Args:
          program: what the steps compute.
          shapes: buckets that a group needs.
          mesh_of: makes the mesh of a group.
          on_ready: called on a compiling thread whenever there is news: something is ready, failed, or awaits its
            trial.
          essential: buckets with which a group can already serve everything, if not always fast; all if empty.
          trials: whether executables are tried before they are used; they wait for `provide`.
          threads: how many compile at a time.
        """
        self._program = program
        self._essential = frozenset(essential or shapes)
        self._shapes = tuple(sorted(shapes, key=lambda shape: shape not in self._essential))
        self._mesh_of = mesh_of
        self._on_ready = on_ready
        self._changed = threading.Condition()
        self._jobs: list[_CompileJob] = []
        self._order = itertools.count()
        self._asked: dict[tuple[Group, StepShape], int] = {}
        self._done: dict[Group, dict[StepShape, jax.stages.Compiled]] = {}
        self._trials = trials
        self._trial_run: TrialRun | None = None
        self._trial_lock = threading.Lock()
        self._serving = False
        self._parked: list[_CompileJob] = []
        self._failed: dict[Group, str] = {}
        self._blueprints: dict[tuple[int, StepShape], Blueprint] = {}
        self._store = StepStore.beside_jax_cache()
        self._compiling: set[tuple[int, StepShape]] = set()
        self._sheet = Worksheet()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(index,), name=f"nitsum-compile-{index}", daemon=True)
            for index in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        _OPEN.add(self)
        # Last come, first called: now that JAX's backend is up, this comes before JAX cleans up behind itself.
        atexit.unregister(_finish)
        atexit.register(_finish)

    def want(self, groups: Sequence[Group], priority: int, *, everything: bool = False) -> None:
        """Asks for all buckets of these groups; lower priorities come first, and asking again may only hasten.

        Args:
          groups: devices in rank order.
          priority: of the essential buckets; the others are made with FASTER at most.
          everything: whether the others are as urgent.
        """
        with self._changed:
            for job in self._parked:
                if job.group in groups and (everything or job.shape in self._essential):
                    job.priority = min(job.priority, priority)
            # Shape by shape: the first group compiles one, the others only load it.
            for shape in self._shapes:
                rank = priority if everything or shape in self._essential else max(priority, FASTER)
                for group in groups:
                    key = (group, shape)
                    if shape in self._done.get(group, {}) or self._asked.get(key, rank + 1) <= rank:
                        continue
                    self._asked[key] = rank
                    heapq.heappush(self._jobs, _CompileJob(rank, next(self._order), group, shape))
            self._changed.notify_all()

    def ready(self, group: Group) -> bool:
        """Whether a group can serve: its essential buckets are there."""
        with self._changed:
            return self._has(group, self._essential)

    def failure(self, group: Group) -> str | None:
        """Why a group could not be compiled, or None."""
        with self._changed:
            return self._failed.get(group)

    def of(self, group: Group) -> dict[StepShape, jax.stages.Compiled]:
        """The executables of a group that there are by now."""
        with self._changed:
            return dict(self._done[group])

    def progress(self, wanted: Sequence[WantedLayout]) -> CompileProgress:
        """What is compiled now, and how far these layouts are."""
        now = time.monotonic()
        with self._changed:
            ready = {(group, shape) for group, shapes in self._done.items() for shape in shapes}
            return CompileProgress(
                self._sheet.making(),
                sum(rank != _TAKEN for rank in self._asked.values()),
                tuple(layout_progress(one, self._essential, self._sheet, ready, now) for one in distinct(wanted)),
            )

    def wait(self, groups: Sequence[Group], *, everything: bool = False, timeout_s: float | None = None) -> bool:
        """Blocks until these groups can serve, that is, their essential buckets (or all of them) are ready.

        Args:
          groups: of devices.
          everything: all buckets.
          timeout_s: the longest wait; None: as long as it takes.

        Returns:
          False if that time has passed before.

        Raises:
          RuntimeError: one of them does not compile.
          UnavailableError: compiling was stopped.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while True:
                for group in groups:
                    if group in self._failed:
                        raise RuntimeError(f"the steps of devices {group} do not compile: {self._failed[group]}")
                needed = frozenset(self._shapes) if everything else self._essential
                if all(self._has(group, needed) for group in groups):
                    return True
                if self._closed:
                    raise UnavailableError("the engine is closed, and compiles no more")
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)

    def provide(self, trial_run: TrialRun) -> None:
        """Says how to try executables until `serve` is called: possible when the weights are there."""
        with self._changed:
            self._trial_run = trial_run
            self._changed.notify_all()

    def serve(self) -> None:
        """From now on, programs are launched by the engine's thread alone."""
        with self._trial_lock, self._changed:
            self._serving = True
        # Serving goes before compiling, whoever waits for it: where no stream runs, low priority costs no time.  Linux
        # gives each thread a priority of its own, and the threads that XLA starts to compile inherit that.
        if sys.platform == "linux":
            for thread in self._threads:
                if thread.native_id is not None:
                    niceness = os.getpriority(os.PRIO_PROCESS, thread.native_id) + _BACKGROUND_NICENESS
                    os.setpriority(os.PRIO_PROCESS, thread.native_id, min(_LEAST_PRIORITY, niceness))

    def launch_trial(self, trial_run: TrialRun, *, idle: bool) -> None:
        """Launches one of the trials that wait for the engine's thread, without waiting for its end.

        Args:
          trial_run: how to run it; returns None if that cannot be done now.
          idle: whether nobody is kept waiting by it; if not, what only may come next is not tried.
        """
        with self._changed:
            fitting = [job for job in self._parked if idle or job.priority <= FASTER]
            if not fitting:
                return
            job = min(fitting)
            self._parked.remove(job)
        assert job.compiled is not None
        try:
            job.outputs = trial_run(job.group, job.shape, job.compiled)
        except Exception as error:  # the executable is of no use, and the engine's thread goes on
            self._fail(job, error)
            return
        with self._changed:
            if job.outputs is None:
                self._parked.append(job)
            else:
                heapq.heappush(self._jobs, dataclasses.replace(job, priority=-1))
                self._changed.notify_all()

    def close(self, wait_s: float | None = _CLOSING_S) -> None:
        """Stops compiling; what is being compiled is thrown away when it is finished.

        Args:
          wait_s: how long to wait for that, seconds; None waits as long as it takes.
        """
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(wait_s)

    def _has(self, group: Group, shapes: frozenset[StepShape]) -> bool:
        return shapes <= self._done.get(group, {}).keys()

    def _make(self, job: _CompileJob) -> jax.stages.Compiled:
        """Compiles a step, or loads what was compiled for another group of the same size or by an earlier start."""
        mesh = self._mesh_of(job.group)
        devices = list(mesh.devices.flat)
        if not self._portable(devices[0]):
            self._begin(job, Activity.COMPILING)
            return compile_step(self._program, job.shape, mesh)
        key = (len(devices), job.shape)
        with self._changed:
            while key in self._compiling:  # another thread compiles the same for its group
                self._changed.wait()
            blueprint = self._blueprints.get(key)
            if blueprint is None:
                self._compiling.add(key)
        if blueprint is not None:
            return self._load(blueprint, job, mesh)
        try:
            self._begin(job, Activity.LOADING)
            blueprint = self._store.get(self._program, job.shape, devices[0], len(devices))
            if blueprint is not None:
                return self._load(blueprint, job, mesh)
            self._begin(job, Activity.COMPILING)
            with without_jax_cache() as name:
                compiled = compile_step(self._program, job.shape, mesh, name=name)
            blueprint = Blueprint(compiled, devices)
            self._store.put(self._program, job.shape, devices[0], len(devices), blueprint)
            return compiled
        finally:
            with self._changed:
                self._compiling.discard(key)
                if blueprint is not None:
                    self._blueprints[key] = blueprint
                self._changed.notify_all()

    def _load(self, blueprint: Blueprint, job: _CompileJob, mesh: Mesh) -> jax.stages.Compiled:
        self._begin(job, Activity.LOADING)
        try:
            return blueprint.load(list(mesh.devices.flat))
        except Exception as error:  # what worked for the probe may not work for a real step
            _LOG.warning("devices %s compile %s for themselves: %s", job.group, job.shape, error)
            self._begin(job, Activity.COMPILING)
            return compile_step(self._program, job.shape, mesh)

    def _begin(self, job: _CompileJob, activity: Activity) -> None:
        with self._changed:
            self._sheet.begin((job.group, job.shape), activity)

    def _end(self, job: _CompileJob) -> None:
        with self._changed:
            self._sheet.end((job.group, job.shape), compiled=job.compiled is not None)

    def _portable(self, device: jax.Device) -> bool:
        others = [other for other in device.client.local_devices() if other != device]
        return can_rebind(device, others[0] if others else device)

    def _work(self, index: int) -> None:
        while (job := self._next(index)) is not None:
            finished = None
            try:
                if job.compiled is None:
                    job.compiled = self._make(job)
                    self._end(job)  # before another thread may take it
                    finished = self._after_compiling(job)
                else:
                    finished = self._try(job)
            except Exception as error:  # whatever XLA throws must not end the thread
                self._end(job)
                self._fail(job, error)
            if finished is not None:
                with self._changed:
                    self._sheet.end((job.group, job.shape), compiled=True)
                    self._done.setdefault(job.group, {})[job.shape] = finished
                    self._changed.notify_all()
            if not self._closed:
                self._on_ready()

    def _fail(self, job: _CompileJob, error: Exception) -> None:
        with self._changed:
            if self._closed:
                return  # nobody wants it any more, and at the end of the interpreter tracing fails in odd ways
        _LOG.error("%s for devices %s failed", job.shape, job.group, exc_info=error)
        with self._changed:
            self._failed[job.group] = f"{type(error).__name__}: {error}".splitlines()[0]
            self._changed.notify_all()

    def _next(self, index: int) -> _CompileJob | None:
        """The next thing for thread `index` to do, None at the end."""
        reserved = index == 0 and len(self._threads) > 1
        with self._changed:
            while True:
                if self._closed:
                    return None
                if self._jobs and not (self._serving and reserved and self._jobs[0].priority > ASKED_FOR):
                    job = heapq.heappop(self._jobs)
                    if job.compiled is not None:
                        return job
                    if self._asked.get((job.group, job.shape)) == job.priority:
                        self._asked[(job.group, job.shape)] = _TAKEN  # cannot be hastened any more
                        return job
                    continue  # asked for again with more haste; that entry came first
                self._changed.wait()

    def _after_compiling(self, job: _CompileJob) -> jax.stages.Compiled | None:
        if not self._trials:
            return job.compiled
        with self._changed:
            heapq.heappush(self._jobs, dataclasses.replace(job, order=next(self._order)))
            self._changed.notify_all()
        return None

    def _try(self, job: _CompileJob) -> jax.stages.Compiled | None:
        assert job.compiled is not None
        if job.outputs is not None:
            self._begin(job, Activity.TRYING)
            jax.block_until_ready(job.outputs)
            return job.compiled
        with self._changed:
            while self._trial_run is None and not self._closed:
                self._changed.wait()
            run = self._trial_run
        if run is None:
            return None
        with self._trial_lock:
            outputs = None
            if not self._serving:
                self._begin(job, Activity.TRYING)
                outputs = run(job.group, job.shape, job.compiled)
        if outputs is not None:
            jax.block_until_ready(outputs)
            return job.compiled
        with self._changed:
            self._parked.append(job)
        return None
