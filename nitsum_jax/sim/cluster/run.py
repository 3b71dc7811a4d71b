"""Runs a workload through many models of cells with a router before them.

The router sees what a live one sees: reports that are as old as `report_s` when the next ones come, and what it has
sent itself.  A cell keeps the beginnings of its latest prompts, as far as they fit its KV cache, and computes only what
is new of a prompt.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping

from nitsum_jax.control.model.cell import MAX_BATCH, ModelWorker, Recorder
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.model.switching import SwitchingCell
from nitsum_jax.control.routing.cells import KnownCell, RoutedRequest
from nitsum_jax.control.routing.report import make_report
from nitsum_jax.control.routing.routers import CellRouter
from nitsum_jax.control.scheduling.scheduler import Scheduler
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.meshes.layout import Layout
from nitsum_jax.sim.cluster.conversations import Prefixes, conversations, key_of
from nitsum_jax.sim.cluster.plans import CellPlans
from nitsum_jax.sim.workloads.workload import TraceRequest, Workload

_TAKEN = 0.5  # share of a KV cache that beginnings of prompts are kept in


@dataclasses.dataclass(frozen=True, slots=True)
class ClusterSetting:
    """A cluster.

    Attributes:
      cells: what each is for.
      report_s: how often a cell reports; reports are between 0 and so many seconds old when they are read.
      doors: routers that know nothing of each other; requests come to them in turn.
      continued: share of the requests that go on with an earlier one.
      seed: of conversations.
    """

    cells: CellPlans
    report_s: float = 0.1
    doors: int = 1
    continued: float = 0.5
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class ClusterOutcome:
    """What a run came to.

    Attributes:
      offered: requests that came.
      met: of these, both targets.
      seconds: length of the workload.
      held_tokens: prompt tokens that were not computed.
      prompt_tokens: of all prompts.
      fullest: most requests that one cell got, of the mean.
    """

    offered: int
    met: int
    seconds: float
    held_tokens: int
    prompt_tokens: int
    fullest: float

    @property
    def attainment(self) -> float:
        """Share of the requests that met both targets; 1 if none came."""
        return self.met / self.offered if self.offered else 1.0

    @property
    def goodput(self) -> float:
        """Requests that met both targets, per second."""
        return self.met / self.seconds


class _Cell(Recorder):
    """A model of a cell with what it keeps of prompts."""

    def __init__(self, number: int, cost: CostModel, tiers: TierSet, plan: Layout, doors: int):
        self.scheduler: Scheduler[ModelJob, ModelWorker] = Scheduler(cost, tuple(tiers))
        self.model = SwitchingCell(cost, self.scheduler, plan, recorder=self, max_batch=MAX_BATCH)
        self.known = [KnownCell(f"cell-{number}") for _ in range(doors)]
        self._from: dict[str, KnownCell] = {}
        self.met = self.got = 0
        self._kept: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        self._room = _TAKEN * sum(w.capacity_blocks * w.page_size for w in self.model.workers)

    def report(self, now_s: float) -> None:
        """Tells the routers."""
        self.model.run_until(now_s)
        self.model.settle()
        kept = frozenset(self._kept)
        report = make_report(self.known[0].name, self.scheduler, self.model.workers, now_s, prefixes=kept)
        for known in self.known:
            known.reported(report)

    def take(self, number: int, request: TraceRequest, tiers: TierSet, prefixes: Prefixes, door: int) -> int:
        """A request comes by a door; returns the tokens of its prompt that are there."""
        self.model.run_until(request.arrival_s)
        self.got += 1
        self._from[str(number)] = self.known[door]
        held = 0
        for tokens, key in prefixes:
            if key in self._kept:
                self._kept.move_to_end(key)
                held = tokens
        job = ModelJob(
            str(number),
            tiers.get(request.tier),
            request.arrival_s,
            request.prompt_tokens,
            request.output_tokens,
            cached=held,
        )
        self.model.add(job)
        return held

    def finished(self, job: ModelJob) -> None:
        """A request has its last token: its text may be the beginning of another."""
        self.met += job.met()
        self.scheduler.ended(job)
        self._from.pop(job.id).ended()
        tokens = job.prompt_tokens + job.output_tokens
        self._kept[key_of(int(job.id))] = tokens
        self._room -= tokens
        while self._room < 0 and len(self._kept) > 1:
            self._room += self._kept.popitem(last=False)[1]

    def failed(self, job: ModelJob, reason: str) -> None:
        """A request cannot be served: it is missed."""
        self._from.pop(job.id).ended()


def simulate_cluster(
    workload: Workload, tiers: TierSet, cost: CostModel, setting: ClusterSetting, router: CellRouter
) -> ClusterOutcome:
    """Runs a workload to the end of its last request.

    Args:
      workload: what comes to all cells together.
      tiers: targets of its tiers.
      cost: what steps take.
      setting: the cells.
      router: chooses, at every door.
    """
    cells = [_Cell(number, cost, tiers, plan, setting.doors) for number, plan in enumerate(setting.cells.layouts)]
    by_name = {cell.known[0].name: cell for cell in cells}
    places = setting.cells.places(tiers)
    known = [
        {tier: [cells[place].known[door] for place in its] for tier, its in places.items()}
        for door in range(setting.doors)
    ]
    # Cells report in turn, not all at once.
    due = collections.deque((setting.report_s * (n + 1) / len(cells), cell) for n, cell in enumerate(cells))
    for cell in cells:
        cell.report(0.0)
    held = 0
    requests = workload.requests
    for number, (request, prefixes) in enumerate(
        zip(requests, conversations(requests, setting.continued, setting.seed), strict=True)
    ):
        now_s = request.arrival_s
        while due[0][0] <= now_s:
            time_s, cell = due.popleft()
            cell.report(time_s)
            due.append((time_s + setting.report_s, cell))
        for cell in cells:  # a router learns at once which of its own requests have ended
            cell.model.run_until(now_s)
        tier = tiers.get(request.tier)
        usual = cells[places[tier.name][0]].scheduler.expected_output(request.tier)
        routed = RoutedRequest(tier, request.prompt_tokens, usual, prefixes)
        door = number % setting.doors
        chosen = router.choose(routed, known[door][tier.name], now_s)
        chosen.sent(routed, now_s)
        held += by_name[chosen.name].take(number, request, tiers, prefixes, door)
    for cell in cells:
        cell.model.run_until(math.inf)
    most, mean = max(cell.got for cell in cells), len(requests) / len(cells)
    return ClusterOutcome(
        len(requests),
        sum(cell.met for cell in cells),
        workload.seconds,
        held,
        sum(request.prompt_tokens for request in requests),
        most / mean if mean else 1.0,
    )


def router_table(
    workload: Workload, tiers: TierSet, cost: CostModel, setting: ClusterSetting, routers: Mapping[str, CellRouter]
) -> Iterator[str]:
    """Lines of a Markdown table, one for each router, as the runs end."""
    yield "| router | requests/s | goodput/s | attainment | prompt tokens not computed | fullest cell / mean |"
    yield "|---|---|---|---|---|---|"
    for name, router in routers.items():
        one = simulate_cluster(workload, tiers, cost, setting, router)
        held = one.held_tokens / max(1, one.prompt_tokens)
        rate = one.offered / one.seconds
        yield f"| {name} | {rate:.1f} | {one.goodput:.1f} | {one.attainment:.1%} | {held:.1%} | {one.fullest:.2f} |"
