"""The quickstart notebook runs from top to bottom, on a tiny model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.quick import quick_compiles  # noqa: F401
from tests.models.golden import tiny_models

pytestmark = pytest.mark.usefixtures("quick_compiles")

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "quickstart.ipynb"
# In a process of its own: the kernel's libraries give warnings, which are errors here.
RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""

PROGRESS = ("nitsum-jax: compiling", "nitsum-jax: switching")  # said where that takes longer than a second


def test_the_quickstart_runs(tmp_path: Path) -> None:
    model = tiny_models.write_hf_folder("llama_odd", tmp_path / "model")
    executed = tmp_path / "executed.ipynb"
    settings = {"NITSUM_MODEL": str(model), "JAX_NUM_CPU_DEVICES": "4", "JUPYTER_PLATFORM_DIRS": "1"}
    command = [sys.executable, "-c", RUN, str(NOTEBOOK), str(executed)]
    done = subprocess.run(
        command, env=os.environ | settings, cwd=NOTEBOOK.parent, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    outputs = [output for cell in json.loads(executed.read_text())["cells"] for output in cell.get("outputs", ())]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result"}, outputs
    errors = "".join("".join(output["text"]) for output in outputs if output.get("name") == "stderr")
    assert all(line.startswith(PROGRESS) for line in errors.splitlines()), errors
    text = "".join("".join(output.get("text", ())) for output in outputs)
    assert re.search(r"tp1x4 -> tp4: \d\.\d\d MB moved", text)
    assert re.search(r"tp4 -> tp1x4: \d\.\d\d MB moved", text)
    found = re.search(r"(\d+) of (\d+) prompt tokens were there already", text)
    assert found is not None
    assert int(found[1]) > 0


def test_it_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
