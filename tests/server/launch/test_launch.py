import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.runtime.startup import compile_cache
from nitsum_jax.server.launch.flags import read_options
from nitsum_jax.server.launch.main import main
from nitsum_jax.server.security.keys import ApiKey, digest_of, entry

_ROOT = Path(__file__).resolve().parents[3]


class _Process:
    """A server process with the lines that it has printed."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "tests.server.fake_server", "--port=0", *flags]
        self.process = subprocess.Popen(
            command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
        )

    def client(self) -> list[str]:
        """The command that the server prints last, once it is ready."""
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline() for _ in range(4)]
        assert "loading fake" in lines[0]
        assert "memory" in lines[1]
        assert "fake is ready on 127.0.0.1:" in lines[2]
        return shlex.split(lines[3])

    def finish(self) -> tuple[int, str]:
        """Exit status and stderr."""
        _, err = self.process.communicate(timeout=120)
        return self.process.returncode, err


@contextlib.contextmanager
def _server(*flags: str) -> Iterator[_Process]:
    server = _Process(*flags)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


def _start_client(command: list[str], *flags: str) -> "subprocess.Popen[str]":
    # Through the module: the package need not be installed for its tests.
    command = [
        sys.executable,
        "-m",
        "nitsum_jax.server.client.generate",
        *command[command.index(_server_flag(command)) :],
    ]
    return subprocess.Popen([*command, *flags], cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _server_flag(command: list[str]) -> str:
    return next(part for part in command if part.startswith("--server="))


def _first_word(client: "subprocess.Popen[str]") -> None:
    assert client.stdout is not None
    assert client.stdout.read(4) == "word"


def test_serve_generate_and_drain() -> None:
    with _server("--model=fake", "--layout=tp2x2") as server:
        command = server.client()
        client = _start_client(command, "--max_tokens=100")
        _first_word(client)
        server.process.send_signal(signal.SIGTERM)
        out, err = client.communicate(timeout=120)
        assert client.returncode == 0
        assert "word" + out == "word " * 20 + "\n"
        assert "100 tokens, length" in err
        status, log = server.finish()
        assert status == 0
        assert "finishing running requests" in log
        assert "Traceback" not in log


def test_a_hangup_reads_the_keys_again(tmp_path: Path) -> None:
    path, secret = tmp_path / "keys.toml", tmp_path / "secret"
    secret.write_text("nk_b")
    path.write_text(entry(ApiKey("a", digest_of("nk_a"))))
    with _server("--model=fake", f"--api_keys={path}") as server:
        command = [*server.client(), f"--api_key_file={secret}"]
        _, err = _start_client(command, "--max_tokens=1").communicate(timeout=120)
        assert "UNAUTHENTICATED" in err
        assert server.process.stderr is not None
        path.write_text("nonsense")
        server.process.send_signal(signal.SIGHUP)
        line = server.process.stderr.readline()
        assert "ERROR" in line
        assert f"the API keys in force stay: {path}: not valid TOML" in line
        path.write_text(entry(ApiKey("b", digest_of("nk_b"))))
        server.process.send_signal(signal.SIGHUP)
        assert "API keys read again, 1 in force: added b; removed a" in server.process.stderr.readline()
        client = _start_client(command, "--max_tokens=1")
        client.communicate(timeout=120)
        assert client.returncode == 0
        server.process.send_signal(signal.SIGTERM)
        assert server.finish()[0] == 0


def test_a_second_signal_stops_at_once() -> None:
    with _server("--model=fake") as server:
        client = _start_client(server.client(), "--max_tokens=100000")
        _first_word(client)
        server.process.send_signal(signal.SIGINT)
        assert server.process.stderr is not None
        assert "finishing" in server.process.stderr.readline()
        server.process.send_signal(signal.SIGTERM)
        status, log = server.finish()
        assert status == 128 + signal.SIGTERM
        assert log == "nitsum-serve: stopped at once\n"
        _, err = client.communicate(timeout=120)
        assert client.returncode == 3
        assert "UNAVAILABLE" in err


def test_the_drain_has_an_end() -> None:
    with _server("--model=fake", "--drain_seconds=0.2") as server:
        client = _start_client(server.client(), "--max_tokens=100000")
        _first_word(client)
        server.process.send_signal(signal.SIGTERM)
        status, log = server.finish()
        assert (status, "--drain_seconds passed" in log) == (0, True)
        client.communicate(timeout=120)
        assert client.returncode == 3


def test_a_signal_while_the_model_loads_ends_the_process() -> None:
    with _server("--model=slow") as server:
        assert server.process.stdout is not None
        assert "loading slow" in server.process.stdout.readline()
        server.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        status, log = server.finish()
        assert time.monotonic() - begun < 5
        assert (status, log) == (0, "nitsum-serve: stopped while starting\n")


@pytest.mark.parametrize(
    ("flags", "status", "says_what"),
    [
        (["--model=nothing"], 2, "unknown model 'nothing'"),
        (["--model=fake", "--layout=tp3"], 2, "power of two"),
        (["--model=fake", "--layout=tp8"], 2, "tp8"),
        (["--model=broken"], 1, "unexpected ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(flags: list[str], status: int, says_what: str) -> None:
    with _server(*flags) as server:
        code, log = server.finish()
        assert code == status
        assert log.startswith("nitsum-serve: ")
        assert says_what in log
        assert log.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "says_what"),
    [
        (["--nonsense=1"], "nonsense"),
        (["--port=many"], "--port=many"),
        (["--port=70000"], "70000"),
        (["--dtype=int3"], "<auto|float32|bfloat16>"),
        (["--devices=0"], "--devices=0"),
        (["--drain_seconds=-1"], "--drain_seconds=-1"),
        (["--drain_seconds=nan"], "--drain_seconds=nan"),
        (["--model="], "--model is empty"),
        (["serve"], "'serve'"),
        (["--host=no.such.host.invalid"], "--host=no.such.host.invalid"),
    ],
    ids=lambda value: str(value),
)
def test_wrong_flags_are_one_line_with_status_2(
    flags: list[str], says_what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["nitsum-serve", *flags]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says_what in err


def test_a_port_in_use_is_told_before_the_model_is_touched(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["nitsum-serve", f"--port={port}", "--model=nothing"]) == 2
    assert f"port {port} on 127.0.0.1 is in use" in capsys.readouterr().err


def test_help_names_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nitsum-serve", "--help"]) == 0
    out = capsys.readouterr().out
    for flag in ("model", "host", "port", "devices", "layout", "layouts", "dtype", "max_model_len", "max_batch"):
        assert f"--{flag}:\n" in out
    words = " ".join(out.split())
    assert "[string] (default: smollm2-135m)" in words
    assert "[auto|float32|bfloat16] (default: auto)" in words


def test_layouts_are_listed_with_semicolons() -> None:
    options = read_options(["nitsum-serve", "--layouts=tp4; tp2@0,2+tp1x2;"])
    assert options.engine["layouts"] == ("tp4", "tp2@0,2+tp1x2")
    assert read_options(["nitsum-serve"]).engine["layouts"] is None


def test_the_compilation_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: dict[str, object] = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert compile_cache.enable(None) == tmp_path / "nitsum-jax" / "xla"
    assert (tmp_path / "nitsum-jax" / "xla").is_dir()
    assert updates["jax_compilation_cache_dir"] == str(tmp_path / "nitsum-jax" / "xla")
    assert compile_cache.enable(str(tmp_path / "mine")) == tmp_path / "mine"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "env"))
    assert compile_cache.enable(None) == tmp_path / "env"
    assert compile_cache.enable("off") is None
    assert updates["jax_enable_compilation_cache"] is False
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match=r"--cache_dir=.*cannot be used"):
        compile_cache.enable(str(tmp_path / "file" / "below"))
