"""Decisions of a live controller as JSON lines: what `nitsum-simulate --replay` reads."""

import json
import pathlib
import threading

from nitsum_jax.control.planner import Decision
from nitsum_jax.errors import InvalidInputError


class DecisionLog:
    """Appends to a file; thread-safe.

    Each line has what a replay needs (`time_s, inputs, candidates, choice, reason`); the simulator's logs have the
    same.
    """

    def __init__(self, path: str | pathlib.Path):
        """Opens the file for appending.

        Raises:
          InvalidInputError: it cannot be written.
        """
        self._lock = threading.Lock()
        try:
            self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  one line at a time
        except OSError as error:
            raise InvalidInputError(f"--decision_log={path} cannot be written: {error.strerror or error}") from error

    def write(self, decision: Decision) -> None:
        """Adds a decision."""
        values = decision.to_json()
        entry = {name: values[name] for name in ("time_s", "inputs", "candidates", "reason")}
        entry["choice"] = str(decision.choice)
        with self._lock:
            if not self._file.closed:
                self._file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._file.close()
