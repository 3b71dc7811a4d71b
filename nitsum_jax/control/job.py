"""A request as the policies see it: one object from its arrival to its end."""

from __future__ import annotations

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
class Job:
    """State of one request.

    What runs it (the model of a cell, or an engine) keeps it up to date; policies read it and set `late`.

    Attributes:
      id: unique among those alive.
      tier: its targets.
      arrival_s: when it came.
      prompt_tokens: length of the prompt.
      output_tokens: how many tokens it will have made in the end.  Only the model of a cell knows; policies use
        `expected_output`.
      expected_output: what the policy expects of it, tokens.
      target: tokens that must be in the KV cache before it can decode: the prompt, after a preemption its output too.
      cached: how many of them are.
      generated: output tokens so far; while it decodes in a model ask its worker (`Worker.generated`).
      due_s: when its prompt should be computed: its TTFT deadline, until it has a first token.
      latest_start_s: begun later than this, it is not done by then.
      begin_s: by when about it has to begin to decode, if it waits for an instance that does.
      late: it can no longer meet its targets, and must not cost others theirs.
      first_token_s: when its first token was out.
      finish_s: when its last one was.
      worker: where it is.
      offset: decode steps of the worker before its first token, so that generated = clock - offset.
      instances: numbers of the instances that worked on it.
      recomputed: tokens whose KV was computed again after a preemption.
    """

    id: str
    tier: Tier
    arrival_s: float
    prompt_tokens: int
    output_tokens: int = 1
    expected_output: float = 128.0
    target: int = 0
    cached: int = 0
    generated: int = 0
    due_s: float = 0.0
    latest_start_s: float = 0.0
    begin_s: float = 0.0
    late: bool = False
    first_token_s: float | None = None
    finish_s: float | None = None
    worker: Holder | None = None
    offset: int = 0
    instances: list[int] = dataclasses.field(default_factory=list)
    recomputed: int = 0

    def __post_init__(self) -> None:
        if self.target == 0:
            self.target = self.prompt_tokens

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

    def met(self) -> bool:
        """Whether a finished request met both targets: the definition of goodput."""
        return met(self.tier, self.arrival_s, self.first_token_s, self.finish_s, self.output_tokens)


def met(tier: Tier, arrival_s: float, first_token_s: float | None, finish_s: float | None, output_tokens: int) -> bool:
    """Whether TTFT and TPOT were on target; TPOT = (finish - first token) / (output tokens - 1)."""
    if first_token_s is None or finish_s is None:
        return False
    if (first_token_s - arrival_s) * 1000 > tier.ttft_ms * (1 + 1e-9):
        return False
    return output_tokens < 2 or (finish_s - first_token_s) * 1000 <= tier.tpot_ms * (output_tokens - 1) * (1 + 1e-9)
