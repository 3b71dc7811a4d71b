"""A tiny tokenizer of every kind that published language models have."""

from collections.abc import Callable, Sequence

import gguf
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HfTokenizer

from nitsum_jax.models.text.tokenizer import Tokenizer

SPECIAL = ("<unk>", "<s>", "</s>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_WORDS = ("▁wor", "ld", "▁the", "▁a", "▁▁", "é", "語", "▁語")
_MERGES = (("▁", "w"), ("▁w", "o"), ("▁wo", "r"), ("l", "d"), ("▁", "a"), ("▁", "▁"), ("▁", "語"), ("▁", "t"))


def _sentencepiece(decoder: decoders.Decoder, *, prefix: bool = True) -> HfTokenizer:
    tokens = [*SPECIAL, *_BYTES, "▁", *map(chr, range(0x21, 0x7F)), *_WORDS, *map("".join, _MERGES)]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    inner = HfTokenizer(models.BPE(vocab=vocab, merges=list(_MERGES), unk_token="<unk>", byte_fallback=True))
    first: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prefix else []
    inner.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    inner.decoder = decoder
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return inner


def _steps(*more: decoders.Decoder) -> decoders.Decoder:
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more])


def _byte_level(decoder: decoders.Decoder, split: str | None = None, special: Sequence[str] = ("<s>",)) -> HfTokenizer:
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġw", "Ġwo", "ÃĹ"]
    vocab = {token: number for number, token in enumerate(tokens)}
    inner = HfTokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "w"), ("Ġw", "o"), ("Ã", "Ĺ")]))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    inner.pre_tokenizer = (
        whole
        if split is None
        else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), behavior="isolated"), whole])
    )
    inner.decoder = decoder
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return inner


def tekken() -> HfTokenizer:
    """Mistral's newer kind: byte-level, control tokens first, words cut where their case changes."""
    split = r"[^\r\n\p{L}\p{N}]?\p{Lu}*\p{Ll}+|[^\r\n\p{L}\p{N}]?\p{Lu}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+"
    control = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<SPECIAL_{number}>" for number in range(5, 20)))
    return _byte_level(decoders.ByteLevel(), split, control)


def word_piece() -> HfTokenizer:
    """Not of a language model; its decoder is one that is not taken apart."""
    words = ["[UNK]", "the", "fox", "##es", ".", "##é", "a"]
    inner = HfTokenizer(models.WordPiece(vocab={word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece(cleanup=False)
    return inner


KINDS: dict[str, Callable[[], HfTokenizer]] = {
    "byte_level": lambda: _byte_level(decoders.ByteLevel()),
    "byte_level_in_a_sequence": lambda: _byte_level(decoders.Sequence([decoders.ByteLevel()])),
    "tekken": tekken,
    "llama_2": lambda: _sentencepiece(_steps(decoders.Strip(" ", 1, 0))),
    "gemma": lambda: _sentencepiece(_steps(), prefix=False),
    "metaspace_first": lambda: _sentencepiece(decoders.Metaspace("▁", "first")),
    "metaspace_always": lambda: _sentencepiece(decoders.Sequence([decoders.Metaspace("▁", "always")])),
    "metaspace_never": lambda: _sentencepiece(decoders.Metaspace("▁", "never"), prefix=False),
    "metaspace_and_bytes": lambda: _sentencepiece(
        decoders.Sequence([decoders.Metaspace("▁"), decoders.ByteFallback(), decoders.Fuse()])
    ),
    "word_piece": word_piece,
}
SENTENCEPIECE = tuple(name for name in KINDS if name.startswith(("llama", "gemma", "metaspace")))


def wrapped(inner: HfTokenizer) -> Tokenizer:
    """As the server has it."""
    return Tokenizer(inner, bos_id=1, eos_ids=(2,), chat_template=None)


def sentencepiece_fields() -> dict[str, object]:
    """`tokenizer.ggml` fields of the Llama 2 kind."""
    kinds = gguf.TokenType
    entries = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    entries += [(token, kinds.BYTE) for token in _BYTES]
    words = ["▁", *map(chr, range(0x21, 0x7F)), *_WORDS, *map("".join, _MERGES)]
    entries += [(token, kinds.NORMAL) for token in dict.fromkeys(words)]
    return {
        "model": "llama",
        "tokens": [token for token, _ in entries],
        "token_type": [int(kind) for _, kind in entries],
        "scores": [-float(number) for number in range(len(entries))],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
