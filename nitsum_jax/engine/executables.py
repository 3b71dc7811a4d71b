"""Step executables, compiled ahead of time in background threads, never in a request's way."""

import dataclasses
import heapq
import itertools
import logging
import threading
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from nitsum_jax.engine.packing import StepShape
from nitsum_jax.engine.rebind import Blueprint, can_rebind
from nitsum_jax.engine.step import Program, compile_step

_LOG = logging.getLogger(__name__)
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

Group = tuple[int, ...]


@dataclasses.dataclass(order=True)
class _Job:
    priority: int
    order: int
    group: Group = dataclasses.field(compare=False)
    shape: StepShape = dataclasses.field(compare=False)


class CompileCounter:
    """Counts what XLA compiles in this process, by JAX's monitoring events (a hit of the persistent cache counts too)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    @property
    def count(self) -> int:
        """Compilations so far."""
        with self._lock:
            return self._count

    def _listen(self, event: str, duration: float, **_: object) -> None:
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
    """

    def __init__(
        self,
        program: Program,
        shapes: Sequence[StepShape],
        mesh_of: Callable[[Group], Mesh],
        on_ready: Callable[[], None],
        threads: int = 2,
    ):
        """Starts the compiling threads.

        Args:
          program: what the steps compute.
          shapes: buckets that a group needs.
          mesh_of: makes the mesh of a group.
          on_ready: called on a compiling thread whenever a group has become ready or has failed.
          threads: how many compile at a time.
        """
        self._program = program
        self._shapes = tuple(shapes)
        self._mesh_of = mesh_of
        self._on_ready = on_ready
        self._changed = threading.Condition()
        self._jobs: list[_Job] = []
        self._order = itertools.count()
        self._asked: dict[tuple[Group, StepShape], int] = {}
        self._done: dict[Group, dict[StepShape, jax.stages.Compiled]] = {}
        self._failed: dict[Group, str] = {}
        self._blueprints: dict[tuple[int, StepShape], Blueprint] = {}
        self._compiling: set[tuple[int, StepShape]] = set()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"nitsum-compile-{index}", daemon=True) for index in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def want(self, groups: Sequence[Group], priority: int = 0) -> None:
        """Asks for all buckets of these groups; lower priorities come first, and asking again may only hasten."""
        with self._changed:
            # Shape by shape: the first group compiles one, the others only load it.
            for shape in self._shapes:
                for group in groups:
                    key = (group, shape)
                    if shape in self._done.get(group, {}) or self._asked.get(key, priority + 1) <= priority:
                        continue
                    self._asked[key] = priority
                    heapq.heappush(self._jobs, _Job(priority, next(self._order), group, shape))
            self._changed.notify_all()

    def ready(self, group: Group) -> bool:
        """Whether all buckets of a group are compiled."""
        with self._changed:
            return self._is_ready(group)

    def failure(self, group: Group) -> str | None:
        """Why a group could not be compiled, or None."""
        with self._changed:
            return self._failed.get(group)

    def of(self, group: Group) -> dict[StepShape, jax.stages.Compiled]:
        """The executables of a ready group."""
        with self._changed:
            return dict(self._done[group])

    def wait(self, groups: Sequence[Group]) -> None:
        """Blocks until these groups are ready.

        Raises:
          RuntimeError: one of them does not compile.
        """
        with self._changed:
            while True:
                for group in groups:
                    if group in self._failed:
                        raise RuntimeError(f"the steps of devices {group} do not compile: {self._failed[group]}")
                if all(self._is_ready(group) for group in groups):
                    return
                self._changed.wait()

    def close(self) -> None:
        """Stops compiling; what is being compiled is finished and thrown away."""
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _is_ready(self, group: Group) -> bool:
        return len(self._done.get(group, {})) == len(self._shapes)

    def _make(self, job: _Job) -> jax.stages.Compiled:
        """Compiles a step, or loads what was compiled for another group of the same size."""
        mesh = self._mesh_of(job.group)
        devices = list(mesh.devices.flat)
        key = (len(devices), job.shape)
        with self._changed:
            while key in self._compiling:  # another thread compiles the same for its group
                self._changed.wait()
            blueprint = self._blueprints.get(key)
            if blueprint is None:
                self._compiling.add(key)
        if blueprint is not None:
            try:
                return blueprint.load(devices)
            except Exception as error:  # what worked for the probe may not work for a real step
                _LOG.info("devices %s compile %s for themselves: %s", job.group, job.shape, error)
                return compile_step(self._program, job.shape, mesh)
        try:
            compiled = compile_step(self._program, job.shape, mesh)
            blueprint = self._blueprint(compiled, devices)
        finally:
            with self._changed:
                self._compiling.discard(key)
                if blueprint is not None:
                    self._blueprints[key] = blueprint
                self._changed.notify_all()
        return compiled

    def _blueprint(self, compiled: jax.stages.Compiled, devices: list[jax.Device]) -> Blueprint | None:
        others = [device for device in devices[0].client.local_devices() if device != devices[0]]
        if not others or not can_rebind(devices[0], others[0]):
            return None
        try:
            return Blueprint(compiled, devices)
        except Exception as error:  # not serialisable on this platform
            _LOG.info("executables are compiled per device group: %s", error)
            return None

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job = heapq.heappop(self._jobs)
                if self._asked.get((job.group, job.shape)) != job.priority:
                    continue  # asked for again with more haste; that entry came first
                self._asked[(job.group, job.shape)] = -1  # taken: cannot be hastened any more
            error = None
            compiled = None
            try:
                compiled = self._make(job)
            except Exception as caught:  # whatever XLA throws must not end the thread
                _LOG.exception("compiling %s for devices %s failed", job.shape, job.group)
                error = f"{type(caught).__name__}: {caught}".splitlines()[0]
            with self._changed:
                if compiled is not None:
                    self._done.setdefault(job.group, {})[job.shape] = compiled
                elif error is not None:
                    self._failed[job.group] = error
                tell = error is not None or self._is_ready(job.group)
                self._changed.notify_all()
            if tell and not self._closed:
                self._on_ready()
