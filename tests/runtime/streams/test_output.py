"""What a client reads of an output whose first token begins with a space, by a sentencepiece vocabulary."""

import pytest

from nitsum_jax.engine.request import FinishReason, Request, TokenDelta, TokenLogprob
from nitsum_jax.runtime.calls import Call
from nitsum_jax.runtime.streams.output import Output, Piece
from nitsum_jax.server.http.openai.logprobs import chat_logprobs, completion_logprobs
from tests.models.text.tokenizer_kinds import KINDS, SENTENCEPIECE, wrapped

SAID = ("▁wor", "ld", "</s>", "▁a", "<0xC3>", "<0xA9>")


def pieces(kind: str, *stops: str) -> list[Piece]:
    """The pieces of an output that goes on past an end token, a token a delta."""
    tokenizer, inner = wrapped(KINDS[kind]()), KINDS[kind]()
    request = Request("r", (1,), max_tokens=len(SAID), logprobs=0)
    output = Output(Call(request, stops), tokenizer.stream(), lambda _: None, 0.0)
    taken = []
    for number, token in enumerate(map(inner.get_vocab().__getitem__, SAID), 1):
        reason = FinishReason.LENGTH if number == len(SAID) else None
        taken.append(output.take([TokenDelta("r", (token,), float(number), reason, logprobs=(TokenLogprob(-1.0),))]))
        if taken[-1].end is not None:
            break
    return taken


@pytest.mark.parametrize("kind", ["llama_2", "gemma", "metaspace_and_bytes"])
def test_text_and_logprobs_have_the_space(kind: str) -> None:
    taken, token_bytes = pieces(kind), wrapped(KINDS[kind]()).token_bytes
    text = "".join(piece.text for piece in taken)
    told = [one for piece in taken for one in piece.told]
    assert text == " world aé"
    content = chat_logprobs(told, token_bytes, 1)["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == text
    assert [entry["token"] for entry in content] == [" wor", "ld", "</s>", " a", "\ufffd", "\ufffd"]
    assert completion_logprobs(told, token_bytes, 1)["text_offset"] == [0, 4, 6, 6, 8, 8]


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_a_stop_string_may_begin_with_the_space(kind: str) -> None:
    taken = pieces(kind, " world")
    end = taken[-1].end
    assert "".join(piece.text for piece in taken) == ""
    assert end is not None
    assert end.stop == " world"
