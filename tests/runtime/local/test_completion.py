"""An answer in parts, without an engine."""

from typing import Any

from nitsum_jax.engine.request import FinishReason, TokenDelta
from nitsum_jax.runtime.local.asked import asked_prompts
from nitsum_jax.runtime.local.completion import Completion, FunctionCall, PromptJob
from nitsum_jax.runtime.tools.parts import Said, Thought
from tests.server.harness import TOKENIZER, served_model

TEMPLATE = "{% if tools %}<tool_call>{% endif %}{# </think> #}{% for m in messages %}{{ m.content }}{% endfor %}"
MODEL = served_model(template=TEMPLATE)
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def answer(prompt: Any, text: str, **wanted: Any) -> tuple[Completion, PromptJob, list[Any]]:
    """What comes of an engine that says this text, a byte at a time."""
    (asked,) = asked_prompts([prompt], None, wanted, MODEL, ("standard",))
    cancelled: list[str] = []
    job = PromptJob(asked, MODEL, cancelled.append)
    job.begin()
    ids = TOKENIZER.encode(text)
    parts: list[Any] = []
    for index, token in enumerate(ids):
        end = FinishReason.STOP if index == len(ids) - 1 else None
        piece = job.take(TokenDelta(job.id, (token,), float(index), end))
        parts += piece.parts
        assert piece.text == "".join(part.text for part in piece.parts if isinstance(part, Said)) or not piece.parts
        if piece.end is not None:
            break
    return job.completion(), job, parts


def test_thoughts_and_calls_of_a_chat_stand_apart() -> None:
    chat = [{"role": "user", "content": "hi"}]
    said = '<think>\nhm\n</think>Well.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    whole, _, parts = answer(chat, said, tools=TOOLS)
    assert (whole.text, whole.reasoning) == ("Well.", "hm")
    assert whole.tool_calls == (FunctionCall("f", '{"a": 1}'),)
    assert len(whole.token_ids) == len(said)
    assert "".join(part.text for part in parts if isinstance(part, Thought)) == "\nhm\n"
    assert answer(chat, said)[0].text.startswith("Well.\n<tool_call>")  # no tools are offered: it is text
    assert answer("hi", said)[0].text == said  # not a chat


def test_a_stop_text_is_told() -> None:
    whole, job, _ = answer("hi", "one two three", stop="two")
    assert (whole.text, whole.stop, whole.finish_reason) == ("one ", "two", FinishReason.STOP)
    assert whole.prompt_tokens == len(job.call.prompt_ids) == 2
