"""A model in a few lines, for notebooks and scripts: no server, no ports.

    from nitsum_jax import LLM

    llm = LLM("smollm2-135m", layout="tp2x2")
    print(llm.generate(["Once upon a time"], max_tokens=32)[0].text)
    llm.set_layout("tp4")

An `LLM` may be used by several threads and event loops at once; their requests share the batches of one engine.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from nitsum_jax.control.tiers import DEFAULT_TIERS
from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.engine import EngineStats, start_engine
from nitsum_jax.engine.request import SamplingParams, TokenDelta
from nitsum_jax.engine.switching.switch import SwitchReport
from nitsum_jax.errors import InvalidInputError, OverloadedError, PreconditionError
from nitsum_jax.meshes.devices import discover, emulate_cpu_devices
from nitsum_jax.meshes.layout import parse_layout
from nitsum_jax.models.loading import open_model
from nitsum_jax.runtime.local.asked import AskedPrompt, GivenPrompt, asked_prompts, asked_vectors
from nitsum_jax.runtime.local.completion import Completion, PromptJob
from nitsum_jax.runtime.progress import TICK_S, ProgressLine, StartProgress, Waiting, told
from nitsum_jax.runtime.startup.compile_cache import OFF, enable
from nitsum_jax.runtime.startup.scheduled_engine import start_scheduled
from nitsum_jax.runtime.startup.served_model import served_model
from nitsum_jax.runtime.streams.output import Piece, Vectors, vectors_of

__all__ = ["LLM", "Completion"]

_NAME = "nitsum-jax"
_Take = Callable[[TokenDelta], None]
_MOST_WAITING = 1 << 16  # no request has to be refused: its caller waits for the answer
_MOST_DEVICES = 1024  # more than any cell has: only to read how many a layout names


class LLM:
    """A model that runs in this process, on one cell."""

    def __init__(
        self,
        model: str = "smollm2-135m",
        layout: str | None = None,
        *,
        devices: int | None = None,
        cache_dir: str | None = None,
        generation_config: str = "auto",
        progress: bool = True,
        **settings: Any,
    ):
        """Loads a model and compiles its steps, which takes seconds, and longer the first time on a machine.

        Where there is no accelerator the CPU acts as several devices.  How many is decided when JAX starts, so make the
        `LLM` before anything else uses JAX, or restart the kernel.

        Args:
          model: name of a known model, a GGUF file, a Hugging Face folder, or an Orbax checkpoint of ours.
          layout: the first layout, such as "tp2x2"; chosen to fit if None.
          devices: number of devices of the cell; if None, all, or on a CPU as many as `layout` needs.
          cache_dir: folder for compiled executables, "off" for none; as `nitsum-serve --cache_dir`.
          generation_config: "auto": calls without `sampling` or `max_tokens` take the values of the model's generation
            config; "none": the config is ignored; as `nitsum-serve --generation_config`.
          progress: shows the progress of compiling on stderr, if that takes longer than a second.
          **settings: other fields of `EngineConfig`, such as max_batch, dtype or deterministic.

        Raises:
          NitsumError: model, devices, layout or memory do not fit together.
        """
        if generation_config not in ("auto", "none"):
            raise InvalidInputError(f"generation_config={generation_config!r} is not known: give auto or none")
        known = {field.name for field in dataclasses.fields(EngineConfig)}
        wrong = sorted(set(settings) - known)
        if wrong:
            raise InvalidInputError(f"LLM has no setting {wrong[0]!r}: known are {', '.join(sorted(known))}")
        settings.setdefault("tier_names", DEFAULT_TIERS.names)
        settings.setdefault("max_queue", _MOST_WAITING)
        config = EngineConfig(devices=devices, layout=layout, **settings)
        _emulate(devices or (_devices_of(layout) if layout else None))
        if cache_dir != OFF:
            enable(cache_dir)
        opened = open_model(model)
        self._model = served_model(opened, None, generation_config, pooling=config.pooling)
        self._lock = threading.Lock()
        self._takers: dict[str, _Take] = {}
        self._progress = progress
        line = ProgressLine(_NAME)
        telling = StartProgress(line) if progress else None
        if config.tier_names == DEFAULT_TIERS.names:
            started = start_scheduled(opened, config, DEFAULT_TIERS, self._sink, on_progress=telling)
            self._engine = started.engine
        else:
            self._engine = start_engine(opened, config, self._sink, on_progress=telling)
        line.clear()

    # ---- whole answers

    def generate(
        self, prompts: Sequence[GivenPrompt], sampling: SamplingParams | None = None, **wanted: Any
    ) -> list[Completion]:
        """Continues prompts, as many at a time as fit, and returns their outputs in the same order.

        Args:
          prompts: texts, lists of token ids, or chats: lists of messages in OpenAI's form.
          sampling: how tokens are chosen; if None, by the model's generation config, or greedily if it has no values.
          **wanted: fields of `CallOptions`, such as max_tokens, stop, tier, json_schema or tools.

        Raises:
          NitsumError: a prompt or a parameter is wrong, or does not fit the model.
        """
        return [job.completion() for job in self._run(self._jobs(prompts, sampling, wanted))]

    def embed(self, texts: Sequence[str | Sequence[int]], **wanted: Any) -> Vectors:
        """Vectors of texts or lists of token ids, f32[texts, D], each of length 1.

        The model's files must say how it makes them, or the setting `pooling` ("last" or "mean").

        Args:
          texts: with what the model expects before them, such as an instruction.
          **wanted: tier, ttft_ms, tpot_ms.

        Raises:
          PreconditionError: the model gives no embeddings.
          NitsumError: a text is wrong, or does not fit.
        """
        jobs = self._run(self._begun(asked_vectors(texts, wanted, self._model, self._engine.tier_names)))
        return vectors_of([job.output for job in jobs if job.output], self._engine.model_config.d_model)

    def _run(self, jobs: list[PromptJob]) -> list[PromptJob]:
        """Runs jobs to their ends, as many at a time as fit."""
        events: queue.SimpleQueue[TokenDelta] = queue.SimpleQueue()
        waiting, alive = deque(jobs), dict[str, PromptJob]()
        try:
            while waiting or alive:
                self._submit(waiting, alive, events.put)
                self._feed(alive, events.get())
        finally:
            self._drop(alive)
        return jobs

    def chat(
        self, messages: Sequence[Mapping[str, Any]], sampling: SamplingParams | None = None, **wanted: Any
    ) -> Completion:
        """The assistant's answer to messages; the other arguments are those of `generate`."""
        return self.generate([messages], sampling, **wanted)[0]

    async def agenerate(
        self, prompts: Sequence[GivenPrompt], sampling: SamplingParams | None = None, **wanted: Any
    ) -> list[Completion]:
        """Like `generate`, for an event loop; cancelling the call ends its requests."""
        events: asyncio.Queue[TokenDelta] = asyncio.Queue()
        jobs = await asyncio.to_thread(self._jobs, prompts, sampling, wanted)
        waiting, alive = deque(jobs), dict[str, PromptJob]()
        take = _posting(events)
        try:
            while waiting or alive:
                self._submit(waiting, alive, take)
                self._feed(alive, await events.get())
        finally:
            self._drop(alive)
        return [job.completion() for job in jobs]

    async def achat(
        self, messages: Sequence[Mapping[str, Any]], sampling: SamplingParams | None = None, **wanted: Any
    ) -> Completion:
        """Like `chat`, for an event loop."""
        return (await self.agenerate([messages], sampling, **wanted))[0]

    # ---- as it comes

    def stream(self, prompt: GivenPrompt, sampling: SamplingParams | None = None, **wanted: Any) -> Iterator[Piece]:
        """The output of one prompt piece by piece; leaving the loop ends the request.  Arguments as for `generate`."""
        (job,) = self._jobs([prompt], sampling, wanted)

        def pieces() -> Iterator[Piece]:
            events: queue.SimpleQueue[TokenDelta] = queue.SimpleQueue()
            alive: dict[str, PromptJob] = {}
            try:
                self._submit(deque([job]), alive, events.put)
                while alive:
                    yield self._feed(alive, events.get())
            finally:
                self._drop(alive)

        return pieces()

    def astream(
        self, prompt: GivenPrompt, sampling: SamplingParams | None = None, **wanted: Any
    ) -> AsyncIterator[Piece]:
        """Like `stream`, for an event loop."""
        (job,) = self._jobs([prompt], sampling, wanted)

        async def pieces() -> AsyncIterator[Piece]:
            events: asyncio.Queue[TokenDelta] = asyncio.Queue()
            alive: dict[str, PromptJob] = {}
            try:
                self._submit(deque([job]), alive, _posting(events))
                while alive:
                    yield self._feed(alive, await events.get())
            finally:
                self._drop(alive)

        return pieces()

    # ---- the layout, and the rest

    @property
    def layout(self) -> str:
        """The layout in force."""
        return str(self._engine.layout())

    def set_layout(self, layout: str) -> SwitchReport:
        """Changes the layout while requests go on, and returns when it is done.

        A layout such as "tp2/interactive+tp2" keeps instances for tiers of requests.

        Raises:
          NitsumError: the layout is malformed, or this cell cannot take it.
        """
        return self._waited(self._engine.set_layout(layout), f"switching to {layout}", layout)

    def prepare_layout(self, layout: str) -> None:
        """Compiles a layout, and returns when a switch to it would start at once.

        Raises:
          NitsumError: the layout is malformed, or this cell cannot take it.
        """
        self._waited(self._engine.prepare_layout(layout), f"compiling {layout}", layout)

    async def aset_layout(self, layout: str) -> SwitchReport:
        """Like `set_layout`, for an event loop; a switch that has begun is completed even if the caller leaves."""
        future = asyncio.wrap_future(self._engine.set_layout(layout))
        line = ProgressLine(_NAME)
        waiting = Waiting(f"switching to {layout}", line)
        try:
            while not (await asyncio.wait({future}, timeout=TICK_S))[0]:
                self._show(waiting, layout)
        finally:
            line.clear()
        return future.result()

    @property
    def layouts(self) -> tuple[str, ...]:
        """Layouts that are compiled; a switch to one of them starts at once, to any other one after compiling it."""
        return self._engine.ready_layouts()

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the devices."""
        return self._engine.device_names

    @property
    def stats(self) -> EngineStats:
        """Counters and gauges now."""
        return self._engine.stats()

    @property
    def memory(self) -> str:
        """What is in the memory of the devices, in words."""
        return self._engine.memory_report

    def close(self) -> None:
        """Ends all requests and frees the devices; a second call does nothing."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({self._model.name!r}, layout={self.layout!r}, {len(self.devices)} devices)"

    # ---- inside

    def _waited(self, future: "concurrent.futures.Future[SwitchReport]", what: str, layout: str) -> SwitchReport:
        """The result of what takes long where something has to be compiled, and a line about that meanwhile."""
        line = ProgressLine(_NAME)
        waiting = Waiting(what, line)
        try:
            while not concurrent.futures.wait([future], TICK_S).done:
                self._show(waiting, layout)
        finally:
            line.clear()
        return future.result()

    def _show(self, waiting: Waiting, layout: str) -> None:
        if self._progress:
            waiting.show(told(self._engine.compiling(), layout, len(self.devices)))

    def _jobs(
        self, prompts: Sequence[GivenPrompt], sampling: SamplingParams | None, wanted: Mapping[str, Any]
    ) -> list[PromptJob]:
        """What a call asks for; making a form may take a second."""
        return self._begun(asked_prompts(prompts, sampling, wanted, self._model, self._engine.tier_names))

    def _begun(self, asked: Sequence[AskedPrompt]) -> list[PromptJob]:
        return [PromptJob(one, self._model, self._engine.cancel) for one in asked]

    def _submit(self, waiting: deque[PromptJob], alive: dict[str, PromptJob], take: _Take) -> None:
        """Submits what is waiting, in order, as far as the engine's queue has room."""
        while waiting:
            job = waiting[0]
            with self._lock:
                self._takers[job.id] = take  # first: tokens may come before submit returns
            try:
                self._engine.submit(job.call.request)
            except Exception as error:
                with self._lock:
                    del self._takers[job.id]
                if isinstance(error, OverloadedError) and alive:
                    return  # when one of ours has ended there is room, or soon will be
                raise
            job.begin()
            alive[waiting.popleft().id] = job

    def _feed(self, alive: dict[str, PromptJob], delta: TokenDelta) -> Piece:
        job = alive.get(delta.request_id)
        if job is None:  # the end of a request that a stop string had ended before
            return Piece("", ())
        try:
            piece = job.take(delta)
        except BaseException:
            del alive[job.id]
            self._forget(job.id)
            raise
        if piece.end is not None:
            del alive[job.id]
            self._forget(job.id)
        return piece

    def _drop(self, alive: dict[str, PromptJob]) -> None:
        for name in alive:
            self._forget(name)
            self._engine.cancel(name)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._takers.pop(name, None)

    def _sink(self, deltas: Sequence[TokenDelta]) -> None:
        with self._lock:
            found = [(self._takers.get(delta.request_id), delta) for delta in deltas]
        for take, delta in found:
            if take is not None:
                take(delta)


def _posting(events: "asyncio.Queue[TokenDelta]") -> _Take:
    loop = asyncio.get_running_loop()

    def take(delta: TokenDelta) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: no caller waits any more
            loop.call_soon_threadsafe(events.put_nowait, delta)

    return take


def _devices_of(layout: str) -> int:
    """How many devices a layout needs."""
    spec = parse_layout(layout, _MOST_DEVICES)
    return 1 + max(device for instance in spec.instances for device in instance.devices)


def _emulate(wanted: int | None) -> None:
    """Lets the CPU act as so many devices, if that can still be done and there are not enough."""
    import jax

    if wanted is None or 0 < wanted <= jax.config.values["jax_num_cpu_devices"]:
        return
    try:
        emulate_cpu_devices(wanted)
    except PreconditionError:
        there = len(discover())
        if there < wanted:
            raise PreconditionError(
                f"JAX has started with {there} device(s), but {wanted} are needed: restart the kernel and make the LLM "
                "before anything else uses JAX"
            ) from None
