"""A long prompt is prefilled at TP 4 across devices that decode at TP 1 in between: two layouts at once."""

import json
from collections.abc import Iterator

import pytest

from nitsum_jax.engine.request import FinishReason
from nitsum_jax.models.loading import OpenModel, open_model
from tests.engine.harness import Harness, eventually
from tests.engine.quick import greedy_steps  # noqa: F401
from tests.engine.reference import random_prompts
from tests.models.golden import tiny_models

pytestmark = pytest.mark.usefixtures("greedy_steps")

VOCAB = 93
LONG = [prompt for size in (2048, 300, 1000) for prompt in random_prompts(1, (size, size), VOCAB, size)]
SHORT = random_prompts(6, (5, 60), VOCAB, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    folder = tiny_models.write_hf_folder("llama_odd", tmp_path_factory.mktemp("model") / "llama_odd")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 8192  # its angles are computed, so that it can go as far as we like
    (folder / "config.json").write_text(json.dumps(config))
    return open_model(str(folder))


def engine(model: OpenModel, wide: int | None) -> Harness:
    return Harness(
        model, deterministic=True, max_model_len=2176, layouts=None, wide_prefill_tokens=wide, prefill_chunk=32
    )


@pytest.fixture(scope="module")
def narrow(model: OpenModel) -> list[tuple[int, ...]]:
    """What the requests say when each is prefilled by the instance that decodes it."""
    with engine(model, None) as harness:
        answers = harness.run([*SHORT, *LONG], 60)
        assert harness.engine.stats().wide_prefills == 0
    return [answer.tokens for answer in answers]


@pytest.fixture(scope="module")
def wide(model: OpenModel) -> Iterator[Harness]:
    with engine(model, 256) as harness:
        harness.engine.wait_for_layouts(("tp1x4", "tp2x2", "tp4"))
        yield harness
        eventually(lambda: harness.engine.stats().running == 0)
        harness.assert_balanced()


@pytest.mark.parametrize("layout", ["tp1x4", "tp2x2"])
def test_tokens_are_those_of_a_prefill_in_place(wide: Harness, narrow: list[tuple[int, ...]], layout: str) -> None:
    wide.switch(layout)
    compiles, before = wide.compiles(), wide.engine.stats()
    for number, prompt in enumerate(LONG, len(SHORT)):  # one that finds another there is prefilled in place
        assert [answer.tokens for answer in wide.run([*SHORT, prompt], 60)] == [*narrow[: len(SHORT)], narrow[number]]
    after = wide.engine.stats()
    assert after.wide_prefills == before.wide_prefills + len(LONG)
    assert after.compiles == compiles
    assert after.sent_back == before.sent_back


def test_others_decode_in_between_the_chunks(wide: Harness, narrow: list[tuple[int, ...]]) -> None:
    wide.switch("tp1x4")
    with wide.paused():
        names = [wide.submit(prompt, 60) for prompt in SHORT[:4]]
        long = wide.submit(LONG[0], 60)
    wide.recorder.wait(lambda: wide.recorder.count(long) > 0)
    # 64 chunks went by, and after each of them every instance took its turn.
    assert all(wide.recorder.count(name) >= 50 for name in names)
    assert [answer.tokens for answer in wide.collect([*names, long])] == [*narrow[:4], narrow[len(SHORT)]]


def test_the_widest_layout_needs_no_guest(wide: Harness, narrow: list[tuple[int, ...]]) -> None:
    wide.switch("tp4")
    before = wide.engine.stats().wide_prefills
    assert wide.run([LONG[1]], 60)[0].tokens == narrow[len(SHORT) + 1]
    assert wide.engine.stats().wide_prefills == before


def test_a_switch_waits_for_the_prompt_and_loses_nothing(wide: Harness, narrow: list[tuple[int, ...]]) -> None:
    wide.switch("tp1x4")
    with wide.paused():
        names = [wide.submit(prompt, 60) for prompt in (*SHORT, *LONG)]
        futures = [wide.switch_when(names[0], 5, "tp2x2"), wide.switch_when(names[7], 5, "tp4")]
    assert [answer.tokens for answer in wide.collect(names)] == narrow
    assert [future.result(60).to_layout for future in futures] == ["tp2x2", "tp4"]


def test_a_prompt_can_be_cancelled_in_the_middle(wide: Harness) -> None:
    wide.switch("tp1x4")
    with wide.paused():
        name = wide.submit(SHORT[0], 60)
        long = wide.submit(LONG[0], 60)
        wide.recorder.when(name, 3, lambda: wide.engine.cancel(long))
    first, second = wide.collect([name, long])
    assert (first.finish, second.finish) == (FinishReason.LENGTH, FinishReason.CANCELLED)
    assert second.tokens == ()
    eventually(lambda: wide.engine.stats().running == 0)
    wide.assert_balanced()


def test_a_lost_device_sends_the_prompt_elsewhere(model: OpenModel, narrow: list[tuple[int, ...]]) -> None:
    with engine(model, 256) as harness:
        harness.engine.wait_for_layouts(("tp1x4", "tp4"))
        with harness.paused():
            names = [harness.submit(prompt, 60) for prompt in (*SHORT[:2], LONG[2])]
            harness.recorder.when(names[0], 5, lambda: harness.engine.lose_device(3))
        assert [answer.tokens for answer in harness.collect(names)] == [*narrow[:2], narrow[-1]]
        assert harness.engine.stats().sent_back >= 1
