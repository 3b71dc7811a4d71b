"""An upper bound for changing layouts: what any of the candidate layouts could have met, request by request.

The workload is cut into windows of `WINDOW_S`.  For every window every candidate layout serves a piece of the workload
on a cell of its own: the requests of the window, those that come for `LEAD_S` before it (to an empty cell that has the
layout already) and those that come for `TAIL_S` after it; the cell keeps the layout until all of them have ended.

**The bound.**  A request counts if it met both targets in at least one of these runs, whichever layout and whichever
window's piece that was; each request is counted once, by its arrival.  A policy that picks one candidate for every
window, with full knowledge, switches that cost nothing and no backlog from before the lead, meets in each window a
subset of what its choice's run met.  So no such policy lies above the bound, whatever it picks: the union over choices
is at least the best choice.  It also knows no compromise: a layout that serves one tier counts for that tier and
another one for the other, at the same time.

**The best layouts of the windows** are the best such policy itself: of every window the candidate that met most of the
window's requests.  The sum over windows is what choosing layouts once a window can reach; the gap to the bound is
what the bound gives away.  `best_met` is at most `met`, always.

What neither covers: layouts that are no candidates, and states of a cell that no run passes through (a cell that comes
into a window with less to do than the lead leaves, since another layout served the lead better).  Candidates are all
cuts of the cell without placement of tiers, and whatever plans the caller adds: the study adds the finalists of the
search for the best static layout and all plans that adaptive control used.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence

from nitsum_jax.control.plan import Shape
from nitsum_jax.meshes.layout import Layout
from nitsum_jax.sim.policies import layouts
from nitsum_jax.sim.policies.baselines import Setting, static
from nitsum_jax.sim.runs.simulation import RunPolicy, simulate
from nitsum_jax.sim.workloads.workload import Workload, window

WINDOW_S = 60.0
LEAD_S = 20.0
TAIL_S = 10.0
NEAR = 0.03


@dataclasses.dataclass(frozen=True, slots=True)
class Bound:
    """What the candidates reach.

    Attributes:
      offered: requests that came.
      met: of these, both targets in the run of at least one candidate: the bound.
      best_met: both targets, each window under the one candidate that meets most of it.
      seconds: length of the workload.
      choices: that candidate, by window.
      near: candidates that came within `NEAR` of the best in some window, those that need not run left out.
    """

    offered: int
    met: int
    best_met: int
    seconds: float
    choices: tuple[str, ...]
    near: tuple[str, ...] = ()

    @property
    def goodput(self) -> float:
        """Requests a second that met both targets."""
        return self.met / self.seconds

    @property
    def attainment(self) -> float:
        """Share that met both targets."""
        return self.met / self.offered if self.offered else 1.0

    @property
    def best_goodput(self) -> float:
        """Requests a second that the best layouts of the windows met."""
        return self.best_met / self.seconds

    @property
    def best_attainment(self) -> float:
        """Share that the best layouts of the windows met."""
        return self.best_met / self.offered if self.offered else 1.0


def candidates(setting: Setting, more: Sequence[Layout] = ()) -> list[RunPolicy]:
    """All cuts of a node without placement of tiers, and these plans."""
    plain = [
        static(setting, "static", tuple(Shape(tp) for tp in cut)) for cut in layouts.cuts(setting.node, setting.tps)
    ]
    names = {policy.plan.unplaced for policy in plain}
    for plan in more:
        if plan.unplaced not in names:
            names.add(plan.unplaced)
            plain.append(RunPolicy(f"static[{plan.unplaced}]", plan))
    return plain


def upper_bound(
    setting: Setting,
    workload: Workload,
    policies: Sequence[RunPolicy],
    *,
    window_s: float = WINDOW_S,
    lead_s: float = LEAD_S,
    tail_s: float = TAIL_S,
) -> Bound:
    """The bound of the module's description.

    Args:
      setting: cost, tiers, devices.
      workload: what comes.
      policies: candidates, at least one; none may have a controller.
      window_s: length of a window.
      lead_s: what comes before the window for so long is served, too.
      tail_s: what comes after it for so long is served, too.
    """
    arrivals = [request.arrival_s for request in workload.requests]
    met: set[int] = set()  # numbers of requests
    best_met = 0
    choices = []
    near: set[str] = set()
    # The last window's winner first: where it meets everything the others need not run.
    order = list(policies)
    for i in range(math.ceil(workload.seconds / window_s - 1e-9)):
        start = i * window_s
        length = min(window_s, workload.seconds - start)
        lead = min(lead_s, start)
        piece = window(workload, start - lead, lead + length + tail_s)
        first = _first(arrivals, start - lead)  # a piece is a run of the workload's requests
        last = start + length >= workload.seconds
        inside = range(_first(arrivals, start), len(arrivals) if last else _first(arrivals, start + length))
        best, most = order[0], -1
        counts: dict[str, int] = {}
        for policy in order:
            outcome = simulate(piece, setting.tiers, setting.cost, policy, num_devices=setting.num_devices)
            found = {first + int(job.id) for job in outcome.finished if job.met()}
            met |= found
            count = counts[policy.plan.unplaced] = sum(number in found for number in inside)
            if count > most:
                best, most = policy, count
            if count == len(inside):
                break
        order.sort(key=lambda policy: policy is not best)
        best_met += most
        near |= {name for name, count in counts.items() if count >= (1 - NEAR) * most}
        choices.append(best.plan.unplaced)
    return Bound(len(arrivals), len(met), best_met, workload.seconds, tuple(choices), tuple(sorted(near)))


def _first(arrivals: Sequence[float], time_s: float) -> int:
    """Number of the first request that comes at a time or later."""
    return bisect.bisect_left(arrivals, time_s)
