"""/v1/embeddings: the official client, every field, and models that have none."""

import asyncio
import base64
import json
import re
from typing import Any

import numpy as np
import openai
import pytest

from nitsum_jax.models.pooling import Pooling
from nitsum_jax.server.http.openai.embeddings import EmbeddingRequest
from nitsum_jax.server.http.openai.responses import EmbeddingResponse
from tests.server.fake_engine import fake_embedding
from tests.server.harness import TOKENIZER, says
from tests.server.http.harness import serving, the_error
from tests.server.http.test_fields import PAGE

PATH = "/v1/embeddings"


def expected(text: str) -> np.ndarray:
    return fake_embedding(TOKENIZER.encode(text))


def table() -> list[tuple[str, list[Any], list[Any]]]:
    """(field, values that are taken, values that are refused) of each row of the page."""
    text = PAGE.read_text(encoding="utf-8")
    part = text.partition("<!-- embedding fields -->")[2].partition("<!-- /embedding fields -->")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| `")]

    def values(cell: str) -> list[Any]:
        return [json.loads(one) for one in re.findall(r"`([^`]+)`", cell)]

    return [(row[0].strip("`"), values(row[1]), values(row[2])) for row in cells]


@pytest.mark.parametrize("given", [{}, {"encoding_format": "float"}], ids=["base64, by itself", "numbers"])
def test_the_official_client(given: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with serving(says("unheard"), pooling=Pooling.MEAN) as run:
            texts = ["hello", "a longer text", "hello"]
            async with run.openai() as client:
                answer = await client.embeddings.create(model="fake", input=texts, **given)
            assert [one.index for one in answer.data] == [0, 1, 2]
            for text, one in zip(texts, answer.data, strict=True):
                np.testing.assert_allclose(one.embedding, expected(text), rtol=1e-6)
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, texts))
            assert {request.max_tokens for request in run.engine.requests} == {1}

    asyncio.run(scenario())


def test_answers_are_as_the_document_says() -> None:
    async def scenario() -> None:
        async with serving(says("unheard"), pooling=Pooling.LAST) as run:
            for body in ({"input": "hi"}, {"input": [TOKENIZER.encode("hi"), [104]], "encoding_format": "base64"}):
                response = await run.client.post(PATH, json={"model": "fake", **body})
                assert response.status_code == 200, response.text
                answer = EmbeddingResponse.model_validate_json(response.text)
            first = answer.data[0].embedding
            assert isinstance(first, str)
            np.testing.assert_array_equal(np.frombuffer(base64.b64decode(first), "<f4"), expected("hi"))

    asyncio.run(scenario())


def test_the_table_has_every_field_and_is_true() -> None:
    fields = [field for field, _, _ in table()]
    known = {*EmbeddingRequest.model_fields, *EmbeddingRequest.unsupported, *EmbeddingRequest.harmless}
    assert sorted(fields) == sorted(known)

    async def scenario() -> None:
        async with serving(says("x"), pooling=Pooling.MEAN) as run:
            for field, taken, refused in table():
                body = {"model": "fake", "input": "hello"}
                for value in taken:
                    response = await run.client.post(PATH, json={**body, field: value})
                    assert response.status_code == 200, (field, value, response.text)
                for value in refused:
                    error = the_error(await run.client.post(PATH, json={**body, field: value}), 400)
                    assert str(error["param"]).startswith(field), (field, value, error)
            error = the_error(await run.client.post(PATH, json={"model": "fake", "input": "a", "inputs": "b"}), 400)
            assert "inputs" in error["message"]

    asyncio.run(scenario())


def test_a_text_has_the_tier_and_the_targets_that_are_asked_for() -> None:
    async def scenario() -> None:
        async with serving(says("x"), pooling=Pooling.MEAN) as run:
            headers = {"x-slo-ttft-ms": "250"}
            body = {"model": "fake", "input": "hello", "service_tier": "flex"}
            assert (await run.client.post(PATH, json=body, headers=headers)).status_code == 200
            (request,) = run.engine.requests
            assert (request.tier, request.ttft_ms, request.pooling) == ("batch", 250.0, Pooling.MEAN)

    asyncio.run(scenario())


def test_what_cannot_be_done_is_told() -> None:
    async def scenario() -> None:
        async with serving(says("x")) as run:
            error = the_error(await run.client.post(PATH, json={"model": "fake", "input": "hello"}), 400)
            assert "gives no embeddings" in error["message"]
            assert "--pooling=last" in error["message"]
        small = serving(says("x"), pooling=Pooling.MEAN, max_queue=4, context=64)
        async with small as run, run.openai() as client:
            with pytest.raises(openai.BadRequestError, match="at most 4 requests may wait"):
                await client.embeddings.create(model="fake", input=["hello"] * 9)
            with pytest.raises(openai.BadRequestError, match="the prompt has 200 tokens"):
                await client.embeddings.create(model="fake", input="hello" * 40)
            with pytest.raises(openai.NotFoundError, match="`other` does not exist"):
                await client.embeddings.create(model="other", input="hello")

    asyncio.run(scenario())
