"""Flags of nitsum-cluster, and one line for each thing that it cannot do."""

import socket
import sys
import threading

import pytest

from nitsum_jax.cluster.flags import read
from nitsum_jax.cluster.host import with_own_log
from nitsum_jax.cluster.main import engine_of, loaded, main, model_of
from nitsum_jax.cluster.messages import FAILED
from nitsum_jax.cluster.on_ray import ray_cluster
from nitsum_jax.cluster.on_ray.ray_cluster import reason_in, resource_of
from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.runtime.tools.formats import ToolFormat
from nitsum_jax.server.cli import HelpRequested


def test_flags_of_the_server_go_to_front_door_and_cells() -> None:
    options = read(["nitsum-cluster", "--cells=3", "--devices_per_cell=2", "--model=tiny-random", "--http_port=0"])
    assert (options.cells, options.serve.model, options.serve.http_port) == (3, "tiny-random", 0)
    assert options.serve.engine["devices"] == 2
    assert options.cell_argv[1:] == ("--model=tiny-random", "--http_port=0", "--devices=2")
    assert not options.scales
    assert read(["nitsum-cluster", "--min_cells=1", "--max_cells=4"]).scales


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--devices=4", "give --devices_per_cell"),
        ("--cells=0", "cells"),
        ("--min_cells=3", "must be from --min_cells=3"),
        ("--max_cells=1", "to --max_cells=1"),
        ("--report_ms=1", "report_ms"),
        ("--no_such_flag", "no_such_flag"),
        ("--silent_seconds=-1", "silent_seconds"),
        ("--silent_seconds=nan", "silent_seconds=nan is not a finite number"),
        ("--start_seconds=inf", "start_seconds=inf is not a finite number"),
    ],
)
def test_wrong_flags_are_named(flag: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidInputError, match=says):
        read(["nitsum-cluster", flag])


def test_the_front_door_parses_answers_as_the_flags_say() -> None:
    flags = ("--model=tiny-random", "--tool_parser=hermes", "--reasoning_parser=think")
    model = model_of(read(["nitsum-cluster", *flags]).serve)
    assert (model.tools, model.thinks) == (ToolFormat.HERMES, True)


def test_the_front_door_says_at_whose_pace_its_cells_run() -> None:
    options = read(["nitsum-cluster", "--model=tiny-random", "--pace=llama-3.1-8b-h100", "--time_scale=4"])
    engine = engine_of(options, options.serve, "tiny-random", lambda deltas: None, lambda name, now_s: None)
    try:
        pace = loaded(engine, model_of(options.serve), options.serve).pace
    finally:
        engine.close()
    assert pace is not None
    assert (pace.name, pace.time_scale) == ("llama-3.1-8b-h100", 4)


def test_help_lists_the_flags_of_both() -> None:
    with pytest.raises(HelpRequested) as told:
        read(["nitsum-cluster", "--help"])
    assert "--devices_per_cell" in str(told.value)
    assert "--prefill_chunk" in str(told.value)


def test_without_ray_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ray", "ray.serve"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails, whether it is installed or not
    assert main(["nitsum-cluster", "--model=tiny-random"]) == 2
    assert capsys.readouterr().err == (
        "nitsum-cluster: Ray is not installed: install the extra, as in pip install 'nitsum-jax[ray]'\n"
    )


def test_a_cluster_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")  # the tool sets it if nobody has
    assert main(["nitsum-cluster", "--model=tiny-random", "--address=127.0.0.1:9"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("nitsum-cluster: there is no Ray cluster at --address=127.0.0.1:9 ([Errno 111]")
    assert said.endswith("start one with ray start --head, or leave the flag out\n")


def test_what_listens_there_and_is_not_ray_is_not_waited_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")
    monkeypatch.setattr(ray_cluster, "_REACH_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as other:  # it accepts, and never says a word
        port = other.getsockname()[1]
        assert main(["nitsum-cluster", "--model=tiny-random", f"--address=127.0.0.1:{port}"]) == 2
    assert f"at --address=127.0.0.1:{port} (what listens there is not Ray): start one" in capsys.readouterr().err


def test_a_ray_on_the_loopback_address_is_looked_for_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes 127.0.0.1 for an address of the machine, and would wait there for ever."""
    monkeypatch.setattr(ray_cluster, "_own_address", lambda: "127.0.0.2")
    with socket.create_server(("127.0.0.1", 0)) as only, socket.create_server(("0.0.0.0", 0)) as everywhere:
        assert ray_cluster._only_loopback(f"127.0.0.1:{only.getsockname()[1]}")
        assert not ray_cluster._only_loopback(f"127.0.0.1:{everywhere.getsockname()[1]}")
    assert not ray_cluster._only_loopback("auto")
    assert not ray_cluster._only_loopback("10.0.0.7:6379")


def test_joining_ends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    codes: list[int] = []
    monkeypatch.setattr(ray_cluster, "_JOIN_S", 0.01)

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr("os._exit", leave)
    with ray_cluster._not_for_ever("10.0.0.7:6379"):
        assert ended.wait(10)
    assert codes == [3]
    assert "Ray at --address=10.0.0.7:6379 lets nobody join" in capsys.readouterr().err


def test_cells_need_their_devices() -> None:
    options = read(["nitsum-cluster", "--cells=3", "--devices_per_cell=4"])
    assert resource_of(options, {"CPU": 8.0}) is None  # emulated
    assert resource_of(options, {"GPU": 12.0}) == "GPU"
    assert resource_of(options, {"TPU": 16.0}) == "TPU"
    with pytest.raises(PreconditionError, match="need 12 GPUs, and the cluster has 8"):
        resource_of(options, {"GPU": 8.0})


def test_each_cell_writes_its_own_decision_log() -> None:
    options = read(["nitsum-cluster", "--planner=on", "--decision_log=folder/plans.jsonl"]).serve
    assert with_own_log(options, "abc").control.log == "folder/plans.abc.jsonl"
    assert options.control.log == "folder/plans.jsonl"
    bare = read(["nitsum-cluster"]).serve
    assert with_own_log(bare, "abc") is bare


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("", None),
        ("The replicas are healthy.", None),
        (
            f"RuntimeError: ray::X\nTraceback ...\nRuntimeError: {FAILED}layout tp8 does not fit\nmore",
            "layout tp8 does not fit",
        ),
        ("The deployment failed to start 3 times.\n  File x\nMemoryError: no room\n", "MemoryError: no room"),
    ],
)
def test_the_line_of_a_cell_is_found_in_what_serve_says(said: str, reason: str | None) -> None:
    assert reason_in(said) == reason
