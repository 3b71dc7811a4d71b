"""Chat messages to one prompt text, by the jinja2 template that comes with a model.

Templates are code from a model's author, so they run in jinja2's immutable sandbox: no attribute of Python's internals,
no change of what they are given, no text or time without end (see `chat_sandbox`).  They see what Hugging Face gives
them: messages, tools and documents (None: there are none), add_generation_prompt, bos_token, eos_token,
raise_exception, strftime_now and a tojson that does not escape for HTML.  What a message says comes as text or as a
list of parts, whichever the template takes (see `chat_content`).

What a message says is put into the prompt as it is.  Text that spells a special token, such as "<|im_end|>", becomes
that token when the prompt is encoded, exactly as with Hugging Face's apply_chat_template.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.text import chat_content, chat_sandbox
from nitsum_jax.models.text.chat_options import ChatOptions


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    options: ChatOptions = ChatOptions(),
    *,
    bos_token: str = "",
    eos_token: str = "",
) -> str:
    """The prompt text of `messages`.

    Args:
      template: the model's jinja2 template; None if it has none.
      messages: at least one, each with a "role" (text) and a "content": text, or a list of parts of the form
        {"type": "text", "text": "..."}; None where an assistant's message has "tool_calls" instead. Other keys reach
        the template as they are.
      options: what the template is told beside them.
      bos_token: spelling of the start token, for templates that write it.
      eos_token: spelling of the end token, likewise.

    Raises:
      InvalidInputError: there is no template, a message is malformed, or the template refuses the messages or fails.
    """
    if template is None:
        raise InvalidInputError("the model has no chat template: send a plain prompt instead of chat messages")
    _check(messages)
    tokens = (bos_token, eos_token)
    try:
        forms = _forms(template, tokens)
        formed = [_formed(message, forms) for message in messages]
        text = _rendered(template, formed, options, tokens)
        return _cut_behind(text, formed[-1]["content"]) if options.continue_final else text
    except _RefusedError as e:
        raise InvalidInputError(f"the chat template refuses these messages: {_one_line(e)}") from None
    except jinja2.TemplateSyntaxError as e:
        raise InvalidInputError(f"the chat template is broken at line {e.lineno}: {_one_line(e)}") from None
    except Exception as e:  # a template can fail in any way that Python code can
        raise InvalidInputError(f"the chat template fails on these messages: {_one_line(e)}") from None


class _RefusedError(Exception):
    """Raised by a template through raise_exception."""


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's words for training; here it means nothing."""

    tags = {"generation"}  # noqa: RUF012  the name and kind of attribute are jinja2's

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)  # what is set inside ends there


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = chat_sandbox.BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _formed(message: Mapping[str, Any], forms: Mapping[str, chat_content.Form]) -> dict[str, Any]:
    content = message.get("content")
    if content is not None:
        content = forms.get(message["role"], forms["user"]).of(content)
    return {**message, "content": content}


def _cut_behind(text: str, content: Any) -> str:
    """A rendered chat up to the end of its last message; as in transformers, spaces that a template cuts are cut."""
    last = content if isinstance(content, str) else content[-1]["text"] if content else ""
    at = text.rfind(last.strip())
    if not last.strip() or at < 0:
        raise _RefusedError("it does not show the last message, so that this cannot be continued")
    whole = last.lstrip()
    return text[: at + len(whole)] if text[at : at + len(whole)] == whole else text[: at + len(last.strip())]


def _rendered(template: str, messages: chat_content.Messages, options: ChatOptions, tokens: tuple[str, str]) -> str:
    variables = {
        **options.variables,
        "messages": messages,
        # As Hugging Face has it: templates ask whether it is none, and not whether it is defined.
        "tools": [dict(tool) for tool in options.tools] or None,
        "documents": None,
        "add_generation_prompt": options.add_generation_prompt and not options.continue_final,
        "bos_token": tokens[0],
        "eos_token": tokens[1],
    }
    return chat_sandbox.render(_compiled(template), variables)


@functools.lru_cache(maxsize=16)
def _forms(template: str, tokens: tuple[str, str]) -> Mapping[str, chat_content.Form]:
    _compiled(template)  # a broken one is no matter of the probe
    return chat_content.probe(lambda messages: _rendered(template, messages, ChatOptions(), tokens))


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise InvalidInputError("messages is empty: send at least one message")
    for number, message in enumerate(messages):
        content = message.get("content")
        for key, given in (("role", message.get("role")), ("content", content)):
            silent = key == "content" and given is None and message.get("tool_calls")
            if not isinstance(given, str) and not (key == "content" and isinstance(given, list)) and not silent:
                raise InvalidInputError(f"message {number} has no {key}: give each message a role and a content text")
        if isinstance(content, list) and not all(map(_is_text_part, content)):
            raise InvalidInputError(
                f'message {number} has a part that is no text: give {{"type": "text", "text": "..."}}'
            )
        if not message["role"]:
            raise InvalidInputError(f"message {number} has an empty role: give system, user or assistant")


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
