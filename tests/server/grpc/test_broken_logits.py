"""A model with a broken weight behind both front ends of a real engine: an error that says so, streaming or not."""

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc.aio
import httpx2
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nitsum_jax.control.tiers import DEFAULT_TIERS
from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.engine import start_engine
from nitsum_jax.models.loading import OpenModel, open_model
from nitsum_jax.runtime.backend import ServedModel
from nitsum_jax.runtime.streams.router import StreamRouter
from nitsum_jax.server.grpc.server import GrpcServer, in_thread
from nitsum_jax.server.http.app import build_app
from nitsum_jax.server.http.server import HttpServer
from nitsum_jax.server.launch.ops_flags import OpsOptions
from nitsum_jax.server.launch.ports import ServerPorts
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc
from tests.engine.quick import quick_compiles  # noqa: F401
from tests.models.golden import tiny_models
from tests.server.harness import refusal
from tests.server.operations.test_metrics import of

pytestmark = pytest.mark.usefixtures("quick_compiles")

BROKEN, SOUND = [5, 70, 6], [5, 71, 6]
SAYS = "the model produced NaN or infinite logits for request "


def _model(folder: Path) -> OpenModel:
    """The embedding of token 70 is not a number."""
    folder = tiny_models.write_hf_folder("llama_mha", folder / "llama_mha")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][70] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return open_model(str(folder))


def test_a_broken_weight_is_an_error_for_who_meets_it(tmp_path: Path) -> None:
    asyncio.run(_test(tmp_path))


async def _test(folder: Path) -> None:
    model = _model(folder)
    # As in tests/engine/step/test_broken_logits.py, whose steps it shares.
    config = EngineConfig(
        devices=4, layout="tp1x4", layouts=("tp1x4",), dtype="float32", max_batch=8, prefill_chunk=32, max_model_len=256
    )
    router = StreamRouter(asyncio.get_running_loop())
    engine = await in_thread(lambda: start_engine(model, config, router.sink))
    ports = ServerPorts(OpsOptions(), DEFAULT_TIERS, "127.0.0.1")
    server = GrpcServer("127.0.0.1", 0, state=ports.state)
    web = HttpServer(build_app(ports.state), "127.0.0.1", 0)
    try:
        served = ServedModel("tiny", model.tokenizer, model.config.vocab_size, (), None)
        backend = ports.open(engine, served, router)
        await server.start()
        await web.start()
        await server.serve(backend)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            await _over_grpc(nitsum_pb2_grpc.GenerationServiceStub(channel))
        url = f"http://127.0.0.1:{web.port}"
        async with httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
            await _over_http(client)
        samples = of(ports.views.present().registry)
        assert samples["nitsum_broken_logits_total",] == 3
        assert samples["nitsum_request_success_total", "error", "standard"] == 3
        assert samples["nitsum_request_success_total", "length", "standard"] == 3
    finally:
        await server.stop()
        await web.stop()
        engine.close()


async def _over_grpc(stub: nitsum_pb2_grpc.GenerationServiceStub) -> None:
    async def say(prompt: list[int]) -> list[int]:
        request = nitsum_pb2.GenerateRequest(
            tokens=nitsum_pb2.TokenPrompt(ids=prompt), max_tokens=12, ignore_eos=True, tier="standard"
        )
        return [token async for event in stub.Generate(request, timeout=60) for token in event.delta.token_ids]

    mate = asyncio.create_task(say(SOUND))
    error = await refusal(say(BROKEN))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert str(error.details()).startswith(SAYS)
    assert len(await mate) == 12


async def _over_http(client: httpx2.AsyncClient) -> None:
    async def complete(prompt: list[int], stream: bool) -> httpx2.Response:
        body: dict[str, Any] = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": 12,
            "stream": stream,
            "logprobs": 2,
            "temperature": 0,
        }
        return await client.post("/v1/completions", json=body | {"ignore_eos": True})

    whole, mate = await asyncio.gather(complete(BROKEN, stream=False), complete(SOUND, stream=False))
    assert whole.status_code == 500
    assert whole.json()["error"]["message"].startswith(SAYS)
    assert len(mate.json()["choices"][0]["logprobs"]["tokens"]) == 12
    streamed, mate = await asyncio.gather(complete(BROKEN, stream=True), complete(SOUND, stream=True))
    events = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    errors = [json.loads(event)["error"]["message"] for event in events if '"error"' in event]
    assert len(errors) == 1
    assert errors[0].startswith(SAYS)
    assert mate.status_code == 200
    assert mate.text.count('"error"') == 0
