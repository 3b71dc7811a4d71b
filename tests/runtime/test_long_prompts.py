"""Long prompts are rendered and tokenized beside the event loop, whatever makes them long."""

import asyncio
import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from nitsum_jax.models.text.chat_options import ChatOptions
from nitsum_jax.runtime.calls import ChatPrompt, encode
from tests.server.harness import served_model

LONG = "x" * 5000
HI: dict[str, Any] = {"role": "user", "content": "hi"}
CALLED = {"type": "function", "function": {"name": "f", "arguments": {"text": [LONG]}}}


@pytest.mark.parametrize(
    ("prompt", "beside"),
    [
        (ChatPrompt([HI]), False),
        (ChatPrompt([HI, {**HI, "content": LONG}]), True),
        (ChatPrompt([HI, {**HI, "content": [{"type": "text", "text": LONG}]}]), True),
        (ChatPrompt([HI, {"role": "assistant", "content": None, "tool_calls": [CALLED]}]), True),
        (ChatPrompt([HI], ChatOptions(tools=[{"type": "function", "function": {"description": LONG}}])), True),
        (ChatPrompt([HI], ChatOptions(variables={"hint": LONG})), True),
    ],
    ids=["short", "text", "parts", "call", "tools", "variables"],
)
def test_long_prompts_leave_the_event_loop_free(prompt: ChatPrompt, beside: bool) -> None:
    threads = []

    def render(messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        threads.append(threading.current_thread())
        return "text"

    asyncio.run(encode([prompt], dataclasses.replace(served_model(), render_chat=render)))
    assert [thread is not threading.main_thread() for thread in threads] == [beside]
