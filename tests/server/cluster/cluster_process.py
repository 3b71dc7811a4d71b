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


@dataclasses.dataclass
class ClusterProcess:
    """It, once it serves."""

    process: "subprocess.Popen[bytes]"
    http: str
    grpc: str
    mark: str

    def deploy(self, **changes: object) -> None:
        """Has it deploy anew, with other options; returns at once."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(changes).encode() + b"\n")
        self.process.stdin.flush()

    def cells(self) -> list[int]:
        """Ids of the processes that hold a cell: they have inherited a variable of its environment."""
        listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
        rows = (line.split(None, 1) for line in listed.splitlines())
        named = (int(pid) for pid, name in rows if name.startswith("ray::ServeReplica:nitsum:Cell"))
        return sorted(pid for pid in named if f"{MARK}={self.mark}".encode() in _environment_of(pid))

    def listens_at(self) -> dict[str, str]:
        """Addresses where its processes listen, those of Ray and of the cells, and the process of each."""
        found: dict[str, str] = {}
        listening = _listening()
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            if f"{MARK}={self.mark}".encode() not in _environment_of(int(folder.name)):
                continue
            with contextlib.suppress(OSError):  # it has ended meanwhile
                name = (folder / "comm").read_text().strip()
                sockets = {os.readlink(file) for file in (folder / "fd").iterdir()}
                found |= {listening[socket]: name for socket in sockets & listening.keys()}
        return found


def _listening() -> dict[str, str]:
    """Addresses in the kernel's hexadecimal form, by the socket's name in /proc."""
    rows = [
        line.split() for table in ("tcp", "tcp6") for line in pathlib.Path("/proc/net", table).read_text().splitlines()
    ]
    return {f"socket:[{row[9]}]": row[1] for row in rows if row[3] == "0A"}


def _environment_of(pid: int) -> bytes:
    try:
        return pathlib.Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


@contextlib.contextmanager
def started(*flags: str, cells: int = 2) -> Iterator[ClusterProcess]:
    """Starts it, and ends it with all that belongs to it."""
    module = "tests.server.cluster.told_cluster"
    command = [sys.executable, "-m", module, *CELLS, f"--cells={cells}", "--port=0", "--http_port=0", *flags]
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
        yield ClusterProcess(process, web[1], ready[1], mark)
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
