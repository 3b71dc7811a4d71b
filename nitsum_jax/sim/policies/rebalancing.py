"""Controllers of other systems, as far as their published rules say: dynamic baselines.

Both see what `control` controllers see, and act through the same switches.
"""

import dataclasses
import math
from collections.abc import Sequence

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import DECODE, PREFILL
from nitsum_jax.control.planning.cell_view import CellView, JobView, WorkerView
from nitsum_jax.control.planning.controller import CountLate
from nitsum_jax.control.planning.decision import Decision, PlanInputs
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.meshes.layout import InstanceSpec, Layout, Role


@dataclasses.dataclass(frozen=True, slots=True)
class RoleLimits:
    """When `RoleBalancer` acts.

    Attributes:
      interval_s: time between looks.
      high: a role is short of instances above this load,
      low: and can spare one if its load, spread over one instance fewer, stays below this.
    """

    interval_s: float = 10.0
    high: float = 0.8
    low: float = 0.8


class _LoadController:
    """What controllers share that look at the cell's load and at nothing else."""

    interval_s = 1.0

    def arrived(self, now_s: float, job: JobView) -> None:
        """Not needed."""

    def finished(self, now_s: float, job: JobView) -> None:
        """Not needed."""

    def urgent(self, now_s: float, count_late: CountLate) -> bool:
        """It keeps its intervals."""
        return False


def _decision(now_s: float, view: CellView, plan: Layout, reason: str) -> Decision:
    inputs = PlanInputs(now_s, view.plan, view.num_devices, view.lost, ())
    return Decision(now_s, inputs, (), plan, plan != view.plan, reason)


class RoleBalancer(_LoadController):
    """Keeps one TP for prefill and one for decode, and moves devices between the roles by load (after NVIDIA Dynamo's
    planner).

    Devices move in units: an aligned group of as many devices as the larger of the two TPs, which holds one instance of
    one role and several of the other.  With one TP for both a unit is an instance.

    The load of prefill is the time that the waiting prompts take its instances, as a share of the tightest TTFT target;
    that of decode is the larger of the share of KV cache in use and of the next step's share of the tightest TPOT
    target in the batch.
    """

    def __init__(
        self,
        cost: CostModel,
        tiers: TierSet,
        limits: RoleLimits = RoleLimits(),
        tps: tuple[int, int] | None = None,
    ):
        """Makes one for a cell that has at least one unit of either role; `tps` are those of prefill and decode, None:
        instances change their role as they are.
        """
        self.interval_s = limits.interval_s
        self._cost = cost
        self._limits = limits
        self._tps = tps
        self._ttft_s = min(tier.ttft_ms for tier in tiers) / 1000

    def tick(self, now_s: float, view: CellView) -> Decision | None:
        """Moves one unit if one role is short and the other can spare one."""
        prefill = [worker for worker in view.workers if worker.plan.role == PREFILL]
        decode = [worker for worker in view.workers if worker.plan.role == DECODE]
        if not prefill or not decode:
            return None
        prefill_load = self._prefill_load(prefill, view.backlog_tokens)
        decode_load = max(map(self._decode_load, decode))
        low, high = self._limits.low, self._limits.high
        moved, role = None, ""
        prefills, decodes = self._units(prefill), self._units(decode)
        if prefill_load > high and _spared(decode_load, len(decodes)) < low:
            moved, role = min(decodes.items(), key=lambda unit: (sum(w.context for w in unit[1]), unit[0])), PREFILL
        elif decode_load > high and _spared(prefill_load, len(prefills)) < low:
            moved, role = (
                min(prefills.items(), key=lambda unit: (sum(w.prefill_left for w in unit[1]), unit[0])),
                DECODE,
            )
        plan = view.plan if moved is None else self._moved(view.plan, [worker.plan for worker in moved[1]], role)
        loads = (
            f"load of {len(prefill)} prefill instances {prefill_load:.2f}, of {len(decode)} decode {decode_load:.2f}"
        )
        return _decision(now_s, view, plan, loads)

    def _units(self, workers: Sequence[WorkerView]) -> dict[int, list[WorkerView]]:
        """The instances of a role by unit."""
        size = max(self._tps) if self._tps else workers[0].tp
        found: dict[int, list[WorkerView]] = {}
        for worker in workers:
            found.setdefault(worker.plan.devices[0] // size, []).append(worker)
        return found

    def _moved(self, plan: Layout, instances: Sequence[InstanceSpec], role: str) -> Layout:
        """The plan with the devices of these instances in another role, cut to its TP."""
        devices = sorted(device for instance in instances for device in instance.devices)
        tp = instances[0].tp if self._tps is None else self._tps[0] if role == PREFILL else self._tps[1]
        new = [InstanceSpec(tuple(devices[i : i + tp]), Role(role)) for i in range(0, len(devices), tp)]
        kept = [instance for instance in plan.instances if instance not in instances]
        return Layout(tuple(sorted((*kept, *new), key=lambda i: (i.devices[0], i.devices))))

    def _prefill_load(self, workers: Sequence[WorkerView], waiting: int) -> float:
        tokens = (waiting + sum(worker.prefill_left for worker in workers)) // len(workers)
        return self._cost.prefill_s(workers[0].tp, tokens) / self._ttft_s if tokens else 0.0

    def _decode_load(self, worker: WorkerView) -> float:
        count = worker.decoding
        if not count:
            return 0.0
        tightest = worker.tightest_tpot_s
        step = self._cost.step_s(worker.tp, count, worker.context) / tightest if tightest < math.inf else 0.0
        return max(step, worker.used_share)


def _spared(load: float, units: int) -> float:
    """The load of a role with one unit fewer."""
    return load * units / (units - 1) if units > 1 else math.inf


@dataclasses.dataclass(frozen=True, slots=True)
class SwitchLimits:
    """When `AllOrNothing` acts.

    Attributes:
      interval_s: time between looks.
      up: more requests in the cell than this, per device, call for the many small instances,
      down: fewer for the few large ones.
    """

    interval_s: float = 2.0
    up: float = 8.0
    down: float = 4.0


class AllOrNothing(_LoadController):
    """Switches the whole cell between data parallel (least TP) and tensor parallel (largest TP) by load.

    After Flying Serving: latency when there is little to do, throughput when there is much.
    """

    def __init__(self, data_parallel: Layout, tensor_parallel: Layout, limits: SwitchLimits = SwitchLimits()):
        """Makes one that knows these two plans."""
        self.interval_s = limits.interval_s
        self._plans = (data_parallel, tensor_parallel)
        self._limits = limits

    def tick(self, now_s: float, view: CellView) -> Decision | None:
        """Compares the requests in the cell with its two limits."""
        load = (view.backlog + sum(worker.jobs for worker in view.workers)) / view.num_devices
        spread, joined = self._plans
        choice = spread if load > self._limits.up else joined if load < self._limits.down else view.plan
        return _decision(now_s, view, choice, f"{load:.1f} requests per device")
