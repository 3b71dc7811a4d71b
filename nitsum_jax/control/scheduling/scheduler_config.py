"""How a scheduler decides: its settings."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How a scheduler decides.

    Attributes:
      order: "deadline" (least slack first, with demotion) or "fcfs" (first come first served, nobody is late).
      chunk_tokens: prompt tokens and decodes in a step: None sizes chunks by token deadlines, a number is a fixed
        budget (Sarathi).
      routing: "predicted" (both targets must hold) or "least_loaded" (fewest tokens per device, whatever the targets).
      tiers_apart: a request never leaves the instances of its tier.
      max_chunk: most prompt tokens in a step.
      step_share: a step with prompts takes at most this share of the tightest TTFT target, so that who comes next does
        not wait long.
      tpot_margin: an instance takes a request if a decode step with it takes at most this share of the tightest TPOT.
      ttft_margin: share of a TTFT target that predictions may use.
      decode_margin: a request is handed over to an instance if a decode step with it takes at most this share of the
        tightest TPOT there;
      decode_most: or at most this share,
      decode_ahead: while those that decode there are ahead of their time per token by so many tokens on average;
      late_room: a late one is, if the step takes at most this share of what the fastest step leaves of that time.
      spill_after: an instance of other tiers may be used after this share of the TTFT target.
      spill_margin: and if a decode step there takes at most this share of the tightest TPOT of its own tiers.
      ahead_tokens: an instance takes another prompt when fewer prompt tokens than this are left to it.
      copy_share: what an instance must copy from another is taken to cost this share of computing it.
      look: requests of each tier that are considered, besides the first.
      shed_window_s: how fast a tier's requests leave the backlog is measured over so long, and those that will be late
        at this rate are given up early; 0: never.
      patience_s: a late request that has waited so long gets every `aging_every`-th turn, whatever it costs others.
      aging_every: see `patience_s`.
      starve_s: a prompt in an instance that only decodes meanwhile waits at most about so long for its next chunk.
      cap_floor: a step with prompts may take so many times what it takes without them, however tight the TTFT targets
        are: shorter steps would be overhead for the most part.
    """

    order: str = "deadline"
    chunk_tokens: int | None = None
    routing: str = "predicted"
    tiers_apart: bool = False
    max_chunk: int = 8192
    step_share: float = 0.25
    tpot_margin: float = 0.92
    ttft_margin: float = 0.95
    decode_margin: float = 0.95
    decode_most: float = 1.1
    decode_ahead: float = 4.0
    late_room: float = 0.5
    spill_after: float = 0.4
    spill_margin: float = 0.8
    ahead_tokens: int = 512
    copy_share: float = 0.1
    look: int = 4
    shed_window_s: float = 1.0
    patience_s: float = 30.0
    aging_every: int = 8
    starve_s: float = 0.5
    cap_floor: float = 5.0
