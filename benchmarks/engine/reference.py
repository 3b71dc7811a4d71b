"""The other side of reference_worker.py: other people's libraries as a process of their own, beside the engine."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from nitsum_jax.errors import PreconditionError

_WORKER = pathlib.Path(__file__).with_name("reference_worker.py")


class Reference:
    """A worker process; `there` says which libraries it has, `missing` why it lacks the others."""

    def __init__(self, python: str, model: pathlib.Path):
        """Starts it and waits until its models are loaded.

        Raises:
          PreconditionError: the interpreter does not start, or the worker died.
        """
        try:
            self._process = subprocess.Popen(
                [python, str(_WORKER), str(model)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            raise PreconditionError(f"--reference_python={python} does not start: {error.strerror or error}") from None
        self._python = python
        hello = self._answer()
        self.there: dict[str, str] = hello["there"]
        self.missing: dict[str, str] = hello["missing"]

    def run(self, name: str, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, float]:
        """Seconds of the decode phase (`decode_s`) and with prefill (`total_s`), and `tokens` of the decode phase.

        Raises:
          PreconditionError: the library failed.
        """
        assert self._process.stdin is not None
        order = {"name": name, "prompts": [list(prompt) for prompt in prompts], "tokens": tokens}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise PreconditionError(f"{name} failed: {answer['error']}")
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise PreconditionError(
                f"the comparison stopped with status {status}: see what {self._python} {_WORKER.name} says, or give "
                "--reference_python= (empty) to do without"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def default_python() -> str:
    """This interpreter; it may have the libraries or not."""
    return sys.executable
