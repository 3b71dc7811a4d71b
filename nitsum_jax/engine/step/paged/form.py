"""How attention over the pool can be computed."""

import dataclasses

ATTENTIONS = ("auto", "xla", "pallas")


@dataclasses.dataclass(frozen=True)
class AttentionForm:
    """How attention over the pool is computed.

    Attributes:
      kernel: "xla": operations of XLA (`attention.paged_attention`), everywhere; "mosaic" or "triton": a kernel of
        Pallas, on TPUs or GPUs.
      interpret: a kernel is interpreted, on whatever device; slow, for tests.
    """

    kernel: str = "xla"
    interpret: bool = False
