from typing import Any

import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.runtime.tools.turns import read_turn

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}


@pytest.mark.parametrize(
    ("message", "turn"),
    [
        ({"role": "developer", "content": "be brief"}, {"role": "system", "content": "be brief"}),
        (
            {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": None},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ),
        (
            {"role": "assistant", "tool_calls": [CALL]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {"a": [1]}}}],
            },
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{no"}}]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{no"}}],
            },
        ),
        ({"role": "tool", "content": "7", "tool_call_id": "1"}, {"role": "tool", "content": "7", "tool_call_id": "1"}),
    ],
)
def test_turns_as_templates_expect_them(message: dict[str, Any], turn: dict[str, Any]) -> None:
    assert read_turn(message) == turn


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"content": "hi"}, "needs a role"),
        ({"role": "user"}, "needs content"),
        ({"role": "user", "content": 5}, "needs content"),
        ({"role": "assistant", "tool_calls": [{"name": "f"}]}, "a tool call must be like"),
    ],
)
def test_what_is_wrong_with_a_turn(message: dict[str, Any], what: str) -> None:
    with pytest.raises(InvalidInputError, match=what):
        read_turn(message)
