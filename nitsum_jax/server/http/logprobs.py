"""Log probabilities as OpenAI's two APIs write them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from nitsum_jax.server.output import ToldToken

_LEAST = -9999.0  # JSON has no infinity; this is what OpenAI writes

TokenBytes = Callable[[int], bytes]


def chat_logprobs(told: Sequence[ToldToken], token_bytes: TokenBytes) -> dict[str, Any]:
    """The `logprobs` of a chat choice: an entry per token."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}

    content = [
        {**entry(one.id, one.logprob.logprob), "top_logprobs": [entry(*other) for other in one.logprob.top]}
        for one in told
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(told: Sequence[ToldToken], token_bytes: TokenBytes) -> dict[str, Any]:
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
