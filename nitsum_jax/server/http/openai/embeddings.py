"""POST /v1/embeddings: a vector of length 1 for each text."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from nitsum_jax.errors import PreconditionError
from nitsum_jax.runtime.backend import Backend
from nitsum_jax.runtime.calls import check_embeds, embedding_calls
from nitsum_jax.runtime.streams.outputs import Outputs
from nitsum_jax.server.gateway import GatewayHeaders
from nitsum_jax.server.http.answering import Endpoint, Planned, Whole, check_model
from nitsum_jax.server.http.errors import ApiError
from nitsum_jax.server.http.fields import MAX_TIER_CHARS, PromptField, Strict, Unsupported
from nitsum_jax.server.http.openai.known import HARMLESS
from nitsum_jax.server.http.openai.tiers import choose_tier

_LITTLE_ENDIAN = np.dtype("<f4")


class EmbeddingRequest(Strict):
    """POST /v1/embeddings."""

    harmless: ClassVar[Mapping[str, str]] = {name: HARMLESS[name] for name in ("user", "priority", "request_id")}
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "dimensions": Unsupported("vectors have the width of the model: cut them, and scale them to length 1 again"),
        "truncate_prompt_tokens": Unsupported("texts are not cut: send shorter ones"),
        "add_special_tokens": Unsupported("texts get what the model expects; ids are used as given", (True,)),
        "input_type": Unsupported("write the instruction of the model before the text"),
        "normalize": Unsupported("vectors are of length 1", (True,)),
    }

    model: str = Field(max_length=4096, description="The id that /v1/models lists.")
    input: PromptField
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: little-endian float32; float, a list of numbers, if not given."
    )
    service_tier: str | None = Field(None, max_length=MAX_TIER_CHARS, description="The latency tier.")


class Embeddings(Endpoint[EmbeddingRequest]):
    """/v1/embeddings."""

    kind = EmbeddingRequest

    async def plan(self, request: EmbeddingRequest, backend: Backend, asked: GatewayHeaders) -> Planned:
        """One call per text, each with one token that nobody sees.

        Raises:
          ApiError: model or tier are not known.
          NitsumError: a text does not fit, there are too many, or the model gives no embeddings.
        """
        model = backend.model
        check_model(request.model, model)
        try:
            check_embeds(model)
        except PreconditionError as error:
            raise ApiError(400, str(error), param="model") from None
        tier, _ = choose_tier(request.service_tier, backend.engine.tier_names, asked)
        calls = await embedding_calls(request.input, backend, tier=tier, ttft_ms=asked.ttft_ms, tpot_ms=asked.tpot_ms)
        prompt_tokens = sum(len(call.prompt_ids) for call in calls)
        writer = _Writer(model.name, prompt_tokens, in_base64=request.encoding_format == "base64")
        return Planned(calls, writer)


class _Writer:
    """The answer of one request."""

    def __init__(self, model: str, prompt_tokens: int, *, in_base64: bool) -> None:
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._in_base64 = in_base64

    def whole(self, wholes: Sequence[Whole], outputs: Outputs) -> dict[str, Any]:
        """See `responses.EmbeddingResponse`."""
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": self._written(outputs.embedding(index))}
                for index in range(len(wholes))
            ],
            "model": self._model,
            "usage": {"prompt_tokens": self._prompt_tokens, "total_tokens": self._prompt_tokens},
        }

    def _written(self, vector: np.ndarray) -> list[float] | str:
        if self._in_base64:
            return base64.b64encode(vector.astype(_LITTLE_ENDIAN).tobytes()).decode()
        numbers: list[float] = vector.tolist()
        return numbers
