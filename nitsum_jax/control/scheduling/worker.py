"""An instance as the policies see it: who is in it, what KV cache it has left, and how much time its tokens leave.

The model of a cell and the live engine keep the same object, so that a scheduler cannot tell which one it serves.
"""

import heapq
import itertools
import math
from collections.abc import Iterator
from typing import Generic, TypeVar

from nitsum_jax.control.job import Job
from nitsum_jax.control.plan import DECODE, PREFILL
from nitsum_jax.meshes.layout import InstanceSpec

_NUMBER = itertools.count()
_MOST_TARGETS = 32  # kept after their requests have gone

J = TypeVar("J", bound=Job)


class Worker(Generic[J]):
    """Membership and accounts of one instance.

    Attributes:
      index: number of the instance, unique in a run.
      plan: devices, role and tiers.
      prefills: jobs whose prompt is not computed yet.
      decoding: jobs that get a token a step, by id.
      outgoing: jobs whose prompt is computed and whose KV cache has yet to go to another instance, by id.
      clock: decode steps so far.
      context: tokens of KV cache of the decoding jobs together.
      used_blocks: pages taken, of `capacity_blocks`.
      stopping: it takes nobody any more (a switch is under way).
      hungry_s: since when its prompts have had no chunk; None before anybody looked, or without any.
    """

    def __init__(self, index: int, plan: InstanceSpec, capacity_tokens: int, page_size: int, max_batch: int):
        """Makes an empty instance that can hold `capacity_tokens` tokens and `max_batch` jobs."""
        self.index = index
        self.plan = plan
        self.tp = plan.tp
        self.page_size = page_size
        self.capacity_blocks = capacity_tokens // page_size
        self.max_batch = max_batch
        self.prefills: list[J] = []
        self.decoding: dict[str, J] = {}
        self.outgoing: dict[str, J] = {}
        self.clock = 0
        self.context = 0
        self.used_blocks = 0
        self.stopping = False
        self.hungry_s: float | None = None
        # Decoding jobs per page offset: tells in which step how many of them begin a new page.
        self._residues = [0] * page_size
        self._offsets = 0
        self._expected = 0.0
        # Per tier and target, as requests may name their own, a heap of (due time less clock * tpot, tie, job): the
        # order never changes while all decode in step.
        self._due: dict[tuple[str, float], tuple[float, list[tuple[float, int, J]]]] = {}

    # ---- who is here

    @property
    def jobs(self) -> int:
        """Prefilling and decoding jobs."""
        return len(self.prefills) + len(self.decoding) + len(self.outgoing)

    def members(self) -> list[J]:
        """All of them."""
        return [*self.prefills, *self.decoding.values(), *self.outgoing.values()]

    @property
    def serves_prompts(self) -> bool:
        """Whether it prefills, be it that it has no room now."""
        return not self.stopping and self.plan.role != DECODE

    @property
    def takes_prompts(self) -> bool:
        """Whether it can take a prompt now."""
        return self.serves_prompts

    @property
    def takes_decodes(self) -> bool:
        """Whether it decodes."""
        return self.plan.role != PREFILL and not self.stopping

    @property
    def prefill_left(self) -> int:
        """Prompt tokens that are still to be computed."""
        left = 0
        for job in self.prefills:
            left += job.target - job.cached
        return left

    def keeps(self, job: Job) -> bool:
        """Whether it is kept for the tier of a job, or for none."""
        return not self.plan.tiers or job.tier.name in self.plan.tiers

    def starved_s(self, now_s: float) -> float:
        """How long its prompts have had no chunk, since somebody looked first."""
        if self.hungry_s is None:
            self.hungry_s = now_s
        return now_s - self.hungry_s

    def generated(self, job: Job) -> int:
        """Output tokens of a decoding job so far."""
        return self.clock - job.offset

    # ---- room

    @property
    def free_blocks(self) -> int:
        """Pages that are free."""
        return self.capacity_blocks - self.used_blocks

    def pages(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.page_size)

    def growth_tokens(self) -> float:
        """Tokens that the jobs here are still expected to make."""
        generated = len(self.decoding) * self.clock - self._offsets
        waiting = 0.0
        for job in self.prefills:
            waiting += job.expected_output
        return max(0.0, self._expected - generated) + waiting

    def steps_until_full(self) -> int:
        """Decode steps of all jobs that the free pages allow; a large number if nobody decodes."""
        count = len(self.decoding)
        if count == 0:
            return 1 << 30
        free = self.free_blocks
        steps = free // count * self.page_size
        free %= count
        clock = self.clock + steps
        while True:
            need = self._residues[-clock % self.page_size]
            if need > free:
                return steps
            free -= need
            steps += 1
            clock += 1

    # ---- time

    def busy_s(self, now_s: float) -> float:
        """Time until the steps under way end, as far as is known; 0 here."""
        return 0.0

    def slack_s(self, now_s: float) -> float:
        """Time until the first next token is due, over all decoding jobs that are not late; infinite without any."""
        least = math.inf
        for tpot_s, heap in self._due.values():
            if self._forget_gone(heap):
                least = min(least, heap[0][0] + self.clock * tpot_s)
        return least - now_s

    def tightest_tpot_s(self) -> float:
        """Least TPOT target of the decoding jobs that are not late; infinite without any."""
        least = math.inf
        for tpot_s, heap in self._due.values():
            if tpot_s < least and self._forget_gone(heap):
                least = tpot_s
        return least

    def _forget_gone(self, heap: list[tuple[float, int, J]]) -> bool:
        """Brings one that is here and in time up in a heap, where others stay until then; whether there is one."""
        while heap:
            job = heap[0][2]
            if not job.late and self.decoding.get(job.id) is job:
                return True
            heapq.heappop(heap)
        return False

    def overdue(self, now_s: float) -> Iterator[J]:
        """Decoding jobs, not late, whose next token is due before now, the most overdue of each tier first."""
        for tpot_s, heap in self._due.values():
            while self._forget_gone(heap):
                key, _, job = heap[0]
                if key + self.clock * tpot_s >= now_s:
                    break
                before = len(heap)
                yield job
                if len(heap) == before and heap and heap[0][2] is job and not job.late:
                    break  # the caller keeps it: the others of the tier are less overdue

    # ---- changes

    def seat(self, job: J) -> None:
        """Takes a job whose prompt is to be computed; its pages are taken at once."""
        job.worker = self
        if not self.prefills:
            self.hungry_s = None
        self.prefills.append(job)
        self.used_blocks += self.pages(job.target)

    def begin_decode(self, job: J) -> None:
        """A job that was seated here has its first token (or, computed again, its next)."""
        self.prefills.remove(job)
        self._enter(job)

    def depart(self, job: J) -> None:
        """A job that was seated here has its first token and will decode elsewhere; its pages stay until `departed`."""
        self.prefills.remove(job)
        self.outgoing[job.id] = job

    def park(self, job: J) -> None:
        """A job comes with its KV cache and will decode elsewhere; its pages stay until `departed`."""
        job.worker = self
        self.outgoing[job.id] = job
        self.used_blocks += self.pages(job.cached)

    def departed(self, job: J) -> None:
        """Its KV cache has been copied; its pages are free."""
        del self.outgoing[job.id]
        self.used_blocks -= self.pages(job.cached)

    def reserve(self, job: J) -> None:
        """Takes pages for a job that will come with its KV cache."""
        self.used_blocks += self.pages(job.cached)

    def arrive(self, job: J) -> None:
        """A job for which pages were reserved comes to decode."""
        self._enter(job)

    def retime(self, job: J) -> None:
        """The first token of a decoding job came at another time than was expected of it."""
        if job.id not in self.decoding or job.first_token_s is None:
            return
        _, heap = self._due.get((job.tier.name, job.tier.tpot_ms), (0.0, []))
        heap[:] = [entry for entry in heap if entry[2] is not job]
        heapq.heapify(heap)
        if not job.late:
            self._note_due(job, job.first_token_s)

    def leave(self, job: J) -> None:
        """A job goes, with its pages."""
        if job.id in self.decoding:
            del self.decoding[job.id]
            cached = job.prompt_tokens + self.generated(job) - 1
            self.context -= cached
            self.used_blocks -= self.pages(cached)
            self._residues[(job.prompt_tokens - 1 - job.offset) % self.page_size] -= 1
            self._offsets -= job.offset
            self._expected -= job.expected_output
        else:
            self.prefills.remove(job)
            self.used_blocks -= self.pages(job.target)
        job.worker = None

    def advance(self, steps: int) -> None:
        """All decoding jobs have got `steps` tokens."""
        for _ in range(steps) if steps < self.page_size else ():
            self.used_blocks += self._residues[-self.clock % self.page_size]
            self.clock += 1
        if steps >= self.page_size:
            rounds, rest = divmod(steps, self.page_size)
            self.used_blocks += rounds * len(self.decoding)
            self.clock += rounds * self.page_size
            for _ in range(rest):
                self.used_blocks += self._residues[-self.clock % self.page_size]
                self.clock += 1
        self.context += steps * len(self.decoding)

    def _enter(self, job: J) -> None:
        job.worker = self
        job.offset = self.clock - job.generated
        self.decoding[job.id] = job
        self.context += job.prompt_tokens + job.generated - 1
        self._residues[(job.prompt_tokens - 1 - job.offset) % self.page_size] += 1
        self._offsets += job.offset
        self._expected += job.expected_output
        if not job.late and job.first_token_s is not None:
            self._note_due(job, job.first_token_s)

    def _note_due(self, job: J, first_token_s: float) -> None:
        key = (job.tier.name, job.tier.tpot_ms)
        if key not in self._due and len(self._due) >= _MOST_TARGETS:
            self._due = {other: due for other, due in self._due.items() if self._forget_gone(due[1])}
        tpot_s, heap = self._due.setdefault(key, (job.tier.tpot_ms / 1000, []))
        # The number decides between jobs that are due at the same time: jobs themselves have no order.
        heapq.heappush(heap, (first_token_s - job.offset * tpot_s, next(_NUMBER), job))
