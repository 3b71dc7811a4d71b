"""Answers are taken apart, however they are cut into pieces."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum_jax.runtime.tools.formats import ToolFormat, format_of, thinks
from nitsum_jax.runtime.tools.parts import CallArguments, CallBegun, Part, Said, Thought
from nitsum_jax.runtime.tools.reader import AnswerReader


@dataclasses.dataclass
class Read:
    """An answer, put together."""

    text: str = ""
    thought: str = ""
    calls: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def add(self, parts: list[Part]) -> None:
        for part in parts:
            match part:
                case Said(text):
                    self.text += text
                case Thought(text):
                    self.thought += text
                case CallBegun(index, name):
                    assert index == len(self.calls)
                    self.calls.append((name, ""))
                case CallArguments(index, text):
                    assert index == len(self.calls) - 1
                    self.calls[index] = (self.calls[index][0], self.calls[index][1] + text)


def read(pieces: list[str], form: ToolFormat | None, thinks: bool = False, thinking: bool = False) -> Read:
    reader, found = AnswerReader(form, ("get", "put"), thinks=thinks, thinking=thinking), Read()
    for piece in pieces:
        found.add(reader.push(piece))
    found.add(reader.finish())
    assert reader.calls == len(found.calls)
    return found


GET = '{"name": "get", "arguments": {"a": "}{\\"]", "b": [1, {"c": null}]}}'
ARGS = '{"a": "}{\\"]", "b": [1, {"c": null}]}'
H, L, M, A = ToolFormat.HERMES, ToolFormat.LLAMA3, ToolFormat.MISTRAL, ToolFormat.MISTRAL_ARGS
CASES: dict[str, tuple[str, ToolFormat | None, dict[str, Any], Read]] = {
    "plain": ("Hi <there> {", None, {}, Read("Hi <there> {")),
    "plain with tools": ("a < b <tool> c \n", H, {}, Read("a < b <tool> c")),
    "one": (f"<tool_call>\n{GET}\n</tool_call>", H, {}, Read("", "", [("get", ARGS)])),
    "text before": (f"Let me see.\n\n<tool_call>{GET}</tool_call>", H, {}, Read("Let me see.", "", [("get", ARGS)])),
    "two": (
        f'<tool_call>\n{GET}\n</tool_call>\n<tool_call>\n{{"name":"put","arguments":{{}}}}\n</tool_call>\n',
        H,
        {},
        Read("", "", [("get", ARGS), ("put", "{}")]),
    ),
    "arguments first": (
        '<tool_call>{"arguments": {"x": 1}, "id": 7, "name": "put"}</tool_call>',
        H,
        {},
        Read("", "", [("put", '{"x": 1}')]),
    ),
    "arguments as text": (
        '<tool_call>{"name": "put", "arguments": "{\\"x\\": 1}"}</tool_call>',
        H,
        {},
        Read("", "", [("put", '{"x": 1}')]),
    ),
    "no arguments": ('<tool_call>{"name": "put"}</tool_call>', H, {}, Read("", "", [("put", "{}")])),
    "no call": ("<tool_call>oh well", H, {}, Read("oh well")),
    "bad key": ('<tool_call>{"a\\q": 1}</tool_call>', H, {}, Read('{"a\\q": 1}</tool_call>')),
    "deep value": (
        f'<tool_call>{{"x": {"[" * 2000}{"]" * 2000}}}</tool_call>',
        H,
        {},
        Read(f'{{"x": {"[" * 2000}{"]" * 2000}}}</tool_call>'),
    ),
    "broken behind the name": (
        f'<tool_call>{GET}</tool_call><tool_call>{{"name": "put", "x" y}}</tool_call> so',
        H,
        {},
        Read("y}</tool_call> so", "", [("get", ARGS), ("put", "{}")]),
    ),
    "broken behind the arguments": (
        '<tool_call>{"name": "put", "arguments": {"x": 1} y}</tool_call>',
        H,
        {},
        Read("y}</tool_call>", "", [("put", '{"x": 1}')]),
    ),
    "cut": (f"<tool_call>\n{GET[:40]}", H, {}, Read("", "", [("get", GET[29:40])])),
    "llama": (GET.replace("arguments", "parameters"), L, {}, Read("", "", [("get", ARGS)])),
    "llama tag": (f"<|python_tag|>{GET}; {GET}", L, {}, Read("", "", [("get", ARGS), ("get", ARGS)])),
    "llama json": ('{"name": "other", "x": 1} is JSON', L, {}, Read('{"name": "other", "x": 1} is JSON')),
    "llama text": ("no {call}", L, {}, Read("no {call}")),
    "mistral": (f"[TOOL_CALLS] [{GET}, {GET}]", M, {}, Read("", "", [("get", ARGS), ("get", ARGS)])),
    "mistral args": (
        f"[TOOL_CALLS]get[ARGS]{ARGS}[TOOL_CALLS]put[CALL_ID]x1[ARGS]{{}}",
        A,
        {},
        Read("", "", [("get", ARGS), ("put", "{}")]),
    ),
    "thought": ("<think>\nwell\n</think>\n\nHi", None, {"thinks": True}, Read("Hi", "\nwell\n")),
    "no thought": ("Hi <think>", None, {"thinks": True}, Read("Hi <think>")),
    "begun thought": ("well</think>Hi", None, {"thinks": True, "thinking": True}, Read("Hi", "well")),
    "endless thought": ("<think>well </th", None, {"thinks": True}, Read("", "well </th")),
    "thought and call": (
        f"<think>hm</think>\n<tool_call>\n{GET}\n</tool_call>",
        H,
        {"thinks": True},
        Read("", "hm", [("get", ARGS)]),
    ),
    "thought and llama": (f"<think>hm</think>\n{GET}", L, {"thinks": True}, Read("", "hm", [("get", ARGS)])),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_whole_and_by_characters(name: str) -> None:
    text, form, how, expected = CASES[name]
    assert read([text], form, **how) == expected
    assert read(list(text), form, **how) == expected


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_cut_matters(data: st.DataObject) -> None:
    text, form, how, expected = CASES[data.draw(st.sampled_from(sorted(CASES)))]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(pieces, form, **how) == expected


@given(
    arguments=st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)),
    form=st.sampled_from([H, M]),
)
@settings(max_examples=150, deadline=None)
def test_any_arguments_come_through(arguments: dict[str, Any], form: ToolFormat) -> None:
    call = json.dumps({"name": "get", "arguments": arguments})
    text = f"<tool_call>{call}</tool_call>" if form is H else f"[TOOL_CALLS][{call}]"
    found = read(list(text), form)
    ((name, said),) = found.calls
    assert (name, json.loads(said), found.text) == ("get", arguments, "")


def test_arguments_stream() -> None:
    reader = AnswerReader(H, thinks=False, thinking=False)
    assert reader.push('<tool_call>{"name": "get", "argu') == [CallBegun(0, "get")]
    assert reader.push('ments": {"a"') == [CallArguments(0, '{"a"')]
    assert reader.push(": 1}") == [CallArguments(0, ": 1}")]
    assert reader.push("}</tool_call>") == []


def test_templates_tell_their_format() -> None:
    for template, form in (
        (None, None),
        ("{{ messages }}", None),
        ("{% if tools %}<tool_call>{% endif %}", H),
        ("{{ tools }}[TOOL_CALLS]", M),
        ("{{ tools }}[TOOL_CALLS]{{ name }}[ARGS]", A),
        ("{{ tools }}<|start_header_id|>{'name': x, \"parameters\": y}", L),
    ):
        assert format_of(template) == form
    assert thinks("a</think>b")
    assert not thinks(None)
