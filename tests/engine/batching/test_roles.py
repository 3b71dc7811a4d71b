"""Layouts with prefill and decode instances: sequences go over with their blocks, and say what they would have said."""

from collections.abc import Iterator

import pytest

from nitsum_jax.engine.batching.step_log import StepTiming
from nitsum_jax.engine.request import FinishReason
from nitsum_jax.models.loading import OpenModel
from tests.engine.harness import Harness, eventually, tiny_model
from tests.engine.quick import quick_compiles  # noqa: F401
from tests.engine.reference import random_prompts

pytestmark = pytest.mark.usefixtures("quick_compiles")

VARIANT, VOCAB = "llama_odd", 93
MIXED = "tp1x4"
ROLES = ("tp2:prefill+tp1x2:decode", "tp1x2:prefill+tp2:decode")
PROMPTS = [prompt for size in (1, 16, 31, 33, 60, 90) for prompt in random_prompts(1, (size, size), VOCAB, size)]
LENGTHS = (60, 40, 1, 50, 33, 45)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    return tiny_model(VARIANT, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(model: OpenModel) -> Iterator[Harness]:
    with Harness(model, deterministic=True, layouts=(MIXED, *ROLES)) as harness:
        harness.engine.wait_for_layouts()
        yield harness


@pytest.fixture
def harness(shared: Harness) -> Iterator[Harness]:
    yield shared
    eventually(lambda: shared.engine.stats().running == 0)
    shared.assert_balanced()


def submit_all(harness: Harness) -> list[str]:
    return [
        harness.submit(prompt, length, temperature=1.0 if i % 2 else 0.0, seed=i)
        for i, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True))
    ]


def spoken(harness: Harness, names: list[str]) -> list[tuple[int, ...]]:
    answers = harness.collect(names)
    assert {answer.finish for answer in answers} == {FinishReason.LENGTH}
    return [answer.tokens for answer in answers]


@pytest.fixture(scope="module")
def mixed(shared: Harness) -> list[tuple[int, ...]]:
    """What the streams say where every instance does everything."""
    return spoken(shared, submit_all(shared))


@pytest.mark.parametrize("layout", ROLES)
def test_roles_change_no_token(harness: Harness, mixed: list[tuple[int, ...]], layout: str) -> None:
    harness.switch(layout)
    before = harness.engine.stats().hand_overs
    assert spoken(harness, submit_all(harness)) == mixed
    # A request for one token is never handed over.
    assert harness.engine.stats().hand_overs - before == sum(length > 1 for length in LENGTHS)


def test_prefill_instances_never_decode(harness: Harness) -> None:
    harness.switch(ROLES[0])
    timings: list[StepTiming] = []
    harness.engine.on_step(timings.extend)
    harness.run(PROMPTS, 12)
    eventually(lambda: harness.engine.stats().running == 0)
    prefills = [timing for timing in timings if timing.prefill_tokens]
    decodes = [timing for timing in timings if timing.decode_sequences]
    assert {timing.devices for timing in prefills} == {(0, 1)}
    assert {timing.devices for timing in decodes} == {(2,), (3,)}
    assert sum(sum(timing.prefill_tokens) for timing in prefills) == sum(map(len, PROMPTS))
    assert sum(timing.decode_sequences for timing in decodes) >= 11 * len(PROMPTS)
    assert all(timing.end_s > timing.start_s for timing in timings)


def test_switches_between_layouts_with_and_without_roles_change_no_token(
    harness: Harness, mixed: list[tuple[int, ...]]
) -> None:
    harness.switch(MIXED)
    with harness.paused():
        names = submit_all(harness)
        walk = [*ROLES, MIXED, ROLES[1]]
        futures = [harness.switch_when(names[0], 10 * number, layout) for number, layout in enumerate(walk, 1)]
    assert spoken(harness, names) == mixed
    assert [future.result(60).to_layout for future in futures] == walk


def test_a_full_decode_instance_holds_prompts_back(harness: Harness, mixed: list[tuple[int, ...]]) -> None:
    harness.switch(ROLES[1])
    names = [harness.submit(PROMPTS[3], 30, seed=1, temperature=1.0) for _ in range(20)]  # it has 8 rows
    said = spoken(harness, names)
    assert len(set(said)) == 1
