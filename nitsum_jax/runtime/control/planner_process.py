"""A planner in a process of its own: one line of JSON in, one line out.

Planning takes tens of milliseconds of Python. In the server's process these would be taken from the thread that
launches steps, since Python runs one thread at a time; here they cost it nothing. `PlannerProcess` is the server's side
of the pipe, and `python -m nitsum_jax.runtime.control.planner_process` the other.
"""

import contextlib
import dataclasses
import gc
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import IO, Any

from nitsum_jax.control.model.corrected_cost import CorrectedCost
from nitsum_jax.control.model.profile import Profile, parse_profile, to_json
from nitsum_jax.control.planning.decision import Decision, PlanInputs, PlannerConfig
from nitsum_jax.control.planning.planner import Planner
from nitsum_jax.control.tiers import Tier

Ratios = Mapping[int, tuple[float, float]]
_NICE = 10
_GARBAGE = 100_000  # objects between two searches for cycles, which a replay makes few of


class PlannerError(Exception):
    """The planner did not answer, or not with a decision."""


class PlannerProcess:
    """Starts the process when it is first needed, and again when it has died; used by one thread."""

    def __init__(self, profile: Profile, tiers: Iterable[Tier], config: PlannerConfig, *, timeout_s: float = 5.0):
        """Starts nothing.

        Args:
          profile: step times.
          tiers: targets.
          config: how to plan.
          timeout_s: after so long without an answer the process is ended, and started anew for the next decision.
        """
        self._hello = {
            "profile": to_json(profile),
            "tiers": [dataclasses.asdict(tier) for tier in tiers],
            "config": dataclasses.asdict(config),
        }
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self.cpu_s = 0.0  # that its answers took, processor time

    def start(self) -> None:
        """Starts the process, so that the first decision does not wait for it."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nitsum_jax.runtime.control.planner_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A planner needs no accelerator and must not take one from the server.
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        self._send(self._hello)

    def decide(self, inputs: PlanInputs, ratios: Ratios | None = None) -> Decision:
        """A decision.

        Args:
          inputs: what it is made from.
          ratios: measured over predicted seconds of decoding and of prompts, by TP.

        Raises:
          PlannerError: there is no answer in time, or an error in the planner; the message is one line.
        """
        try:
            self.start()
            self._send({"inputs": inputs.to_json(), "ratios": {str(tp): r for tp, r in (ratios or {}).items()}})
            answer = json.loads(self._receive())
        except (OSError, ValueError) as error:
            self.close()
            raise PlannerError(f"the planner's process failed: {' '.join(str(error).split())}") from error
        self.cpu_s += answer["cpu_s"]
        if "error" in answer:
            raise PlannerError(f"the planner failed: {answer['error']}")
        return Decision.from_json(answer["decision"])

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        pipe = self._process.stdin
        # A process that hangs reads nothing: without the timer, a full pipe would hold this thread for ever.
        timer = threading.Timer(self._timeout_s, self._process.kill)
        timer.start()
        try:
            pipe.write(json.dumps(message).encode() + b"\n")
            pipe.flush()
        finally:
            timer.cancel()

    def _receive(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        pipe = self._process.stdout
        end = time.monotonic() + self._timeout_s
        line = b""
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise TimeoutError(f"no decision within {self._timeout_s:g} s")
            part = os.read(pipe.fileno(), 1 << 16)
            if not part:
                raise OSError("it ended")
            line += part
        return line


def serve(source: IO[str], sink: IO[str]) -> None:
    """The process: reads settings, then inputs, and answers each with a decision, until the end of its input."""
    hello = json.loads(source.readline())
    cost = CorrectedCost(parse_profile(hello["profile"], "the server's profile"))
    config = hello["config"] | {"tps": tuple(hello["config"]["tps"])}
    planner = Planner(cost, [Tier(**tier) for tier in hello["tiers"]], PlannerConfig(**config))
    for line in source:
        start = time.process_time()
        message = json.loads(line)
        try:
            cost.adopt({int(tp): (ratio[0], ratio[1]) for tp, ratio in message["ratios"].items()})
            answer: dict[str, Any] = {"decision": planner.decide(PlanInputs.from_json(message["inputs"])).to_json()}
        except Exception as error:  # one bad decision must not cost the next ones
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        answer["cpu_s"] = time.process_time() - start
        sink.write(json.dumps(answer) + "\n")
        sink.flush()


if __name__ == "__main__":
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    gc.set_threshold(_GARBAGE)
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        serve(sys.stdin, sys.stdout)
