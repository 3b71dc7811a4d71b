"""Both front ends over an engine without a model that says one token per stream and step, at a fixed pace.

Started by frontend.py: prints the two ports, serves until its standard input ends. With --alone it measures the engine
without front ends instead, and prints its tokens per second.
"""

import asyncio
import concurrent.futures
import dataclasses
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers

# As a script only this folder is on the path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from nitsum_jax.engine.batching.load import InstanceLoad
from nitsum_jax.engine.executables.progress import CompileProgress
from nitsum_jax.engine.request import FinishReason, Request, TokenDelta
from nitsum_jax.meshes.layout import Layout, parse_layout
from nitsum_jax.models.text.tokenizer import Tokenizer
from nitsum_jax.runtime.backend import Backend, ServedModel
from nitsum_jax.runtime.streams.router import StreamRouter
from nitsum_jax.server.grpc.server import GrpcServer
from nitsum_jax.server.http.app import build_app
from nitsum_jax.server.http.server import HttpServer

T = TypeVar("T")
TOKEN, TEXT = 0, "x"
_CONTEXT = 10**6


@dataclasses.dataclass(frozen=True, slots=True)
class _Stats:
    waiting: int
    running: int
    queue_capacity: int = 1_000_000
    blocks_free: int = 0
    blocks_total: int = 0
    tokens_generated: int = 0
    steps: int = 0
    switches: int = 0
    compiles: int = 0
    blocks_cached: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    pace_late_steps: int = 0


class PacedEngine:
    """Every `step_s` seconds each request that is alive gets its next token, like from a device that is never late."""

    tier_names = ("standard",)
    device_names = ("none:0",)
    memory_report = ""

    def __init__(self, sink: Callable[[Sequence[TokenDelta]], None], step_s: float) -> None:
        self._sink = sink
        self._step_s = step_s
        self._lock = threading.Condition()
        self._left: dict[str, int] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="paced-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Adds a request; it takes part in the next step."""
        with self._lock:
            self._left[request.id] = request.max_tokens
            self._lock.notify_all()

    def cancel(self, request_id: str) -> None:
        """Forgets a request."""
        with self._lock:
            self._left.pop(request_id, None)

    def wait(self) -> None:
        """Blocks until nothing is alive."""
        while self.stats().running:
            time.sleep(self._step_s)

    def close(self) -> None:
        """Ends the thread."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._thread.join()

    def stats(self) -> _Stats:
        """How many are alive."""
        with self._lock:
            return _Stats(waiting=0, running=len(self._left))

    def lose_device(self, device: int) -> None:
        """There is none to lose."""

    def restore_device(self, device: int) -> None:
        """None was lost."""

    def ask(self, call: Callable[[], T]) -> "concurrent.futures.Future[T]":
        """Answers at once."""
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()
        answer.set_result(call())
        return answer

    def lost_devices(self) -> tuple[int, ...]:
        """None."""
        return ()

    def context_limit(self) -> int:
        """More than a benchmark asks for."""
        return _CONTEXT

    def loads(self) -> Sequence[InstanceLoad]:
        """Of nobody."""
        return ()

    def layout(self) -> Layout:
        """The only one."""
        return parse_layout("tp1", 1)

    def allowed_layouts(self) -> tuple[str, ...]:
        """The only one."""
        return ("tp1",)

    ready_layouts = allowed_layouts

    def compiling(self) -> CompileProgress:
        """Nothing."""
        return CompileProgress()

    def set_layout(self, layout: str) -> concurrent.futures.Future[Any]:
        """There is no other."""
        raise NotImplementedError

    prepare_layout = set_layout

    def drain(self, timeout_s: float) -> bool:
        """Nothing is waited for."""
        return True

    def _loop(self) -> None:
        due = time.perf_counter()
        while True:
            with self._lock:
                while not self._left and not self._closed:
                    self._lock.wait()
                    due = time.perf_counter()
                if self._closed:
                    return
                deltas = self._step()
            self._sink(deltas)
            # A step that was late makes the next one no shorter: a device does not catch up.
            due = max(due + self._step_s, time.perf_counter())
            time.sleep(max(due - time.perf_counter(), 0))

    def _step(self) -> list[TokenDelta]:
        now = time.monotonic()
        deltas = []
        for request_id, left in list(self._left.items()):
            last = left == 1
            deltas.append(TokenDelta(request_id, (TOKEN,), now, FinishReason.LENGTH if last else None))
            if last:
                del self._left[request_id]
            else:
                self._left[request_id] = left - 1
        return deltas


def one_letter_model() -> ServedModel:
    """A real tokenizer of a vocabulary of one letter."""
    inner = HfTokenizer(models.BPE(vocab={TEXT: TOKEN}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(inner, bos_id=None, eos_ids=[], chat_template=None)
    return ServedModel("paced", tokenizer, 1, (), lambda messages, options: TEXT)


def alone(streams: int, tokens: int, step_s: float) -> float:
    """Tokens per second of the engine when nobody listens."""
    engine = PacedEngine(lambda deltas: None, step_s)
    begun = time.perf_counter()
    for index in range(streams):
        engine.submit(Request(str(index), (TOKEN,), tokens))
    engine.wait()
    taken = time.perf_counter() - begun
    engine.close()
    return streams * tokens / taken


async def serve(step_s: float) -> None:
    """Serves until standard input ends."""
    loop = asyncio.get_running_loop()
    server = GrpcServer("127.0.0.1", 0)
    http = HttpServer(build_app(server.state), "127.0.0.1", 0)
    await server.start()
    await http.start()
    router = StreamRouter(loop)
    engine = PacedEngine(router.sink, step_s)
    await server.serve(Backend(engine, one_letter_model(), router))
    print(server.port, http.port, flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    await asyncio.gather(server.stop(), http.stop())
    engine.close()


if __name__ == "__main__":
    if sys.argv[1] == "--alone":
        print(alone(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
    else:
        asyncio.run(serve(float(sys.argv[1])))
