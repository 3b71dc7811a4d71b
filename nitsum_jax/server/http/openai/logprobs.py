"""Log probabilities as OpenAI's two APIs write them."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

from nitsum_jax.engine.request import TokenLogprob
from nitsum_jax.runtime.streams.output import TokenWithLogprob

_LEAST = -9999.0  # JSON has no infinity; this is what OpenAI writes


class TokenBytes(Protocol):
    """What a token says; see `nitsum_jax.models.text.tokenizer.Tokenizer.token_bytes`."""

    def __call__(self, token_id: int, skip_special: bool = False) -> bytes:
        """Its bytes."""


def chat_logprobs(told: Sequence[TokenWithLogprob], token_bytes: TokenBytes, top: int) -> dict[str, Any]:
    """The `logprobs` of a chat choice: an entry per token.

    The bytes of all tokens are those of the content: a special token has a name, and no bytes.
    """

    def entry(token: int, logprob: float) -> dict[str, Any]:
        name, data = token_bytes(token).decode(errors="replace"), token_bytes(token, skip_special=True)
        return {"token": name, "logprob": _finite(logprob), "bytes": list(data)}

    content = [
        {**entry(one.id, one.logprob.logprob), "top_logprobs": [entry(*other) for other in one.logprob.top[:top]]}
        for one in told
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    told: Sequence[TokenWithLogprob], token_bytes: TokenBytes, top: int, start: int = 0
) -> dict[str, Any]:
    """The `logprobs` of a completion choice: four lists with an element per token."""
    name = functools.partial(_name, token_bytes)
    return {
        "tokens": [name(one.id) for one in told],
        "token_logprobs": [_finite(one.logprob.logprob) for one in told],
        "top_logprobs": [{name(token): _finite(value) for token, value in one.logprob.top[:top]} for one in told],
        "text_offset": [start + one.start for one in told],
    }


def echoed_logprobs(echo: "Echo", told: Sequence[TokenLogprob], token_bytes: TokenBytes) -> dict[str, Any]:
    """The same for the tokens of a prompt that is repeated; nothing is known of the first one."""
    name = functools.partial(_name, token_bytes)
    likely = [{name(token): _finite(value) for token, value in one.top} for one in told]
    return {
        "tokens": [name(token) for token in echo.ids],
        "token_logprobs": [None, *(_finite(one.logprob) for one in told)],
        "top_logprobs": [None, *likely],
        "text_offset": list(echo.offsets),
    }


def prompt_logprobs(
    ids: Sequence[int], told: Sequence[TokenLogprob], token_bytes: TokenBytes, top: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: per token of the prompt the likeliest ones and itself, by their ids."""

    def entry(token: int, logprob: float, rank: int | None) -> dict[str, Any]:
        said = token_bytes(token).decode(errors="replace")
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": said}

    found: list[dict[str, Any] | None] = [None]
    for token, one in zip(ids[1:], told, strict=False):
        ranks = {other: rank for rank, (other, _) in enumerate(one.top, start=1)}
        entries = {str(token): entry(token, one.logprob, ranks.get(token))}
        for other, value in one.top[:top]:
            entries.setdefault(str(other), entry(other, value, ranks[other]))
        found.append(entries)
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is repeated before its output.

    Attributes:
      text: of the prompt.
      ids: its tokens.
      offsets: where the text of each begins.
    """

    text: str
    ids: Sequence[int]
    offsets: Sequence[int]


def _name(token_bytes: TokenBytes, token: int) -> str:
    data = token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:  # a part of a character; written so, different tokens stay different keys
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST
