"""Both front ends over a fake engine, and clients of the HTTP one."""

import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai

from nitsum_jax.server.http.app import build_app
from nitsum_jax.server.http.server import HttpServer
from tests.server.fake_engine import FakeEngine, Script
from tests.server.harness import Running, echo, running

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO: Any = [{"role": "user", "content": "hello"}]


@dataclasses.dataclass
class Serving:
    """A server under test with both front ends."""

    grpc: Running
    http: HttpServer
    url: str
    client: httpx2.AsyncClient

    @property
    def engine(self) -> FakeEngine:
        return self.grpc.engine

    def openai(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", **options)

    async def chat(self, messages: Any = None, **fields: Any) -> httpx2.Response:
        body = {"model": "fake", "messages": HELLO if messages is None else messages, **fields}
        return await self.client.post(CHAT, json=body)

    async def complete(self, prompt: Any = "hello", **fields: Any) -> httpx2.Response:
        return await self.client.post(COMPLETIONS, json={"model": "fake", "prompt": prompt, **fields})

    async def events(self, path: str = CHAT, **fields: Any) -> list[dict[str, Any]]:
        """The events of a whole stream; checks that it ends as streams must."""
        body = {"model": "fake", "stream": True, **fields}
        body |= {} if "messages" in fields or "prompt" in fields else {"messages": HELLO}
        response = await self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return events_of(response.text)


def events_of(text: str) -> list[dict[str, Any]]:
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def chat_text(events: list[dict[str, Any]], index: int = 0) -> str:
    """The content that the events bring for one answer."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def the_error(response: httpx2.Response, status: int) -> dict[str, Any]:
    """The error of a response, which must have OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]
    return dict(error)


@contextlib.asynccontextmanager
async def serving(script: Script = echo, chat: bool = True, **options: Any) -> AsyncIterator[Serving]:
    async with running(script, chat, **options) as run:
        server = HttpServer(build_app(run.server.state), "127.0.0.1", 0)
        await server.start()
        url = f"http://127.0.0.1:{server.port}"
        try:
            async with httpx2.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:
                yield Serving(run, server, url, client)
        finally:
            run.router.cut_off()
            await server.stop()
