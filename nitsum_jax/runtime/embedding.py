"""What every front end does with texts whose embeddings are wanted: one request of the engine for each."""

import uuid
from collections.abc import Sequence

from nitsum_jax.errors import PreconditionError
from nitsum_jax.runtime.backend import Backend, ServedModel
from nitsum_jax.runtime.calls import Call, Prompt, Wanted, check, check_outputs, encode, make_call


def check_embeds(model: ServedModel) -> None:
    """Raises PreconditionError if the model gives no embeddings."""
    if model.pooling is None:
        raise PreconditionError(
            f"The model `{model.name}` gives no embeddings: serve one whose files say how it makes them, or start the "
            "server with --pooling=last or mean"
        )


async def embedding_calls(
    texts: Sequence[Prompt],
    backend: Backend,
    *,
    tier: str,
    ttft_ms: float | None = None,
    tpot_ms: float | None = None,
    deadline_s: float | None = None,
) -> list[Call]:
    """One call per text, each with one token that nobody sees.

    Args:
      texts: at most MAX_OUTPUTS of them.
      backend: that makes the embeddings.
      tier: name of the latency tier, "" for the default.
      ttft_ms: target of its own, as in `Wanted`.
      tpot_ms: likewise.
      deadline_s: likewise.

    Raises:
      NitsumError: a text is empty, there are too many for now, a target is out of range, or the model gives none.
    """
    model, tiers = backend.model, backend.engine.tier_names
    check_embeds(model)
    check_outputs(len(texts), backend, f"{len(texts)} texts")
    wanted = Wanted(
        max_tokens=0, tier=tier, ttft_ms=ttft_ms, tpot_ms=tpot_ms, deadline_s=deadline_s, pooling=model.pooling
    )
    check(wanted, model.vocab_size, least_tokens=0)
    name = f"embd-{uuid.uuid4().hex}"
    encoded = await encode(texts, model)
    return [make_call(wanted, ids, model, tiers, f"{name}-{index}") for index, ids in enumerate(encoded)]
