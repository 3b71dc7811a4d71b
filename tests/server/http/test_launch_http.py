"""nitsum-serve with --http_port, as a process."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from nitsum_jax.server.launch.flags import read_options
from nitsum_jax.server.launch.main import main

_ROOT = Path(__file__).resolve().parents[3]


@contextlib.contextmanager
def _server(*flags: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The process and the URL that it prints."""
    command = [sys.executable, "-m", "tests.server.fake_server", "--port=0", "--http_port=0", "--model=fake", *flags]
    process = subprocess.Popen(
        command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        assert "fake is ready" in lines[3]
        yield process, lines[2].removeprefix("OpenAI-compatible HTTP: ").strip()
    finally:
        process.kill()
        process.communicate()


class _Stream(threading.Thread):
    """A chat stream that is read to its end."""

    def __init__(self, url: str, max_tokens: int) -> None:
        super().__init__()
        self._url = url
        self._max_tokens = max_tokens
        self.begun = threading.Event()
        self.text = ""
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with openai.OpenAI(base_url=self._url, api_key="none", max_retries=0) as client:
                stream = client.chat.completions.create(
                    model="fake",
                    messages=[{"role": "user", "content": "hi"}],
                    max_tokens=self._max_tokens,
                    stream=True,
                )
                for chunk in stream:
                    self.text += chunk.choices[0].delta.content or ""
                    if self.text:
                        self.begun.set()
        except openai.APIError as error:
            self.error = error


def test_it_prints_its_url_and_a_drain_lets_streams_finish() -> None:
    with _server() as (process, url):
        assert url.startswith("http://127.0.0.1:")
        stream = _Stream(url, 100)
        assert stream.begun.wait(20)
        process.send_signal(signal.SIGTERM)
        stream.join(20)
        assert (stream.text, stream.error) == ("word " * 20, None)
        _, log = process.communicate(timeout=20)
        assert process.returncode == 0
        assert "finishing running requests" in log
        assert "Traceback" not in log


def test_a_second_signal_cuts_streams_off_with_an_error_and_no_trace() -> None:
    with _server() as (process, url):
        stream = _Stream(url, 1_000)
        assert stream.begun.wait(20)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "finishing" in process.stderr.readline()
        refused = httpx2.post(f"{url}/chat/completions", json={}, trust_env=False)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        process.send_signal(signal.SIGINT)
        stream.join(20)
        assert stream.error is not None
        assert "server stopped" in str(stream.error)
        _, log = process.communicate(timeout=20)
        assert log == "nitsum-serve: stopped at once\n"


def test_the_port_in_use_is_told_by_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["nitsum-serve", "--port=0", f"--http_port={port}", "--model=nothing"]) == 2
    assert f"port {port} on 127.0.0.1 is in use" in (err := capsys.readouterr().err)
    assert "--http_port" in err


def test_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_options(["nitsum-serve"]).http_port is None
    assert read_options(["nitsum-serve", "--http_port=0"]).http_port == 0
    assert read_options(["nitsum-serve", "--served_model_name=mine"]).served_model_name == "mine"
    for flag in ("--http_port=-1", "--http_port=70000", "--served_model_name="):
        assert main(["nitsum-serve", flag]) == 2
        assert flag.split("=")[0].strip("-") in capsys.readouterr().err
