"""Outputs that are held to a form: whatever the layout is and however it changes, each is valid."""

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from nitsum_jax.engine.request import FinishReason, OutputForm
from nitsum_jax.models.loading import OpenModel
from nitsum_jax.runtime.structured import forms
from nitsum_jax.runtime.structured.compiler import FormCompiler
from tests.engine.batching.schemas import EOS, VOCAB, schemas, tokenizer
from tests.engine.harness import Answer, Harness, eventually, tiny_model
from tests.engine.quick import quick_compiles  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compiles")

TOKENS = tokenizer()
LAYOUTS = ("tp1x4", "tp2x2", "tp4")


@pytest.fixture(scope="module")
def compiler() -> FormCompiler:
    return FormCompiler(TOKENS, VOCAB, [EOS])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    return tiny_model("llama_odd", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(model: OpenModel) -> Iterator[Harness]:
    with Harness(model, max_queue=256, layouts=LAYOUTS) as harness:
        harness.engine.wait_for_layouts()
        yield harness


@pytest.fixture
def harness(shared: Harness) -> Iterator[Harness]:
    if str(shared.engine.layout()) != "tp1x4":
        shared.switch("tp1x4")
    yield shared
    eventually(lambda: shared.engine.stats().running == 0)
    shared.assert_balanced()


def text(answer: Answer) -> str:
    return TOKENS.decode(answer.tokens, skip_special=False)


def submit(harness: Harness, form: OutputForm | None, seed: int, **fields: Any) -> str:
    wanted: dict[str, Any] = {"temperature": 30.0, "seed": seed, "stop_token_ids": (EOS,), "form": form}
    return harness.submit([1, 2, 3 + seed % 7], 250, **(wanted | fields))


def test_two_hundred_schemas_at_every_tp_and_across_switches(harness: Harness, compiler: FormCompiler) -> None:
    drawn = schemas(200)
    names = [submit(harness, compiler.compile(forms.json_schema(one)), n) for n, one in enumerate(drawn)]
    for layout in (*LAYOUTS[1:], *LAYOUTS, *LAYOUTS):
        done = [name for name in names if not harness.recorder.finished(name)]
        if done:
            harness.wait_for_tokens(done[0], 4)
        harness.switch(layout)
    for one, answer in zip(drawn, harness.collect(names), strict=True):
        assert (answer.finish, answer.error) == (FinishReason.STOP, None), one
        jsonschema.validate(json.loads(text(answer)), one)


def test_other_forms_and_outputs_without_one_beside_them(harness: Harness, compiler: FormCompiler) -> None:
    free = [submit(harness, None, seed, stop_token_ids=()) for seed in range(4)]
    kinds = {
        "regex": forms.regex(r"[a-f]{3}-\d+"),
        "choice": forms.choice(["yes", "no", "a.b"]),
        "lark": forms.grammar('start: "<" word ("," word)* ">"\nword: /[a-c]+/'.replace("<", "[").replace(">", "]")),
        "gbnf": forms.grammar('root ::= "[" item ("," item)* "]"\nitem ::= [0-9]+'),
        "object": forms.json_object(),
    }
    held = {kind: submit(harness, compiler.compile(spec), 5) for kind, spec in kinds.items()}
    said = {kind: text(answer) for kind, answer in zip(held, harness.collect(held.values()), strict=True)}
    assert re.fullmatch(r"[a-f]{3}-\d+", said["regex"])
    assert said["choice"] in ("yes", "no", "a.b")
    assert re.fullmatch(r"\[[a-c]+(,[a-c]+)*\]", said["lark"])
    assert re.fullmatch(r"\[\d+(,\d+)*\]", said["gbnf"])
    assert said["object"].startswith("{")
    alone = [submit(harness, None, seed, stop_token_ids=()) for seed in range(4)]
    assert [a.tokens for a in harness.collect(free)] == [a.tokens for a in harness.collect(alone)]


def test_a_form_goes_before_the_end_of_a_text_and_before_min_tokens(harness: Harness, compiler: FormCompiler) -> None:
    form = compiler.compile(forms.regex("a{2,200}"))
    answers = harness.collect(
        [
            submit(harness, form, 1, logit_bias=((EOS, 100.0),)),  # it would end at once
            submit(harness, form, 1, logit_bias=((EOS, 100.0),), min_tokens=5),
            submit(harness, compiler.compile(forms.choice(["yes"])), 1, min_tokens=100),
            submit(harness, compiler.compile(forms.choice(["yes"])), 1, temperature=0.0),
        ]
    )
    assert {answer.finish for answer in answers} == {FinishReason.STOP}
    said = [text(answer) for answer in answers]
    assert said[0] == "aa"
    assert set(said[1]) == {"a"}
    assert len(answers[1].tokens) == 5
    assert said[2:] == ["yes", "yes"]


@pytest.mark.parametrize("again", [False, True], ids=["goes on", "says all again"])
def test_who_is_sent_back_keeps_its_form(
    harness: Harness, compiler: FormCompiler, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    form = compiler.compile(forms.regex("(ab|12){60}"))
    loop = harness.engine._running
    monkeypatch.setattr(loop._admission, "_deterministic", again)
    before = harness.engine.stats().sent_back

    def send_all_back() -> None:  # on the engine's thread
        for sequence in [s for s in loop.alive.values() if s.row >= 0]:
            loop._admission._send_back(sequence)

    names = [submit(harness, form, seed) for seed in range(6)]
    for count in (7, 40):
        harness.recorder.when(names[0], count, send_all_back)
    answers = harness.collect(names)
    assert harness.engine.stats().sent_back >= before + 6
    assert all(re.fullmatch("(ab|12){60}", text(answer)) for answer in answers), [a.error for a in answers]


def test_given_tokens_are_said_with_how_likely_they_were(harness: Harness) -> None:
    prompt, given = [5, 6, 7], (8, EOS, 9, 10)  # a stop token among them ends nothing
    (whole,) = harness.collect([harness.submit(prompt[:1], 6, forced_ids=(*prompt[1:], *given), logprobs=2)])
    assert whole.tokens[:6] == (*prompt[1:], *given)
    assert len(whole.tokens) == 6
    (plain,) = harness.collect([harness.submit([*prompt, *given], 5, logprobs=2)])
    (both,) = harness.collect([harness.submit(prompt[:1], 11, forced_ids=(*prompt[1:], *given), logprobs=2)])
    assert both.tokens[6:] == plain.tokens
    (early,) = harness.collect([harness.submit([1], 3, forced_ids=(EOS, 4, 5), min_tokens=3, stop_token_ids=(EOS,))])
    assert early.tokens == (EOS, 4, 5)


@dataclasses.dataclass
class _Stuck:
    """A form whose matcher breaks at its second token."""

    inner: OutputForm

    @property
    def first_mask(self) -> Any:
        return self.inner.first_mask

    def matcher(self) -> Any:
        class Matcher:
            ended = False

            def accept(self, token: int) -> None:
                raise ValueError("it is stuck")

        return Matcher()


def test_a_form_that_breaks_is_an_error_of_its_request_alone(harness: Harness, compiler: FormCompiler) -> None:
    good = compiler.compile(forms.choice(["abc"]))
    names = [submit(harness, _Stuck(good), 1), submit(harness, good, 1)]
    broken, other = harness.collect(names)
    assert broken.finish is FinishReason.ERROR
    assert broken.error == "the output cannot be held to its form: it is stuck"
    assert text(other) == "abc"
