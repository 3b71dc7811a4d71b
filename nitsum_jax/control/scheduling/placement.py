"""Who goes where when a switch takes instances away: one rule, for the model of a cell and for a running engine.

Longest first, each goes to the instance that has time for it, is of its tier, is the emptiest, and has most of its KV
cache already, in this order.  Roles are kept: a prompt goes where prompts are computed, who decodes where others do.
There are three more cases:

- Who waited for an instance to decode, and who is late, is not let into one by a switch: it is parked in an instance
  that only prefills, if one has room, until the scheduler lets it in.
- Who finds no room where its role is goes to the other kind rather than lose its KV cache: it is parked, or its prompt
  is ended by an instance that only decodes.
- If somebody finds no room at all, those that it harms most are seated first: the others are computed again.

Pure.  What room there is, the caller says: the model counts pages of instances, an engine blocks of devices.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from nitsum_jax.control.job import Job
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import PREFILL
from nitsum_jax.control.scheduling.worker import Worker
from nitsum_jax.meshes.vshards import VshardMap

J = TypeVar("J", bound=Job)


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


class Vacancies(Protocol):
    """What is free, counted by whoever places; travellers and instances go by their numbers."""

    # ruff: noqa: D102
    def fits(self, traveller: int, instance: int, /) -> bool: ...
    def take(self, traveller: int, instance: int, /) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Traveller(Generic[J]):
    """A request whose instance goes.

    Attributes:
      job: the request.
      devices: of that instance.
      cached: tokens of its KV cache.
      decodes: whether its prompt is computed.
      waited: whether it waited for an instance to decode.
    """

    job: J
    devices: tuple[int, ...]
    cached: int
    decodes: bool
    waited: bool = False


class Seat(NamedTuple):
    """Number of an instance, and whether the traveller is parked there: it decodes elsewhere, later."""

    instance: int
    parked: bool


def seats(
    cost: CostModel, travellers: Sequence[Traveller], instances: Sequence[Worker], room: Callable[[], Vacancies]
) -> list[Seat | None]:
    """Says where each traveller goes, in the order given.

    Args:
      cost: what steps take.
      travellers: who must go somewhere.
      instances: that may be used.
      room: begins to count what is free.

    Returns:
      None: there was no room, it is computed again.
    """
    numbers = range(len(travellers))
    longest = sorted(numbers, key=lambda i: (-travellers[i].cached, travellers[i].job.id))
    found = _Seating(cost, travellers, instances, room()).seat(longest)
    if None in found:
        jobs = [traveller.job for traveller in travellers]
        urgent = sorted(numbers, key=lambda i: (jobs[i].late, jobs[i].arrival_s, jobs[i].id))
        found = _Seating(cost, travellers, instances, room()).seat(urgent)
    return found


class _Load:
    """What an instance has to do, with those that were promised to it."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self.decoding = len(worker.decoding)
        self.context = worker.context
        self.prefill_left = worker.prefill_left
        self.pages = worker.used_blocks
        self.tightest_s = worker.tightest_tpot_s()

    def add(self, traveller: Traveller, parked: bool) -> None:
        job, worker = traveller.job, self.worker
        self.pages += worker.pages(traveller.cached if traveller.decodes else job.target)
        if not traveller.decodes:
            self.prefill_left += job.target - traveller.cached
        elif not parked:
            self.decoding += 1
            self.context += traveller.cached
            if not job.late:
                self.tightest_s = min(self.tightest_s, job.tier.tpot_ms / 1000)


class _Seating:
    """One try to seat all, in some order."""

    def __init__(self, cost: CostModel, travellers: Sequence[Traveller], instances: Sequence[Worker], room: Vacancies):
        self._cost = cost
        self._travellers = travellers
        self._loads = [_Load(worker) for worker in instances]
        self._room = room
        self._shares: dict[tuple[tuple[int, ...], int], float] = {}  # many come from few instances
        self._vshards = max([worker.tp for worker in instances] + [len(one.devices) for one in travellers], default=1)

    def seat(self, order: Sequence[int]) -> list[Seat | None]:
        found: list[Seat | None] = [None] * len(self._travellers)
        for number in order:
            seat = found[number] = self._one(number)
            if seat is not None:
                self._room.take(number, seat.instance)
                self._loads[seat.instance].add(self._travellers[number], seat.parked)
        return found

    def _one(self, number: int) -> Seat | None:
        traveller = self._travellers[number]
        fitting = [i for i in range(len(self._loads)) if self._room.fits(number, i)]
        if not traveller.decodes:
            able = [i for i in fitting if self._loads[i].worker.takes_prompts]
            return self._best(traveller, able or (fitting if traveller.cached else []))
        if traveller.job.late or traveller.waited:
            return self._parking(traveller, fitting) or self._best(traveller, fitting)
        able = [i for i in fitting if self._loads[i].worker.takes_decodes]
        return self._best(traveller, able) or self._parking(traveller, fitting)

    def _best(self, traveller: Traveller, able: Sequence[int]) -> Seat | None:
        return Seat(min(able, key=lambda i: self._suits(traveller, i)), False) if able else None

    def _parking(self, traveller: Traveller, fitting: Sequence[int]) -> Seat | None:
        prefilling = [i for i in fitting if self._loads[i].worker.plan.role == PREFILL]
        return Seat(min(prefilling, key=lambda i: self._emptiness(traveller, i)), True) if prefilling else None

    def _moved(self, traveller: Traveller, instance: int) -> float:
        key = traveller.devices, instance
        share = self._shares.get(key)
        if share is None:
            after = self._loads[instance].worker.plan.devices
            share = self._shares[key] = sum(moves(traveller.devices, after, self._vshards).values())
        return share

    def _emptiness(self, traveller: Traveller, instance: int) -> tuple[float, float]:
        load = self._loads[instance]
        return round(load.pages / load.worker.capacity_blocks, 1), self._moved(traveller, instance)

    def _suits(self, traveller: Traveller, instance: int) -> tuple[bool, bool, float, float]:
        """Less is better: too slow with it, not of its tier, how full, how much must move."""
        load, job = self._loads[instance], traveller.job
        worker = load.worker
        tightest_s = min(math.inf if job.late else job.tier.tpot_ms / 1000, load.tightest_s)
        step_s = self._cost.step_s(worker.tp, load.decoding + 1, load.context + traveller.cached)
        crowd = (load.context + load.prefill_left) / worker.capacity_blocks
        return step_s > tightest_s, not worker.keeps(job), round(crowd, 1), self._moved(traveller, instance)


class WorkerRoom:
    """Room as instances count it that hold the KV cache of nobody else: rows and pages."""

    def __init__(self, travellers: Sequence[Traveller], instances: Sequence[Worker]):
        """Counts what is free now."""
        self._travellers = travellers
        self._instances = instances
        self._rows = [worker.max_batch - worker.jobs for worker in instances]
        self._pages = [worker.free_blocks for worker in instances]

    def fits(self, traveller: int, instance: int) -> bool:
        """Whether there are a row and the pages for all that is known of it, and for the next token."""
        one, worker = self._travellers[traveller], self._instances[instance]
        need = worker.pages(one.cached + 1 if one.decodes else one.job.target)
        return self._rows[instance] > 0 and need <= self._pages[instance]

    def take(self, traveller: int, instance: int) -> None:
        """It goes there."""
        one, worker = self._travellers[traveller], self._instances[instance]
        self._rows[instance] -= 1
        self._pages[instance] -= worker.pages(one.cached if one.decodes else one.job.target)
