"""An upper bound for changing layouts: the best one for every window, known beforehand, with free switches.

The workload is cut into windows of `WINDOW_S`.  For each window every candidate layout serves it alone: a cell that has
had the layout for `LEAD_S` already (the requests of that time come to it empty and are not counted), and that keeps it
until all requests of the window have ended, with those that come for `TAIL_S` after it.  The window's goodput is that
of the best candidate; the bound is the sum.  So the choice knows the window's requests before they come, nothing is
ever moved, a change takes no time, and no backlog is carried from one window to the next for longer than the lead.

It bounds what choosing among these layouts window by window can reach with this scheduler.  A policy that changes more
often than once a window, or uses a layout that is no candidate, can come to lie above it.  Candidates are all cuts of
the cell without placement of tiers, and whatever plans the caller adds: the study adds the finalists of the search
for the best static layout and all plans that adaptive control used.
"""

import dataclasses
import math
from collections.abc import Sequence

from nitsum_jax.control.job import Job
from nitsum_jax.control.plan import CellPlan, Shape
from nitsum_jax.sim import layouts
from nitsum_jax.sim.baselines import Setting, static
from nitsum_jax.sim.simulation import Policy, simulate
from nitsum_jax.sim.workload import Workload, window

WINDOW_S = 60.0
LEAD_S = 20.0
TAIL_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Bound:
    """What the best layout of each window reaches.

    Attributes:
      offered: requests that came.
      met: of these, both targets, each window under its best candidate.
      seconds: length of the workload.
      choices: that candidate, by window.
    """

    offered: int
    met: int
    seconds: float
    choices: tuple[str, ...]

    @property
    def goodput(self) -> float:
        """Requests a second that met both targets."""
        return self.met / self.seconds

    @property
    def attainment(self) -> float:
        """Share that met both targets."""
        return self.met / self.offered if self.offered else 1.0


def candidates(setting: Setting, more: Sequence[CellPlan] = ()) -> list[Policy]:
    """All cuts of a node without placement of tiers, and these plans."""
    plain = [
        static(setting, "static", tuple(Shape(tp) for tp in cut)) for cut in layouts.cuts(setting.node, setting.tps)
    ]
    names = {str(policy.plan) for policy in plain}
    for plan in more:
        if str(plan) not in names:
            names.add(str(plan))
            plain.append(Policy(f"static[{plan}]", plan))
    return plain


def upper_bound(
    setting: Setting,
    workload: Workload,
    policies: Sequence[Policy],
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
      lead_s: what comes before the window for so long is served, but not counted.
      tail_s: what comes after it for so long is served, but not counted.
    """
    offered = met = 0
    choices = []
    # The last window's winner first: where nobody can do better the others need not run.
    order = list(policies)
    for i in range(math.ceil(workload.seconds / window_s - 1e-9)):
        start = i * window_s
        lead = min(lead_s, start)
        length = min(window_s, workload.seconds - start)
        piece = window(workload, start - lead, lead + length + tail_s)
        inside = sum(_counts(request.arrival_s, lead, length) for request in piece.requests)
        best, best_met = order[0], -1
        for policy in order:
            outcome = simulate(piece, setting.tiers, setting.cost, policy, num_devices=setting.num_devices)
            found = sum(_met(job, lead, length) for job in outcome.finished)
            if found > best_met:
                best, best_met = policy, found
            if found == inside:
                break
        order.sort(key=lambda policy: policy is not best)
        offered += inside
        met += best_met
        choices.append(str(best.plan))
    return Bound(offered, met, workload.seconds, tuple(choices))


def _counts(arrival_s: float, lead_s: float, length_s: float) -> bool:
    return lead_s <= arrival_s < lead_s + length_s


def _met(job: Job, lead_s: float, length_s: float) -> bool:
    return _counts(job.arrival_s, lead_s, length_s) and job.met()
