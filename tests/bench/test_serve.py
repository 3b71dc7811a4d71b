"""The load generator against a server without a model."""

import asyncio
import json
import pathlib

import pytest

from nitsum_jax.bench.serve.main import run_async
from nitsum_jax.bench.serve.session import Session, capped, drive
from nitsum_jax.control.tiers import DEFAULT_TIERS
from nitsum_jax.engine.request import Request
from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.sim.workloads.workload import TraceRequest, Workload
from tests.server.harness import running

_REQUESTS = tuple(TraceRequest(0.02 * i, 5 + i, 3 + i % 4, "interactive" if i % 2 else "batch") for i in range(20))
_LOAD = Workload(_REQUESTS, "small", 0.5)


def _say(request: Request) -> list[int]:
    return [7] * request.max_tokens


def test_all_requests_are_sent_as_they_are_and_counted() -> None:
    seen: list[tuple[str, int, int]] = []

    def script(request: Request) -> list[int]:
        seen.append((request.tier, len(request.prompt_ids), request.max_tokens))
        assert max(request.prompt_ids) < 320
        return _say(request)

    async def scenario() -> None:
        async with running(script) as server:
            results = await drive(server.channel, Session(_LOAD, DEFAULT_TIERS, warm_up_s=0.1))
        assert results.errors == {}
        assert results.paced is None
        assert sorted(seen) == sorted((r.tier, r.prompt_tokens, r.output_tokens) for r in _REQUESTS)
        assert len(results.records) == 15  # those of the first 0.1 s do not count
        assert all(
            r.finish_s is not None and r.arrival_s <= (r.first_token_s or 0) <= r.finish_s for r in results.records
        )
        assert results.metrics.total.requests == 15

    asyncio.run(scenario())


def test_time_scale_stretches_the_load() -> None:
    async def scenario() -> None:
        async with running(_say) as server:
            fast = await drive(server.channel, Session(_LOAD, DEFAULT_TIERS))
            slow = await drive(server.channel, Session(_LOAD, DEFAULT_TIERS, time_scale=3.0))
        # On the workload's clock both took as long: arrivals are where the workload has them.
        for results in (fast, slow):
            assert [r.arrival_s for r in results.records] == pytest.approx([r.arrival_s for r in _REQUESTS], abs=0.3)

    asyncio.run(scenario())


def test_what_cannot_be_is_refused() -> None:
    async def scenario() -> None:
        async with running(_say) as server:
            other = Workload((TraceRequest(0.0, 1, 1, "gold"),), "other", 1.0)
            with pytest.raises(InvalidInputError, match="no tier 'gold', only interactive, standard, batch"):
                await drive(server.channel, Session(other, DEFAULT_TIERS))
            with pytest.raises(PreconditionError, match="no request came after the warm-up"):
                await drive(server.channel, Session(_LOAD, DEFAULT_TIERS, warm_up_s=0.45))

    asyncio.run(scenario())


def test_lengths_are_capped() -> None:
    cut = capped(_LOAD, 10, 4)
    assert max(r.prompt_tokens for r in cut.requests) == 10
    assert max(r.output_tokens for r in cut.requests) == 4
    assert capped(_LOAD, None, None) is _LOAD


def test_command_writes_figures_picture_and_records(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    rows = "\n".join(f"2023-11-16 18:00:00.{i:02d}0000,{5 + i},{3 + i % 3}" for i in range(0, 50, 5))
    trace.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}\n")

    async def scenario() -> None:
        async with running(_say) as server:
            await run_async(
                [
                    "nitsum-bench serve",
                    f"--server={server.address}",
                    f"--trace=interactive:{trace}",
                    f"--json={tmp_path / 'figures.json'}",
                    f"--plot={tmp_path / 'picture.svg'}",
                    f"--out={tmp_path / 'run'}",
                ]
            )

    asyncio.run(scenario())
    assert "interactive" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["metrics"]["total"]["requests"] == 10
    assert figures["paced"] is None
    assert "<svg" in (tmp_path / "picture.svg").read_text()
    lines = (tmp_path / "run" / "requests.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt_tokens"] for line in lines] == [5 + i for i in range(0, 50, 5)]


def test_wrong_flags_and_no_server_are_told() -> None:
    with pytest.raises(InvalidInputError, match="give at least one --trace"):
        asyncio.run(run_async(["nitsum-bench serve"]))
    with pytest.raises(InvalidInputError, match="have no tier 'gold'"):
        asyncio.run(run_async(["nitsum-bench serve", "--trace=gold:azure-conv-like", "--seconds=1"]))
