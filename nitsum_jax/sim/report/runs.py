"""The runs of a report: their summaries, and their logs where those are wanted."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from nitsum_jax.control.tiers import TierSet
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.runs.logs import RunLogs, read_folder
from nitsum_jax.sim.runs.metrics import tiers_of
from nitsum_jax.sim.runs.records import REQUESTS, STEPS, SUMMARY, SWITCHES, read_summary


@dataclasses.dataclass(frozen=True)
class ReportedRun:
    """A folder with a summary and perhaps with logs.

    Attributes:
      folder: of the run.
      summary: its summary.json.
    """

    folder: pathlib.Path
    summary: Mapping[str, Any]

    @property
    def policy(self) -> str:
        """Name of its policy; that of the folder if it has none."""
        return str(self.summary.get("policy", self.folder.name))

    @property
    def setting(self) -> str:
        """What runs must share to be compared: workload, profile and number of devices."""
        about = [str(self.summary[key]) for key in ("workload", "profile") if self.summary.get(key)]
        devices = self.summary.get("devices")
        return ", ".join([*about, *([f"{devices} devices"] if devices else [])])

    @property
    def rate(self) -> float:
        """Requests per second that came."""
        return float(self.summary["rate"])

    @property
    def attainment(self) -> float:
        """Share of the requests that met both targets."""
        return float(self.summary["total"]["attainment"])

    @property
    def seconds(self) -> float:
        """Length of the workload."""
        return float(self.summary["seconds"])

    @functools.cached_property
    def tiers(self) -> TierSet:
        """Its tiers."""
        return tiers_of(self.summary)

    @property
    def has_logs(self) -> bool:
        """Whether there are logs beside the summary."""
        return all((self.folder / name).is_file() for name in (REQUESTS, STEPS, SWITCHES))

    def logs(self) -> RunLogs:
        """Reads the logs.

        Raises:
          InvalidInputError: they are not there, or wrong.
        """
        return read_folder(self.folder)


def open_run(folder: str | pathlib.Path) -> ReportedRun:
    """The run in a folder; reads the summary only.

    Raises:
      InvalidInputError: there is no summary, or it is not one of a run.
    """
    folder = pathlib.Path(folder)
    run = ReportedRun(folder, read_summary(folder / SUMMARY))
    try:
        sound = run.rate >= 0 and run.seconds > 0 and 0 <= run.attainment <= 1 and len(run.tiers) > 0
        sound = sound and all(name in run.summary["tiers"] for name in run.tiers.names)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InvalidInputError(f"{folder / SUMMARY}: not the summary of a run: {e!r}") from e
    if not sound:
        raise InvalidInputError(f"{folder / SUMMARY}: not the summary of a run: a figure is out of its range")
    return run
