"""The model of a cell that can change its plan while requests live on it."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable

from nitsum_jax.control.cell import CellModel, ModelWorker
from nitsum_jax.control.job import Job
from nitsum_jax.control.plan import PREFILL, CellPlan
from nitsum_jax.meshes.vshards import VshardMap


@dataclasses.dataclass(frozen=True, slots=True)
class Switched:
    """What a switch did.

    Attributes:
      time_s: when the last instance that had to stop had stopped.
      asked_s: when it was asked for.
      before: plan.
      after: plan.
      devices: of the instances that stopped.
      stall_s: from time_s until their successors began.
      kv_bytes: copied between devices.
      sequences: requests that changed their instance.
      requeued: of these, how many found no room and are computed again.
    """

    time_s: float
    asked_s: float
    before: CellPlan
    after: CellPlan
    devices: tuple[int, ...]
    stall_s: float
    kv_bytes: float
    sequences: int
    requeued: int


@functools.cache
def moves(before: tuple[int, ...], after: tuple[int, ...], num_vshards: int) -> dict[tuple[int, int], float]:
    """Share of a sequence's KV cache that goes over each pair of devices when it changes its instance."""
    vmap = VshardMap(num_vshards)
    links: dict[tuple[int, int], float] = collections.defaultdict(float)
    for vshard in range(num_vshards):
        source, target = vmap.device_of(before, vshard), vmap.device_of(after, vshard)
        if source != target:
            links[source, target] += 1 / num_vshards
    return dict(links)


class SwitchingCell(CellModel):
    """A `CellModel` with switches: stop the instances that the new plan does not keep, move what must move, go on."""

    on_switch: Callable[[Switched], None] | None = None
    device_put = False  # ablation: weights and KV cache of the stopped instances are resharded by copying all of it
    _pending: CellPlan | None = None
    _asked_s = 0.0

    @property
    def switching(self) -> bool:
        """Whether a switch is under way."""
        return self._pending is not None

    def switch(self, plan: CellPlan, prepare_s: float = 0.0) -> bool:
        """Asks for another plan; False if a switch is under way.

        Args:
          plan: wanted.
          prepare_s: until its executables are compiled; nothing stops before.
        """
        if self._pending is not None:
            return False
        self._pending = plan
        self._asked_s = self.now_s
        if prepare_s > 0:
            self.at(self.now_s + prepare_s, self._stop)
        else:
            self._stop()
        return True

    def _stop(self) -> None:
        assert self._pending is not None
        wanted = {instance.group for instance in self._pending.instances}
        for worker in self.workers:
            if worker.plan.group not in wanted:
                worker.stopping = True
                self.cut(worker)
        self._drained()

    def _drained(self) -> None:
        gone = [worker for worker in self.workers if worker.stopping]
        if self._pending is None or any(w.run or w.incoming or w.sending or w.idle_until > self.now_s for w in gone):
            for worker in gone:
                if worker.idle_until > self.now_s and worker.run is None:
                    self.at(worker.idle_until, self._drained)
                    break
            return
        after, self._pending = self._pending, None
        before, self.plan = self.plan, after
        kept = {worker.plan.group: worker for worker in self.workers if not worker.stopping}
        for instance in after.instances:
            if instance.group in kept:
                kept[instance.group].plan = instance
        fresh = {i.group: self.make_worker(i) for i in after.instances if i.group not in kept}
        self.workers = [kept.get(i.group) or fresh[i.group] for i in after.instances]
        waiting = {job.id for worker in gone for job in worker.outgoing.values()}
        travellers = [(job, worker.plan.devices) for worker in gone for job in _take_all(worker)]
        self._stranded = [job for job in self._stranded if job.worker is not None]
        links: dict[tuple[int, int], float] = collections.defaultdict(float)
        self.settle()
        to_kept, requeued = self._place(travellers, waiting, set(map(id, kept.values())), links)
        stall_s = self._stall_s(gone, links) if gone else 0.0
        for worker, job, decodes in to_kept:
            self.at(self.now_s + stall_s, self._join if decodes else self._take_up, worker, job)
        if self._stranded:
            self.at(self.now_s + stall_s, self._retry_stranded)
        for worker in fresh.values():
            worker.idle_until = self.now_s + stall_s
            self.at(worker.idle_until, self.nudge, worker)
        for worker in self.workers:
            if worker.plan.group in kept:
                self.nudge(worker)
        if self.on_switch is not None:
            devices = tuple(sorted(device for worker in gone for device in worker.plan.devices))
            report = Switched(
                self.now_s,
                self._asked_s,
                before,
                after,
                devices,
                stall_s,
                sum(links.values()),
                len(travellers),
                requeued,
            )
            self.on_switch(report)

    def _place(
        self,
        travellers: list[tuple[Job, tuple[int, ...]]],
        waiting: set[str],
        kept: set[int],
        links: dict[tuple[int, int], float],
    ) -> tuple[list[tuple[ModelWorker, Job, bool]], int]:
        """Gives requests their new instances, longest first.

        Who waited for an instance to decode, and who is late, does not get into one by a switch: it stays in an
        instance that only prefills, if there is one with room, until the scheduler lets it in.

        Args:
          travellers: with the devices that they were on.
          waiting: of these, the ids of those that waited for an instance to decode.
          kept: instances (`id`) that go on meanwhile.
          links: bytes of each pair of devices; added to.

        Returns:
          Those that go to instances that were kept, which do not wait for the copies (with whether they decode), and
          how many requests found no room.
        """
        requeued = 0
        to_kept: list[tuple[ModelWorker, Job, bool]] = []
        promised: dict[int, tuple[int, int]] = {}
        vshards = max(self.cost.tps[-1], max(worker.tp for worker in self.workers))
        for job, devices in sorted(travellers, key=lambda item: (-item[0].cached, item[0].id)):
            decodes = job.generated > 0 and job.cached >= job.prompt_tokens + job.generated - 1
            kept_out = decodes and (job.late or job.id in waiting)
            parking = self._parking(job, devices, vshards) if kept_out else None
            worker = parking or self._best(job, decodes, devices, vshards, promised)
            if worker is None:
                requeued += 1
                self.send_back(job)
                continue
            if job.cached:
                for link, share in moves(devices, worker.plan.devices, vshards).items():
                    links[link] += share * job.cached * self.cost.profile.kv_bytes_per_token
            if parking is not None:
                parking.park(job)
                self.strand(job)
            elif id(worker) in kept and job.cached:
                worker.incoming += 1
                worker.used_blocks += worker.pages(job.cached if decodes else job.target)
                count, tokens = promised.get(worker.index, (0, 0))
                promised[worker.index] = count + 1, tokens + job.cached
                to_kept.append((worker, job, decodes))
            elif decodes:
                worker.reserve(job)
                worker.arrive(job)
                self._enter(worker, job)
            else:
                worker.seat(job)
        return to_kept, requeued

    def _take_up(self, worker: ModelWorker, job: Job) -> None:
        """A request whose prompt is computed in part has its KV cache here: the rest follows."""
        worker.incoming -= 1
        worker.used_blocks -= worker.pages(job.target)
        worker.seat(job)
        if worker.stopping:
            self._drained()
        else:
            self.nudge(worker)

    def _parking(self, job: Job, devices: tuple[int, ...], vshards: int) -> ModelWorker | None:
        """The instance that only prefills, has room and is the emptiest; of these the one to which least must move."""
        best, best_score = None, (math.inf, math.inf)
        for worker in self.workers:
            if worker.plan.role != PREFILL or worker.jobs >= worker.max_batch:
                continue
            if worker.pages(job.cached) > worker.free_blocks:
                continue
            moved = sum(moves(devices, worker.plan.devices, vshards).values())
            score = round(worker.used_blocks / worker.capacity_blocks, 1), moved
            if score < best_score:
                best, best_score = worker, score
        return best

    def _best(
        self,
        job: Job,
        decodes: bool,
        devices: tuple[int, ...],
        vshards: int,
        promised: dict[int, tuple[int, int]],
    ) -> ModelWorker | None:
        best, best_score = None, (math.inf,) * 4
        for worker in self.workers:
            if not (worker.takes_decodes if decodes else worker.takes_prompts) or worker.jobs >= worker.max_batch:
                continue
            need = job.cached + 1 if decodes else job.target
            if worker.pages(need) > worker.free_blocks:
                continue
            own = not worker.plan.tiers or job.tier.name in worker.plan.tiers
            tightest = min(math.inf if job.late else job.tier.tpot_ms / 1000, worker.tightest_tpot_s())
            count, tokens = promised.get(worker.index, (0, 0))
            sequences, context = len(worker.decoding) + count + 1, worker.context + tokens + job.cached
            load = self.cost.step_s(worker.tp, sequences, context) / tightest
            moved = sum(moves(devices, worker.plan.devices, vshards).values())
            crowd = (context + worker.prefill_left) / worker.capacity_blocks
            score = (float(load > 1), float(not own), round(crowd, 1), moved)
            if score < best_score:
                best, best_score = worker, score
        return best

    def _stall_s(self, gone: list[ModelWorker], links: dict[tuple[int, int], float]) -> float:
        if not self.device_put:
            return self.cost.switch_s(max(links.values(), default=0.0))
        profile = self.cost.profile
        # Everything of the stopped instances goes through the general resharding path, weights and KV cache alike.
        weights = max(profile.weight_bytes / worker.tp for worker in gone)
        return profile.switch_host_s + (weights + max(links.values(), default=0.0)) / profile.device_put_bytes_per_s


def _take_all(worker: ModelWorker) -> list[Job]:
    jobs = [*worker.prefills, *worker.decoding.values()]
    for job in jobs:
        worker.leave(job)
    stranded = list(worker.outgoing.values())
    for job in stranded:
        worker.departed(job)
        job.worker = None
    return jobs + stranded
