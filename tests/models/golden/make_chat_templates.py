"""Writes chat_templates.json: what transformers makes of the templates in chat_templates.py.

Needs transformers and jinja2, and no torch:

    python -m venv chat-env
    chat-env/bin/pip install transformers==5.24.0 jinja2==3.1.6
    PYTHONPATH=. chat-env/bin/python tests/models/golden/make_chat_templates.py
"""

import json
import pathlib
from typing import Any

import jinja2
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from tests.models.golden.chat_templates import PARTS_TALK, READ_EITHER, READ_PARTS, TALKS, TEMPLATES

FILE = pathlib.Path(__file__).with_name("chat_templates.json")


def outcome(template: str, messages: list[dict[str, Any]], prompt: bool) -> dict[str, str]:
    """The text, or how the template refuses (with its words) or fails (with the kind of error)."""
    try:
        (text,), _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
        )
    except Exception as error:
        if type(error) is jinja2.TemplateError:
            return {"refused": str(error)}
        return {"failed": type(error).__name__}
    return {"text": text}


def in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with parts, as the users of such templates write it."""
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with text, as a template that reads text must be given it."""
    return [{**m, "content": "\n".join(part["text"] for part in m["content"])} for m in messages]


def main() -> None:
    """Writes the file."""
    found: dict[str, dict[str, Any]] = {}
    for name, template in TEMPLATES.items():
        given = {talk: in_parts(messages) if name in READ_PARTS else messages for talk, messages in TALKS.items()}
        given["parts"] = PARTS_TALK if name in READ_PARTS | READ_EITHER else joined(PARTS_TALK)
        found[name] = {
            talk + ("" if prompt else "_without_prompt"): outcome(template, messages, prompt)
            for talk, messages in given.items()
            for prompt in (True, False)
        }
    versions = {"transformers": transformers.__version__, "jinja2": jinja2.__version__}
    FILE.write_text(json.dumps({"versions": versions, "found": found}, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
