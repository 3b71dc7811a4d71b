"""An engine on a tiny model, and everything that came out of it."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.engine import Engine, start_engine
from nitsum_jax.engine.executables import compiling
from nitsum_jax.engine.request import FinishReason, Request, SamplingParams, TokenDelta, TokenLogprob
from nitsum_jax.engine.switching.switch import SwitchReport
from nitsum_jax.models.loading import OpenModel, open_model
from tests.engine.shared_steps import SharedSteps
from tests.models.golden import tiny_models

LAYOUTS = ("tp1x4", "tp2x2", "tp4", "tp2+tp1x2")
TIMEOUT_S = 400.0  # for machines that are slow and shared


@dataclasses.dataclass(frozen=True)
class Answer:
    """All that came of one request."""

    tokens: tuple[int, ...]
    finish: FinishReason | None
    error: str | None
    times: tuple[float, ...]


class Recorder:
    """A sink that keeps all deltas and lets tests wait for them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._deltas: dict[str, list[TokenDelta]] = collections.defaultdict(list)
        self._actions: list[tuple[str, int, Callable[[], object]]] = []
        self.fail_next = False

    def __call__(self, deltas: Sequence[TokenDelta]) -> None:
        with self._changed:
            if self.fail_next:
                self.fail_next = False
                raise RuntimeError("the sink has a fault")
            for delta in deltas:
                before = self._deltas[delta.request_id]
                assert not before or before[-1].finish_reason is None, f"a delta after the last one: {delta}"
                before.append(delta)
            due = [action for action in self._actions if self._has_come(*action[:2])]
            self._actions = [action for action in self._actions if action not in due]
            for _, _, do in due:
                do()
            self._changed.notify_all()

    def when(self, name: str, count: int, do: Callable[[], object]) -> None:
        """Has the engine's thread call `do` as soon as so many tokens of a request have come, or it has ended.

        So tests act at the same moment of a stream however slow and busy the machine is.
        """
        with self._changed:
            self._actions.append((name, count, do))

    def wait(self, ready: Callable[[], bool]) -> None:
        """Waits until `ready`, which is asked again after every delta."""
        with self._changed:
            assert self._changed.wait_for(ready, TIMEOUT_S), "nothing came in time"

    def answer(self, name: str) -> Answer:
        """What has come for a request so far."""
        with self._changed:
            deltas = list(self._deltas[name])
        tokens = tuple(token for delta in deltas for token in delta.token_ids)
        times = tuple(delta.time_s for delta in deltas for _ in delta.token_ids)
        last = deltas[-1] if deltas else TokenDelta(name, (), 0.0)
        return Answer(tokens, last.finish_reason, last.error, times)

    def count(self, name: str) -> int:
        """Tokens that have come for a request."""
        return sum(len(delta.token_ids) for delta in list(self._deltas[name]))

    def logprobs(self, name: str) -> list[TokenLogprob]:
        """Of every token of a request that asked for them, as far as they have come."""
        with self._changed:
            return [one for delta in self._deltas[name] for one in delta.logprobs]

    def cached_tokens(self, name: str) -> int:
        """Tokens of the prompt that the prefix cache had, which all deltas of a request agree on."""
        (cached,) = {delta.cached_tokens for delta in list(self._deltas[name])}
        return cached

    def embedding(self, name: str) -> np.ndarray:
        """What came with the end of a request."""
        with self._changed:
            (found,) = [delta.embedding for delta in self._deltas[name] if delta.embedding is not None]
        return found

    def finished(self, name: str) -> bool:
        """Whether the last delta of a request has come."""
        deltas = self._deltas[name]
        return bool(deltas) and deltas[-1].finish_reason is not None

    def _has_come(self, name: str, count: int) -> bool:
        return self.count(name) >= count or self.finished(name)


class Harness:
    """A running engine with its recorder; a context manager that closes it."""

    def __init__(self, model: OpenModel, **settings: Any):
        self.recorder = Recorder()
        defaults: dict[str, Any] = {
            "devices": 4,
            "dtype": "float32",
            "layouts": LAYOUTS,
            "max_batch": 8,
            "prefill_chunk": 32,
            "max_model_len": 256,
        }
        with SharedSteps.in_use():
            self.engine: Engine = start_engine(model, EngineConfig(**(defaults | settings)), self.recorder)
        self._names = 0

    def __enter__(self) -> "Harness":
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def submit(self, prompt: Sequence[int], max_tokens: int, *, name: str | None = None, **fields: Any) -> str:
        """Submits a request and returns its name; keyword arguments of SamplingParams may be mixed in."""
        if name is None:
            self._names += 1
            name = f"request {self._names}"
        known = {field.name for field in dataclasses.fields(SamplingParams)}
        sampling = SamplingParams(**{key: fields.pop(key) for key in list(fields) if key in known})
        self.engine.submit(Request(name, tuple(prompt), max_tokens, sampling, **fields))
        return name

    def collect(self, names: Iterable[str]) -> list[Answer]:
        """Waits for the ends of requests."""
        names = list(names)
        self.recorder.wait(lambda: all(map(self.recorder.finished, names)))
        return [self.recorder.answer(name) for name in names]

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int, **fields: Any) -> list[Answer]:
        """Submits prompts at once and waits for their ends."""
        return self.collect([self.submit(prompt, max_tokens, **fields) for prompt in prompts])

    def ask_for(self, layout: str) -> "concurrent.futures.Future[SwitchReport]":
        """Asks for a layout."""
        return self.engine.set_layout(layout)

    def switch(self, layout: str) -> SwitchReport:
        """Switches and waits until it is done."""
        return self.ask_for(layout).result(TIMEOUT_S)

    def wait_for_tokens(self, name: str, count: int) -> None:
        """Waits until so many tokens of a request have come (or it has ended)."""
        self.recorder.wait(lambda: self.recorder._has_come(name, count))

    def switch_when(self, name: str, count: int, layout: str) -> "concurrent.futures.Future[SwitchReport]":
        """Asks for a layout at the moment when so many tokens of a request have come."""
        outer: concurrent.futures.Future[SwitchReport] = concurrent.futures.Future()

        def ask() -> None:
            self.ask_for(layout).add_done_callback(lambda inner: _pass_on(inner, outer))

        self.recorder.when(name, count, ask)
        return outer

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The engine's thread does nothing meanwhile."""
        reached, go_on = threading.Event(), threading.Event()

        def pause() -> None:
            reached.set()
            go_on.wait(TIMEOUT_S)

        self.engine._running.post(pause)
        assert reached.wait(TIMEOUT_S)
        try:
            yield
        finally:
            go_on.set()

    def compiles(self) -> int:
        """Compilations of this process, when those that closed engines left behind are over.

        Closing an engine does not wait for what is being compiled, the counter is the process's, and on a busy machine
        such a compilation, at a low priority, may go on for long.
        """
        wait_for_closed_engines()
        return self.engine.stats().compiles

    def assert_balanced(self) -> None:
        """Nothing is alive, and every block is free."""
        stats = self.engine.stats()
        assert (stats.waiting, stats.running) == (0, 0)
        assert stats.blocks_free == stats.blocks_total > 0
        for allocator in self.engine._cell.pool.allocators:
            free = allocator.take(allocator.total)
            assert sorted(free.tolist()) == list(range(allocator.total)), "a block is free twice"
            allocator.give(free)
        for instance in self.engine._running.instances:
            assert instance.rows == {}
            assert instance.in_flight <= 2


def _pass_on(
    inner: "concurrent.futures.Future[SwitchReport]", outer: "concurrent.futures.Future[SwitchReport]"
) -> None:
    error = inner.exception()
    if error is None:
        outer.set_result(inner.result())
    else:
        outer.set_exception(error)


def wait_for_closed_engines() -> None:
    """Waits until no engine that was closed compiles any more."""
    for one in list(compiling._OPEN):
        if one._closed:
            one.close(wait_s=None)


def tiny_model(variant: str, folder: Path) -> OpenModel:
    """A tiny model, written as a Hugging Face folder and opened as a server would."""
    return open_model(str(tiny_models.write_hf_folder(variant, folder / variant)))


def eventually(condition: Callable[[], bool]) -> None:
    """Waits for something that no delta tells of."""
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, "it did not come to be in time"
        time.sleep(0.002)
