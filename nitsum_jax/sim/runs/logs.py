"""Writes the logs of a run into a folder, and reads them back."""

import contextlib
import dataclasses
import io
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from nitsum_jax.control.model.cell import ModelWorker, Recorder, StepRun
from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.model.switching import Switched
from nitsum_jax.control.planning.decision import Decision
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.runs import metrics
from nitsum_jax.sim.runs.records import (
    DECISIONS,
    REQUESTS,
    STEPS,
    SUMMARY,
    SWITCHES,
    DecisionRecord,
    RequestRecord,
    StepRecord,
    SwitchRecord,
    read_requests,
    read_steps,
    read_summary,
    read_switches,
    to_line,
)
from nitsum_jax.sim.runs.tables import RequestTable, StepTable

_BUFFER = 1 << 20


class LogFolder(contextlib.ExitStack, Recorder):
    """Is notified of what happens in a run and writes it down at once; a context manager.

    Raises:
      InvalidInputError: the folder or a file cannot be made (on construction).
    """

    def __init__(self, folder: str | pathlib.Path):
        """Makes the folder if need be, and empties the logs in it."""
        super().__init__()
        self.folder = pathlib.Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._requests, self._steps, self._switches, self._decisions = (
                self._open(name) for name in (REQUESTS, STEPS, SWITCHES, DECISIONS)
            )
        except OSError as e:
            self.close()
            raise InvalidInputError(f"{self.folder}: cannot write the logs: {e.strerror or e}") from e

    def _open(self, name: str) -> io.TextIOWrapper:
        file = open(self.folder / name, "w", encoding="utf-8", buffering=_BUFFER)  # noqa: SIM115
        return self.enter_context(file)

    def ran(self, worker: ModelWorker, run: StepRun) -> None:
        """An instance has made a row of steps."""
        spans = run.spans()
        tokens, before = zip(*spans, strict=True) if spans else ((), ())
        devices = worker.plan.devices
        for start_s, end_s, context in run.steps():
            record = StepRecord(
                worker.index, devices, worker.tp, start_s, end_s, run.sequences, context, tokens, before
            )
            self._steps.write(to_line(record))

    def finished(self, job: ModelJob) -> None:
        """A request has ended."""
        self._requests.write(to_line(request_record(job)))

    def failed(self, job: ModelJob, reason: str) -> None:
        """A request cannot be served; it is in the log without an end."""
        del reason
        self._requests.write(to_line(dataclasses.replace(request_record(job), finish_s=None, met=False)))

    def switched(self, report: Switched) -> None:
        """The layout has changed."""
        self._switches.write(to_line(switch_record(report)))

    def decided(self, decision: Decision) -> None:
        """A controller has decided."""
        self._decisions.write(to_line(decision_record(decision)))

    def summarise(self, values: dict[str, Any]) -> None:
        """Writes summary.json; see metrics.summary."""
        (self.folder / SUMMARY).write_text(metrics.to_json(values), encoding="utf-8")


def request_record(job: ModelJob) -> RequestRecord:
    """The record of a request as it stands."""
    return RequestRecord(
        job.id,
        job.tier.name,
        job.arrival_s,
        job.prompt_tokens,
        job.output_tokens,
        job.first_token_s,
        job.finish_s,
        tuple(job.instances),
        job.met(),
    )


def switch_record(report: Switched) -> SwitchRecord:
    """The record of a switch."""
    return SwitchRecord(
        report.time_s,
        report.before.placed,
        report.after.placed,
        report.devices,
        report.stall_s,
        report.kv_bytes,
        report.sequences,
        report.requeued,
    )


def decision_record(decision: Decision) -> DecisionRecord:
    """The record of a decision: its inputs can be read back and the decision made again."""
    candidates = [_plain(dataclasses.asdict(candidate)) for candidate in decision.candidates]
    inputs = _plain(decision.inputs.to_json())
    return DecisionRecord(decision.time_s, inputs, candidates, decision.choice.unplaced, decision.reason)


def _plain(value: Any) -> Any:
    """The value in terms of JSON, which has no infinite numbers: they become null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclasses.dataclass(frozen=True, slots=True)
class RunLogs:
    """The logs of one run, read back.

    Attributes:
      summary: summary.json.
      requests, steps, switches: the logs.
    """

    summary: dict[str, Any]
    requests: RequestTable
    steps: StepTable
    switches: tuple[SwitchRecord, ...]


def read_folder(folder: str | pathlib.Path) -> RunLogs:
    """Reads what LogFolder wrote.

    Raises:
      InvalidInputError: a file is missing, or a line of it is wrong.
    """
    folder = pathlib.Path(folder)
    return RunLogs(
        read_summary(folder / SUMMARY),
        RequestTable.of(read_requests(folder / REQUESTS)),
        StepTable.of(read_steps(folder / STEPS)),
        tuple(read_switches(folder / SWITCHES)),
    )
