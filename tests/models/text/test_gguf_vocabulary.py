"""GGUF files that say too little of their vocabulary: read as what it is known to be, and never without a word."""

import logging
from pathlib import Path

import gguf
import pytest

from nitsum_jax.models.text.gguf_vocabulary import pre_tokenizer, token_types
from tests.models.text.test_tokenizer import REFERENCE, SIZE, SPECIAL, load_gguf, write_gguf

NORMAL, CONTROL, USER = (int(kind) for kind in (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, 4))
# Ids of published vocabularies.
LLAMA3 = {128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128009: "<|eot_id|>"}
QWEN2 = {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"}
SMOLLM2 = {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>", 3: "<repo_name>", 49151: "x"}


def vocabulary(known: dict[int, str]) -> list[str]:
    return [known.get(i, f"token {i}") for i in range(max(known) + 1)]


@pytest.mark.parametrize(("known", "pre"), [(LLAMA3, "llama-bpe"), (QWEN2, "qwen2"), (SMOLLM2, "smollm")])
@pytest.mark.parametrize("named", [None, "default"])
def test_known_vocabularies_get_their_own_split(
    caplog: pytest.LogCaptureFixture, known: dict[int, str], pre: str, named: str | None
) -> None:
    assert pre_tokenizer(named, vocabulary(known)) == pre
    assert f"it is read with '{pre}'" in caplog.text


def test_a_name_in_the_file_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    assert pre_tokenizer("gpt-2", vocabulary(LLAMA3)) == "gpt-2"
    assert not caplog.records


def test_a_file_without_a_name_is_split_as_for_gpt2_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    named = load_gguf(write_gguf(tmp_path / "a.gguf", pre="gpt-2"))
    assert not caplog.records
    unnamed = load_gguf(write_gguf(tmp_path / "b.gguf", pre=None))
    assert "names no pre-tokenizer (tokenizer.ggml.pre): text is split as for GPT-2" in caplog.text
    assert unnamed.encode("It's 12345") == named.encode("It's 12345")


def test_chat_markup_typed_as_text_is_control(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    right = load_gguf(write_gguf(tmp_path / "a.gguf", pre="smollm"))
    assert not caplog.records
    ours = load_gguf(write_gguf(tmp_path / "b.gguf", pre="smollm", token_type=[NORMAL] * SIZE))
    text = "<|im_start|>user\nthe fox<|im_end|>"
    assert ours.encode(text) == right.encode(text) == REFERENCE.encode(text).ids
    assert ours.decode(ours.encode(text)) == "user\nthe fox"
    assert ours.eos_ids == right.eos_ids == (2, 0)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "types 3 tokens" in record.getMessage()
    assert all(token in record.getMessage() for token in SPECIAL)


@pytest.mark.parametrize(
    ("token", "of_type", "special", "expected"),
    [
        ("<|im_start|>", NORMAL, False, CONTROL),
        ("<\uff5cUser\uff5c>", NORMAL, False, CONTROL),
        ("<|im_start|>", USER, False, USER),  # matched whole, and shown: the file says so
        ("<|im_start|>", CONTROL, False, CONTROL),
        ("</s>", NORMAL, True, CONTROL),
        ("</s>", NORMAL, False, NORMAL),  # may be HTML
        ("!", NORMAL, True, NORMAL),  # a wrong id in the metadata makes no text vanish
        ("<|a b|>", NORMAL, False, NORMAL),
        ("<|>", NORMAL, False, NORMAL),
        ("a<|im_start|>", NORMAL, False, NORMAL),
    ],
)
def test_which_tokens_are_control(token: str, of_type: int, special: bool, expected: int) -> None:
    assert token_types(["x", token], [NORMAL, of_type], [], [1] if special else []) == [NORMAL, expected]


def test_what_merges_build_is_text() -> None:
    assert token_types(["<|x", "|>", "<|x|>"], [NORMAL] * 3, [("<|x", "|>")], []) == [NORMAL] * 3
