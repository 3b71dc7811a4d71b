"""The model of a cell that can change its plan while requests live on it."""

import collections
import dataclasses
from collections.abc import Callable

from nitsum_jax.control.model.cell import CellModel, ModelWorker
from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.scheduling.placement import Traveller, WorkerRoom, moves
from nitsum_jax.meshes.layout import Layout

_Travellers = list[Traveller[ModelJob]]


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
    before: Layout
    after: Layout
    devices: tuple[int, ...]
    stall_s: float
    kv_bytes: float
    sequences: int
    requeued: int


class SwitchingCell(CellModel):
    """A `CellModel` with switches: stop the instances that the new plan does not keep, move what must move, go on."""

    on_switch: Callable[[Switched], None] | None = None
    device_put = False  # ablation: weights and KV cache of the stopped instances are resharded by copying all of it
    _pending: Layout | None = None
    _asked_s = 0.0

    @property
    def switching(self) -> bool:
        """Whether a switch is under way."""
        return self._pending is not None

    def switch(self, plan: Layout, prepare_s: float = 0.0) -> bool:
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
        travellers = [traveller for worker in gone for traveller in _take_all(worker)]
        self._stranded = [one for one in self._stranded if not one.source.stopping]
        self.settle()
        links: dict[tuple[int, int], float] = collections.defaultdict(float)
        requeued = self._place(travellers, list(fresh.values()), links)
        stall_s = self._stall_s(gone, links) if gone else 0.0
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

    def _place(self, travellers: _Travellers, fresh: list[ModelWorker], links: dict[tuple[int, int], float]) -> int:
        """Gives requests their new instances, by the scheduler's rule; those that are kept take none.

        Args:
          travellers: requests of instances that have gone.
          fresh: instances that come.
          links: bytes of each pair of devices; added to.

        Returns:
          How many found no room.
        """
        found = self.scheduler.place(travellers, fresh, lambda: WorkerRoom(travellers, fresh))
        vshards = max([self.cost.tps[-1], *(worker.tp for worker in fresh), *(len(t.devices) for t in travellers)])
        for traveller, seat in zip(travellers, found, strict=True):
            job = traveller.job
            if seat is None:
                self.send_back(job)
                continue
            worker = fresh[seat.instance]
            if job.cached:
                for link, share in moves(traveller.devices, worker.plan.devices, vshards).items():
                    links[link] += share * job.cached * self.cost.profile.kv_bytes_per_token
            if seat.parked:
                worker.park(job)
                self.strand(job, worker)
            elif traveller.decodes:
                worker.reserve(job)
                worker.arrive(job)
                self._enter(worker, job)
            else:
                worker.seat(job)
        return found.count(None)

    def _stall_s(self, gone: list[ModelWorker], links: dict[tuple[int, int], float]) -> float:
        if not self.device_put:
            return self.cost.switch_s(max(links.values(), default=0.0))
        profile = self.cost.profile
        # Everything of the stopped instances goes through the general resharding path, weights and KV cache alike.
        weights = max(profile.weight_bytes / worker.tp for worker in gone)
        return profile.switch_host_s + (weights + max(links.values(), default=0.0)) / profile.device_put_bytes_per_s


def _take_all(worker: ModelWorker) -> _Travellers:
    jobs = [*worker.prefills, *worker.decoding.values()]
    for job in jobs:
        worker.leave(job)
    waiting = list(worker.outgoing.values())
    for job in waiting:
        worker.departed(job)
        job.worker = None
    devices = worker.plan.devices
    return [
        *(Traveller(job, devices, job.cached, _decodes(job)) for job in jobs),
        *(Traveller(job, devices, job.cached, _decodes(job), waited=True) for job in waiting),
    ]


def _decodes(job: ModelJob) -> bool:
    return job.generated > 0 and job.cached >= job.prompt_tokens + job.generated - 1
