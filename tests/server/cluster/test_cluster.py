"""nitsum-cluster on Ray: clients through the front door, and cells that come, go, hang and are killed under them.

One cluster for all tests. It begins with one cell, which compiles what the others read from the cache, and the tests
stand in the order in which the fewest cells are started.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc.aio
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nitsum_jax.control.tiers import Tier, TierSet, tiers_toml
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc
from tests.server.cluster.cluster_process import ClusterProcess, started
from tests.server.operations.http import fetch

pytest.importorskip("ray.serve", reason="Ray is not installed (the extra ray)")

TOKENS = 64
NEVER_S = 100_000.0
TIERS = TierSet((Tier("batch", 60_000, 1_000), Tier("tight", 1, 1_000)))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    tiers = tmp_path_factory.mktemp("tiers") / "tiers.toml"
    tiers.write_text(tiers_toml(TIERS))
    # Autoscaling is on, and takes its time until a test says otherwise.
    scaling = ("--min_cells=1", "--max_cells=3", f"--scale_up_seconds={NEVER_S}", f"--scale_down_seconds={NEVER_S}")
    with started("--cells=1", "--silent_seconds=3", "--log_level=info", f"--tiers={tiers}", *scaling) as process:
        yield process


async def generate(stub: nitsum_pb2_grpc.GenerationServiceStub, number: int) -> tuple[int, ...]:
    """The tokens of a sampled request, which prompt and seed decide."""
    message = nitsum_pb2.GenerateRequest(
        tokens=nitsum_pb2.TokenPrompt(ids=[3 + number, 5, 7, 11]),
        max_tokens=TOKENS,
        ignore_eos=True,
        sampling=nitsum_pb2.SamplingParams(temperature=1.0, seed=number, presence_penalty=0.5),
        tier="batch",
    )
    tokens: list[int] = []
    finished = False
    async for answer in stub.Generate(message, timeout=120):
        tokens += answer.delta.token_ids
        finished |= answer.WhichOneof("event") == "finished"
    assert finished
    return tuple(tokens)


async def many(running: ClusterProcess, count: int, disturb: Any = None) -> list[tuple[int, ...]]:
    """So many requests at once, and what `disturb` does once they stream."""
    async with grpc.aio.insecure_channel(running.address) as channel:
        stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
        streams = [asyncio.create_task(generate(stub, number)) for number in range(count)]
        if disturb is not None:
            before = (await stub.GetLayout(nitsum_pb2.GetLayoutRequest())).stats.tokens_generated
            async with asyncio.timeout(60):
                while (await stub.GetLayout(nitsum_pb2.GetLayoutRequest())).stats.tokens_generated < before + 200:
                    await asyncio.sleep(0.02)
            assert not any(stream.done() for stream in streams)
            await asyncio.to_thread(disturb)
        return await asyncio.gather(*streams)


def wait_for_cells(running: ClusterProcess, count: int, timeout_s: float = 120.0) -> None:
    """Until the front door sends requests to so many."""
    end = time.monotonic() + timeout_s
    while running.serving() != count:
        assert time.monotonic() < end, f"there are not {count} cells"
        time.sleep(0.1)


def have_cells(running: ClusterProcess, least: int) -> None:
    """For a test that is run alone: others leave as many behind as the next one needs."""
    if running.serving() < least:
        running.deploy(cells=least)
        wait_for_cells(running, least)


@pytest.fixture(scope="module")
def undisturbed(running: ClusterProcess) -> list[tuple[int, ...]]:
    answers = asyncio.run(many(running, 32))
    assert all(len(answer) == TOKENS for answer in answers)
    assert len(set(answers)) == 32
    return answers


async def under_load(
    running: ClusterProcess, expected: list[tuple[int, ...]], streams: int, done: Callable[[], bool]
) -> None:
    """So many streams all the time, each of which comes whole, until something has happened."""

    async def client(number: int) -> None:
        while not over.is_set():
            assert await generate(stub, number % 32) == expected[number % 32]

    over = asyncio.Event()
    async with grpc.aio.insecure_channel(running.address) as channel, asyncio.timeout(300):
        stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
        async with asyncio.TaskGroup() as clients:
            for number in range(streams):
                clients.create_task(client(number))
            while not await asyncio.to_thread(done):
                await asyncio.sleep(0.1)
            over.set()


def test_one_cell_becomes_three_by_itself(running: ClusterProcess, undisturbed: list[tuple[int, ...]]) -> None:
    """By what cells predict: in one that is full a request of the tier `tight` would miss its target."""
    first = set(running.cells())
    assert (len(first), running.serving()) == (1, 1)
    running.deploy(up_s=0.5)
    asyncio.run(under_load(running, undisturbed, 48, lambda: len(running.cells()) == 3))  # they are wanted, and start
    asyncio.run(under_load(running, undisturbed, 4, lambda: running.serving() == 3))
    assert first < set(running.cells())  # another number of cells replaces none
    running.deploy(up_s=NEVER_S, cells=3)  # what is deployed anew begins with as many as it says


def test_the_official_client_is_served(running: ClusterProcess) -> None:
    client = openai.OpenAI(base_url=f"{running.http}/v1", api_key="none", timeout=60)
    with client:
        assert [model.id for model in client.models.list()] == ["tiny-random"]
        options: dict[str, Any] = {"model": "tiny-random", "prompt": "hello", "max_tokens": 12, "temperature": 0}
        whole = client.completions.create(**options)
        streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True))
        assert whole.choices[0].text == streamed
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 12
        with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens"):
            client.completions.create(**{**options, "prompt": "a b " * 600})
        with pytest.raises(openai.NotFoundError):
            client.completions.create(**{**options, "model": "other"})


def test_embeddings_are_the_same_by_either_protocol(running: ClusterProcess) -> None:
    texts = ["hello", "a longer text", "hello"]
    with openai.OpenAI(base_url=f"{running.http}/v1", api_key="none", timeout=60) as client:
        by_http = [one.embedding for one in client.embeddings.create(model="tiny-random", input=texts).data]

    async def scenario() -> list[list[float]]:
        async with grpc.aio.insecure_channel(running.address) as channel:
            stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
            inputs = [nitsum_pb2.EmbedInput(text=text) for text in texts]
            answer = await stub.Embed(nitsum_pb2.EmbedRequest(inputs=inputs), timeout=60)
            return [list(one.values) for one in answer.embeddings]

    by_grpc = asyncio.run(scenario())
    assert by_grpc == by_http
    assert by_grpc[0] == by_grpc[2] != by_grpc[1]
    assert sum(number**2 for number in by_grpc[0]) == pytest.approx(1)


def test_health_metrics_and_layout_are_those_of_all_cells(running: ClusterProcess) -> None:
    have_cells(running, 2)
    count = running.serving()

    async def scenario() -> None:
        async with grpc.aio.insecure_channel(running.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
            layout = await nitsum_pb2_grpc.GenerationServiceStub(channel).GetLayout(nitsum_pb2.GetLayoutRequest())
        assert layout.layout == f"tp1x{count}"
        assert len(layout.devices) == count
        text = (await fetch(f"{running.http}/metrics")).text
        assert 'nitsum_predicted_ttft_seconds{model_name="tiny-random",tier="tight"}' in text
        assert 'nitsum_total_queued_requests{model_name="tiny-random"} 0.0' in text
        assert (await fetch(f"{running.http}/readyz")).status == 200

    asyncio.run(scenario())


def test_nothing_of_it_listens_beyond_this_machine(running: ClusterProcess) -> None:
    places = running.listens_at()
    loopback = ("0100007F:", "0000000000000000FFFF00000100007F:", "00000000000000000000000001000000:")
    assert len(places) >= 8  # front door, Ray's own processes, cells
    assert {address: name for address, name in places.items() if not address.startswith(loopback)} == {}


def test_cells_do_not_run_in_the_background(running: ClusterProcess) -> None:
    """Ray would have them wait for whatever else runs on the machine."""
    niceness = [os.getpriority(os.PRIO_PROCESS, pid) for pid in (running.process.pid, *running.cells())]
    assert len(niceness) >= 2
    assert len(set(niceness)) == 1


def test_a_cell_that_hangs_is_left_within_its_bound(
    running: ClusterProcess, undisturbed: list[tuple[int, ...]]
) -> None:
    have_cells(running, 2)
    before = running.serving()
    stopped = running.cells()[0]

    def stop() -> None:
        os.kill(stopped, signal.SIGSTOP)

    begun = time.monotonic()
    try:
        assert asyncio.run(many(running, 32, stop)) == undisturbed
        assert time.monotonic() - begun < 60
    finally:
        os.kill(stopped, signal.SIGCONT)
    wait_for_cells(running, before)
    assert stopped in running.cells()


def test_a_cell_that_is_killed_loses_nothing(running: ClusterProcess, undisturbed: list[tuple[int, ...]]) -> None:
    have_cells(running, 2)
    before = running.serving()
    killed = running.cells()[0]
    assert asyncio.run(many(running, 32, lambda: os.kill(killed, signal.SIGKILL))) == undisturbed
    wait_for_cells(running, before)  # Ray starts another
    assert killed not in running.cells()


def test_a_rolling_update_is_not_noticed(running: ClusterProcess, undisturbed: list[tuple[int, ...]]) -> None:
    """Nor that there are two cells afterwards."""
    have_cells(running, 2)
    old = set(running.cells())

    def updated() -> bool:
        if running.serving() != 2:
            return False
        now = set(running.cells())
        return len(now) == 2 and not now & old

    running.deploy(report_s=0.15, cells=2)  # cells that differ are new cells
    asyncio.run(under_load(running, undisturbed, 4, updated))


def test_cells_become_one_by_themselves(running: ClusterProcess, undisturbed: list[tuple[int, ...]]) -> None:
    have_cells(running, 2)
    running.deploy(down_s=1.0)
    wait_for_cells(running, 1)
    assert asyncio.run(many(running, 8)) == undisturbed[:8]
