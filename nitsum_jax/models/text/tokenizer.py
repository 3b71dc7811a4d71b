"""Text to token ids and back, from a Hugging Face `tokenizer.json` or from the metadata of a GGUF file.

The ids are those that Hugging Face's own tokenizer of the model gives.  That holds for text that spells a special
token, too: "<|im_end|>" inside a prompt becomes the one special id, as it does there.  Whoever passes text of strangers
to a model must decide whether that is wanted; nothing here strips it.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import gguf
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HfTokenizer

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.text.detokenizer import Detokenizer, StreamDecoder
from nitsum_jax.models.text.gguf_vocabulary import LLAMA3_NAMES, GgufVocabulary
from nitsum_jax.models.text.special_ids import ids_of_json, valid_ids

_log = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"

# Control tokens that end a turn or a text.  A GGUF file names only one end-of-sequence id, where the generation config
# of the same model lists several (Llama 3: 128001, 128008, 128009), so these are added when the file has them.
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>")

# How the text is split before merging, by `tokenizer.ggml.pre`.  The patterns are facts of the published tokenizers.
_GPT2_NAMES = ("gpt-2", "default")
_QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN2_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES


class Tokenizer:
    """One model's tokenizer, with its special ids and its chat template; immutable and thread-safe.

    Attributes:
      vocab_size: one more than the largest token id (the model's own vocabulary may be padded beyond it).
      bos_id: id that starts a text, or None.
      eos_ids: ids that end generation; the first is the primary one.
      bos_token: spelling of `bos_id`, "" if there is none; chat templates ask for it.
      eos_token: spelling of the first of `eos_ids`, "" if there is none.
      chat_template: jinja2 text, or None.
    """

    def __init__(
        self, inner: HfTokenizer, *, bos_id: int | None, eos_ids: Sequence[int], chat_template: str | None
    ) -> None:
        """Wraps `inner`, whose truncation and padding (some published files carry them) are switched off."""
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._detokenizer = Detokenizer(inner)
        self.vocab_size = _size(inner)
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.bos_token = "" if bos_id is None else inner.id_to_token(bos_id) or ""
        self.eos_token = inner.id_to_token(self.eos_ids[0]) or "" if self.eos_ids else ""
        self.chat_template = chat_template

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Reads a model folder (or the `tokenizer.json` in it) in Hugging Face's layout.

        Beside tokenizer.json it uses, where they are there, tokenizer_config.json (special tokens, chat template),
        chat_template.jinja (wins over the template in the config), generation_config.json and config.json (end ids).

        Raises:
          InvalidInputError: a file is missing or malformed.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        file = folder / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            hint = "; convert its tokenizer.model first" if (folder / "tokenizer.model").exists() else ""
            raise InvalidInputError(f"no tokenizer in {folder}: give a model folder with {TOKENIZER_FILE}{hint}")
        try:
            inner = HfTokenizer.from_file(str(file))
        except Exception as e:  # the tokenizers package raises bare Exception
            raise InvalidInputError(f"cannot read {file}: {_one_line(e)}; fetch the file again") from None
        config = _read_json(folder / TOKENIZER_CONFIG_FILE)
        generation = _read_json(folder / GENERATION_CONFIG_FILE)
        model = _read_json(folder / "config.json")
        rows = model.get("vocab_size")
        size = max(_size(inner), rows if isinstance(rows, int) else 0)
        special = ids_of_json(generation, size, GENERATION_CONFIG_FILE)
        of_model = ids_of_json(
            model, size, "config.json", warn=False
        )  # the reader of the model's config warns about it
        eos_ids = list(special.ends or of_model.ends)
        eos_id = _spelled_id(inner, config, "eos_token")
        if eos_id is not None:
            eos_ids.insert(0, eos_id)
        bos_id = _spelled_id(inner, config, "bos_token")
        if "bos_token" not in config:
            bos_id = of_model.bos if special.bos is None else special.bos
        template = _config_template(config)
        if (folder / CHAT_TEMPLATE_FILE).is_file():
            template = (folder / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
        return cls(inner, bos_id=bos_id, eos_ids=eos_ids, chat_template=template)

    @classmethod
    def from_gguf(cls, reader: gguf.GGUFReader) -> Self:
        """Rebuilds the tokenizer from the `tokenizer.*` metadata of a GGUF file.

        Byte-level BPE ("gpt2") is read with the pre-tokenizers smollm, llama-bpe, qwen2 and gpt-2, sentencepiece BPE
        ("llama") with its byte fallback.  `eos_ids` gets the end-of-turn tokens beside the file's one end id.

        Raises:
          InvalidInputError: the file has no tokenizer, or one of another kind.
        """
        meta = GgufVocabulary(reader)
        tokens: list[str] = meta.require("tokens")
        kind = meta.get("model")
        if kind == "gpt2":
            inner = _byte_level_bpe(meta, tokens)
        elif kind == "llama":
            inner = _sentencepiece_bpe(meta, tokens)
        else:
            raise InvalidInputError(f"the GGUF file's tokenizer is of kind {kind!r}: only gpt2 and llama are supported")
        typed = list(zip(tokens, meta.types, strict=True))
        control = [t for t, of_type in typed if of_type == gguf.TokenType.CONTROL]
        user = [t for t, of_type in typed if of_type == gguf.TokenType.USER_DEFINED]
        inner.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
        inner.add_tokens([AddedToken(t, normalized=False, special=False) for t in user])
        special = meta.special
        eos = valid_ids(meta.get("eos_token_id"), len(tokens), "", warn=False) if meta.get("add_eos_token") else ()
        _add_template(inner, tokens, special.bos if meta.adds_bos() else None, eos[0] if eos else None)
        ends = [inner.token_to_id(t) for t in _END_TOKENS if t in control]
        eos_ids = [*special.ends, *(i for i in ends if i is not None)]
        return cls(inner, bos_id=special.bos, eos_ids=eos_ids, chat_template=meta.chat_template())

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`.

        Args:
          text: any text; special tokens spelled in it become their ids.
          add_special: whether the ids that the model wants around a text (BOS) are added.  A rendered chat template
            spells them itself: pass False for it.

        Raises:
          InvalidInputError: `text` cannot be written as UTF-8 (lone surrogates).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise InvalidInputError(f"text is not valid Unicode at character {e.start}: send UTF-8") from None
        return self._inner.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Iterable[int], skip_special: bool = True, *, starts_text: bool = False) -> str:
        """Text of `ids`: what a stream of them says; ids outside the vocabulary say nothing.

        Bytes that are not UTF-8 become U+FFFD.

        Args:
          ids: of an output, which continues a text, or of a whole text.
          skip_special: whether special tokens say nothing, as in outputs, or are spelled.
          starts_text: whether the ids begin a text.  The space that sentencepiece puts before its first word is dropped
            then; in an output it is the space between prompt and output.

        Raises:
          InvalidInputError: an id is negative or does not fit 32 bits.
        """
        stream = self._detokenizer.stream(skip_special, starts_text)
        return stream.push(ids) + stream.flush()

    def token_bytes(self, token_id: int, skip_special: bool = False) -> bytes:
        """What one token says in an output, as UTF-8: a part of a character where that is spread over several tokens.

        The bytes of all tokens of an output, decoded together, are its text, if special tokens are skipped in both.

        Raises:
          InvalidInputError: the id is negative or does not fit 32 bits.
        """
        return self._detokenizer.token_bytes(token_id, skip_special)

    @property
    def special_ids(self) -> frozenset[int]:
        """The tokens that say nothing in an output."""
        return self._detokenizer.special_ids

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder for the ids of an output as they come; see StreamDecoder."""
        return self._detokenizer.stream(skip_special, starts_text=False)

    def save(self, folder: str | Path) -> None:
        """Writes the files that `from_file` reads; Hugging Face reads them as well."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._inner.save(str(folder / TOKENIZER_FILE))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token or None,
            "eos_token": self.eos_token or None,
            "clean_up_tokenization_spaces": False,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        ends: dict[str, Any] = {"eos_token_id": list(self.eos_ids)} if self.eos_ids else {}
        if self.bos_id is not None:
            ends["bos_token_id"] = self.bos_id
        _write_json(folder / TOKENIZER_CONFIG_FILE, config)
        _write_json(folder / GENERATION_CONFIG_FILE, ends)


def _byte_level_bpe(meta: GgufVocabulary, tokens: list[str]) -> HfTokenizer:
    """Byte-level BPE (GPT-2's kind) with the split that the file names."""
    pre = meta.pre
    merges = meta.merges
    if merges is None:
        raise InvalidInputError("the GGUF file has no tokenizer.ggml.merges: convert the model with its tokenizer")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    normalizer: normalizers.Normalizer | None = None
    split: pre_tokenizers.PreTokenizer
    if pre == "smollm":
        gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    elif pre in _GPT2_NAMES:
        split = pre_tokenizers.ByteLevel(add_prefix_space=bool(meta.get("add_space_prefix")), use_regex=True)
    elif pre in LLAMA3_NAMES:
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"), byte_level])
    elif pre in _QWEN2_NAMES:
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"), byte_level])
        normalizer = normalizers.NFC()
    else:
        known = ", ".join(("smollm", *LLAMA3_NAMES, *_QWEN2_NAMES, *_GPT2_NAMES))
        raise InvalidInputError(f"the GGUF file's pre-tokenizer {pre!r} is not supported: only {known} are")
    # Llama 3 takes a whole word from the vocabulary even if no chain of merges leads to it.
    inner = HfTokenizer(_bpe(tokens, merges, ignore_merges=pre in LLAMA3_NAMES))
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.pre_tokenizer = split
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentencepiece_bpe(meta: GgufVocabulary, tokens: list[str]) -> HfTokenizer:
    """Sentencepiece BPE with byte fallback (Llama 2, Mistral 7B): U+2581 stands for a space, one is put in front."""
    types = meta.types
    merges = meta.merges or _merges_from_scores(tokens, meta.require("scores"), types)
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.UNKNOWN), None)
    inner = HfTokenizer(_bpe(tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = meta.get("add_space_prefix") is not False
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("\u2581")] if prefix else []
    inner.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return inner


def _bpe(tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, **options)
    except Exception as e:  # the tokenizers package raises bare Exception: a merge of tokens that are not there
        raise InvalidInputError(f"the GGUF file's tokenizer is broken: {_one_line(e)}; convert it again") from None


def _merges_from_scores(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Sentencepiece keeps scores, not merges: any pair that spells a token may be merged, best token first.

    Only ordinary tokens take part: no merging may lead to a control token or to "<0x0A>".
    """
    ordinary = (gguf.TokenType.NORMAL, gguf.TokenType.USER_DEFINED)
    ranked = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind in ordinary}
    best_first = sorted(ranked, key=lambda t: -ranked[t])
    cuts = ((t[:i], t[i:]) for t in best_first for i in range(len(t) - 1, 0, -1))
    return [(left, right) for left, right in cuts if left in ranked and right in ranked]


def _add_template(inner: HfTokenizer, tokens: list[str], bos_id: int | None, eos_id: int | None) -> None:
    """Lets encode() put BOS before and EOS behind a text, for those that are not None."""
    ids = [i for i in (bos_id, eos_id) if i is not None]
    if not ids:
        return
    before = [] if bos_id is None else [tokens[bos_id]]
    behind = [] if eos_id is None else [tokens[eos_id]]
    inner.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *behind], special_tokens=[(tokens[i], i) for i in dict.fromkeys(ids)]
    )


def _spelling(entry: Any) -> str:
    """A special token in tokenizer_config.json is a string, a dict with its content, or null."""
    return str(entry.get("content", "")) if isinstance(entry, dict) else str(entry or "")


def _spelled_id(inner: HfTokenizer, config: dict[str, Any], key: str) -> int | None:
    """The id of a special token that tokenizer_config.json spells."""
    token = _spelling(config.get(key))
    found = inner.token_to_id(token) if token else None
    if token and found is None:
        _log.warning("%s of %s is %r, which the tokenizer lacks: it is ignored", key, TOKENIZER_CONFIG_FILE, token)
    return found


def _size(inner: HfTokenizer) -> int:
    return max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _config_template(config: dict[str, Any]) -> str | None:
    """The template in tokenizer_config.json: a string, or a list of named ones of which "default" is meant."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((str(t["template"]) for t in template if t.get("name") == "default"), None)
    return None if template is None else str(template)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise InvalidInputError(f"cannot read {path}: {_one_line(e)}; fetch the file again") from None
    if not isinstance(data, dict):
        raise InvalidInputError(f"cannot read {path}: it is not a JSON object; fetch the file again")
    return data


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
