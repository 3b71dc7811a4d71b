"""Which prompts begin alike: traces tell lengths and times, so conversations are drawn.

A request goes on with an earlier one of its tier, with some probability and if its prompt is long enough to contain
that one's prompt and output: this is how a chat's next turn looks.  Lengths and times stay those of the trace.
"""

import collections
import random
from collections.abc import Iterator, Sequence

from nitsum_jax.sim.workloads.workload import TraceRequest

_REMEMBERED = 256  # requests per tier that may be gone on with
_TRIES = 8

Prefixes = tuple[tuple[int, bytes], ...]


def key_of(number: int) -> bytes:
    """The key of all that a request and its answer consist of."""
    return number.to_bytes(8, "big")


def conversations(requests: Sequence[TraceRequest], share: float, seed: int) -> Iterator[Prefixes]:
    """For each request, what its prompt begins with: (tokens, key of the request that ended there), ascending.

    Args:
      requests: in order of arrival.
      share: of the requests that go on with another, as far as there is one that fits.
      seed: of what is drawn.
    """
    draw = random.Random(seed)
    open_: dict[str, collections.deque[tuple[int, int, Prefixes]]] = {}
    for number, request in enumerate(requests):
        recent = open_.setdefault(request.tier, collections.deque(maxlen=_REMEMBERED))
        found: Prefixes = ()
        if recent and draw.random() < share:
            for _ in range(_TRIES):
                earlier, tokens, before = recent[draw.randrange(len(recent))]
                if tokens < request.prompt_tokens:
                    found = (*before, (tokens, key_of(earlier)))
                    break
        recent.append((number, request.prompt_tokens + request.output_tokens, found))
        yield found
