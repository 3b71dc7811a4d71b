"""The control loop without its clock: watches requests, and says at its ticks which plan the cell should have."""

import collections
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from nitsum_jax.control.model.cell import MAX_BATCH
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.planning.cell_view import CellView, JobView
from nitsum_jax.control.planning.decision import Decision, PlanInputs, PlannerConfig
from nitsum_jax.control.planning.estimate import EstimatorConfig, WorkloadEstimator
from nitsum_jax.control.planning.fleet.search import MINIATURE
from nitsum_jax.control.planning.planner import Planner
from nitsum_jax.control.planning.rollout import Arrival
from nitsum_jax.control.tiers import Tier

_YOUNG = 64  # the last requests are looked at for those that are late already: so many of them,
_YOUNG_S = 1.0  # or those of so long where more come: the very last cannot be late yet
_LOOK_S = 0.25  # so often they are looked at
_FRESH = 24  # arrivals since the load changed from which a replay can be made


CountLate = Callable[[Collection[str]], int]
"""Counts the requests of these ids that are alive and late by now."""


class Controller(Protocol):
    """What drives switches: adaptive control, and the dynamic baselines."""

    # ruff: noqa: D102
    @property
    def interval_s(self) -> float: ...
    def arrived(self, now_s: float, job: JobView) -> None: ...
    def finished(self, now_s: float, job: JobView) -> None: ...
    def urgent(self, now_s: float, count_late: CountLate) -> bool: ...
    def tick(self, now_s: float, view: CellView) -> Decision | None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class ControllerConfig:
    """When a controller plans.

    Attributes:
      interval_s: between ticks.
      urgent_s: least time between ticks that an event brings on.
      urgent_share: of the requests since the last tick, the share that may miss its targets; more is an event.
        (Another is a change of the load, as the estimator finds it.)
      dwell_s: least time between two switches.
      warm_up_s: no decision before: there is nothing to estimate from.
      work_rate: what planning may cost on average, in `Decision.work` a second.  A planner that spent more is thrifty
        (`PlanInputs.thrifty`) at every interval, unless the load has changed since the last decision: an overload that
        goes on would otherwise be planned for again and again, with the same outcome.
      work_saved: what a calm time leaves for the next change of the load, at the most.
      work_owed: what changes of the load, which are planned for whatever is left, make it owe at the most.
    """

    interval_s: float = 5.0
    urgent_s: float = 1.0
    urgent_share: float = 0.1
    dwell_s: float = 2.0
    warm_up_s: float = 2.0
    work_rate: float = 250.0
    work_saved: float = 15000.0
    work_owed: float = 5000.0


class AdaptiveController:
    """Estimates the load and asks the planner."""

    def __init__(
        self,
        cost: CostModel,
        tiers: Iterable[Tier],
        *,
        config: ControllerConfig = ControllerConfig(),
        planner: PlannerConfig = PlannerConfig(),
        estimator: EstimatorConfig = EstimatorConfig(),
        now_s: float = 0.0,
        decide: Callable[[PlanInputs], Decision | None] | None = None,
    ):
        """Starts knowing nothing of the load.

        Args:
          cost: what steps take.
          tiers: targets.
          config: when to plan.
          planner: how to plan.
          estimator: how to estimate the load.
          now_s: the time.
          decide: asked instead of a planner in this process; None from it is no decision.
        """
        self.config = config
        self.planner = Planner(cost, tiers, planner)
        self._decide = decide or self.planner.decide
        self._estimator = WorkloadEstimator(self.planner.tiers, estimator, now_s)
        self._recent: collections.deque[tuple[float, str, int, str]] = collections.deque(maxlen=planner.replayed)
        self._stride = 1  # every so many arrivals are kept: all for one node, fewer for many
        self._watched: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._outputs: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._start_s = now_s
        self._last_tick_s = now_s
        self._last_switch_s = -1e9
        self._work_left = config.work_saved  # at the last tick
        self._misses = 0
        self._seen = 0
        self._arrivals = 0
        # Requests that came since the last tick: when, and whether they were late in the end.
        self._young: collections.OrderedDict[str, tuple[float, bool]] = collections.OrderedDict()
        self._changes = 0  # of the load, at the last tick
        self._next_look_s = now_s

    @property
    def interval_s(self) -> float:
        """Between ticks."""
        return self.config.interval_s

    @property
    def estimator(self) -> WorkloadEstimator:
        """What it knows of the load."""
        return self._estimator

    def arrived(self, now_s: float, job: JobView) -> None:
        """A request came."""
        self._estimator.arrived(now_s, job.tier, job.prompt_tokens)
        self._seen += 1
        self._young[job.id] = (now_s, False)
        while len(self._young) > _YOUNG and next(iter(self._young.values()))[0] < now_s - _YOUNG_S:
            self._young.popitem(last=False)
        self._arrivals += 1
        if self._arrivals % self._stride == 0:
            self._recent.append((now_s, job.tier, job.prompt_tokens, job.id))
            self._watched[job.id] = None
            if len(self._watched) > 4 * (self._recent.maxlen or 1):
                self._watched.popitem(last=False)

    def finished(self, now_s: float, job: JobView) -> None:
        """A request ended."""
        self._estimator.finished(now_s, job.tier, job.generated)
        if job.id in self._watched:
            self._outputs[job.id] = job.generated
        if len(self._outputs) > 4 * (self._recent.maxlen or 1):
            self._outputs.popitem(last=False)
        if job.id in self._young:
            self._young[job.id] = (self._young[job.id][0], job.late)
        self._misses += job.late or not job.met

    def urgent(self, now_s: float, count_late: CountLate) -> bool:
        """Whether something happened for which the next tick should not be waited for.

        Args:
          now_s: the time.
          count_late: asked a few times a second at the most.
        """
        if now_s - self._last_tick_s < self.config.urgent_s or self._seen < 10:
            return False
        share = self.config.urgent_share
        if self._estimator.changes > self._changes:
            return True
        if self._work_left_at(now_s) < 0:
            return False
        if self._misses > share * self._seen:
            return True
        if now_s < self._next_look_s:
            return False
        self._next_look_s = now_s + _LOOK_S
        ended = sum(late for _, late in self._young.values())
        return ended + count_late(self._young.keys()) > share * len(self._young)

    def inputs(self, now_s: float, view: CellView, *, thrifty: bool = False) -> PlanInputs:
        """What a decision would be made from now."""
        loads = self._estimator.loads(now_s)
        span_s = self.planner.replay_s
        settled_s = self._estimator.settled_s
        recent = tuple(
            Arrival(time_s, tier, prompt, self._outputs.get(name, round(self._estimator.output(tier))))
            for time_s, tier, prompt, name in self._recent
            if time_s >= now_s - span_s
        )
        fresh = [arrival for arrival in recent if arrival.time_s >= now_s - settled_s]
        if 0 < settled_s < span_s and len(fresh) >= _FRESH:
            # What came before the load changed says nothing of what will come: what came since comes again and again.
            rounds = math.ceil(span_s / settled_s)
            again = [
                dataclasses.replace(arrival, time_s=arrival.time_s - (rounds - 1 - i) * settled_s)
                for i in range(rounds)
                for arrival in fresh
            ]
            recent = tuple(again[-(self._recent.maxlen or 1) :])
        waiting = tuple(
            Arrival(job.arrival_s, job.tier, job.left_tokens, max(1, round(job.expected_output)))
            for job in view.waiting
        )
        return PlanInputs(
            now_s,
            view.plan,
            view.num_devices,
            view.lost,
            loads,
            recent,
            view.allowed,
            waiting,
            max((worker.max_batch for worker in view.workers), default=MAX_BATCH),
            thrifty,
        )

    def tick(self, now_s: float, view: CellView) -> Decision | None:
        """Decides; None while it knows too little or the last switch is too recent."""
        self._work_left = self._work_left_at(now_s)
        self._last_tick_s = now_s
        self._stride = max(1, view.num_devices // (MINIATURE * self.planner.cost.profile.devices))
        lost = set(view.lost).intersection(d for i in view.plan.instances for d in i.devices)
        if not lost and now_s - self._start_s < self.config.warm_up_s:
            return None
        if not lost and now_s - self._last_switch_s < self.config.dwell_s:
            return None
        thrifty = self._work_left < 0 and self._estimator.changes <= self._changes
        self._misses = self._seen = 0
        self._young.clear()
        self._changes = self._estimator.changes
        decision = self._decide(self.inputs(now_s, view, thrifty=thrifty))
        if decision is not None:
            self._work_left = max(self._work_left - decision.work, -self.config.work_owed)
        if decision is not None and decision.switch:
            self._last_switch_s = now_s
        return decision

    def _work_left_at(self, now_s: float) -> float:
        saved = self._work_left + self.config.work_rate * (now_s - self._last_tick_s)
        return min(saved, self.config.work_saved)
