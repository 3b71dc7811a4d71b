"""Which weights stay: lean moves exactly what a layout lacks and frees the rest; the budget chooses, and says why."""

from collections.abc import Iterator

import pytest

from nitsum_jax.engine.switching.residency import Residency, choose_residency
from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.meshes.layout import parse_layout
from nitsum_jax.meshes.vshards import VshardMap
from nitsum_jax.meshes.weight_bank import WeightBank
from nitsum_jax.models.loading import OpenModel
from tests.engine.harness import LAYOUTS, Harness, tiny_model
from tests.engine.quick import quick_compiles  # noqa: F401
from tests.engine.reference import random_prompts
from tests.meshes.bank_bytes import bytes_resident

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = random_prompts(6, (3, 80), 93, seed=5)
WALK = ("tp1x4", "tp2x2", "tp4", "tp2+tp1x2", "tp4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    return tiny_model("llama_odd", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lean(model: OpenModel) -> Iterator[Harness]:
    with Harness(model, deterministic=True, residency="lean", layout="tp4") as harness:
        harness.engine.wait_for_layouts()
        yield harness


def vshards(harness: Harness) -> list[int]:
    return [len(harness.engine.cell.bank.resident(device)) for device in range(4)]


def test_lean_keeps_what_the_layout_needs_and_changes_no_token(lean: Harness, model: OpenModel) -> None:
    with Harness(model, deterministic=True) as resident:
        expected = [answer.tokens for answer in resident.run(PROMPTS, 100)]
    with lean.paused():
        names = [lean.submit(prompt, 100) for prompt in PROMPTS]
        futures = [lean.switch_when(names[0], 10 * number, layout) for number, layout in enumerate(WALK, 1)]
    assert [answer.tokens for answer in lean.collect(names)] == expected
    assert [future.result(60).requeued for future in futures] == [0] * len(WALK)


def test_exactly_what_is_missing_moves_and_the_rest_is_freed(lean: Harness) -> None:
    lean.switch("tp4")
    assert vshards(lean) == [1, 1, 1, 1]
    bank = lean.engine.cell.bank
    shard = bytes_resident(bank, 0)
    before = lean.engine.stats()
    report = lean.switch("tp1x4")  # each device lacks three of four
    assert vshards(lean) == [4, 4, 4, 4]
    cut = (bytes_resident(bank, 0) - shard) // 3
    assert report.weight_bytes_moved == 4 * 3 * cut
    back = lean.switch("tp2x2")
    assert back.weight_bytes_moved == 0
    assert vshards(lean) == [2, 2, 2, 2]
    after = lean.engine.stats()
    assert after.weight_bytes_moved - before.weight_bytes_moved == 12 * cut
    assert after.weight_bytes_freed - before.weight_bytes_freed == 8 * cut


def test_weights_that_cannot_be_copied_leave_the_layout(lean: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    lean.switch("tp4")

    def fail(*_: object) -> None:
        raise RuntimeError("the link is down")

    with monkeypatch.context() as patch:
        patch.setattr(WeightBank, "fetch_some", fail)
        with pytest.raises(PreconditionError, match="the weights of tp1x4: the link is down"):
            lean.switch("tp1x4")
    assert str(lean.engine.layout()) == "tp4"
    assert lean.switch("tp2x2").to_layout == "tp2x2"


def test_the_server_says_what_it_chose(lean: Harness) -> None:
    assert "weights per device: lean, 0.00 GiB now" in lean.engine.memory_report
    assert "(asked for)" in lean.engine.memory_report


def choose(policy: str, budget: float | None, first: str = "tp4") -> Residency:
    groups = [spec.devices for layout in LAYOUTS for spec in parse_layout(layout, 4).instances]
    return choose_residency(
        policy,
        budget,
        vmap=VshardMap(4),
        devices=4,
        first=parse_layout(first, 4),
        groups=groups,
        shard_bytes=1 << 30,
        replicated_bytes=1 << 29,
    )


@pytest.mark.parametrize(
    ("policy", "budget", "lean", "why"),
    [
        ("auto", None, False, "resident, 4.50 GiB for all layouts at any time (no budget was set)"),
        ("auto", 5.0, False, "4.50 GiB is within the budget of 5 GiB"),
        ("auto", 4.0, True, "1.50 GiB now and 4.50 GiB at most while a switch copies (4.50 GiB is more than"),
        ("resident", 4.0, False, "asked for"),
        ("lean", 5.0, True, "asked for"),
    ],
)  # fmt: skip
def test_the_budget_chooses(policy: str, budget: float | None, lean: bool, why: str) -> None:
    chosen = choose(policy, budget)
    assert chosen.lean is lean
    assert why in chosen.why
    assert {len(held) for held in chosen.first.values()} == {1 if lean else 4}


def test_bad_policies_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="residency=some is not known"):
        choose("some", None)
    with pytest.raises(InvalidInputError, match=r"layout tp1x4 takes 4\.50 GiB"):
        choose("auto", 2.0, "tp1x4")


def test_an_allow_list_of_high_tps_keeps_less() -> None:
    held = choose_residency(
        "auto", None, vmap=VshardMap(4), devices=4, first=parse_layout("tp4", 4), groups=[(0, 1, 2, 3), (0, 1), (2, 3)],
        shard_bytes=1 << 30, replicated_bytes=0,
    ).first  # fmt: skip
    assert {len(vshards) for vshards in held.values()} == {2}
