"""What a handler that is late finds in its stream."""

import asyncio

from nitsum_jax.engine.request import FinishReason, TokenDelta
from nitsum_jax.runtime.records import ServedRequest
from nitsum_jax.runtime.streams.router import DeltaStream


def taken(*deltas: TokenDelta) -> list[list[TokenDelta]]:
    """What `next` returns, call by call, when all deltas have come before the first."""

    async def scenario() -> list[list[TokenDelta]]:
        stream = DeltaStream(ServedRequest("r", "standard", 3, 0.0))
        for delta in deltas:
            stream.put(delta)
        batches = [await stream.next()]
        while sum(map(len, batches)) < len(deltas):
            batches.append(await asyncio.wait_for(stream.next(), 5))
        return batches

    return asyncio.run(scenario())


FIRST, SECOND = TokenDelta("r", (1,), 1.0), TokenDelta("r", (2,), 2.0)


def test_all_that_has_come_is_taken_at_once() -> None:
    stop = TokenDelta("r", (), 3.0, FinishReason.STOP)
    assert taken(FIRST, SECOND, stop) == [[FIRST, SECOND, stop]]


def test_an_error_does_not_take_the_tokens_before_it_along() -> None:
    error = TokenDelta("r", (), 3.0, FinishReason.ERROR, "it broke")
    assert taken(FIRST, SECOND, error) == [[FIRST, SECOND], [error]]
    assert taken(error) == [[error]]
