"""A request that another engine has begun goes on from its tokens, to the same end."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from nitsum_jax.engine.request import FinishReason
from nitsum_jax.engine.step.masks import only
from nitsum_jax.errors import ContextLengthError, InvalidInputError
from tests.engine.harness import Harness, tiny_model
from tests.engine.quick import quick_compiles  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPT = tuple(range(2, 40))
# Penalties look at the whole output, and the random keys at the position: none of it may begin anew.
SAMPLED: dict[str, Any] = {
    "temperature": 1.1,
    "seed": 7,
    "presence_penalty": 0.6,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.1,
}


@pytest.fixture(scope="module", params=[False, True], ids=["usual", "deterministic"])
def harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    model = tiny_model("llama_odd", tmp_path_factory.mktemp("model"))
    with Harness(model, devices=2, layouts=("tp1x2",), deterministic=request.param) as harness:
        yield harness


@pytest.mark.parametrize("made", [1, 7, 29])
def test_the_rest_is_that_of_an_undisturbed_run(harness: Harness, made: int) -> None:
    (whole,) = harness.run([PROMPT], 30, **SAMPLED)
    assert len(whole.tokens) == 30
    (rest,) = harness.run([PROMPT], 30, generated=whole.tokens[:made], **SAMPLED)
    assert rest.tokens == whole.tokens[made:]
    assert rest.finish is FinishReason.LENGTH


def test_least_tokens_and_stops_count_from_the_beginning(harness: Harness) -> None:
    (whole,) = harness.run([PROMPT], 30, **SAMPLED)
    stop = next(token for token in whole.tokens[12:] if token not in whole.tokens[:12])
    settings = {**SAMPLED, "stop_token_ids": (stop,)}
    (stopped,) = harness.run([PROMPT], 30, **settings)
    (rest,) = harness.run([PROMPT], 30, generated=stopped.tokens[:5], **settings)
    assert (rest.tokens, rest.finish) == (stopped.tokens[5:], FinishReason.STOP)
    assert len(stopped.tokens) >= 12


def test_nothing_goes_on_that_is_at_its_end(harness: Harness) -> None:
    with pytest.raises(InvalidInputError, match="max_tokens=3 leaves none"):
        harness.submit(PROMPT, 3, generated=(1, 2, 3))
    with pytest.raises(InvalidInputError, match="generated has the token id 99"):
        harness.submit(PROMPT, 9, generated=(1, 99))


class _Counting:
    """A form whose tokens count up from 10; see `OutputForm` and `TokenMatcher`."""

    def __init__(self) -> None:
        self._next = 10
        self.first_mask = only(10, 93)

    def matcher(self) -> "_Counting":
        return _Counting()

    def accept(self, token: int) -> None:
        if token != self._next:
            raise ValueError(f"{token} may not come next")
        self._next += 1

    def restart(self) -> None:
        self._next = 10

    def allowed(self, mask: np.ndarray) -> None:
        mask[:] = only(self._next, 93)

    @property
    def ended(self) -> bool:
        return self._next == 40


def test_a_form_goes_on_where_it_was(harness: Harness) -> None:
    (rest,) = harness.run([PROMPT], 20, generated=tuple(range(10, 17)), form=_Counting())
    assert rest.tokens == tuple(range(17, 30))


def test_nothing_goes_on_that_is_longer_than_the_engine_takes(harness: Harness) -> None:
    longest = harness.engine.context_limit()
    most = tuple(3 for _ in range(longest - len(PROMPT)))
    for generated in (most, (*most, *PROMPT)):  # where it began, more may be allowed
        with pytest.raises(ContextLengthError, match=f"{len(generated)} tokens that were generated"):
            harness.submit(PROMPT, 10 * longest, generated=generated)
    (rest,) = harness.run([PROMPT], 10 * longest, generated=most[1:])
    assert (len(rest.tokens), rest.finish) == (1, FinishReason.LENGTH)


def test_a_form_that_is_complete_ends_at_once(harness: Harness) -> None:
    (rest,) = harness.run([PROMPT], 40, generated=tuple(range(10, 40)), form=_Counting())
    assert (rest.tokens, rest.finish, rest.error) == ((), FinishReason.STOP, None)
