"""An output is a continuation: text, streamed text and bytes of its tokens are the same, at every length."""

import functools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer

from nitsum_jax.models.text.tokenizer import Tokenizer
from tests.models.text.test_tokenizer import load_gguf, write_fields, write_gguf
from tests.models.text.tokenizer_kinds import KINDS, SENTENCEPIECE, sentencepiece_fields, wrapped

TEXT = "the world, a 語 and é 😀  two"


@functools.cache
def inner_of(kind: str) -> HfTokenizer:
    return KINDS[kind]()


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return wrapped(inner_of(kind))


@pytest.fixture(scope="module")
def from_gguf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder: Path = tmp_path_factory.mktemp("gguf")
    fields = sentencepiece_fields()
    return {
        "sentencepiece": load_gguf(write_fields(folder / "a.gguf", fields)),
        "no_prefix": load_gguf(write_fields(folder / "b.gguf", fields | {"add_space_prefix": False})),
        "byte_level": load_gguf(write_gguf(folder / "c.gguf", pre="smollm")),
    }


def check_every_prefix(ours: Tokenizer, ids: list[int], skip: bool) -> None:
    stream, streamed, said = ours.stream(skip), "", b""
    for count, token in enumerate(ids, 1):
        streamed += stream.push([token])
        said += ours.token_bytes(token, skip)
        whole = ours.decode(ids[:count], skip)
        assert said.decode(errors="replace") == whole
        assert whole.startswith(streamed)
    assert streamed + stream.flush() == ours.decode(ids, skip)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip=st.booleans())
def test_any_output_says_the_same_thrice(kind: str, data: st.DataObject, skip: bool) -> None:
    ours = tokenizer_of(kind)
    check_every_prefix(ours, data.draw(st.lists(st.integers(0, ours.vocab_size + 2), max_size=12)), skip)


@pytest.mark.parametrize("name", ["sentencepiece", "no_prefix", "byte_level"])
@given(data=st.data(), skip=st.booleans())
def test_so_it_does_with_a_tokenizer_from_gguf(
    from_gguf: dict[str, Tokenizer], name: str, data: st.DataObject, skip: bool
) -> None:
    ours = from_gguf[name]
    check_every_prefix(ours, data.draw(st.lists(st.integers(0, ours.vocab_size + 2), max_size=12)), skip)


def check_borders(ours: Tokenizer, ids: list[int], whole: str) -> None:
    """Wherever a text is cut between characters, the prompt and its continuation together are the text."""
    cuts = 0
    for cut in range(1, len(ids)):
        prompt, output = ours.decode(ids[:cut], starts_text=True), ours.decode(ids[cut:])
        if "\ufffd" not in prompt + output and prompt:
            assert prompt + output == whole
            cuts += 1
    assert cuts >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_output_together_are_the_text(kind: str) -> None:
    ids = [token for token in inner_of(kind).encode(TEXT).ids if token]
    check_borders(tokenizer_of(kind), ids * 2, inner_of(kind).decode(ids * 2))


@pytest.mark.parametrize("name", ["sentencepiece", "no_prefix", "byte_level"])
def test_so_they_are_with_a_tokenizer_from_gguf(from_gguf: dict[str, Tokenizer], name: str) -> None:
    check_borders(from_gguf[name], from_gguf[name].encode(TEXT), TEXT)


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_an_output_keeps_the_space_before_its_first_word(kind: str) -> None:
    ours, inner = tokenizer_of(kind), inner_of(kind)
    ids = [inner.get_vocab()[token] for token in ("▁wor", "ld")]
    assert ours.decode(ids) == " world"
    assert [ours.token_bytes(token) for token in ids] == [b" wor", b"ld"]
    stream = ours.stream()
    assert [stream.push([token]) for token in ids] == [" wor", "ld"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "word_piece"])
@given(text=st.text("the wor語é😀 \n", max_size=20))
def test_a_whole_text_is_what_the_tokenizers_package_says(kind: str, text: str) -> None:
    ids = inner_of(kind).encode(text).ids
    assert tokenizer_of(kind).decode(ids, starts_text=True) == inner_of(kind).decode(ids)


def test_special_tokens_have_a_name_and_say_nothing() -> None:
    ours = tokenizer_of("llama_2")
    assert ours.token_bytes(2) == b"</s>"
    assert ours.token_bytes(2, skip_special=True) == b""
    assert ours.decode([2]) == ""


@pytest.mark.parametrize("kind", ["byte_level", "tekken", "llama_2"])
def test_some_special_tokens_are_spelled_where_the_others_are_not(kind: str) -> None:
    ours, inner = tokenizer_of(kind), inner_of(kind)
    first, *others = sorted(ours.special_ids)
    name = inner.id_to_token(first) or ""
    stream = ours.stream(shown=frozenset({name, "[NONE]"}))
    assert stream.push([first, *others, first]) == 2 * name
