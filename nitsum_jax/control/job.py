"""A request as the policies see it: one object from its arrival to its end."""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nitsum_jax.control.tiers import Tier


class Holder(Protocol):
    """Where a job is, as far as policies ask it; `Worker` is one."""

    @property
    def free_blocks(self) -> int:
        """Pages that are free."""

    @property
    def capacity_blocks(self) -> int:
        """All of its pages."""


@dataclasses.dataclass(slots=True, eq=False)
class Job(abc.ABC):
    """A request, with what the scheduler has decided about it.

    How far it has come is known and written by what runs it alone: the model of a cell (`model.job.ModelJob`), or a
    running engine, whose own state of the request is read here.

    Attributes:
      id: unique among those alive.
      tier: its targets.
      arrival_s: when it came.
      prompt_tokens: length of the prompt.
      expected_output: what the policy expects of it, tokens.
      due_s: when its prompt should be computed: its TTFT deadline, until it has a first token.
      latest_start_s: begun later than this, it is not done by then.
      late: it can no longer meet its targets, and must not cost others theirs; see `give_up`.
      first_token_s: when its first token was out.
      finish_s: when its last one was.
      worker: where it is.
      offset: decode steps of the worker before its first token, so that generated = clock - offset.
    """

    id: str
    tier: Tier
    arrival_s: float
    prompt_tokens: int
    _: dataclasses.KW_ONLY
    expected_output: float = 128.0
    due_s: float = 0.0
    latest_start_s: float = 0.0
    late: bool = False
    first_token_s: float | None = None
    finish_s: float | None = None
    worker: Holder | None = None
    offset: int = 0

    @property
    @abc.abstractmethod
    def target(self) -> int:
        """Tokens that must be in the KV cache before it can decode: the prompt, after a preemption its output too."""

    @property
    @abc.abstractmethod
    def cached(self) -> int:
        """How many of them are."""

    @property
    @abc.abstractmethod
    def generated(self) -> int:
        """Output tokens so far; while it decodes in a model ask its worker (`Worker.generated`)."""

    @property
    def ttft_deadline_s(self) -> float:
        """When the first token is due."""
        return self.arrival_s + self.tier.ttft_ms / 1000

    @property
    def work_s(self) -> float:
        """Least time that its prompt takes: what lies between its latest start and when it is due."""
        return max(0.0, self.due_s - self.latest_start_s)

    def next_token_due_s(self, generated: int) -> float:
        """When the token after `generated` output tokens is due, for the mean time per token to be on target."""
        if self.first_token_s is None:
            return self.ttft_deadline_s
        return self.first_token_s + generated * self.tier.tpot_ms / 1000

    def give_up(self) -> None:
        """Calls it late, for good."""
        self.late = True

    def met(self) -> bool:
        """Whether a finished request met both targets: the definition of goodput."""
        return met(self.tier, self.arrival_s, self.first_token_s, self.finish_s, self.generated)


def met(tier: Tier, arrival_s: float, first_token_s: float | None, finish_s: float | None, output_tokens: int) -> bool:
    """Whether TTFT and TPOT were on target; TPOT = (finish - first token) / (output tokens - 1)."""
    if first_token_s is None or finish_s is None:
        return False
    if (first_token_s - arrival_s) * 1000 > tier.ttft_ms * (1 + 1e-9):
        return False
    return output_tokens < 2 or (finish_s - first_token_s) * 1000 <= tier.tpot_ms * (output_tokens - 1) * (1 + 1e-9)
