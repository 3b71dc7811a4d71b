"""Steps that engines share: compiled once a session, loaded once a process for each group of devices."""

import contextlib
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import ClassVar
from unittest import mock

import jax

from nitsum_jax.engine.executables.rebind import Blueprint
from nitsum_jax.engine.executables.step_store import StepStore
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.engine.step.program import Program


class _LoadedOnce(Blueprint):
    """A blueprint that keeps what it loaded: loading takes a quarter of a second, and an engine loads dozens."""

    def __init__(self, blueprint: Blueprint):
        self.__dict__.update(blueprint.__dict__)
        self._loaded: dict[tuple[jax.Device, ...], jax.stages.Compiled] = {}
        self._loading = threading.Lock()

    def load(self, devices: Sequence[jax.Device]) -> jax.stages.Compiled:
        """The executable for these devices, which no engine of this process loads again."""
        with self._loading:
            if tuple(devices) not in self._loaded:
                self._loaded[tuple(devices)] = super().load(devices)
            return self._loaded[tuple(devices)]


class SharedSteps(StepStore):
    """The store of all engines of a process; the folder behind it is that of all processes of a session."""

    _blueprints: ClassVar[dict[pathlib.Path, _LoadedOnce]] = {}

    @classmethod
    @contextlib.contextmanager
    def in_use(cls) -> Iterator[None]:
        """Engines that start meanwhile share what lies in the folder of the store that they would have."""
        shared = cls(StepStore.beside_jax_cache()._folder)
        with mock.patch.object(StepStore, "beside_jax_cache", return_value=shared):
            yield

    def get(self, program: Program, shape: StepShape, device: jax.Device, tp: int) -> Blueprint | None:
        """What an engine of this process used, or an earlier one of another."""
        path = self._path(program, shape, device, tp)
        if path is None:
            return None
        if path not in self._blueprints:
            blueprint = super().get(program, shape, device, tp)
            if blueprint is None:
                return None
            self._blueprints.setdefault(path, _LoadedOnce(blueprint))
        return self._blueprints[path]

    def put(self, program: Program, shape: StepShape, device: jax.Device, tp: int, blueprint: Blueprint) -> None:
        """Keeps a blueprint for all, and has the engine that made it load what all others will."""
        super().put(program, shape, device, tp, blueprint)
        path = self._path(program, shape, device, tp)
        if path is not None:
            vars(blueprint)["load"] = self._blueprints.setdefault(path, _LoadedOnce(blueprint)).load
