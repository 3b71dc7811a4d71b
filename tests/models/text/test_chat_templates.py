"""Chat templates against transformers: small templates with the habits of the published ones (see tests/golden)."""

import json
import pathlib
from typing import Any

import jinja2
import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.text.chat import render_chat
from nitsum_jax.models.text.chat_content import Form, probe
from nitsum_jax.models.text.chat_options import ChatOptions
from nitsum_jax.models.text.chat_sandbox import TooMuchError
from tests.golden.chat_templates import PARTS_TALK, TALKS, TEMPLATES

_FILE = pathlib.Path(__file__).parents[2] / "golden" / "chat_templates.json"
FOUND: dict[str, dict[str, dict[str, str]]] = json.loads(_FILE.read_text(encoding="utf-8"))["found"]


def ours(template: str, messages: list[dict[str, Any]], prompt: bool) -> dict[str, str]:
    try:
        text = render_chat(
            template, messages, ChatOptions(add_generation_prompt=prompt), bos_token="<s>", eos_token="</s>"
        )
    except InvalidInputError as error:
        how, _, why = str(error).removeprefix("the chat template ").partition(" these messages: ")
        return {"refused": why} if how == "refuses" else {"failed": how}
    return {"text": text}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_that_of_transformers(name: str) -> None:
    for talk, messages in {**TALKS, "parts": PARTS_TALK}.items():
        for prompt in (True, False):
            expected = FOUND[name][talk + ("" if prompt else "_without_prompt")]
            got = ours(TEMPLATES[name], messages, prompt)
            assert got == ({"failed": "fails on"} if "failed" in expected else expected), talk


def test_the_corpus_is_worth_its_name() -> None:
    assert FOUND.keys() == TEMPLATES.keys()
    assert len(TEMPLATES) >= 25
    assert sum("text" in FOUND[name]["talk"] for name in TEMPLATES) >= 25


def probed(template: str) -> dict[str, Form]:
    return dict(probe(lambda messages: render(template, messages)))


def render(template: str, messages: Any) -> str:
    return jinja2.Environment().from_string(template).render(messages=messages)


SYSTEM_AS_TEXT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '.' }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)
NEEDS_A_SYSTEM = "{{ messages[0].content + messages[1].content }}"


@pytest.mark.parametrize(
    ("template", "forms"),
    [
        ("{{ messages[0].content }}", {"user": Form.TEXT, "system": Form.TEXT}),  # prints lists as Python spells them
        (TEMPLATES["chatml"], {"user": Form.TEXT, "system": Form.TEXT, "assistant": Form.TEXT}),
        (TEMPLATES["idefics"], {"user": Form.PARTS, "system": Form.PARTS, "assistant": Form.PARTS}),
        (TEMPLATES["qwen2_vl"], {"user": Form.EITHER, "system": Form.EITHER, "assistant": Form.EITHER}),
        (SYSTEM_AS_TEXT, {"user": Form.PARTS, "system": Form.TEXT, "assistant": Form.PARTS}),
        (NEEDS_A_SYSTEM, {"user": Form.TEXT, "system": Form.TEXT, "assistant": Form.TEXT}),
        ("{{ 1 / 0 }}", {"user": Form.TEXT}),
        ("silent", {"user": Form.TEXT}),
    ],
)
def test_a_probe_tells_what_a_template_takes(template: str, forms: dict[str, Form]) -> None:
    assert probed(template) == forms


def test_a_role_of_its_own_takes_what_the_user_takes() -> None:
    messages = [{"role": "critic", "content": "no"}, {"role": "user", "content": "yes"}]
    assert render_chat(TEMPLATES["idefics"], messages) == "critic:no<end>user:yes<end>"


def test_a_template_without_end_is_probed_once() -> None:
    calls = []

    def endless(messages: Any) -> str:
        calls.append(messages)
        raise TooMuchError("too long")

    assert probe(endless) == {"user": Form.TEXT}
    assert len(calls) == 1


@pytest.mark.parametrize("part", [{"type": "image", "text": "x"}, {"type": "text"}, {"type": "text", "text": 1}, "x"])
def test_parts_that_are_no_text_are_refused(part: Any) -> None:
    with pytest.raises(InvalidInputError, match="message 0 has a part that is no text: give"):
        render_chat(TEMPLATES["llava"], [{"role": "user", "content": [part]}])


def test_messages_are_not_changed_by_their_form() -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert render_chat(TEMPLATES["llava"], messages) == "USER: hi "
    assert messages == [{"role": "user", "content": "hi"}]
