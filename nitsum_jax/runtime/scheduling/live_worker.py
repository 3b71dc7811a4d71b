"""An engine's requests and instances as the policies see them."""

import collections

from nitsum_jax.control.job import Job
from nitsum_jax.control.scheduling.worker import Worker
from nitsum_jax.control.tiers import Tier
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.meshes.layout import InstanceSpec


class LiveJob(Job):
    """A job that an engine runs: how far it has come is read from the engine's own state of it.

    Attributes:
      sequence: that state.
    """

    worker: "LiveWorker | None"

    def __init__(self, sequence: LiveRequest, tier: Tier, arrival_s: float):
        """Begins with what the engine knows of a request; `arrival_s`: on the clock of tiers."""
        super().__init__(sequence.request.id, tier, arrival_s, sequence.prompt_len)
        self.sequence = sequence

    @property
    def target(self) -> int:
        """As of `Job`."""
        return self.sequence.target

    @property
    def cached(self) -> int:
        """As of `Job`, with what dispatched steps compute."""
        return self.sequence.cached

    @property
    def generated(self) -> int:
        """As of `Job`, with what dispatched steps make; a request that has ended made a token, if only to stop at."""
        generated = self.sequence.generated
        return generated if self.finish_s is None else max(1, generated)


class LiveWorker(Worker[LiveJob]):
    """A `Worker` whose steps an engine makes; its room is what the engine says.

    Attributes:
      instance: of the engine.
      busy_until_s: when the steps in flight are expected to end.
      flights: expected seconds of each of them.
      round: prompts and tokens that are still to be done before or with the next decode step.
      begun: whether a step of the round was launched.
      owed: whether decoding jobs have their turn next.
    """

    def __init__(self, index: int, plan: InstanceSpec, instance: Instance, page_size: int, max_batch: int):
        """Makes a worker of nobody."""
        super().__init__(index, plan, instance.total_pages() * page_size, page_size, max_batch)
        self.instance = instance
        self.busy_until_s = 0.0
        self.flights: collections.deque[float] = collections.deque()
        self.round: collections.deque[tuple[LiveJob, int]] = collections.deque()
        self.begun = False
        self.owed = False

    @property
    def free_blocks(self) -> int:
        """Pages that are free."""
        return self.instance.free_pages()

    @property
    def serves_prompts(self) -> bool:
        """As of `Worker`; a broken one does not."""
        return super().serves_prompts and not self.instance.broken

    @property
    def takes_prompts(self) -> bool:
        """As of `Worker`: it has a row for one more request."""
        return self.serves_prompts and self.instance.free_rows > 0

    def busy_s(self, now_s: float) -> float:
        """Time until the steps in flight are expected to end."""
        return max(0.0, self.busy_until_s - now_s) if self.flights else 0.0

    def launched(self, seconds: float, now_s: float) -> None:
        """A step of so many expected seconds was launched."""
        self.busy_until_s = max(self.busy_until_s, now_s) + seconds
        self.flights.append(seconds)

    def settled(self, now_s: float) -> None:
        """The oldest step in flight has ended."""
        if self.flights:
            self.flights.popleft()
        self.busy_until_s = now_s + sum(self.flights)

    def drop(self, job: LiveJob) -> None:
        """A job goes, in whatever state it is."""
        if job.id in self.outgoing:
            self.departed(job)
            job.worker = None
        else:
            self.leave(job)
        if self.round and any(other is job for other, _ in self.round):
            self.round = collections.deque(item for item in self.round if item[0] is not job)
