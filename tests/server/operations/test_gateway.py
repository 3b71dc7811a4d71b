"""The contract of a model server behind an inference gateway: metrics (name, type, labels), readiness, headers."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from nitsum_jax.control.scheduling.forecast import TierForecast
from nitsum_jax.control.tiers import DEFAULT_TIERS
from nitsum_jax.engine.request import Request
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.server.gateway import GatewayHeaders, fairness_id, gateway_headers
from nitsum_jax.server.launch.ops_flags import OpsOptions
from nitsum_jax.server.operations.logs import REQUESTS
from nitsum_jax.server.proto import nitsum_pb2
from tests.server.harness import says, until
from tests.server.operations.http import Reply, fetch
from tests.server.operations.ports import Open, opened, record

ROOT = Path(__file__).resolve().parents[3]
POOL, OBJECTIVE, PICKER = yaml.safe_load_all((ROOT / "deploy" / "inference_pool.yaml").read_text(encoding="utf-8"))


def engine_mapping() -> dict[str, str]:
    config = yaml.safe_load(PICKER["data"]["config.yaml"])
    (extractor,) = (one for one in config["plugins"] if one["type"] == "core-metrics-extractor")
    (engine,) = extractor["parameters"]["engineConfigs"]
    assert engine.pop("name") == extractor["parameters"]["defaultEngine"] == "nitsum"
    return dict(engine)


async def families(url: str) -> dict[str, Metric]:
    reply = await fetch(f"{url}/metrics")
    return {family.name: family for family in text_string_to_metric_families(reply.text)}


async def complete(open_: Open, headers: dict[str, str], **fields: Any) -> Reply:
    body = json.dumps({"model": "fake", "prompt": "hello", "max_tokens": 4, **fields}).encode()
    sent = {"content-type": "application/json", **headers}
    return await fetch(f"{open_.api}/v1/completions", "POST", sent, body)


@pytest.fixture
def asked() -> list[Request]:
    """Requests as they reach the engine of `keep`."""
    return []


def keep(seen: list[Request]) -> Any:
    def script(request: Request) -> Any:
        seen.append(request)
        return says("hello")(request)

    return script


def test_the_metrics_that_a_picker_reads_are_gauges_of_one_series() -> None:
    async def scenario() -> dict[str, Metric]:
        async with opened(OpsOptions()) as open_:
            return await families(open_.api)

    found = asyncio.run(scenario())
    mapping = engine_mapping()
    assert mapping.keys() == {"queuedRequestsSpec", "runningRequestsSpec", "kvUsageSpec", "cacheInfoSpec"}
    for name in mapping.values():
        (sample,) = found[name].samples
        assert found[name].type == "gauge"
        assert sample.labels["model_name"] == "fake"
    assert 0 <= found[mapping["kvUsageSpec"]].samples[0].value <= 1
    info = found[mapping["cacheInfoSpec"]].samples[0].labels
    assert int(info["block_size"]) == 16
    assert int(info["num_gpu_blocks"]) > 0


def test_queued_and_running_requests_are_counted_over_all_tiers() -> None:
    async def scenario() -> tuple[float, float]:
        async with opened(OpsOptions(), says("x", end=False), max_batch=1, step_s=0.01) as open_:
            calls = [
                open_.run.stub.Generate(nitsum_pb2.GenerateRequest(text="a", max_tokens=500, tier=tier))
                for tier in ("interactive", "batch", "standard")
            ]
            await until(lambda: open_.run.engine.stats().running + open_.run.engine.stats().waiting == 3)
            await until(lambda: open_.run.engine.stats().running == 1)
            found = await families(open_.api)
            for call in calls:
                call.cancel()
            mapping = engine_mapping()
            return (
                found[mapping["queuedRequestsSpec"]].samples[0].value,
                found[mapping["runningRequestsSpec"]].samples[0].value,
            )

    assert asyncio.run(scenario()) == (2, 1)


def test_readiness_follows_the_phase() -> None:
    async def scenario() -> list[int]:
        async with opened(OpsOptions()) as open_:
            serving = (await fetch(f"{open_.api}/readyz")).status
            await open_.run.server.drain(1.0)
            return [serving, (await fetch(f"{open_.api}/readyz")).status, (await fetch(f"{open_.api}/livez")).status]

    assert asyncio.run(scenario()) == [200, 503, 200]


def test_what_is_predicted_of_each_tier_is_a_metric() -> None:
    def forecasts() -> list[TierForecast]:
        return [TierForecast(name, 0.25, 0.01) for name in DEFAULT_TIERS.names]

    async def scenario() -> dict[str, Metric]:
        async with opened(OpsOptions(), forecasts=forecasts) as open_:
            return await families(open_.api)

    found = asyncio.run(scenario())
    for name, value in (("ttft", 0.25), ("tpot", 0.01)):
        samples = found[f"nitsum_predicted_{name}_seconds"].samples
        assert {sample.labels["tier"]: sample.value for sample in samples} == dict.fromkeys(DEFAULT_TIERS.names, value)


@pytest.mark.parametrize("names", ["nitsum", "vllm", "both"])
def test_metrics_have_vllms_names_if_asked_for(names: str) -> None:
    async def scenario() -> dict[str, Metric]:
        async with opened(OpsOptions(metrics_names=names)) as open_:
            operations = open_.ports.views.present()
            operations.ended(record(tier="interactive"))
            operations.ended(record(tier="batch"))
            return await families(open_.api)

    found = asyncio.run(scenario())
    kinds = {
        "num_requests_waiting": "gauge",
        "num_requests_running": "gauge",
        "kv_cache_usage_perc": "gauge",
        "cache_config_info": "gauge",
        "prompt_tokens": "counter",
        "generation_tokens": "counter",
        "request_success": "counter",
        "time_to_first_token_seconds": "histogram",
        "e2e_request_latency_seconds": "histogram",
    }
    there = {name for name in found if name.startswith("vllm:")}
    assert bool(there) == (names != "nitsum")
    assert ("nitsum_time_to_first_token_seconds" in found) == (names != "vllm")
    assert "nitsum_attainment_ratio" in found  # which vLLM has no name for
    if there:
        assert {name: found[f"vllm:{name}"].type for name in kinds} == kinds
        assert all("tier" not in s.labels and s.labels["model_name"] for name in there for s in found[name].samples)
        ttft = {s.name: s.value for s in found["vllm:time_to_first_token_seconds"].samples if "le" not in s.labels}
        assert ttft["vllm:time_to_first_token_seconds_count"] == 2  # of both tiers
        borders = [s for s in found["vllm:time_to_first_token_seconds"].samples if s.labels.get("le") == "+Inf"]
        assert [s.value for s in borders] == [2]


def test_the_pool_selects_the_pods_and_the_port_of_the_deployment() -> None:
    deployment, _ = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert POOL["spec"]["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert {one["number"] for one in POOL["spec"]["targetPorts"]} <= {p["containerPort"] for p in container["ports"]}
    assert OBJECTIVE["metadata"]["name"] in DEFAULT_TIERS.names
    assert OBJECTIVE["spec"]["poolRef"]["name"] == POOL["metadata"]["name"]


def test_headers_become_targets_and_tier(asked: list[Request]) -> None:
    async def scenario() -> None:
        async with opened(OpsOptions(), keep(asked)) as open_:
            slo = {"x-slo-ttft-ms": "350", "x-slo-tpot-ms": "12.5"}
            for headers, fields in (
                (slo, {}),
                ({"x-gateway-inference-objective": "batch"}, {}),
                ({"x-llm-d-inference-objective": "batch"}, {}),
                ({"x-gateway-inference-objective": "batch"}, {"service_tier": "interactive"}),
                ({"x-gateway-inference-objective": "some-objective"}, {}),
            ):
                assert (await complete(open_, headers, **fields)).status == 200

    asyncio.run(scenario())
    own, by_objective, newer, named, other = asked
    assert (own.tier, own.ttft_ms, own.tpot_ms) == ("standard", 350, 12.5)
    assert [one.tier for one in (by_objective, newer, named, other)] == ["batch", "batch", "interactive", "standard"]
    assert (named.ttft_ms, named.tpot_ms) == (None, None)


@pytest.mark.parametrize("value", ["0", "0.5", "-1", "nan", "inf", "1e3", "fast", "86400001", "1" * 400, ""])
@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
def test_a_wrong_target_is_refused(name: str, value: str) -> None:
    with pytest.raises(InvalidInputError, match=name):
        gateway_headers([(name.encode(), value.encode())])


def test_a_wrong_target_is_an_error_of_the_client() -> None:
    async def scenario() -> tuple[Reply, grpc.StatusCode]:
        async with opened(OpsOptions()) as open_:
            reply = await complete(open_, {"x-slo-ttft-ms": "soon"})
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async for _ in open_.run.stub.Generate(nitsum_pb2.GenerateRequest(text="a", ttft_ms=0.0)):
                    pass
            return reply, refused.value.code()

    reply, code = asyncio.run(scenario())
    assert reply.status == 400
    assert "x-slo-ttft-ms" in reply.json["error"]["message"]
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_grpc_takes_fields_before_metadata(asked: list[Request]) -> None:
    async def scenario() -> None:
        async with opened(OpsOptions(), keep(asked)) as open_:
            metadata = (("x-slo-ttft-ms", "900"), ("x-slo-tpot-ms", "90"), ("x-gateway-inference-objective", "batch"))
            async for _ in open_.run.stub.Generate(
                nitsum_pb2.GenerateRequest(text="a", ttft_ms=700), metadata=metadata
            ):
                pass

    asyncio.run(scenario())
    (request,) = asked
    assert (request.tier, request.ttft_ms, request.tpot_ms) == ("batch", 700, 90)


def test_goodput_counts_a_request_by_its_own_targets() -> None:
    interactive = DEFAULT_TIERS.get("interactive")
    assert record().met(interactive)  # 0.2 s, then 10 ms each
    assert not record(ttft_target_ms=150.0).met(interactive)
    assert not record(tpot_target_ms=5.0).met(interactive)
    late = record(first_s=100.9, last_s=101.0, ended_s=101.0)
    assert not late.met(interactive)
    assert late.met(interactive) is False
    assert record(first_s=100.9, last_s=101.0, ended_s=101.0, ttft_target_ms=1000.0).met(interactive)


def test_the_fairness_id_is_logged_and_tells_clients_of_a_gateway_apart(caplog: pytest.LogCaptureFixture) -> None:
    async def most_at_once(behind: bool) -> list[int]:
        options = OpsOptions(streams_per_client=1, behind_gateway=behind)
        async with opened(options, says("x", end=False), step_s=0.005) as open_:
            headers = [{"x-gateway-inference-fairness-id": name} for name in ("ann", "bob", "ann")]
            replies = await asyncio.gather(*(complete(open_, header, max_tokens=60) for header in headers))
            return sorted(reply.status for reply in replies)

    assert asyncio.run(most_at_once(False)) == [200, 429, 429]
    with caplog.at_level(logging.INFO, REQUESTS.name):
        assert asyncio.run(most_at_once(True)) == [200, 200, 429]
    assert any("fairness_id=bob" in line for line in caplog.messages)
    assert fairness_id([(b"x-gateway-inference-fairness-id", b"two words\n")]) == ""


def test_nothing_asked_is_nothing_changed() -> None:
    assert gateway_headers([(b"accept", b"*/*")]) == GatewayHeaders()
