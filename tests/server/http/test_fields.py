"""Every field that clients send: docs/server/http.md says what is taken and what is refused, and so it is."""

import asyncio
import json
import pathlib
import re
from typing import Any

from nitsum_jax.server.http.fields import Strict
from nitsum_jax.server.http.openai.requests import ChatRequest, CompletionRequest
from tests.server.harness import says
from tests.server.http.harness import CHAT, COMPLETIONS, HELLO, serving, the_error

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "server" / "http.md"
KINDS: dict[str, tuple[str, type[Strict], dict[str, Any]]] = {
    "chat": (CHAT, ChatRequest, {"model": "fake", "messages": HELLO}),
    "completions": (COMPLETIONS, CompletionRequest, {"model": "fake", "prompt": "hello"}),
}


def table() -> list[tuple[str, str, list[Any], list[Any]]]:
    """(field, endpoint, values that are taken, values that are refused) of each row."""
    text = PAGE.read_text(encoding="utf-8").partition("<!-- fields -->")[2].partition("<!-- /fields -->")[0]
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 5 and cells[0].startswith("`"):
            taken, refused = (
                [json.loads(value.replace("\\|", "|")) for value in re.findall(r"`([^`]+)`", cell)]
                for cell in cells[2:4]
            )
            for kind in KINDS if cells[1] == "both" else (cells[1],):
                rows.append((cells[0].strip("`"), kind, taken, refused))
    return rows


def test_the_table_has_every_field_once() -> None:
    named = [(field, kind) for field, kind, _, _ in table()]
    assert len(set(named)) == len(named)
    known = {
        (field, kind)
        for kind, (_, model, _) in KINDS.items()
        for field in (*model.model_fields, *model.unsupported, *model.harmless)
    }
    assert set(named) == known


def test_values_are_taken_and_refused_as_the_table_says() -> None:
    async def scenario() -> None:
        async with serving(says("x"), max_queue=256) as run:
            for field, kind, taken, refused in table():
                path, _, body = KINDS[kind]
                assert taken, field
                for value in taken:
                    response = await run.client.post(path, json={**body, field: value})
                    assert response.status_code == 200, (kind, field, value, response.text)
                for value in refused:
                    response = await run.client.post(path, json={**body, field: value})
                    error = the_error(response, 400)
                    assert str(error["param"]).startswith(field), (field, value, error)

    asyncio.run(scenario())
