"""Tokenizer against the tokenizers package itself, on vocabularies trained here."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HfTokenizer

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, 12345 times.",
    "It's 2026 and we'll see: the dogs' fox isn't lazy.  Two  spaces,\n\n    indented\tlines.",
    "def fox(n): return [dog for dog in range(n)]",
    "naïve café, 日本語 and Привет; 😀😀 👩‍👩‍👧",
] * 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "",
    " ",
    "the fox",
    "  two spaces  3  4",
    "a\n\nb\r\n\tc",
    "12345 1 2 ½ ٣",
    "It's we'll THE'LL",
    "日本語 Привет 👩‍👩‍👧 🏳️‍🌈",
    "<|im_start|>user\nthe<|im_end|>",
    "the<|endoftext|>12<|im_end",
    "\x00\x7f\u200b\ufffd",
    "e\u0301 é",
]
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])


def train_byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer) -> HfTokenizer:
    inner = HfTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizer
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(t, normalized=False, special=True) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    return inner


REFERENCE = train_byte_level(SMOLLM)
SIZE = REFERENCE.get_vocab_size()
BYTE_LEVEL = Tokenizer(REFERENCE, bos_id=1, eos_ids=(2,), chat_template=None)


def write_gguf(path: Path, *, pre: str | None, model: str = "gpt2", drop: Sequence[str] = (), **extra: Any) -> Path:
    """A GGUF file with REFERENCE's vocabulary and no tensors; `extra` are further tokenizer.ggml fields."""
    state = json.loads(REFERENCE.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    fields: dict[str, Any] = {
        "model": model,
        "tokens": tokens,
        "token_type": [gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in tokens],
        "merges": [" ".join(pair) for pair in state["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
    }
    if pre is not None:
        fields["pre"] = pre
    return write_fields(path, {k: v for k, v in (fields | extra).items() if k not in drop})


def write_fields(path: Path, fields: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        name = key if key == "tokenizer.chat_template" else f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load_gguf(path: Path) -> Tokenizer:
    return Tokenizer.from_gguf(gguf.GGUFReader(path))


# From GGUF: byte-level.


@pytest.mark.parametrize(("pre", "split"), [("smollm", SMOLLM), ("gpt-2", GPT2), ("default", GPT2), (None, GPT2)])
def test_gguf_gives_the_ids_of_the_original(
    tmp_path: Path, pre: str | None, split: pre_tokenizers.PreTokenizer
) -> None:
    original = HfTokenizer.from_str(REFERENCE.to_str())
    original.pre_tokenizer = split
    ours = load_gguf(write_gguf(tmp_path / "m.gguf", pre=pre))
    for text in TEXTS + CORPUS:
        assert ours.encode(text) == original.encode(text).ids, text


def test_smollm_splits_every_digit(tmp_path: Path) -> None:
    smollm = load_gguf(write_gguf(tmp_path / "a.gguf", pre="smollm"))
    gpt2 = load_gguf(write_gguf(tmp_path / "b.gguf", pre="gpt-2"))
    text = "a  1"
    assert [smollm.decode([i]) for i in smollm.encode(text)] == ["a", "  ", "1"]
    assert [gpt2.decode([i]) for i in gpt2.encode(text)] == ["a", " ", " ", "1"]


def merged_vocabulary(words: Sequence[str]) -> dict[str, Any]:
    """Tokens and merges with which every one of the (byte-level spelled) words can be built left to right."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    return {"tokens": tokens, "merges": merges, "token_type": [int(gguf.TokenType.NORMAL)] * len(tokens)}


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", ["123", "45", "'LL", " x"]),  # digits in threes, contractions in any case
        ("qwen2", ["1", "2", "3", "4", "5", "'LL", " x"]),  # single digits
        ("gpt-2", ["12345", "'", "LL", " x"]),
    ],
)
def test_pre_tokenizers_differ_where_they_should(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    fields = merged_vocabulary(["12345", "45", "'LL", "LL", "Ġx"])
    ours = load_gguf(write_fields(tmp_path / "m.gguf", {"model": "gpt2", "pre": pre, "add_bos_token": False, **fields}))
    assert [ours.decode([i]) for i in ours.encode("12345'LL x")] == pieces


def test_llama3_takes_whole_words_from_the_vocabulary(tmp_path: Path) -> None:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "abc"]  # no merge leads to "abc"
    fields = {"model": "gpt2", "tokens": tokens, "merges": ["x y"], "bos_token_id": 0}
    fields["tokens"] = [*tokens, "xy"]
    llama = load_gguf(write_fields(tmp_path / "a.gguf", {**fields, "pre": "llama-bpe", "add_bos_token": False}))
    gpt2 = load_gguf(write_fields(tmp_path / "b.gguf", {**fields, "pre": "gpt-2"}))
    assert llama.encode("abc") == [tokens.index("abc")]
    assert len(gpt2.encode("abc")) == 3
    # The Llama 3 vocabulary starts texts with BOS unless the file says otherwise; GPT-2's does not.
    default = load_gguf(write_fields(tmp_path / "c.gguf", {**fields, "pre": "llama-bpe"}))
    assert default.encode("abc") == [0, tokens.index("abc")]
    assert default.encode("abc", add_special=False) == [tokens.index("abc")]


def test_qwen2_composes_characters(tmp_path: Path) -> None:
    qwen = load_gguf(write_gguf(tmp_path / "m.gguf", pre="qwen2"))
    assert qwen.encode("e\u0301") == qwen.encode("é")
    assert BYTE_LEVEL.encode("e\u0301") != BYTE_LEVEL.encode("é")


def test_gguf_metadata(tmp_path: Path) -> None:
    ours = load_gguf(write_gguf(tmp_path / "m.gguf", pre="smollm", **{"tokenizer.chat_template": "{{ messages }}"}))
    assert ours.vocab_size == SIZE == REFERENCE.get_vocab_size()
    assert (ours.bos_id, ours.bos_token, ours.eos_token) == (1, "<|im_start|>", "<|im_end|>")
    assert ours.eos_ids == (2, 0)  # the file's end id first, then the other control tokens that end a text
    assert ours.chat_template == "{{ messages }}"
    assert ours.encode("<|im_end|>") == [2]


def test_gguf_bos_eos_flags_and_user_defined_tokens(tmp_path: Path) -> None:
    fox = REFERENCE.encode("fox", add_special_tokens=False).ids
    types = [int(gguf.TokenType.NORMAL)] * SIZE
    types[1] = types[2] = int(gguf.TokenType.CONTROL)
    types[0] = int(gguf.TokenType.USER_DEFINED)
    path = write_gguf(tmp_path / "m.gguf", pre="smollm", add_bos_token=True, add_eos_token=True, token_type=types)
    ours = load_gguf(path)
    assert ours.encode("fox") == [1, *fox, 2]
    assert ours.encode("fox", add_special=False) == fox
    # A user-defined token is matched whole like a special one, but it is text: decoding shows it.
    assert ours.encode("<|endoftext|>fox", add_special=False) == [0, *fox]
    assert ours.decode([1, 0, *fox, 2]) == "<|endoftext|>fox"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "kind 'bert'"),
        ({"pre": "unheard-of"}, "'unheard-of' is not supported"),
        ({"drop": ["tokens"]}, r"no tokenizer\.ggml\.tokens"),
        ({"drop": ["merges"]}, r"no tokenizer\.ggml\.merges"),
        ({"merges": ["a b c"]}, "malformed merge 'a b c'"),
        ({"merges": ["nosuch token"]}, "broken"),
        ({"token_type": [1, 1]}, f"{SIZE} tokens but 2 token types"),
    ],
)
def test_gguf_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", **({"pre": "smollm"} | change))
    with pytest.raises(InvalidInputError, match=message) as caught:
        load_gguf(path)
    assert "\n" not in str(caught.value)


# From GGUF: sentencepiece.


def sentencepiece_fields(**extra: Any) -> dict[str, Any]:
    kinds = gguf.TokenType
    entries = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    entries += [(f"<0x{b:02X}>", kinds.BYTE) for b in range(256)]
    entries += [(t, kinds.NORMAL) for t in ["▁the", "▁t", "he", "th", "▁do", "do", "og", "▁▁", "</", "s>"]]
    entries += [(c, kinds.NORMAL) for c in "▁thedogfx</s"]
    tokens = list(dict(entries))
    return {
        "model": "llama",
        "tokens": tokens,
        "token_type": [int(dict(entries)[t]) for t in tokens],
        "scores": [-float(i) for i in range(len(tokens))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        **extra,
    }


def spell(tokenizer: Tokenizer, tokens: Sequence[str], ids: Sequence[int]) -> list[str]:
    assert tokenizer.vocab_size == len(tokens)
    return [tokens[i] for i in ids]


def test_sentencepiece_merges_by_score(tmp_path: Path) -> None:
    fields = sentencepiece_fields()
    ours = load_gguf(write_fields(tmp_path / "m.gguf", fields))
    cases = {
        # The best score goes first: "▁t" before "he" before "th", "do" before "og".
        "the dog": ["<s>", "▁the", "▁do", "g"],
        "  the": ["<s>", "▁▁", "▁the"],
        "fé": ["<s>", "▁", "f", "<0xC3>", "<0xA9>"],  # bytes where there is no token
        "the</s>the": ["<s>", "▁the", "</s>", "▁the"],  # a special token; the prefix comes again behind it
        "<0xC3>": ["<s>", "▁", "<", "<0x30>", "x", "<0x43>", "<0x33>", "<0x3E>"],  # text that looks like a byte token
    }
    for text, pieces in cases.items():
        assert spell(ours, fields["tokens"], ours.encode(text)) == pieces, text
        assert ours.decode(ours.encode(text), starts_text=True) == text.replace("</s>", " ")
    assert (ours.bos_id, ours.eos_ids) == (1, (2,))


def test_sentencepiece_without_prefix_and_bos(tmp_path: Path) -> None:
    fields = sentencepiece_fields(add_space_prefix=False, add_bos_token=False)
    ours = load_gguf(write_fields(tmp_path / "m.gguf", fields))
    assert spell(ours, fields["tokens"], ours.encode("the the")) == ["t", "he", "▁the"]
    assert ours.decode(ours.encode(" the")) == " the"


def test_sentencepiece_invalid_bytes_do_not_spoil_their_neighbours(tmp_path: Path) -> None:
    ours = load_gguf(write_fields(tmp_path / "m.gguf", sentencepiece_fields()))
    byte = [3 + b for b in "é".encode()]
    stream = ours.stream()
    assert [stream.push([i]) for i in [*byte, 3 + 0xFF, *byte]] == ["", "é", "\ufffd", "", "é"]


# From a folder.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    REFERENCE.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write_json(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def test_folder_and_file_give_the_same(folder: Path) -> None:
    for path in (folder, str(folder), folder / "tokenizer.json"):
        ours = Tokenizer.from_file(path)
        assert all(ours.encode(text) == REFERENCE.encode(text).ids for text in TEXTS)


def test_special_ids_from_the_configs(folder: Path) -> None:
    ours = Tokenizer.from_file(folder)
    assert (ours.bos_id, ours.eos_ids, ours.eos_token, ours.chat_template) == (None, (), "", None)
    write_json(folder, config={"bos_token_id": 1, "eos_token_id": 0})
    ours = Tokenizer.from_file(folder)
    assert (ours.bos_id, ours.eos_ids) == (1, (0,))
    write_json(folder, generation_config={"bos_token_id": 0, "eos_token_id": [0, 2]})  # wins over config.json
    ours = Tokenizer.from_file(folder)
    assert (ours.bos_id, ours.eos_ids) == (0, (0, 2))
    write_json(folder, tokenizer_config={"bos_token": None, "eos_token": {"content": "<|im_end|>"}})
    ours = Tokenizer.from_file(folder)
    assert (ours.bos_id, ours.bos_token, ours.eos_ids, ours.eos_token) == (None, "", (2, 0), "<|im_end|>")


def test_chat_template_from_the_configs(folder: Path) -> None:
    write_json(folder, tokenizer_config={"chat_template": "one"})
    assert Tokenizer.from_file(folder).chat_template == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    write_json(folder, tokenizer_config={"chat_template": named})
    assert Tokenizer.from_file(folder).chat_template == "three"
    (folder / "chat_template.jinja").write_text("four\n", encoding="utf-8")
    assert Tokenizer.from_file(folder).chat_template == "four\n"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    inner = HfTokenizer.from_str(REFERENCE.to_str())
    inner.enable_truncation(2)
    inner.enable_padding(length=64)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_file(tmp_path).encode(CORPUS[0]) == REFERENCE.encode(CORPUS[0]).ids


def test_save_and_load_give_the_same(tmp_path: Path) -> None:
    template = "{{ bos_token }}äöü 日本"
    path = write_gguf(tmp_path / "m.gguf", pre="smollm", add_bos_token=True, **{"tokenizer.chat_template": template})
    before = load_gguf(path)
    before.save(tmp_path / "new" / "folder")
    after = Tokenizer.from_file(tmp_path / "new" / "folder")
    for name in ("vocab_size", "bos_id", "eos_ids", "bos_token", "eos_token", "chat_template"):
        assert getattr(after, name) == getattr(before, name)
    for text in TEXTS:
        assert after.encode(text) == before.encode(text)
        assert after.decode(after.encode(text)) == before.decode(before.encode(text))


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"give a model folder with tokenizer\.json$"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(InvalidInputError, match=r"convert its tokenizer\.model first"):
        Tokenizer.from_file(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("content", ['{"a": ', "[]"])
def test_malformed_files(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(InvalidInputError, match=f"cannot read .*{name}") as caught:
        Tokenizer.from_file(folder)
    assert "\n" not in str(caught.value)


# Encoding and decoding.


def test_text_that_is_not_unicode() -> None:
    with pytest.raises(InvalidInputError, match="character 2"):
        BYTE_LEVEL.encode("ab\ud800")


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_ids_that_are_no_ids(bad: int) -> None:
    with pytest.raises(InvalidInputError, match=str(bad)):
        BYTE_LEVEL.decode([5, bad])


def test_ids_beyond_the_vocabulary_say_nothing() -> None:
    assert BYTE_LEVEL.decode([*BYTE_LEVEL.encode("fox"), SIZE, 2**32 - 1]) == "fox"


def test_special_tokens_are_shown_on_demand() -> None:
    ids = BYTE_LEVEL.encode("the<|im_end|>")
    assert BYTE_LEVEL.decode(ids) == "the"
    assert BYTE_LEVEL.decode(ids, skip_special=False) == "the<|im_end|>"
    stream = BYTE_LEVEL.stream(skip_special=False)
    assert stream.push(ids) + stream.flush() == "the<|im_end|>"


def test_emoji_is_held_back_until_it_is_whole() -> None:
    ids = [BYTE_LEVEL.encode(c)[0] for c in "ab"]
    emoji = [REFERENCE.get_vocab()[c] for c in "ðŁ¦Ĭ"]  # the four bytes of U+1F98A, a token each
    stream = BYTE_LEVEL.stream()
    assert [stream.push([i]) for i in [ids[0], *emoji, ids[1]]] == ["a", "", "", "", "🦊", "b"]
    assert stream.flush() == ""
    cut = BYTE_LEVEL.stream()
    assert [cut.push([i]) for i in emoji[:3]] == ["", "", ""]
    assert cut.flush() == "\ufffd"
    assert cut.flush() == ""


def test_text_before_an_unfinished_character_is_not_held_back() -> None:
    tokens = {"ab": 0, "aâĢ": 1, "ĵ": 2, "âĢ": 3}
    inner = HfTokenizer(models.BPE(vocab=tokens, merges=[]))
    inner.decoder = decoders.ByteLevel()
    stream = Tokenizer(inner, bos_id=None, eos_ids=(), chat_template=None).stream()
    assert [stream.push([i]) for i in (1, 2, 3, 0)] == ["a", "\u2013", "", "\ufffdab"]


@given(st.text(max_size=40))
def test_round_trip(text: str) -> None:
    ids = BYTE_LEVEL.encode(text)
    assert BYTE_LEVEL.decode(ids, skip_special=False) == text
    stream = BYTE_LEVEL.stream(skip_special=False)
    pieces = [stream.push([i]) for i in ids]
    assert "".join(pieces) == text
    assert stream.flush() == ""
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, SIZE + 20), max_size=30), st.integers(1, 5), st.booleans())
def test_stream_of_any_ids_says_what_the_tokenizers_package_says(ids: list[int], step: int, skip: bool) -> None:
    stream = BYTE_LEVEL.stream(skip)
    text = "".join(stream.push(ids[i : i + step]) for i in range(0, len(ids), step)) + stream.flush()
    assert text == REFERENCE.decode(ids, skip_special_tokens=skip)
    assert text == BYTE_LEVEL.decode(ids, skip)


# Tokenizers with other decoders.


def wordpiece() -> HfTokenizer:
    inner = HfTokenizer(models.WordPiece(vocab={"[UNK]": 0, "the": 1, "fox": 2, "##es": 3}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece()
    return inner


def metaspace() -> HfTokenizer:
    inner = HfTokenizer(models.BPE(vocab={c: i for i, c in enumerate("▁thefox")}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return inner


def regex_replace() -> HfTokenizer:
    """A byte-fallback decoder in an order we do not take apart."""
    tokens = {"<0xC3>": 0, "<0xA9>": 1, "the": 2}
    inner = HfTokenizer(models.BPE(vocab=tokens, merges=[], byte_fallback=True))
    inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return inner


@pytest.mark.parametrize(
    ("make", "ids"),
    [(wordpiece, [1, 2, 3, 1]), (metaspace, [0, 1, 2, 3, 0, 4, 5, 6]), (regex_replace, [2, 0, 1, 2, 0])],
)
def test_other_decoders_stream_too(make: Callable[[], HfTokenizer], ids: list[int]) -> None:
    inner = make()
    ours = Tokenizer(inner, bos_id=None, eos_ids=(), chat_template=None)
    stream = ours.stream()
    pieces = [stream.push([i]) for i in ids]
    assert len([p for p in pieces if p]) >= 2  # it streams
    assert "".join(pieces) + stream.flush() == ours.decode(ids)
    assert ours.decode(ids, starts_text=True) == inner.decode(ids)
    assert stream.flush() == ""


def test_template_processing_of_the_file_is_kept(tmp_path: Path) -> None:
    inner = HfTokenizer.from_str(REFERENCE.to_str())
    inner.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    inner.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_file(tmp_path)
    assert ours.encode("fox") == [1, *ours.encode("fox", add_special=False)]


def test_the_bytes_of_single_tokens_are_those_of_the_text() -> None:
    inner = HfTokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(inner, bos_id=None, eos_ids=[], chat_template=None)
    text = "añ 🙂\n"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert tokenizer.token_bytes(10**6) == b""
    with pytest.raises(InvalidInputError):
        tokenizer.token_bytes(-1)
