import asyncio
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from nitsum_jax.control.tiers import DEFAULT_TIERS, Tier, TierSet
from nitsum_jax.engine.request import FinishReason
from nitsum_jax.errors import InvalidInputError, OverloadedError
from nitsum_jax.runtime.records import ServedRequest
from nitsum_jax.server.launch.ops_flags import OpsOptions
from nitsum_jax.server.operations.metrics.requests import RequestMetrics
from nitsum_jax.server.operations.metrics.window import Windows, percentile
from nitsum_jax.server.proto import nitsum_pb2
from tests.server.harness import Running, ask, refusal, says, until
from tests.server.operations.http import fetch
from tests.server.operations.ports import opened, record
from tools import make_grafana

# The part after the prefix is vLLM's name: what its users' dashboards and alerts are written for.
VLLM_NAMES = {
    "time_to_first_token_seconds_bucket",
    "time_per_output_token_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
}


def values(text: str) -> dict[tuple[str, ...], float]:
    """Samples by name and label values, without model_name."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = [value for name, value in sorted(sample.labels.items()) if name != "model_name"]
            found[(sample.name, *labels)] = sample.value
    return found


def of(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    return values(generate_latest(registry).decode())


def requests() -> tuple[RequestMetrics, CollectorRegistry]:
    registry = CollectorRegistry()
    return RequestMetrics(registry, "m", DEFAULT_TIERS), registry


def test_a_request_is_observed_once_with_its_times() -> None:
    metrics, registry = requests()
    metrics.ended(record())
    seen = of(registry)
    assert seen["nitsum_request_success_total", "stop", "interactive"] == 1
    assert seen["nitsum_request_success_total", "length", "interactive"] == 0
    assert seen["nitsum_prompt_tokens_total", "interactive"] == 7
    for name, total in (
        ("time_to_first_token_seconds", 0.2),
        ("time_per_output_token_seconds", 0.01),
        ("request_queue_time_seconds", 0.05),
        ("request_prefill_time_seconds", 0.15),
        ("request_decode_time_seconds", 0.09),
        ("e2e_request_latency_seconds", 0.29),
        ("request_generation_tokens", 10),
    ):
        assert seen[f"nitsum_{name}_count", "interactive"] == 1
        assert seen[f"nitsum_{name}_sum", "interactive"] == pytest.approx(total)
        assert seen[f"nitsum_{name}_count", "batch"] == 0
    assert seen["nitsum_goodput_requests_total", "interactive"] == seen["nitsum_slo_requests_total", "interactive"] == 1


def test_the_targets_are_borders_of_the_histograms() -> None:
    registry = CollectorRegistry()
    tiers = TierSet((Tier("odd", ttft_ms=333, tpot_ms=13),))
    RequestMetrics(registry, "m", tiers).ended(record(tier="odd"))
    assert of(registry)["nitsum_time_to_first_token_seconds_bucket", "0.333", "odd"] == 1
    assert of(registry)["nitsum_time_per_output_token_seconds_bucket", "0.013", "odd"] == 1


@pytest.mark.parametrize(
    ("fields", "met"),
    [
        ({}, True),
        ({"first_s": 100.5}, True),  # at the target, not past it
        ({"first_s": 100.51, "last_s": 100.6, "ended_s": 100.6}, False),
        ({"last_s": 100.2 + 9 * 0.0501, "ended_s": 101.0}, False),
        ({"tokens": 1, "last_s": 100.2}, True),  # there is no TPOT to miss
        ({"tokens": 0, "first_s": None, "last_s": None, "ended_s": 100.3}, True),  # its first token was a stop token
        ({"tokens": 0, "first_s": None, "last_s": None, "ended_s": 100.6}, False),
        ({"finish": FinishReason.ERROR}, False),
        ({"finish": FinishReason.DEADLINE}, False),
        ({"finish": FinishReason.CANCELLED}, None),
    ],
)
def test_which_requests_met_their_targets(fields: dict[str, object], met: bool | None) -> None:
    assert record(**fields).met(DEFAULT_TIERS.get("interactive")) is met


def test_refusals_do_not_let_a_client_make_time_series() -> None:
    metrics, registry = requests()
    for number in range(50):
        metrics.refused(f"invented-{number}", InvalidInputError("x"))
    metrics.refused("batch", OverloadedError("x"))
    seen = {key: value for key, value in of(registry).items() if key[0] == "nitsum_requests_refused_total"}
    assert seen["nitsum_requests_refused_total", "invalid", "unknown"] == 50
    assert seen["nitsum_requests_refused_total", "queue_full", "batch"] == 1
    assert {key[-1] for key in seen} == {"unknown", *DEFAULT_TIERS.names}


@given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_percentile_is_the_least_value_that_covers_the_share(numbers: list[float], share: float) -> None:
    ordered = sorted(numbers)
    found = percentile(ordered, share)
    assert found is not None
    assert sum(n <= found for n in numbers) >= share * len(numbers)
    assert sum(n < found for n in numbers) < share * len(numbers)


ends = st.tuples(st.floats(0, 200), st.sampled_from(list(FinishReason)), st.floats(0.1, 1))


@given(st.lists(ends, max_size=60), st.floats(0, 260))
def test_the_window_equals_a_count_over_all_requests(made: list[tuple[float, FinishReason, float]], now: float) -> None:
    windows = Windows(DEFAULT_TIERS, window_s=60)
    made = sorted(made, key=lambda end: end[0])
    records = [
        record(arrival_s=at - wait, admitted_s=None, first_s=at, last_s=at, tokens=1, ended_s=at, finish=finish)
        for at, finish, wait in made
    ]
    for one in records:
        windows.add(one)
    target = DEFAULT_TIERS.get("interactive")
    recent = [one for one in records if one.ended_s is not None and now - one.ended_s <= 60]
    counted = [one.met(target) for one in recent if one.met(target) is not None]
    seen = windows.of("interactive", now)
    assert seen.counted == len(counted)
    assert seen.goodput == pytest.approx(sum(map(bool, counted)) / 60)
    assert seen.attainment == (pytest.approx(sum(map(bool, counted)) / len(counted)) if counted else None)
    assert windows.of("batch", now).counted == 0


def test_a_full_window_says_the_rate_of_the_time_that_it_covers() -> None:
    windows = Windows(DEFAULT_TIERS)
    for number in range(5000):  # 1000 a second, so 4096 of them are about four seconds
        windows.add(record(arrival_s=number / 1000, first_s=number / 1000, last_s=number / 1000 + 0.1,
                           ended_s=number / 1000 + 0.1))  # fmt: skip
    assert windows.of("interactive", 5.1).goodput == pytest.approx(1000, rel=0.01)


async def scrape(url: str) -> dict[tuple[str, ...], float]:
    reply = await fetch(f"{url}/metrics")
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/plain")
    return values(reply.text)


def test_metrics_of_a_server_that_works() -> None:
    async def scenario() -> None:
        async with opened(OpsOptions(metrics_port=0), says("word ", end=False), max_batch=2) as open_:
            run = open_.run
            await ask(run.stub, max_tokens=20, tier="interactive")
            assert (await ask(run.stub, max_tokens=50, stop=["word word"])).finished.stop == "word word"
            await refusal(ask(run.stub, max_tokens=1, tier="no such tier"))
            await run.stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout="tp2x2"))
            run.engine.hold()
            streams = await _three_streams(run)
            seen = await scrape(open_.http)
            assert seen["nitsum_num_requests_running", "standard"] == 2
            assert seen["nitsum_num_requests_waiting", "standard"] == 1
            assert seen["nitsum_kv_cache_usage_perc",] > 0
            for stream in streams:
                stream.cancel()
            run.engine.release()
            await until(lambda: run.engine.stats().running == 0)
            await until(lambda: run.router.open_streams == 0)
            seen = await scrape(open_.http)
            assert seen["nitsum_request_success_total", "length", "interactive"] == 1
            assert seen["nitsum_request_success_total", "stop", "standard"] == 1  # the stop string, not an abort
            assert seen["nitsum_request_success_total", "abort", "standard"] == 3
            assert seen["nitsum_requests_refused_total", "invalid", "unknown"] == 1
            assert seen["nitsum_generation_tokens_total", "interactive"] == 20
            assert seen["nitsum_request_queue_time_seconds_count", "interactive"] == 1
            assert seen["nitsum_layout_info", "tp2x2"] == 1
            assert seen["nitsum_instances", "mixed", "2"] == 2
            assert seen["nitsum_layout_switches_total",] == 1
            assert seen["nitsum_switch_stall_seconds_count",] == 1
            assert seen["nitsum_switch_stall_seconds_sum",] == pytest.approx(0.00025)
            assert seen["nitsum_layout_decisions_total",] == 1
            assert seen["nitsum_tier_target_seconds", "ttft", "interactive"] == 0.5
            assert {f"nitsum_{name}" for name in VLLM_NAMES} <= {key[0] for key in seen}

    asyncio.run(scenario())


async def _three_streams(run: Running) -> list["asyncio.Task[object]"]:
    """Two that run and one that waits, on an engine that stands still."""
    run.engine.release()
    streams: list[asyncio.Task[object]] = [asyncio.create_task(_patient(run)) for _ in range(3)]
    await until(lambda: (run.engine.stats().running, run.engine.stats().waiting) == (2, 1))
    run.engine.hold()
    return streams


async def _patient(run: Running) -> object:
    return [event async for event in run.stub.Generate(nitsum_pb2.GenerateRequest(text="x", max_tokens=10**6))]


def test_tokens_of_open_streams_count_and_never_run_back() -> None:
    async def scenario() -> None:
        async with opened(OpsOptions(metrics_port=0), says("x", end=False)) as open_:
            call = asyncio.create_task(ask(open_.run.stub, max_tokens=300))
            last = 0.0
            while not call.done():
                now = (await scrape(open_.http))["nitsum_generation_tokens_total", "standard"]
                assert now >= last
                last = now
                await asyncio.sleep(0.1)
            await call
            assert (await scrape(open_.http))["nitsum_generation_tokens_total", "standard"] == 300

    asyncio.run(scenario())


def test_openmetrics_is_served_to_who_asks_for_it() -> None:
    async def scenario() -> None:
        async with opened(OpsOptions(metrics_port=0)) as open_:
            headers = {"accept": "application/openmetrics-text; version=1.0.0"}
            reply = await fetch(f"{open_.http}/metrics", headers=headers)
            assert reply.headers["content-type"].startswith("application/openmetrics-text")
            assert reply.text.endswith("# EOF\n")

    asyncio.run(scenario())


def test_the_grafana_dashboard_names_only_metrics_that_there_are() -> None:
    async def names() -> set[str]:
        async with opened(OpsOptions(metrics_port=0)) as open_:
            return {key[0] for key in await scrape(open_.http)}

    text = make_grafana.PATH.read_text(encoding="utf-8")
    assert text == make_grafana.text(), "run python tools/make_grafana.py"
    dashboard = json.loads(text)
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    expressions += [item["expr"] for item in dashboard["annotations"]["list"]]
    expressions += [item["query"] for item in dashboard["templating"]["list"]]
    named = {name for expression in expressions for name in re.findall(r"\bnitsum_\w+", expression)}
    assert len(named) > 15
    assert named - asyncio.run(names()) == set()


def test_a_record_keeps_the_reason_that_the_front_end_gave() -> None:
    from nitsum_jax.engine.request import TokenDelta

    mine = ServedRequest("r", "batch", 1, 0.0, finish=FinishReason.STOP)
    mine.take(TokenDelta("r", (), 2.0, FinishReason.CANCELLED))
    assert (mine.finish, mine.ended_s) == (FinishReason.STOP, 2.0)
