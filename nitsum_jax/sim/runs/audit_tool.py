"""`nitsum-simulate --audit=DIR`: the checks of `audit` on the logs of a finished run, with a verdict for each."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.tiers import TierSet, read_tiers
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.profiles.library import load_profile
from nitsum_jax.sim.runs.audit import Finding, checks
from nitsum_jax.sim.runs.logs import RunLogs, read_folder
from nitsum_jax.sim.runs.metrics import tiers_of
from nitsum_jax.sim.runs.records import STEPS, SUMMARY

_SHOWN = 3  # findings of a check


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What an audit of one run says.

    Attributes:
      folder: of the logs.
      against: profile and targets that it was audited against.
      findings: what each check found.
    """

    folder: pathlib.Path
    against: str
    findings: Mapping[str, list[Finding]]

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return not any(self.findings.values())

    def place(self, finding: Finding) -> str:
        """`file:line: what is wrong`."""
        if finding.log is None:
            return finding.text
        line = "" if finding.row is None else f":{finding.row + 1}"
        return f"{self.folder / finding.log}{line}: {finding.text}"

    def lines(self) -> list[str]:
        """What is printed: a line for each check, the first findings below those that fail."""
        out = [f"{self.folder}: {self.against}"]
        for check, found in self.findings.items():
            out.append(f"  {'WRONG' if found else 'ok   '} {check}")
            out += [f"        {self.place(finding)}" for finding in found[:_SHOWN]]
            if len(found) > _SHOWN:
                out.append(f"        ... and {len(found) - _SHOWN} more lines like these")
        return out

    def first(self) -> str | None:
        """The first thing that is wrong in a line of a log, else anywhere; None if nothing is."""
        found = [finding for findings in self.findings.values() for finding in findings]
        located = [finding for finding in found if finding.row is not None]
        return self.place((located or found)[0]) if found else None


def audit_folder(folder: pathlib.Path, profile: str | None = None, tiers: str | None = None) -> Verdict:
    """Audits the logs of one run.

    Args:
      folder: with summary.json and the logs.
      profile: name or file; None: the name in the summary.
      tiers: file with the targets; None: those in the summary.

    Raises:
      InvalidInputError: the logs or the profile cannot be read; `file:line` where it is a line of a log.
    """
    logs = _read(folder)
    summary = logs.summary
    if summary.get("steps") is None and not len(logs.steps):
        raise InvalidInputError(f"{folder / STEPS}: the run was made with --nosteps: run it again without, to audit it")
    name = profile or summary.get("profile")
    if not isinstance(name, str):
        raise InvalidInputError(f"{folder / SUMMARY}: it names no profile: give --profile")
    try:
        cost = CostModel(load_profile(name))
    except InvalidInputError as e:
        raise e if profile else InvalidInputError(f"{e} (named by {folder / SUMMARY}; --profile overrides it)") from e
    targets = read_tiers(tiers) if tiers else _tiers(summary, folder)
    words = ", ".join(f"{tier.name} {tier.ttft_ms:g}/{tier.tpot_ms:g} ms" for tier in targets)
    found = checks(summary, logs.requests, logs.steps, logs.switches, tiers=targets, cost=cost)
    counts = f"{len(logs.requests)} requests, {len(logs.steps)} steps, {len(logs.switches)} switches"
    return Verdict(folder, f"{counts}; profile {name}, TTFT/TPOT targets {words}", found)


def run_audit(folder: str, profile: str | None, tiers: str | None, out: Callable[[str], None]) -> int:
    """Audits a run, or all runs in the folders of a folder, and prints what came of it.

    Returns:
      0 if nothing is wrong, else 1; the last line then is the first thing that is.

    Raises:
      InvalidInputError: see `audit_folder`; or there are no logs.
    """
    root = pathlib.Path(folder)
    runs = [root] if (root / SUMMARY).exists() else sorted(path.parent for path in root.glob(f"*/{STEPS}"))
    if not runs:
        raise InvalidInputError(f"--audit={folder}: no {SUMMARY} in it: name the folder that --out named")
    wrong = []
    for run in runs:
        verdict = audit_folder(run, profile, tiers)
        for line in verdict.lines():
            out(line)
        first = verdict.first()
        if first is not None:
            wrong.append(first)
    if wrong:
        out(f"{len(wrong)} of {len(runs)} runs fail the audit: {wrong[0]}")
        return 1
    out(f"{len(runs)} {'run passes' if len(runs) == 1 else 'runs pass'} the audit")
    return 0


def _read(folder: pathlib.Path) -> RunLogs:
    try:
        return read_folder(folder)
    except ValueError as e:
        if isinstance(e, InvalidInputError):
            raise
        raise InvalidInputError(f"{folder / STEPS}: {' '.join(str(e).split())}") from e


def _tiers(summary: Mapping[str, Any], folder: pathlib.Path) -> TierSet:
    try:
        return tiers_of(summary)
    except (KeyError, TypeError, AttributeError) as e:
        raise InvalidInputError(f"{folder / SUMMARY}: it names no targets: give --tiers") from e
