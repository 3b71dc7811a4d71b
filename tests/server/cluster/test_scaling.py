"""Cells come and go under load, and no stream notices."""

import json
import subprocess
import sys

import pytest

from tests.server.cluster.cluster_process import CELLS, START_S, environment

pytest.importorskip("ray.serve", reason="Ray is not installed (the extra ray)")


def test_one_cell_becomes_three_and_one_again_under_load() -> None:
    command = [sys.executable, "-m", "tests.server.cluster.scaling_driver", *CELLS, "--cells=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * START_S, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (told,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert told["cells"] == [1, 3, 1]
    assert told["whole"] == told["streams"] >= 12
