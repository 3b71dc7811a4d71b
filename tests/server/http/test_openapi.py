"""Requests made from the served OpenAPI document: none is a server error, and every answer is what the document says.

NITSUM_FUZZ_CASES=10000 makes so many; without it there are enough for a look.
"""

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import httpx2
import hypothesis
import pytest
import requests
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from nitsum_jax.engine.request import Request
from nitsum_jax.models.pooling import Pooling
from nitsum_jax.server.http.openai.requests import ChatRequest, CompletionRequest
from nitsum_jax.server.http.openapi import openapi
from tests.server.harness import held, says
from tests.server.http.harness import Serving, serving
from tests.server.http.test_tools import HERMES

CASES = int(os.environ.get("NITSUM_FUZZ_CASES", "60"))


def _says_or_holds(request: Request) -> Sequence[int]:
    return says("<think>añ</think>🙂 answer")(request) if request.form is None else held(request)


class _Background:
    """A server on an event loop of its own thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._end = asyncio.Event()
        self.run: Serving
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._main(),))
        self._thread.start()
        assert self._ready.wait(20)

    async def _main(self) -> None:
        options: dict[str, Any] = {"max_batch": 64, "max_queue": 256, "tokens_per_step": 100, "step_s": 0.0}
        # A model that can do all that the document offers.
        powers: dict[str, Any] = {"template": HERMES, "pooling": Pooling.MEAN}
        async with serving(_says_or_holds, context=512, **powers, **options) as self.run:
            self._ready.set()
            await self._end.wait()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    background = _Background()
    yield background.run
    background.stop()


CHECKED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)
LABELS = [f"{method.upper()} {path}" for path, methods in openapi(None)["paths"].items() for method in methods]
TRIED = [
    pytest.param(label, mode, id=f"{label} {mode.value}")
    for label in LABELS
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    if label.startswith("POST") or mode is GenerationMode.POSITIVE  # nothing in the others can be wrong
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("label", "mode"), TRIED)
def test_requests_made_from_the_document(server: Serving, label: str, mode: GenerationMode) -> None:
    posted = label.startswith("POST")
    load_all_checks()
    checks: list[Any] = [CHECKS.get_one(name) for name in CHECKED]
    document = httpx2.get(f"{server.url}/openapi.json", trust_env=False).json()
    schema = schemathesis.openapi.from_dict(document)
    found: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
    operations = {operation.label: operation for operation in found}
    assert operations.keys() == set(LABELS)
    seen: Counter[int] = Counter()
    with requests.Session() as session:
        session.trust_env = False  # a proxy for the web has no business here, and looking for one takes time
        _try_many(
            operations[label], server.url, session, mode, checks, seen, max(CASES // 4 if posted else CASES // 30, 2)
        )
    assert all(status < 500 for status in seen)
    if posted:
        assert (200 in seen) == (mode is GenerationMode.POSITIVE), seen  # the document leads to answers
    _nothing_is_left(server)


def _try_many(
    operation: Any,
    url: str,
    session: requests.Session,
    mode: GenerationMode,
    checks: list[Any],
    seen: Counter[int],
    cases: int,
) -> None:
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def one(case: schemathesis.Case) -> None:
        response = case.call(base_url=url, session=session, timeout=20)
        # A body that is too long is refused, too, though not in a way that this check knows.
        known = [check for check in checks if response.status_code != 413 or "negative_data" not in check.__name__]
        case.validate_response(response, checks=known)
        seen[response.status_code] += 1

    one()


def _nothing_is_left(server: Serving) -> None:
    stats = server.engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.blocks_free == stats.blocks_total
    assert server.grpc.router.open_streams == 0


def test_the_document_names_model_tiers_and_token_ids(server: Serving) -> None:
    document = openapi(server.grpc.server.state.backend)
    for name in ("ChatRequest", "CompletionRequest"):
        fields = document["components"]["schemas"][name]["properties"]
        assert fields["model"]["enum"] == ["fake"]
        assert {"auto", "priority", "batch"} <= set(fields["service_tier"]["enum"])
        ids = fields["stop_token_ids"]["anyOf"][0]["items"]
        assert (ids["minimum"], ids["maximum"]) == (0, 256)


def test_every_field_is_in_the_document() -> None:
    document = openapi(None)
    for model in (ChatRequest, CompletionRequest):
        schema = document["components"]["schemas"][model.__name__]
        assert schema["additionalProperties"] is False
        assert set(schema["properties"]) == {*model.model_fields, *model.unsupported, *model.harmless}
        assert "x-nitsum-token-id" in str(schema)  # before the model is known
