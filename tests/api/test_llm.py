"""The Python API: the same answers whichever way they are asked for."""

import asyncio
import concurrent.futures
import dataclasses
import json
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, Field

import nitsum_jax
from nitsum_jax.engine.request import FinishReason, Request, SamplingParams
from nitsum_jax.engine.switching.switch import SwitchReport
from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.llm import LLM, _devices_of
from nitsum_jax.models.generation import GenerationDefaults
from nitsum_jax.runtime.local.completion import Completion
from nitsum_jax.runtime.progress import ProgressLine
from nitsum_jax.runtime.tools.formats import ToolFormat
from nitsum_jax.runtime.tools.parts import Answer
from tests.engine.quick import quick_compiles  # noqa: F401
from tests.models.golden import tiny_models

pytestmark = pytest.mark.usefixtures("quick_compiles")

TEXTS = ["the quick fox", "a b c d e", "hello there", "x"]
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tiny_models.write_hf_folder("llama_odd", tmp_path_factory.mktemp("model") / "llama_odd")
    settings: dict[str, Any] = {
        "max_model_len": 256,
        "max_batch": 8,  # with the other sizes, what tests/engine/test_engine.py has: the steps are shared
        "prefill_chunk": 32,
        "dtype": "float32",
        "max_queue": 6,
    }
    with LLM(str(folder), "tp2/batch+tp2", devices=4, layouts=("tp2x2", "tp4"), **settings) as llm:
        assert llm.layout == "tp2/batch+tp2"
        llm.set_layout("tp2x2")
        yield llm


@pytest.fixture(scope="module")
def answers(llm: LLM) -> list[Completion]:
    return llm.generate(TEXTS, max_tokens=20, ignore_eos=True)


def test_many_prompts_come_back_in_order(llm: LLM, answers: list[Completion]) -> None:
    assert [len(answer.token_ids) for answer in answers] == [20] * 4
    assert {answer.finish_reason for answer in answers} == {FinishReason.LENGTH}
    assert all(answer.ttft_ms and answer.tpot_ms and answer.text for answer in answers)
    assert len({answer.token_ids for answer in answers}) > 1
    many = llm.generate(TEXTS * 3, max_tokens=20, ignore_eos=True)  # more than the queue takes at once
    assert [answer.token_ids for answer in many] == [answer.token_ids for answer in answers] * 3


def test_vectors_of_texts(tmp_path: Path) -> None:
    folder = str(tiny_models.write_hf_folder("llama_odd", tmp_path / "llama_odd"))
    with LLM(folder, "tp1", devices=1, max_batch=1, max_model_len=64, dtype="float32", pooling="mean") as llm:
        ids = tiny_models.tokenizer().encode(TEXTS[0]).ids
        vectors = llm.embed([TEXTS[0], "another", ids])
        assert vectors.shape == (3, 54)
        assert np.array_equal(vectors[0], vectors[2])
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
        assert vectors[0] @ vectors[1] < 0.999
        assert llm.embed([]).shape == (0, 54)


def test_a_model_without_vectors_says_what_to_do(llm: LLM) -> None:
    with pytest.raises(PreconditionError, match="make the LLM with pooling='last' or 'mean'"):
        llm.embed(["hello"])


def test_a_layout_that_compiles_is_not_waited_for_in_silence(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    told: queue.Queue[str] = queue.Queue()
    lines: list[str] = []

    class Line(ProgressLine):
        def tell(self, text: str) -> None:
            lines.append(text)
            told.put(text)

    def slow(layout: str) -> "concurrent.futures.Future[SwitchReport]":
        future: concurrent.futures.Future[SwitchReport] = concurrent.futures.Future()

        def end() -> None:
            if llm._progress:
                told.get(timeout=60)
            else:
                time.sleep(1.2)  # a line would be due
            future.set_result(SwitchReport("tp2x2", layout, 0, 0, 0, 0.0, 0))

        threading.Thread(target=end, daemon=True).start()
        return future

    monkeypatch.setattr("nitsum_jax.llm.ProgressLine", Line)
    monkeypatch.setattr(llm._engine, "set_layout", slow, raising=False)
    for switch in (llm.set_layout, lambda layout: asyncio.run(llm.aset_layout(layout))):
        lines.clear()
        assert switch("tp4").to_layout == "tp4"
        assert lines[0].startswith("switching to tp4 for ")
    lines.clear()
    monkeypatch.setattr(llm, "_progress", False)
    llm.set_layout("tp4")
    assert lines == []


def test_streams_and_event_loops_say_the_same(llm: LLM, answers: list[Completion]) -> None:
    pieces = list(llm.stream(TEXTS[0], max_tokens=20, ignore_eos=True))
    assert "".join(piece.text for piece in pieces) == answers[0].text
    assert len(pieces) > 5
    assert pieces[-1].end is not None

    async def together() -> None:
        async def stream() -> str:
            return "".join([piece.text async for piece in llm.astream(TEXTS[1], max_tokens=20, ignore_eos=True)])

        whole, streamed = await asyncio.gather(llm.agenerate(TEXTS, max_tokens=20, ignore_eos=True), stream())
        assert [answer.token_ids for answer in whole] == [answer.token_ids for answer in answers]
        assert streamed == answers[1].text
        assert (await llm.achat(CHAT, max_tokens=3)).text == llm.chat(CHAT, max_tokens=3).text

    asyncio.run(together())


def test_what_a_call_does_not_say_is_as_the_model_says(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def request(sampling: SamplingParams | None = None, **wanted: Any) -> Request:
        (job,) = llm._jobs(["x"], sampling, wanted)
        request = job.call.request
        return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=None))

    assert (request().sampling, request().max_tokens) == (SamplingParams(), 256)
    says = GenerationDefaults(temperature=0.6, top_k=20, max_new_tokens=99)
    monkeypatch.setattr(llm, "_model", dataclasses.replace(llm._model, defaults=says))
    assert (request().sampling, request().max_tokens) == (SamplingParams(temperature=0.6, top_k=20), 99)
    # A call that gives parameters gives all of them.
    assert request(SamplingParams(top_p=0.5), max_tokens=7).sampling == SamplingParams(top_p=0.5)
    assert request(max_tokens=7).max_tokens == 7


def test_token_ids_chats_and_parameters(llm: LLM, answers: list[Completion]) -> None:
    ids = llm._model.tokenizer.encode(TEXTS[2])
    (answer,) = llm.generate([ids], max_tokens=20, ignore_eos=True)
    assert answer.token_ids == answers[2].token_ids
    assert answer.prompt_tokens == len(ids)
    stop = answer.text[6:9]
    (stopped,) = llm.generate([TEXTS[2]], max_tokens=20, ignore_eos=True, stop=stop)
    assert (stopped.text, stopped.finish_reason) == (answer.text[: answer.text.index(stop)], FinishReason.STOP)
    drawn = llm.chat(CHAT, SamplingParams(temperature=1.5), max_tokens=8, logprobs=2, ignore_eos=True)
    assert len(drawn.logprobs) == len(drawn.token_ids) == 8
    again = llm.chat(CHAT, SamplingParams(temperature=1.5, seed=drawn.seed), max_tokens=8, ignore_eos=True)
    assert again.token_ids == drawn.token_ids


WILD = SamplingParams(temperature=3.0, seed=5)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 3}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Person(BaseModel, extra="forbid"):
    name: str = Field(max_length=3)
    age: int = Field(ge=0, le=99)


@pytest.mark.parametrize("schema", [PERSON, json.dumps(PERSON), Person], ids=["dictionary", "text", "pydantic"])
def test_an_output_holds_a_schema(llm: LLM, schema: Any) -> None:
    for answer in llm.generate(TEXTS, WILD, json_schema=schema, ignore_eos=True):
        Person.model_validate_json(answer.text)
        assert answer.finish_reason is FinishReason.STOP
    streamed = "".join(piece.text for piece in llm.stream(TEXTS[3], WILD, json_schema=schema))
    assert streamed == answer.text
    Person.model_validate_json(asyncio.run(llm.achat(CHAT, WILD, json_schema=schema)).text)


def test_an_output_holds_any_other_form(llm: LLM) -> None:
    assert re.fullmatch("[ab]{3}", llm.generate(["x"], WILD, regex="[ab]{3}")[0].text)
    assert llm.chat(CHAT, WILD, choice=["yes", "no"]).text in ("yes", "no")
    assert llm.generate(["x"], WILD, grammar='start: "x" "y"')[0].text == "xy"
    assert llm.generate(["x"], WILD, json_object=True, max_tokens=3)[0].text.startswith("{")


def test_what_is_wrong_with_a_form_or_a_tool_is_named(llm: LLM) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    of_texts: list[tuple[dict[str, Any], str]] = [
        ({"regex": "a", "choice": ["b"]}, "regex, choice give several"),
        ({"regex": "["}, "regular expression cannot be used"),
        ({"json_schema": "{"}, "json_schema is not valid JSON"),
        ({"json_schema": 5}, "a class of pydantic"),
        ({"choice": "yes"}, "choice must be a list"),
        ({"tools": [tool]}, "are for chats"),
        ({"ttft_ms": 0}, "ttft_ms=0 is out of range"),
        ({"prompt_logprobs": 21}, "logprobs"),
        ({"pooling": "mean"}, "'pooling' is not known"),
    ]
    of_chats: list[tuple[dict[str, Any], str]] = [
        ({"tools": [{"name": "f"}]}, "a tool must be like"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": "g"}, "names g, which is not in tools"),
    ]
    for wanted, what in of_texts:
        with pytest.raises(InvalidInputError, match=what):
            llm.generate(["x"], **wanted)
    for wanted, what in of_chats:
        with pytest.raises(InvalidInputError, match=what):
            llm.chat(CHAT, **wanted)
    with pytest.raises(PreconditionError, match="teaches no way to call tools"):
        llm.chat(CHAT, tools=[tool])
    with pytest.raises(InvalidInputError, match="needs a role"):
        llm.chat([{"content": "hello"}])


def test_a_chat_calls_tools(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def render(messages: Any, options: Any) -> str:
        told.append((messages, options))
        return "hello"

    model = dataclasses.replace(llm._model, render_chat=render, tools=ToolFormat.HERMES)
    monkeypatch.setattr(llm, "_model", model)
    tools = [{"type": "function", "function": {"name": name, "parameters": PERSON}} for name in ("meet", "greet")]
    options: dict[str, Any] = {"tools": tools, "max_tokens": 200, "chat_template_kwargs": {"mood": "good"}}
    for choice in ("required", "greet"):
        answer = llm.chat(CHAT, WILD, tool_choice=choice, parallel_tool_calls=False, **options)
        (call,) = answer.tool_calls
        assert answer.text == ""
        assert call.name in (("meet", "greet") if choice == "required" else ("greet",))
        Person.model_validate_json(call.arguments)
    assert told[0][1].tools == tuple(tools)
    assert told[0][1].variables == {"mood": "good"}
    parts = [p for piece in llm.stream(CHAT, WILD, tool_choice="greet", **options) for p in piece.parts]
    assert Answer.of(parts).calls == [(call.name, call.arguments)]
    called: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "greet", "arguments": '{"age": 3}'}}
    turns: list[dict[str, Any]] = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "content": "ok"},
    ]
    llm.chat(turns, tool_choice="none", tools=tools, max_tokens=1)
    assert told[-1][0][1]["tool_calls"][0]["function"] == {"name": "greet", "arguments": {"age": 3}}
    assert told[-1][1].tools == ()


def test_a_prompt_is_scored(llm: LLM) -> None:
    ids = llm._model.tokenizer.encode(TEXTS[0])
    (said,) = llm.generate([ids], max_tokens=6, ignore_eos=True, logprobs=2)
    (scored,) = llm.generate([[*ids, *said.token_ids]], prompt_logprobs=2, max_tokens=0)
    assert (scored.text, scored.token_ids, scored.prompt_tokens) == ("", (), len(ids) + 6)
    assert len(scored.prompt_logprobs) == len(ids) + 5
    found = [one.logprob for one in scored.prompt_logprobs[-6:]]
    np.testing.assert_allclose(found, [one.logprob for one in said.logprobs], atol=1e-4)


def test_special_tokens_and_targets_are_as_a_call_says(llm: LLM) -> None:
    end = llm._model.eos_ids[0]
    always = SamplingParams(logit_bias=((end, 100.0),))
    for skip, text in ((True, ""), (False, "</s></s>")):
        assert llm.generate(["x"], always, max_tokens=2, ignore_eos=True, skip_special=skip)[0].text == text
    (job,) = llm._jobs(["x"], None, {"ttft_ms": 30, "tpot_ms": 5.5, "tier": "batch"})
    assert (job.call.request.ttft_ms, job.call.request.tpot_ms, job.call.request.tier) == (30, 5.5, "batch")
    assert llm.generate(["x"], max_tokens=2, ttft_ms=30)[0].token_ids
    stopped = llm.generate(["x"], max_tokens=20, ignore_eos=True)[0].text[4:7]
    answer = llm.generate(["x"], max_tokens=20, ignore_eos=True, stop=["#?#", stopped], include_stop=True)[0]
    assert answer.stop == stopped
    assert answer.text.endswith(stopped)


def test_the_layout_changes_in_the_middle_of_a_stream(llm: LLM, answers: list[Completion]) -> None:
    text, report = "", None
    for piece in llm.stream(TEXTS[0], max_tokens=20, ignore_eos=True):
        text += piece.text
        report = report or llm.set_layout("tp4")
    assert llm.layout == "tp4"
    assert text == answers[0].text
    asyncio.run(llm.aset_layout("tp2x2"))
    assert repr(llm) == f"LLM({llm._model.name!r}, layout='tp2x2', 4 devices)"


def test_a_layout_may_keep_instances_for_tiers(llm: LLM) -> None:
    report = llm.set_layout("tp2/interactive+tp2/standard,batch")
    assert (report.sequences, report.kv_bytes_moved) == (0, 0)
    assert llm.layout == "tp2/interactive+tp2/standard,batch"
    assert len(llm.generate(["x"], max_tokens=2, tier="batch")) == 1
    llm.set_layout("tp2x2")
    assert llm.layout == "tp2x2"
    with pytest.raises(InvalidInputError, match="names the tier 'gold'"):
        llm.set_layout("tp4/gold")


def test_who_leaves_a_stream_ends_its_request(llm: LLM) -> None:
    for _ in llm.stream(TEXTS[0], max_tokens=200, ignore_eos=True):
        break
    llm.generate(["x"], max_tokens=1)
    assert llm._engine._running.alive == {}


def test_what_is_wrong_is_told_at_once(llm: LLM) -> None:
    cases: list[tuple[Any, dict[str, Any]]] = [
        ("text", {}),
        (["x"], {"best_of": 3}),
        (["x"], {"max_tokens": 0}),
        ([""], {}),
    ]
    for prompts, wanted in cases:
        with pytest.raises(InvalidInputError):
            llm.generate(prompts, **wanted)
    with pytest.raises(InvalidInputError):
        llm.stream("x", max_tokens=0)
    with pytest.raises(InvalidInputError, match="no setting 'batch'"):
        LLM("x", batch=3)
    with pytest.raises(PreconditionError, match="restart the kernel"):
        LLM("x", layout="tp16")


def test_a_layout_says_how_many_devices_it_needs() -> None:
    assert [_devices_of(text) for text in ("tp1", "tp2x2", "tp2+tp1x2", "tp2@6,7")] == [1, 4, 4, 8]


def test_the_package_loads_nothing_until_it_is_asked() -> None:
    code = "import sys, nitsum_jax; assert 'jax' not in sys.modules; nitsum_jax.LLM; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert nitsum_jax.LLM is LLM
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        nitsum_jax.nothing  # noqa: B018
