"""Any schedule of switches: deterministic mode keeps every token, and nothing leaks, however many there are."""

import gc
import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nitsum_jax.engine.request import FinishReason
from nitsum_jax.meshes.layout import enumerate_layouts
from tests.engine.harness import Harness, eventually, tiny_model
from tests.engine.quick import quick_compiles  # noqa: F401
from tests.engine.reference import random_prompts

pytestmark = pytest.mark.usefixtures("quick_compiles")

DEVICES, VOCAB = 8, 93
LAYOUTS, LAYOUTS_OF_FOUR = (
    [str(layout) for layout in enumerate_layouts(devices, devices, 1)] for devices in (DEVICES, 4)
)
SIZES = (1, 9, 17, 31, 32, 33, 64, 70, 90, 5, 48, 25)
PROMPTS = [random_prompts(1, (size, size), VOCAB, size)[0] for size in SIZES]
LENGTHS = (60, 40, 80, 20, 50, 70, 30, 64, 25, 90, 45, 10)
# Counted as switches that leaks would show in: memory may still settle during the first ones.
SETTLING, SWITCHES = 100, 1000


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """With a KV cache in 8 bits, whose blocks move like all others."""
    model = tiny_model("llama_odd", tmp_path_factory.mktemp("model"))
    settings = {"devices": DEVICES, "layouts": None, "layout": "tp1x8", "max_batch": 12, "drain_before_switch": False}
    with Harness(model, deterministic=True, prefix_cache=True, kv_dtype="int8", **settings) as harness:
        harness.engine.wait_for_layouts()
        yield harness


def submit(harness: Harness, index: int) -> str:
    sampling = {} if index % 2 else {"temperature": 1.1, "top_p": 0.9, "seed": index}
    return harness.submit(PROMPTS[index], LENGTHS[index], **sampling)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """On half as many devices a switch, and what goes on around it, takes half as long."""
    model = tiny_model("llama_odd", tmp_path_factory.mktemp("model"))
    settings = {"layouts": None, "layout": "tp1x4", "drain_before_switch": False}
    with Harness(model, deterministic=True, prefix_cache=True, **settings) as harness:
        harness.engine.wait_for_layouts()
        yield harness


@pytest.fixture(scope="module")
def undisturbed(harness: Harness) -> list[tuple[int, ...]]:
    return without_switch(harness)


def without_switch(harness: Harness) -> list[tuple[int, ...]]:
    """What each request says without a switch."""
    answers = harness.collect([submit(harness, index) for index in range(len(PROMPTS))])
    assert [len(answer.tokens) for answer in answers] == list(LENGTHS)
    return [answer.tokens for answer in answers]


SCHEDULES = st.lists(
    st.tuples(st.integers(0, len(PROMPTS) - 1), st.integers(0, 60), st.sampled_from(LAYOUTS)), max_size=6
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=12), schedule=SCHEDULES)
def test_no_schedule_of_switches_changes_a_token(
    harness: Harness,
    undisturbed: list[tuple[int, ...]],
    requests: list[int],
    schedule: list[tuple[int, int, str]],
) -> None:
    """Each switch comes when some stream has so many tokens, in the middle of whatever the others do then."""
    with harness.paused():
        names = [submit(harness, index) for index in requests]
        futures = [harness.switch_when(names[who % len(names)], count, layout) for who, count, layout in schedule]
    answers = harness.collect(names)
    assert [answer.tokens for answer in answers] == [undisturbed[index] for index in requests]
    for future in futures:
        assert future.result(60).kv_bytes_moved >= 0
    eventually(lambda: harness.engine.stats().running == 0)
    harness.assert_balanced()


def test_a_thousand_switches_under_load_lose_compile_and_leak_nothing(four: Harness) -> None:
    harness, undisturbed = four, without_switch(four)
    rng = random.Random(7)
    running: list[tuple[int, str]] = []
    done: list[tuple[int, str]] = []
    compiles = resident = 0
    for number in range(SWITCHES):
        if number == SETTLING:
            gc.collect()
            compiles, resident = harness.compiles(), _resident_pages()
        while len(running) < 8:
            index = rng.randrange(len(PROMPTS))
            running.append((index, submit(harness, index)))
        report = harness.switch(rng.choice(LAYOUTS_OF_FOUR))
        assert report.weight_bytes_moved == 0
        done += [item for item in running if harness.recorder.finished(item[1])]
        running = [item for item in running if not harness.recorder.finished(item[1])]
    done += running
    answers = harness.collect([name for _, name in done])
    assert {answer.finish for answer in answers} == {FinishReason.LENGTH}
    assert [answer.tokens for answer in answers] == [undisturbed[index] for index, _ in done]
    eventually(lambda: harness.engine.stats().running == 0)
    harness.assert_balanced()
    gc.collect()
    assert harness.compiles() == compiles
    assert harness.engine.stats().prefix_hit_tokens > 1000  # beginnings that others had computed, often elsewhere
    assert _resident_pages() < 1.02 * resident


def _resident_pages() -> int:
    """Pages of memory that this process has in RAM."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1])
