"""Decisions of a live controller as JSON lines: what `nitsum-simulate --replay` reads."""

import json
import pathlib
import threading
from collections.abc import Mapping

from nitsum_jax.control.planning.decision import Decision
from nitsum_jax.errors import InvalidInputError


class DecisionLog:
    """Appends to a file; thread-safe.

    Each line has what a replay needs (`time_s, inputs, candidates, choice, reason`), as the simulator's logs have, and
    among the inputs `ratios` where measured step times corrected the profile: by TP, of decoding and of prompts.
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

    def write(self, decision: Decision, ratios: Mapping[int, tuple[float, float]] | None = None) -> None:
        """Adds a decision, and the corrections of the cost model that it was made with."""
        values = decision.to_json()
        entry = {name: values[name] for name in ("time_s", "inputs", "candidates", "reason")}
        entry["choice"] = decision.choice.unplaced
        if ratios is not None:
            entry["inputs"] = values["inputs"] | {"ratios": {str(tp): list(pair) for tp, pair in ratios.items()}}
        with self._lock:
            if not self._file.closed:
                self._file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._file.close()
