"""Outputs that hold a form, by the words of OpenAI, vLLM, SGLang and llama.cpp."""

import asyncio
import json
import re
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel

from tests.server.harness import held
from tests.server.http.harness import HELLO, serving

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Person(BaseModel):
    name: str
    age: int


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
        {"json_schema": SCHEMA},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_schemas(fields: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with serving(held) as run:
            answer = (await run.chat(n=3, seed=1, **fields)).json()
            said = [choice["message"]["content"] for choice in answer["choices"]]
            assert len(set(said)) == 3
            for one in said:
                jsonschema.validate(json.loads(one), SCHEMA)
            text = (await run.complete(seed=2, max_tokens=200, ignore_eos=True, **fields)).json()["choices"][0]["text"]
            jsonschema.validate(json.loads(text), SCHEMA)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"structured_outputs": {"choice": ["yes", "no."]}}, r"yes|no\."),
        ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, "a|b"),
        ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
        ({"guided_choice": ["yes", "no."]}, r"yes|no\."),
        ({"guided_grammar": 'root ::= "x" [0-9]'}, "x[0-9]"),
        ({"regex": "[ab]{3}"}, "[ab]{3}"),
        ({"ebnf": 'root ::= "x" [0-9]'}, "x[0-9]"),
        ({"grammar": 'root ::= "x" [0-9]'}, "x[0-9]"),
        ({"response_format": {"type": "json_object"}}, r"\{.*"),
        ({"response_format": {"type": "text"}}, "hello"),
        ({}, "hello"),
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_other_forms(fields: dict[str, Any], pattern: str) -> None:
    async def scenario() -> None:
        async with serving(held) as run:
            choice = (await run.chat(seed=3, **fields)).json()["choices"][0]
            assert re.fullmatch(pattern, choice["message"]["content"])

    asyncio.run(scenario())


def test_the_client_parses_what_it_asked_for() -> None:
    async def scenario() -> None:
        async with serving(held) as run, run.openai() as client:
            answer = await client.chat.completions.parse(model="fake", messages=HELLO, response_format=Person, seed=5)
            assert isinstance(answer.choices[0].message.parsed, Person)

    asyncio.run(scenario())
