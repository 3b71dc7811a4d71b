"""The ports for operators: health, draining, profiles, and nitsum-serve with its flags."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
import pytest

from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.server.http.server import HttpServer
from nitsum_jax.server.launch.flags import read_options
from nitsum_jax.server.launch.ops_flags import OpsOptions
from nitsum_jax.server.operations.profiling import Profiler
from nitsum_jax.server.operations.routes import OperatorViews, ops_routes
from nitsum_jax.server.proto import admin_pb2, admin_pb2_grpc
from nitsum_jax.server.state import ServerState
from tests.server.harness import ask, refusal, says, until
from tests.server.operations.http import fetch
from tests.server.operations.ports import opened

_ROOT = Path(__file__).resolve().parents[3]


def test_alive_before_ready_and_not_ready_while_draining() -> None:
    from starlette.applications import Starlette

    async def starting() -> None:
        server = HttpServer(Starlette(routes=ops_routes(OperatorViews(ServerState(), Profiler(None)))), "127.0.0.1", 0)
        await server.start()
        base = f"http://127.0.0.1:{server.port}"
        try:
            assert (await fetch(f"{base}/livez")).status == 200
            ready = await fetch(f"{base}/readyz")
            assert (ready.status, ready.text, "retry-after" in ready.headers) == (503, "starting\n", True)
            assert (await fetch(f"{base}/metrics")).status == 503
            assert (await fetch(f"{base}/dashboard/events")).status == 503
        finally:
            await server.stop()

    async def serving() -> None:
        async with opened(OpsOptions(metrics_port=0), says("x", end=False)) as open_:
            assert (await fetch(f"{open_.http}/readyz")).status == 200
            alive = asyncio.create_task(ask(open_.run.stub, max_tokens=50))
            await until(lambda: open_.run.engine.stats().running == 1)
            open_.run.engine.hold()
            draining = asyncio.create_task(open_.run.server.drain(20))
            await asyncio.sleep(0.02)
            ready = await fetch(f"{open_.http}/readyz")
            assert (ready.status, ready.text) == (503, "draining\n")
            assert (await fetch(f"{open_.http}/livez")).status == 200
            assert (await fetch(f"{open_.http}/metrics")).status == 200  # to the end
            open_.run.engine.release()
            assert await draining
            await alive

    asyncio.run(starting())
    asyncio.run(serving())


def test_a_port_in_use_is_told() -> None:
    async def scenario() -> None:
        async with opened(OpsOptions(metrics_port=0)) as open_:
            port = int(open_.http.rpartition(":")[2])
            with pytest.raises(PreconditionError, match=f"port {port} .*in use"):
                HttpServer(None, "127.0.0.1", port)  # type: ignore[arg-type]

    asyncio.run(scenario())


class _Recorder:
    def __init__(self) -> None:
        self.folders: list[str] = []
        self.stopped = 0

    def start(self, folder: str) -> None:
        self.folders.append(folder)

    def stop(self) -> None:
        self.stopped += 1


def test_one_trace_at_a_time_and_every_trace_is_stopped(tmp_path: Path) -> None:
    recorder = _Recorder()
    profiler = Profiler(str(tmp_path / "deep" / "traces"), recorder.start, recorder.stop)

    async def scenario() -> None:
        first = asyncio.create_task(profiler.record(0.2))
        await until(lambda: bool(recorder.folders))
        with pytest.raises(PreconditionError, match="another trace"):
            await profiler.record(1)
        folder = await first
        assert recorder.folders == [str(folder)]
        assert folder.is_dir()
        left = asyncio.create_task(profiler.record(30))
        await until(lambda: len(recorder.folders) == 2)
        left.cancel()
        await until(lambda: recorder.stopped == 2)
        with pytest.raises(asyncio.CancelledError):
            await left
        await profiler.record(0.01)
        assert len(set(recorder.folders)) == 3
        for seconds in (0, -1, 61, float("nan"), float("inf")):
            with pytest.raises(InvalidInputError, match="out of range"):
                await profiler.record(seconds)
        with pytest.raises(PreconditionError, match="--profile_dir"):
            await Profiler(None).record(1)
        (tmp_path / "file").write_text("")
        with pytest.raises(PreconditionError, match="cannot be written"):
            await Profiler(str(tmp_path / "file"), recorder.start, recorder.stop).record(1)

    asyncio.run(scenario())


def test_jax_writes_a_trace_over_http_and_grpc(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(OpsOptions(metrics_port=0, profile_dir=str(tmp_path))) as open_:
            reply = await fetch(f"{open_.http}/admin/profile?seconds=0.1", "POST")
            assert reply.status == 200, reply.text
            assert list(Path(reply.json["folder"]).rglob("*.xplane.pb"))
            stub = admin_pb2_grpc.AdminServiceStub(open_.run.channel)
            answer = await stub.Profile(admin_pb2.ProfileRequest(seconds=0.1))
            assert Path(answer.folder).parent == tmp_path
            assert (await fetch(f"{open_.http}/admin/profile?seconds=many", "POST")).status == 400
            error = await refusal(stub.Profile(admin_pb2.ProfileRequest()))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert (await fetch(f"{open_.http}/admin/profile")).status == 405

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tls_cert=x"], "belong together"),
        (["--otlp_endpoint=localhost:4318"], "is not an address"),
        (["--metrics_port=70000"], "metrics_port"),
        (["--max_streams_per_client=0"], "max_streams_per_client"),
    ],
)
def test_wrong_flags(flags: list[str], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read_options(["nitsum-serve", *flags])


def test_nitsum_serve_listens_to_this_machine_only() -> None:
    options = read_options(["nitsum-serve"])
    assert (options.host, options.ops.admin_host) == ("127.0.0.1", "127.0.0.1")
    assert (options.ops.metrics_port, options.ops.admin_port) == (None, None)


def test_nitsum_serve_as_a_process(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text("[keys.a]\nhash = 'x'\n")
    command = [sys.executable, "-m", "tests.server.fake_server", "--model=fake", "--port=0"]
    wrong = subprocess.run(
        [*command, f"--api_keys={tmp_path / 'keys.toml'}"], cwd=_ROOT, capture_output=True, text=True, timeout=60
    )
    assert wrong.returncode == 2
    assert re.fullmatch(r"nitsum-serve: .*keys\.toml:1: key 'a': hash must be .*\n", wrong.stderr)

    flags = ["--metrics_port=0", "--admin_port=0", "--log_format=json", "--log_level=info"]
    process = subprocess.Popen(
        [*command, *flags], cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(6)]
        found = re.search(r"metrics (http\S+)", lines[2])
        assert found, lines
        assert "administration on 127.0.0.1:" in lines[3]
        with urllib.request.urlopen(found[1], timeout=20) as answer:
            assert b'nitsum_layout_info{layout="tp1x4",model_name="fake"} 1.0' in answer.read()
        with urllib.request.urlopen(found[1].replace("metrics", "dashboard/events"), timeout=20) as stream:
            assert stream.readline().startswith(b"retry:")
            process.send_signal(signal.SIGTERM)  # an open dashboard keeps no server from leaving
            _, err = process.communicate(timeout=20)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()
    logged = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in logged)
    assert "Traceback" not in err
