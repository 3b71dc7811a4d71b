"""Which targets a cell can keep at all, and what to say of those that it cannot.

A tier whose targets no request can meet even alone is no use to anybody: its requests run, but always as late ones.
So a server measures one request before it serves, or asks its profile, and says so.
"""

import dataclasses
import math
import queue
import random
from collections.abc import Callable, Iterable, Sequence

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.engine.engine import Engine
from nitsum_jax.engine.request import Request, TokenDelta

PROMPT_TOKENS = 512
_OUTPUT_TOKENS = 9
_ROUNDS = 2  # of which the faster one counts: the first may find things cold
_SPACE = 3.0  # times what a request alone takes: room for some neighbours
_LONGEST_S = 120.0
_PROBE = "\0reach"  # no client's request bears such a name


@dataclasses.dataclass(frozen=True, slots=True)
class Reach:
    """What one request gets that has the cell to itself.

    Attributes:
      prompt_tokens: of the prompt.
      ttft_ms: time to its first token, milliseconds.
      tpot_ms: time per token after it, milliseconds.
      compiling: executables were compiled beside it, as at a first start; without that it may be faster.
    """

    prompt_tokens: int
    ttft_ms: float
    tpot_ms: float
    compiling: bool = False


class Tap:
    """A sink that keeps the deltas of the probe for itself, and hands all others on."""

    def __init__(
        self, sink: Callable[[Sequence[TokenDelta]], None], admitted: Callable[[str, float], None] | None = None
    ) -> None:
        """Taps a sink, and whoever is told of requests that leave the queue."""
        self.deltas: queue.SimpleQueue[TokenDelta] = queue.SimpleQueue()
        self._sink = sink
        self._admitted = admitted
        self._probing = False

    def __call__(self, deltas: Sequence[TokenDelta]) -> None:
        """Takes the deltas of a step."""
        if not self._probing:
            self._sink(deltas)
            return
        for delta in deltas:
            if delta.request_id.startswith(_PROBE):
                self.deltas.put(delta)
        others = [delta for delta in deltas if not delta.request_id.startswith(_PROBE)]
        if others:
            self._sink(others)

    def admitted(self, request_id: str, time_s: float) -> None:
        """A request has left the queue."""
        if self._admitted is not None and not (self._probing and request_id.startswith(_PROBE)):
            self._admitted(request_id, time_s)

    def measure(self, engine: Engine, vocab_size: int, tier: str, clock: Callable[[], float]) -> Reach | None:
        """Serves a request or two on an engine that has nothing else to do; some seconds on a slow machine.

        Args:
          engine: whose sink this is.
          vocab_size: token ids that it knows.
          tier: the probe's.
          clock: the engine's.

        Returns:
          None if the engine could not serve it.
        """
        count = max(1, min(PROMPT_TOKENS, engine.context_limit() - _OUTPUT_TOKENS - 1))
        draw = random.Random(0)
        found = []
        self._probing = True
        try:
            for number in range(_ROUNDS):
                prompt = tuple(draw.randrange(vocab_size) for _ in range(count))
                start_s = clock()
                deadline_s = start_s + _LONGEST_S
                engine.submit(Request(f"{_PROBE}{number}", prompt, _OUTPUT_TOKENS, tier=tier, deadline_s=deadline_s))
                times = self._times()
                if len(times) < 2:
                    return None
                tpot_s = (times[-1] - times[0]) / (len(times) - 1)
                found.append((times[0] - start_s, tpot_s))
        finally:
            self._probing = False
        progress = engine.compiling()
        compiling = bool(progress.making or progress.queued)
        return Reach(count, 1000 * min(ttft for ttft, _ in found), 1000 * min(tpot for _, tpot in found), compiling)

    def _times(self) -> list[float]:
        times: list[float] = []
        while True:
            try:
                delta = self.deltas.get(timeout=2 * _LONGEST_S)
            except queue.Empty:  # the engine is stuck, which others will say
                return []
            times += [delta.time_s] * len(delta.token_ids)
            if delta.finish_reason is not None:
                return times if delta.error is None else []


def predicted_reach(cost: CostModel, tps: Iterable[int]) -> Reach:
    """What a cost model says of one request at the best of some TPs."""
    tps = tuple(tps)
    return Reach(
        PROMPT_TOKENS,
        1000 * min(cost.prefill_s(tp, PROMPT_TOKENS) for tp in tps),
        1000 * min(cost.step_s(tp, 1, PROMPT_TOKENS) for tp in tps),
    )


def unkept(tiers: TierSet, reach: Reach) -> list[str]:
    """A line for every tier whose targets not even a request alone meets."""
    lines = []
    meanwhile = " while other executables are compiled (less once they are)" if reach.compiling else ""
    for tier in tiers:
        misses = [
            f"{what} {least:.0f} ms instead of {target:g}"
            for what, least, target in (("TTFT", reach.ttft_ms, tier.ttft_ms), ("TPOT", reach.tpot_ms, tier.tpot_ms))
            if least > target
        ]
        if misses:
            lines.append(
                f"tier {tier.name} cannot be kept here: a request alone, of {reach.prompt_tokens} prompt tokens, "
                f"has {' and '.join(misses)}{meanwhile}. Its requests run behind those that can be in time; "
                "--tiers=auto sets targets that this machine can keep"
            )
    return lines


def stretched(tiers: TierSet, reach: Reach) -> TierSet:
    """The same tiers with targets that some requests side by side can meet: as they are, or longer."""
    return TierSet(
        tuple(
            dataclasses.replace(
                tier,
                ttft_ms=max(tier.ttft_ms, _rounded(_SPACE * reach.ttft_ms)),
                tpot_ms=max(tier.tpot_ms, _rounded(_SPACE * reach.tpot_ms)),
            )
            for tier in tiers
        )
    )


def _rounded(value: float) -> float:
    """To two digits, upwards."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1) if value > 0 else 1.0
    return round(math.ceil(value / step - 1e-9) * step, 6)
