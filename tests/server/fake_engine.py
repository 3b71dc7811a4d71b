"""An engine without a model: real threads, a bounded queue, batches, cancellation, deadlines and switches."""

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from nitsum_jax.engine.executables.progress import CompileProgress, LayoutProgress, Making
from nitsum_jax.engine.request import FinishReason, Request, TokenDelta, TokenLogprob
from nitsum_jax.errors import (
    ContextLengthError,
    InvalidInputError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
)
from nitsum_jax.meshes.layout import Layout, parse_layout

T = TypeVar("T")
Script = Callable[[Request], Sequence[int]]
PAGE = 16


@dataclasses.dataclass(frozen=True)
class FakeReport:
    from_layout: str
    to_layout: str
    sequences: int
    kv_bytes_moved: int = 0
    weight_bytes_moved: int = 0
    stall_ms: float = 0.25
    requeued: int = 0


@dataclasses.dataclass(frozen=True)
class FakeLoad:
    devices: tuple[int, ...]
    tp: int
    role: str
    running: int
    kv_use: float


@dataclasses.dataclass(frozen=True)
class FakeStats:
    waiting: int
    running: int
    queue_capacity: int
    blocks_free: int
    blocks_total: int
    tokens_generated: int
    steps: int
    switches: int
    compiles: int = 0
    pace_late_steps: int = 0
    blocks_cached: int = 0
    page_size: int = PAGE
    pages_total: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0


@dataclasses.dataclass
class _Live:
    request: Request
    answer: Sequence[int]
    done: int = 0  # of the answer, with what another engine has said of it

    @property
    def blocks(self) -> int:
        return -(-(len(self.request.prompt_ids) + self.request.max_tokens) // PAGE)


def fake_logprob(token: int, top: int) -> TokenLogprob:
    """Of token t: -t / 1000; the most likely tokens are t, t - 1, t - 2 ... down to 0, in this order."""
    return TokenLogprob(-token / 1000, tuple((other, -other / 1000) for other in range(token, -1, -1)[:top]))


def fake_embedding(ids: Sequence[int]) -> np.ndarray:
    """Of a text: how often each of 0 to 7 is the rest of an id by 8, f32[8], of length 1."""
    counts = np.bincount(np.array(ids) % 8, minlength=8).astype(np.float32)
    return counts / np.linalg.norm(counts)


class FakeEngine:
    """Says what its script says, `tokens_per_step` tokens of each running request per step."""

    tier_names = ("interactive", "standard", "batch")
    device_names = tuple(f"fake:{index}" for index in range(4))
    memory_report = "memory: a fake engine needs none"

    def __init__(
        self,
        sink: Callable[[Sequence[TokenDelta]], None],
        script: Script,
        *,
        step_s: float = 0.001,
        tokens_per_step: int = 1,
        max_batch: int = 8,
        max_queue: int = 64,
        context: int = 2048,
        vocab_size: int = 257,
        blocks_total: int = 100_000,
        admitted: Callable[[str, float], None] | None = None,
        cached: Callable[[Request], int] = lambda request: 0,
    ) -> None:
        self._sink = sink
        self._script = script
        self._step_s = step_s
        self._tokens_per_step = tokens_per_step
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._context = context
        self._lost: set[int] = set()
        self._vocab_size = vocab_size
        self._blocks_total = blocks_total
        self._admitted = admitted
        self._cached = cached
        self._lock = threading.Condition()
        self._waiting: list[_Live] = []
        self._running: list[_Live] = []
        self._cancelled: set[str] = set()
        self._switches: list[tuple[Layout, concurrent.futures.Future[FakeReport]]] = []
        self._preparing: list[tuple[Layout, concurrent.futures.Future[FakeReport]]] = []
        self._layout = parse_layout("tp1x4", 4)
        self._held = False
        self._draining = False
        self._closed = False
        self._counts = {"tokens_generated": 0, "steps": 0, "switches": 0}
        self.requests: list[Request] = []
        self.cancels: list[str] = []
        self._thread = threading.Thread(target=self._loop, name="fake-engine", daemon=True)
        self._thread.start()

    def hold(self) -> None:
        """Makes no more steps, and compiles and switches no more, until `release`."""
        with self._lock:
            self._held = True

    def release(self) -> None:
        with self._lock:
            self._held = False
            self._lock.notify_all()

    def submit(self, request: Request) -> None:
        request.sampling.validate()
        if request.tier not in self.tier_names:
            raise InvalidInputError(f"tier {request.tier!r} is unknown: give one of {', '.join(self.tier_names)}")
        if any(not 0 <= token < self._vocab_size for token in request.prompt_ids):
            raise InvalidInputError(f"a prompt id is outside the vocabulary: give 0 to {self._vocab_size - 1}")
        if len(request.prompt_ids) >= self._context:
            raise ContextLengthError(f"the prompt has {len(request.prompt_ids)} tokens: give under {self._context}")
        whole = dataclasses.replace(request, prompt_ids=request.prompt_ids + request.forced_ids)
        live = _Live(request, (*request.forced_ids, *self._script(whole)), len(request.generated))
        if live.blocks > self._blocks_total:
            raise PreconditionError("the request does not fit the KV pool: ask for fewer tokens")
        with self._lock:
            if self._draining or self._closed:
                raise UnavailableError("the engine is draining: try another server")
            if len(self._waiting) >= self._max_queue:
                raise OverloadedError(f"the queue is full ({self._max_queue} requests wait): try again later")
            self.requests.append(request)
            self._waiting.append(live)
            self._lock.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._lock:
            self.cancels.append(request_id)
            if any(live.request.id == request_id for live in self._waiting + self._running):
                self._cancelled.add(request_id)
                self._lock.notify_all()

    def set_layout(self, layout: str) -> "concurrent.futures.Future[FakeReport]":
        parsed = parse_layout(layout, 4)
        if str(parsed) not in self.allowed_layouts():
            raise PreconditionError(
                f"layout {parsed} is not allowed: choose one of {', '.join(self.allowed_layouts())}"
            )
        future: concurrent.futures.Future[FakeReport] = concurrent.futures.Future()
        with self._lock:
            self._switches.append((parsed, future))
            self._lock.notify_all()
        return future

    def prepare_layout(self, layout: str) -> "concurrent.futures.Future[FakeReport]":
        parsed = parse_layout(layout, 4)
        future: concurrent.futures.Future[FakeReport] = concurrent.futures.Future()
        with self._lock:
            self._preparing.append((parsed, future))
            self._lock.notify_all()
        return future

    def layout(self) -> Layout:
        with self._lock:
            return self._layout

    def allowed_layouts(self) -> tuple[str, ...]:
        return ("tp1x4", "tp2x2", "tp4", "tp2+tp1x2")

    def compiling(self) -> CompileProgress:
        with self._lock:
            waited = [str(layout) for layout, _ in self._switches] + [str(layout) for layout, _ in self._preparing]
        making = Making("compiling", 4, "decode", 32, 1.25)
        layouts = tuple(LayoutProgress(layout, "compiling", 4, 2, 1, 3.5) for layout in waited)
        return CompileProgress((making,), 7, layouts) if layouts else CompileProgress()

    def ready_layouts(self) -> tuple[str, ...]:
        return ("tp1x4", "tp2x2")

    def lose_device(self, device: int) -> None:
        if device not in range(len(self.device_names)):
            raise InvalidInputError(f"there is no device {device}")
        self._lost.add(device)

    def restore_device(self, device: int) -> None:
        self._lost.discard(device)

    def lost_devices(self) -> tuple[int, ...]:
        return tuple(sorted(self._lost))

    def ask(self, call: Callable[[], T]) -> "concurrent.futures.Future[T]":
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()
        answer.set_result(call())
        return answer

    def context_limit(self) -> int:
        return min(self._context, self._blocks_total * PAGE)

    def stats(self) -> FakeStats:
        with self._lock:
            used = sum(live.blocks for live in self._running)
            return FakeStats(
                waiting=len(self._waiting),
                running=len(self._running),
                queue_capacity=self._max_queue,
                blocks_free=self._blocks_total - used,
                blocks_total=self._blocks_total,
                pages_total=self._blocks_total,
                **self._counts,
            )

    def loads(self) -> tuple[FakeLoad, ...]:
        stats = self.stats()
        use = 1 - stats.blocks_free / stats.blocks_total
        with self._lock:
            specs = self._layout.instances
        return tuple(
            FakeLoad(spec.devices, spec.tp, str(spec.role), stats.running // len(specs), use) for spec in specs
        )

    def drain(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        with self._lock:
            self._draining = True
            while self._waiting or self._running:
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._lock.wait(min(left, 0.01))
        return True

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._lock:
                while not self._closed and (self._held or self._idle()):
                    # Cancelled and late requests end also while nothing else moves.
                    self._lock.wait(0.005)
                    if self._waiting or self._running:
                        self._emit(self._reap())
                if self._closed:
                    ended = [self._end(live, FinishReason.CANCELLED) for live in self._waiting + self._running]
                    self._waiting, self._running = [], []
                    self._emit(ended)
                    for _, future in self._switches + self._preparing:
                        future.cancel()
                    return
                self._emit(self._step())
            time.sleep(self._step_s)

    def _idle(self) -> bool:
        return not (self._waiting or self._running or self._switches or self._preparing)

    def _emit(self, deltas: list[TokenDelta]) -> None:
        if deltas:
            self._sink(deltas)

    def _reap(self) -> list[TokenDelta]:
        """Ends what is cancelled or late."""
        ended = []
        for group in (self._waiting, self._running):
            for live in list(group):
                late = live.request.deadline_s is not None and live.request.deadline_s <= time.monotonic()
                if late or live.request.id in self._cancelled:
                    group.remove(live)
                    self._cancelled.discard(live.request.id)
                    ended.append(self._end(live, FinishReason.DEADLINE if late else FinishReason.CANCELLED))
        return ended

    def _step(self) -> list[TokenDelta]:
        for layout, future in self._switches:
            report = FakeReport(str(self._layout), str(layout), len(self._running))
            self._layout = layout
            self._counts["switches"] += 1
            future.set_result(report)
        self._switches.clear()
        for layout, future in self._preparing:
            future.set_result(FakeReport(str(self._layout), str(layout), 0))
        self._preparing.clear()
        deltas = self._reap()
        while self._waiting and len(self._running) < self._max_batch:
            self._running.append(self._waiting.pop(0))
            if self._admitted is not None:
                self._admitted(self._running[-1].request.id, time.monotonic())
        self._counts["steps"] += 1
        for live in list(self._running):
            deltas.append(self._advance(live))
            if deltas[-1].finish_reason is not None:
                self._running.remove(live)
        return deltas

    def _advance(self, live: _Live) -> TokenDelta:
        ids: list[int] = []
        reason = None
        for _ in range(self._tokens_per_step):
            token = live.answer[live.done % len(live.answer)]
            if token < 0:
                return TokenDelta(live.request.id, tuple(ids), time.monotonic(), FinishReason.ERROR, "the fake broke")
            if token in live.request.stop_token_ids and live.done >= len(live.request.forced_ids):
                reason = FinishReason.STOP
                break
            ids.append(token)
            live.done += 1
            if live.done == live.request.max_tokens:
                reason = FinishReason.LENGTH
                break
        self._counts["tokens_generated"] += len(ids)
        logprobs = () if live.request.logprobs is None else tuple(fake_logprob(i, live.request.logprobs) for i in ids)
        cached = self._cached(live.request)
        wanted = live.request.pooling is not None and reason is not None
        return TokenDelta(
            live.request.id,
            tuple(ids),
            time.monotonic(),
            reason,
            logprobs=logprobs,
            cached_tokens=cached,
            embedding=fake_embedding(live.request.prompt_ids) if wanted else None,
        )

    def _end(self, live: _Live, reason: FinishReason) -> TokenDelta:
        return TokenDelta(live.request.id, (), time.monotonic(), reason)
