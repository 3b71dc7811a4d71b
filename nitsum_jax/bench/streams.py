"""Live streams of an engine, and when each of their tokens came."""

import itertools
import threading
import time
from collections.abc import Sequence

import numpy as np

from nitsum_jax.engine.engine import Engine
from nitsum_jax.engine.request import FinishReason, Request, TokenDelta
from nitsum_jax.errors import PreconditionError

_TIMEOUT_S = 600.0
_ids = itertools.count()


class Streams:
    """Takes the deltas of an engine, and keeps the time of every token per request."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._times: dict[str, list[float]] = {}
        self._error: str | None = None

    def __call__(self, deltas: Sequence[TokenDelta]) -> None:
        """The engine's sink."""
        with self._changed:
            for delta in deltas:
                self._times.setdefault(delta.request_id, []).extend([delta.time_s] * len(delta.token_ids))
                if delta.finish_reason in (FinishReason.ERROR, FinishReason.LENGTH):
                    self._error = delta.error or "a stream ended before it was measured: lower --context or --live"
            self._changed.notify_all()

    def start(self, engine: Engine, live: int, context: int, max_tokens: int, seed: int) -> list[str]:
        """Submits `live` requests with random prompts of `context` tokens."""
        rng = np.random.default_rng(seed)
        names = [f"bench {next(_ids)}" for _ in range(live)]
        for name in names:
            prompt = tuple(rng.integers(0, engine.model_config.vocab_size, context).tolist())
            engine.submit(Request(name, prompt, max_tokens))
        return names

    def count(self, name: str) -> int:
        """Tokens of a request so far."""
        with self._changed:
            return len(self._times.get(name, ()))

    def times(self, name: str) -> list[float]:
        """When the tokens of a request came, seconds of time.monotonic."""
        with self._changed:
            return list(self._times.get(name, ()))

    def wait(self, counts: dict[str, int]) -> None:
        """Waits until every request has so many tokens.

        Raises:
          PreconditionError: a stream ended, or they did not come in time.
        """
        end = time.monotonic() + _TIMEOUT_S
        with self._changed:
            while any(len(self._times.get(name, ())) < count for name, count in counts.items()):
                if self._error is not None:
                    raise PreconditionError(self._error)
                if not self._changed.wait(max(0.0, end - time.monotonic())):
                    raise PreconditionError(f"the streams gave no token for {_TIMEOUT_S:.0f} s")

    def stop(self, engine: Engine, names: Sequence[str]) -> None:
        """Cancels requests and waits until the engine has let go of all."""
        for name in names:
            engine.cancel(name)
        while engine.stats().running or engine.stats().waiting:
            time.sleep(0.002)
