"""Log probabilities as OpenAI's two APIs write them."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

from nitsum_jax.runtime.streams.output import TokenWithLogprob

_LEAST = -9999.0  # JSON has no infinity; this is what OpenAI writes


class TokenBytes(Protocol):
    """What a token says; see `nitsum_jax.models.text.tokenizer.Tokenizer.token_bytes`."""

    def __call__(self, token_id: int, skip_special: bool = False) -> bytes:
        """Its bytes."""


def chat_logprobs(told: Sequence[TokenWithLogprob], token_bytes: TokenBytes) -> dict[str, Any]:
    """The `logprobs` of a chat choice: an entry per token.

    The bytes of all tokens are those of the content: a special token has a name, and no bytes.
    """

    def entry(token: int, logprob: float) -> dict[str, Any]:
        name, data = token_bytes(token).decode(errors="replace"), token_bytes(token, skip_special=True)
        return {"token": name, "logprob": _finite(logprob), "bytes": list(data)}

    content = [
        {**entry(one.id, one.logprob.logprob), "top_logprobs": [entry(*other) for other in one.logprob.top]}
        for one in told
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(told: Sequence[TokenWithLogprob], token_bytes: TokenBytes) -> dict[str, Any]:
    """The `logprobs` of a completion choice: four lists with an element per token."""

    def name(token: int) -> str:
        data = token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:  # a part of a character; written so, different tokens stay different keys
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    return {
        "tokens": [name(one.id) for one in told],
        "token_logprobs": [_finite(one.logprob.logprob) for one in told],
        "top_logprobs": [{name(token): _finite(value) for token, value in one.logprob.top} for one in told],
        "text_offset": [one.start for one in told],
    }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST
