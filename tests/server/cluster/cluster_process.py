"""A nitsum-cluster of cells of tiny-random in its own process, for tests that have Ray."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence

import grpc

from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc

START_S = 600.0
MARK = "NITSUM_TEST_CLUSTER"
CELLS = (
    "--model=tiny-random",
    "--devices_per_cell=1",
    "--pooling=last",
    "--deterministic",
    "--max_model_len=512",
    "--max_batch=16",
)
# Steps take 30 to 40 ms then, nearly all of it waiting: cells under load leave the processors to those that start.
PACED = ("--pace=llama-3.1-8b-h100", "--time_scale=4")


@dataclasses.dataclass
class ClusterProcess:
    """It, once it serves."""

    process: "subprocess.Popen[bytes]"
    http: str
    address: str
    mark: str
    stub: nitsum_pb2_grpc.GenerationServiceStub

    def deploy(self, **changes: object) -> None:
        """Has it deploy anew, with other options; returns at once."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(changes).encode() + b"\n")
        self.process.stdin.flush()

    def layout(self) -> nitsum_pb2.GetLayoutResponse:
        """What the front door says of the cells that it sends requests to."""
        return self.stub.GetLayout(nitsum_pb2.GetLayoutRequest(), timeout=60)

    def serving(self) -> int:
        """How many cells these are: each has one instance."""
        return len(self.layout().instances)

    def cells(self) -> list[int]:
        """Ids of the processes that hold a cell, or will: they have inherited a variable of its environment."""
        replicas = (
            int(folder.name)
            for folder in pathlib.Path("/proc").glob("[0-9]*")
            if _read(folder / "cmdline").startswith(b"ray::ServeReplica:nitsum:Cell")
        )
        return sorted(pid for pid in replicas if self._owns(pid))

    def listens_at(self) -> dict[str, str]:
        """Addresses where its processes listen, those of Ray and of the cells, and the process of each."""
        found: dict[str, str] = {}
        listening = _listening()
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            if not self._owns(int(folder.name)):
                continue
            with contextlib.suppress(OSError):  # it has ended meanwhile
                name = (folder / "comm").read_text().strip()
                sockets = {os.readlink(file) for file in (folder / "fd").iterdir()}
                found |= {listening[socket]: name for socket in sockets & listening.keys()}
        return found

    def _owns(self, pid: int) -> bool:
        return f"{MARK}={self.mark}".encode() in _read(pathlib.Path(f"/proc/{pid}/environ"))


def _listening() -> dict[str, str]:
    """Addresses in the kernel's hexadecimal form, by the socket's name in /proc."""
    rows = [
        line.split() for table in ("tcp", "tcp6") for line in pathlib.Path("/proc/net", table).read_text().splitlines()
    ]
    return {f"socket:[{row[9]}]": row[1] for row in rows if row[3] == "0A"}


def _read(file: pathlib.Path) -> bytes:
    """Of /proc; nothing of a process that has ended."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


@contextlib.contextmanager
def started(*flags: str) -> Iterator[ClusterProcess]:
    """Starts it, and ends it with all that belongs to it."""
    module = "tests.server.cluster.told_cluster"
    command = [sys.executable, "-m", module, *CELLS, *PACED, "--port=0", "--http_port=0", *flags]
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment() | {MARK: mark},
    )
    said: list[str] = []
    reading = None
    try:
        text = read_until(process, ("nitsum-generate", "nitsum-cluster:"))
        ready = re.search(r"is ready on (\S+),", text)
        assert ready is not None, text
        web = re.search(r"HTTP: (\S+)/v1", text)
        assert web is not None, text
        reading = threading.Thread(target=_keep, args=(process, said), daemon=True)  # else it stops at a full pipe
        reading.start()
        with grpc.insecure_channel(ready[1]) as channel:
            stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
            yield ClusterProcess(process, web[1], ready[1], mark, stub)
    finally:
        died = process.poll()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if reading is not None:
            reading.join(30)  # until its children have ended, too
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        if reading is None or not reading.is_alive():
            process.stdout.close()
        print(*(line for line in said if "nitsum_jax.requests" not in line), sep="")  # shown where a test has failed
        assert died is None, f"the front door has ended by itself with {died}"


def environment() -> dict[str, str]:
    """Of this process, without a proxy."""
    return {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}


def _keep(process: "subprocess.Popen[bytes]", said: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line.decode(errors="replace"))


def read_until(process: "subprocess.Popen[bytes]", words: Sequence[str]) -> str:
    """What it says, up to one of these words."""
    assert process.stdout is not None
    said = b""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if select.select([process.stdout], [], [], 1.0)[0]:
            more = os.read(process.stdout.fileno(), 65536)
            said += more
            if not more or any(word.encode() in said for word in words):
                break
    return said.decode(errors="replace")
