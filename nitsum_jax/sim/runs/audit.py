"""What a stranger would check in the logs of a run: that the figures follow from them, and that nothing was for free.

Each check returns a finding for each thing that is wrong.  None of them trusts the simulator: they read only the logs,
the tiers and the cost model.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.errors import InvalidInputError, NitsumError
from nitsum_jax.meshes.layout import MOST_DEVICES, parse_layout
from nitsum_jax.sim.runs.metrics import measure
from nitsum_jax.sim.runs.records import REQUESTS, STEPS, SUMMARY, SWITCHES, SwitchRecord
from nitsum_jax.sim.runs.tables import RequestTable, StepTable, rows_by
from nitsum_jax.sim.workloads.workload import Workload

_SLACK_S = 1e-6  # times are sums of many steps
_MOST = 10  # lines of one kind


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong.

    Attributes:
      text: one line.
      log: name of the file where it shows; None: in none alone.
      row: number of the entry in it, from 0: line `row + 1` of the file; None: in the whole file.
    """

    text: str
    log: str | None = None
    row: int | None = None

    def __str__(self) -> str:
        return self.text


def audit(
    summary: Mapping[str, Any],
    requests: RequestTable,
    steps: StepTable,
    switches: Sequence[SwitchRecord],
    *,
    tiers: TierSet,
    cost: CostModel,
    workload: Workload | None = None,
) -> list[str]:
    """All checks.

    Args:
      summary: of the run; its figures are compared with the logs.  `preemptions` in it says how often a request lost
        its KV cache and was computed again; without it the prefill tokens beyond the prompts bound how much decoding
        that may have saved.
      requests: the request log.
      steps: the step log.
      switches: the switch log.
      tiers: their targets.
      cost: what steps take.
      workload: what the run was given; None: not compared.

    Returns:
      What is wrong, one line each, at most 10 of a kind; empty if nothing is.
    """
    found = checks(summary, requests, steps, switches, tiers=tiers, cost=cost, workload=workload)
    return [finding.text for findings in found.values() for finding in findings]


def checks(
    summary: Mapping[str, Any],
    requests: RequestTable,
    steps: StepTable,
    switches: Sequence[SwitchRecord],
    *,
    tiers: TierSet,
    cost: CostModel,
    workload: Workload | None = None,
) -> dict[str, list[Finding]]:
    """What each check finds, by what it makes sure of; arguments are those of `audit`."""
    found = {
        "every request is there once, and met is what its times say": check_requests(requests, tiers),
        "switches follow each other, and steps keep to the layouts": check_switches(switches, steps),
    }
    if all(name in tiers for name in requests.names):
        found["goodput and every figure of the summary follow from the logs"] = check_summary(
            summary, requests, steps, switches, tiers
        )
    devices = summary.get("devices")
    preemptions = summary.get("preemptions")
    found |= {
        "no device does two things at once": check_devices(
            steps, switches, devices if isinstance(devices, int) else None
        ),
        "every step takes the profile's time": check_step_times(steps, cost),
        "every token was paid for": check_tokens(
            requests, steps, preemptions if isinstance(preemptions, int) else None
        ),
        "tokens come out where and when steps end": check_moments(requests, steps),
    }
    if workload is not None:
        found["the requests are those of the workload"] = check_workload(requests, workload)
    return found


def check_requests(requests: RequestTable, tiers: TierSet) -> list[Finding]:
    """Each request is there once, in order of time, and `met` is what its times and its tier say."""
    last = {r.id: row for row, r in enumerate(requests.records)}
    counts = collections.Counter(r.id for r in requests.records)
    found = _some(
        Finding(f"request {i}: it is in the log {n} times", REQUESTS, last[i]) for i, n in counts.items() if n > 1
    )
    for number, name in enumerate(requests.names):
        if name not in tiers:
            row = int(np.flatnonzero(requests.tier == number)[0])
            found.append(Finding(f"tier {name!r}: it is not among the tiers of the run", REQUESTS, row))
    if not all(name in tiers for name in requests.names):
        return found
    met = requests.recomputed_met(tiers)

    def lines() -> Iterator[Finding]:
        for row, (r, expected) in enumerate(zip(requests.records, met.tolist(), strict=True)):
            if r.prompt_tokens < 1 or r.output_tokens < 1:
                yield Finding(f"request {r.id}: it has no prompt or no output", REQUESTS, row)
            if r.first_token_s is not None and r.first_token_s < r.arrival_s:
                yield Finding(
                    f"request {r.id}: first token at {r.first_token_s} s, before its arrival at {r.arrival_s} s",
                    REQUESTS,
                    row,
                )
            if r.finish_s is not None and (r.first_token_s is None or r.finish_s < r.first_token_s):
                yield Finding(f"request {r.id}: finished at {r.finish_s} s, before its first token", REQUESTS, row)
            if r.met != expected:
                yield Finding(f"request {r.id}: met is {r.met}, but its times say {expected}", REQUESTS, row)

    return found + _some(lines())


def check_summary(
    summary: Mapping[str, Any],
    requests: RequestTable,
    steps: StepTable,
    switches: Sequence[SwitchRecord],
    tiers: TierSet,
) -> list[Finding]:
    """Every figure of the summary follows from the logs."""
    seconds, devices = summary.get("seconds"), summary.get("devices")
    if not isinstance(seconds, int | float) or not seconds > 0 or not isinstance(devices, int) or devices < 1:
        return [Finding(f"summary: seconds {seconds!r} and devices {devices!r} must be above 0", SUMMARY)]
    expected = measure(requests, tiers, seconds, devices=devices, steps=steps, switches=switches)
    found = _differences("summary", dataclasses.asdict(expected), summary)
    return _some(Finding(text, SUMMARY) for text in found)


def check_devices(steps: StepTable, switches: Sequence[SwitchRecord], devices: int | None = None) -> list[Finding]:
    """No device does two things at once: steps, and the stalls in which a switch copies its KV cache."""
    found: list[Finding] = []
    by_group = rows_by(steps.group)
    for number, group in enumerate(steps.groups):
        wrong = sorted({d for d in group if devices is not None and d >= devices})
        if wrong or len(set(group)) != len(group):
            text = f"devices {list(group)}: not a set of the {devices} devices"
            found.append(Finding(text, STEPS, int(by_group[number][0])))
        others = by_group[number][steps.tp[by_group[number]] != len(group)]
        for tp in np.unique(steps.tp[others]).tolist():
            row = int(others[steps.tp[others] == tp][0])
            found.append(Finding(f"devices {list(group)}: a step at TP {tp}", STEPS, row))
    for instance, mine in rows_by(steps.instance).items():
        elsewhere = mine[steps.group[mine] != steps.group[mine[0]]]
        if len(elsewhere):
            text = f"instance {instance}: it changes its devices without becoming another instance"
            found.append(Finding(text, STEPS, int(elsewhere[0])))
    # Per device, everything it does in order of time.
    rows: dict[int, list[npt.NDArray[np.int64]]] = collections.defaultdict(list)
    for number, group in enumerate(steps.groups):
        for device in group:
            rows[device].append(by_group[number])
    for device in sorted(rows):
        mine = np.concatenate(rows[device])
        stalls = [(i, s) for i, s in enumerate(switches) if device in s.devices and s.stall_s > 0]
        start = np.concatenate([steps.start_s[mine], [s.time_s for _, s in stalls]])
        end = np.concatenate([steps.end_s[mine], [s.time_s + s.stall_s for _, s in stalls]])
        places = [*((STEPS, i) for i in mine.tolist()), *((SWITCHES, i) for i, _ in stalls)]
        order = np.lexsort((end, start))
        start, end = start[order], end[order]
        # What began earlier may also end later than the next: compare with the latest end so far.
        latest = np.maximum.accumulate(end)
        bad = np.flatnonzero(start[1:] < latest[:-1] - _SLACK_S)
        found += _some(
            Finding(
                f"device {device}: busy from {start[i + 1]:.6f} s with one thing, and with another until"
                f" {latest[i]:.6f} s",
                *places[order[i + 1]],
            )
            for i in bad.tolist()
        )
    return found


def check_step_times(steps: StepTable, cost: CostModel) -> list[Finding]:
    """Every step takes what the cost model says, fits the KV cache of its instance, and does something."""

    def lines() -> Iterator[Finding]:
        capacity: dict[int, int] = {}
        rows = zip(
            steps.tp.tolist(),
            steps.decode_sequences.tolist(),
            steps.context_tokens.tolist(),
            steps.start_s.tolist(),
            steps.end_s.tolist(),
            steps.chunks(),
            strict=True,
        )
        for i, (tp, sequences, context, start_s, end_s, chunks) in enumerate(rows):
            try:
                expected = cost.step_s(tp, sequences, context, chunks)
                room = capacity.setdefault(tp, cost.kv_capacity_tokens(tp))
            except InvalidInputError as e:
                yield Finding(f"step {i + 1}: {e}", STEPS, i)
                continue
            if not sequences and not chunks:
                yield Finding(f"step {i + 1}: it does nothing", STEPS, i)
            if any(new < 1 for new, _ in chunks):
                yield Finding(f"step {i + 1}: it has an empty prefill chunk", STEPS, i)
            if abs(end_s - start_s - expected) > _SLACK_S * max(1.0, expected):
                yield Finding(
                    f"step {i + 1}: it takes {end_s - start_s:.9f} s, but the profile says {expected:.9f} s", STEPS, i
                )
            if context > room or context < sequences:
                yield Finding(
                    f"step {i + 1}: {sequences} sequences hold {context} tokens of KV cache, of {room} at TP {tp}",
                    STEPS,
                    i,
                )

    return _some(lines())


def check_tokens(requests: RequestTable, steps: StepTable, preemptions: int | None = None) -> list[Finding]:
    """Every token was paid for: prompts by prefill chunks, outputs after the first by decode steps.

    A request that lost its KV cache is prefilled again, output and all, and that prefill makes the next token.  So each
    preemption may stand for one decode token, and adds prefill tokens.
    """
    found: list[Finding] = []
    done = ~np.isnan(requests.finish_s)
    begun = ~np.isnan(requests.first_token_s)
    prefilled, prompts = int(steps.chunk_tokens.sum()), int(requests.prompt_tokens[begun].sum())
    if prefilled < prompts:
        found.append(
            Finding(
                f"tokens: {prefilled} prompt tokens were computed, but prompts that were answered have {prompts}", STEPS
            )
        )
    decoded = int(steps.decode_sequences.sum())
    owed = int((requests.output_tokens[done] - 1).sum())
    most = int((requests.output_tokens[begun] - 1).sum())
    by_prefill = max(0, prefilled - prompts) if preemptions is None else preemptions
    if decoded < owed - by_prefill:
        found.append(Finding(f"tokens: {decoded} were decoded, but outputs have {owed} after their first ones", STEPS))
    if decoded > most:
        found.append(
            Finding(f"tokens: {decoded} were decoded, but outputs have only {most} after their first ones", STEPS)
        )
    # At every moment: what has been answered must have been prefilled by then, what has ended decoded.
    order = np.argsort(steps.end_s, kind="stable")
    ends = steps.end_s[order]
    for what, which, times, lengths, work, spare in (
        ("prompt", begun, requests.first_token_s, requests.prompt_tokens, steps.prefill_tokens, 0),
        ("output", done, requests.finish_s, requests.output_tokens - 1, steps.decode_sequences, by_prefill),
    ):
        rows, moments, need = np.flatnonzero(which), times[which], lengths[which]
        by_time = np.argsort(moments, kind="stable")
        needed = np.cumsum(need[by_time])
        by_then = np.concatenate([[0], np.cumsum(work[order])])
        paid = by_then[np.searchsorted(ends, moments[by_time] + _SLACK_S, side="right")]
        short = np.flatnonzero(paid + spare < needed)
        if len(short):
            i = int(short[0])
            text = f"tokens: at {moments[by_time[i]]:.6f} s {needed[i]} {what} tokens were out, but {paid[i]} computed"
            found.append(Finding(text, REQUESTS, int(rows[by_time[i]])))
    return found


def check_moments(requests: RequestTable, steps: StepTable) -> list[Finding]:
    """Tokens come out where and when steps end, one a step.

    First tokens and finishes fall on the end of a step of an instance of the request, no request gets more tokens than
    its instances made steps, and no step decodes more sequences than were there.
    """
    ends, prefill_ends = {}, {}
    prefills = steps.prefill_tokens > 0
    mine_by_instance = rows_by(steps.instance)
    for instance, mine in mine_by_instance.items():
        ends[instance] = np.sort(steps.end_s[mine])
        prefill_ends[instance] = np.sort(steps.end_s[mine[prefills[mine]]])

    def lines() -> Iterator[Finding]:
        for row, r in enumerate(requests.records):
            if r.first_token_s is not None and not _falls_on(prefill_ends, r.instances, r.first_token_s):
                yield Finding(
                    f"request {r.id}: no instance of it ends a prefill at {r.first_token_s} s, its first token",
                    REQUESTS,
                    row,
                )
            if r.finish_s is None or r.first_token_s is None:
                continue
            if not _falls_on(ends, r.instances, r.finish_s):
                yield Finding(
                    f"request {r.id}: no instance of it ends a step at {r.finish_s} s, its last token", REQUESTS, row
                )
            made = 0
            for instance in set(r.instances) & set(ends):
                low = ends[instance].searchsorted(r.first_token_s + _SLACK_S, "right")
                made += int(ends[instance].searchsorted(r.finish_s + _SLACK_S, "right") - low)
            if made < r.output_tokens - 1:
                yield Finding(
                    f"request {r.id}: {r.output_tokens} tokens, but its instances made {made} steps after the first",
                    REQUESTS,
                    row,
                )

    return _some(lines()) + _crowds(requests, steps, mine_by_instance)


def check_workload(requests: RequestTable, workload: Workload) -> list[Finding]:
    """The log has the requests of the workload, all and only they."""
    given = collections.Counter((r.arrival_s, r.prompt_tokens, r.output_tokens, r.tier) for r in workload.requests)
    logged = collections.Counter((r.arrival_s, r.prompt_tokens, r.output_tokens, r.tier) for r in requests.records)
    missing, extra = given - logged, logged - given
    rows = {(r.arrival_s, r.prompt_tokens, r.output_tokens, r.tier): row for row, r in enumerate(requests.records)}
    return [
        *_some(
            Finding(f"workload: the request of {t} s ({p} + {o} tokens, {of}) is not in the log", REQUESTS)
            for t, p, o, of in missing
        ),
        *_some(
            Finding(
                f"workload: a request of {t} s ({p} + {o} tokens, {of}) was never given", REQUESTS, rows[t, p, o, of]
            )
            for t, p, o, of in extra
        ),
    ]


def check_switches(switches: Sequence[SwitchRecord], steps: StepTable) -> list[Finding]:
    """Switches follow each other, each from the layout that the last one left, and steps keep to the layouts."""
    found: list[Finding] = []
    for row, (before, after) in enumerate(itertools.pairwise(switches), 1):
        if after.time_s < before.time_s:
            text = f"switch at {after.time_s} s: it stands behind the one at {before.time_s} s"
            found.append(Finding(text, SWITCHES, row))
        if after.from_layout != before.to_layout:
            text = f"switch at {after.time_s} s: from {after.from_layout}, but {before.to_layout} was in force"
            found.append(Finding(text, SWITCHES, row))
    for row, s in enumerate(switches):
        if s.stall_s < 0 or s.kv_bytes < 0 or s.requeued > s.sequences:
            found.append(Finding(f"switch at {s.time_s} s: it has an impossible figure", SWITCHES, row))
    if not switches:
        return _some(found)
    # A group that a layout does not have must not begin a step while that layout is in force.
    edges = np.array([s.time_s for s in switches])
    layout = np.searchsorted(edges, steps.start_s + _SLACK_S, side="right")
    texts = [switches[0].from_layout, *(s.to_layout for s in switches)]
    known = [_groups(text) for text in texts]
    for number, mine in rows_by(steps.group).items():
        group = steps.groups[number]
        allowed = np.array([group in groups for groups in known])
        wrong = mine[~allowed[layout[mine]]]
        if len(wrong):
            i = int(wrong[0])
            text = f"step {i + 1}: devices {list(group)} are no instance of {texts[layout[i]]}"
            found.append(Finding(text, STEPS, i))
    return _some(found)


def _groups(layout: str) -> set[tuple[int, ...]]:
    """Groups of devices in a layout's text."""
    try:
        return {instance.devices for instance in parse_layout(layout, MOST_DEVICES).instances}
    except NitsumError:  # the log is damaged, or of no run of ours
        return set()


def _falls_on(ends: Mapping[int, npt.NDArray[np.float64]], instances: Sequence[int], time_s: float) -> bool:
    for instance in set(instances):
        times = ends.get(instance)
        if times is None:
            continue
        i = int(times.searchsorted(time_s - _SLACK_S))
        if i < len(times) and times[i] <= time_s + _SLACK_S:
            return True
    return False


def _crowds(
    requests: RequestTable, steps: StepTable, mine_by_instance: Mapping[int, npt.NDArray[np.int64]]
) -> list[Finding]:
    """Steps that decode more sequences than had begun and not ended on the instance."""
    first: dict[int, list[float]] = collections.defaultdict(list)
    last: dict[int, list[float]] = collections.defaultdict(list)
    for r in requests.records:
        if r.first_token_s is None or r.output_tokens == 1:
            continue
        for instance in set(r.instances):
            first[instance].append(r.first_token_s)
            if r.finish_s is not None:
                last[instance].append(r.finish_s)
    found: list[Finding] = []
    for instance, mine in mine_by_instance.items():
        begun = np.searchsorted(np.sort(first[instance]), steps.start_s[mine] + _SLACK_S, side="right")
        ended = np.searchsorted(np.sort(last[instance]), steps.end_s[mine] - _SLACK_S, side="left")
        there = begun - ended
        wrong = mine[steps.decode_sequences[mine] > there]
        if len(wrong):
            i = int(wrong[0])
            n = int(there[np.flatnonzero(mine == i)[0]])
            text = f"step {i + 1}: it decodes {steps.decode_sequences[i]} sequences, but {n} were there"
            found.append(Finding(text, STEPS, i))
    return _some(found)


def _differences(place: str, expected: Any, found: Any) -> Iterator[str]:
    if isinstance(expected, Mapping):
        for key, value in expected.items():
            if not isinstance(found, Mapping) or key not in found:
                yield f"{place}: {key} is missing"
            else:
                yield from _differences(f"{place}: {key}", value, found[key])
    elif isinstance(expected, float) and isinstance(found, int | float):
        if not abs(found - expected) <= 1e-9 * max(1.0, abs(expected)):
            yield f"{place} is {found}, but the logs say {expected}"
    elif found != expected:
        yield f"{place} is {found}, but the logs say {expected}"


def _some(lines: Iterable[Finding]) -> list[Finding]:
    """The first ones, and how many more there are."""
    kept: list[Finding] = []
    more = 0
    for line in lines:
        if len(kept) < _MOST:
            kept.append(line)
        else:
            more += 1
    return [*kept, Finding(f"... and {more} more like these")] if more else kept
