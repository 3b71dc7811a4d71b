"""A request that the model of a cell runs."""

import dataclasses

from nitsum_jax.control.job import Job


@dataclasses.dataclass(slots=True, eq=False)
class ModelJob(Job):
    """A job whose progress the model writes, by these methods alone.

    Attributes:
      output_tokens: how many tokens it will have made in the end; policies use `expected_output`.
      target, cached, generated: as of `Job`.
      begin_s: by when about it has to begin to decode, if it waits for an instance that does.
      instances: numbers of the instances that worked on it.
      recomputed: tokens whose KV was computed again after a preemption.
    """

    output_tokens: int = 1
    _: dataclasses.KW_ONLY
    target: int = 0
    cached: int = 0
    generated: int = 0
    begin_s: float = 0.0
    instances: list[int] = dataclasses.field(default_factory=list)
    recomputed: int = 0

    def __post_init__(self) -> None:
        if self.target == 0:
            self.target = self.prompt_tokens

    def visit(self, instance: int) -> None:
        """An instance takes it."""
        if not self.instances or self.instances[-1] != instance:
            self.instances.append(instance)

    def prefilled(self, tokens: int) -> bool:
        """A chunk of so many tokens is computed; returns whether it was the last one, which makes a token."""
        self.cached += tokens
        if self.cached < self.target:
            return False
        self.generated += 1
        return True

    def decoded(self, generated: int) -> None:
        """It has made so many tokens by now; the last one's KV is still to be computed."""
        self.generated = generated
        self.cached = self.prompt_tokens + generated - 1

    def lose(self) -> None:
        """Its KV cache is gone: prompt and output so far are computed again."""
        self.recomputed += self.cached
        self.target = self.prompt_tokens + self.generated
        self.cached = 0

    def end(self, now_s: float) -> None:
        """Its last token is out."""
        self.generated = self.output_tokens
        self.finish_s = now_s
