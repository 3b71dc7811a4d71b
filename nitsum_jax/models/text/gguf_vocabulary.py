"""The vocabulary of a GGUF file, and what it shows where the metadata around it says too little.

Old converters left out `tokenizer.ggml.pre`, and some type `<|im_start|>` as plain text.  Read to the letter, such a
file gives other ids than the model was trained with, and the model answers almost well.
"""

import functools
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

import gguf

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.text.special_ids import ids_of_gguf

LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")  # of its pre-tokenizer
_log = logging.getLogger(__name__)

# A pre-tokenizer, and tokens with their ids by which the published vocabulary it belongs to is known.
_KNOWN: dict[str, dict[int, str]] = {
    "llama-bpe": {128000: "<|begin_of_text|>", 128001: "<|end_of_text|>"},
    "qwen2": {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"},
    "smollm": {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>", 3: "<repo_name>"},
}
_UNNAMED = (None, "", "default")
# Nobody writes these as text, so a token that is spelled so and that no merge builds stands for itself.
_CONTROL = re.compile(r"<[|\uff5c][^<>\s]+[|\uff5c]>")
_NAMED_CONTROL = re.compile(r"<[^<>\s]+>")  # of tokens that the metadata names as special


class GgufVocabulary:
    """The `tokenizer.*` fields of a GGUF file.

    Attributes:
      special: the ids that begin and end a text.
    """

    def __init__(self, reader: gguf.GGUFReader) -> None:
        """Reads from an open file.

        Raises:
          InvalidInputError: it has no tokens, or a special id that is no id.
        """
        self._fields = reader.fields
        self.special = ids_of_gguf(self.field, len(self.require("tokens")))

    def field(self, key: str) -> Any:
        """The value under any key of the file, or None."""
        field = self._fields.get(key)
        return None if field is None else field.contents()

    def get(self, key: str) -> Any:
        """The value under a key of tokenizer.ggml, or None."""
        return self.field(f"tokenizer.ggml.{key}")

    def require(self, key: str) -> Any:
        """The value under a key of tokenizer.ggml; InvalidInputError without one."""
        value = self.get(key)
        if value is None:
            raise InvalidInputError(f"the GGUF file has no tokenizer.ggml.{key}: convert the model with its tokenizer")
        return value

    @functools.cached_property
    def types(self) -> list[int]:
        """The type of each token, see `token_types`."""
        tokens = self.require("tokens")
        types: list[int] = self.get("token_type") or [gguf.TokenType.NORMAL] * len(tokens)
        if len(types) != len(tokens):
            raise InvalidInputError(
                f"the GGUF file has {len(tokens)} tokens but {len(types)} token types: fetch it again"
            )
        begin = () if self.special.bos is None else (self.special.bos,)
        return token_types(tokens, types, self.merges or (), (*begin, *self.special.ends))

    @functools.cached_property
    def pre(self) -> str:
        """How text is split before merging, see `pre_tokenizer`."""
        return pre_tokenizer(self.get("pre"), self.require("tokens"))

    def adds_bos(self) -> bool:
        """The file's flag; without one, as llama.cpp does: sentencepiece and Llama 3 vocabularies start with BOS."""
        flag = self.get("add_bos_token")
        return bool(flag) if flag is not None else self.get("model") == "llama" or self.pre in LLAMA3_NAMES

    @functools.cached_property
    def merges(self) -> list[tuple[str, str]] | None:
        """The pairs that are merged, first those that come first; None if the file has none."""
        lines = self.get("merges")
        if lines is None:
            return None
        pairs = [tuple(line.split(" ")) for line in lines]
        bad = next((line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2), None)
        if bad is not None:
            raise InvalidInputError(f"the GGUF file has a malformed merge {bad!r}: fetch or convert it again")
        return pairs

    def chat_template(self) -> str | None:
        """The jinja2 text, or None."""
        template = self.field("tokenizer.chat_template")
        return None if template is None else str(template)


def pre_tokenizer(named: str | None, tokens: Sequence[str]) -> str:
    """How text is split before merging: what the file names, or what its vocabulary was made with.

    Args:
      named: `tokenizer.ggml.pre`, if the file has it.
      tokens: the vocabulary.
    """
    if named is not None and named not in _UNNAMED:
        return named
    for pre, spelled in _KNOWN.items():
        if all(i < len(tokens) and tokens[i] == token for i, token in spelled.items()):
            _log.warning("the GGUF file names no pre-tokenizer; by its vocabulary it is read with '%s'", pre)
            return pre
    _log.warning(
        "the GGUF file names no pre-tokenizer (tokenizer.ggml.pre): text is split as for GPT-2, and if the model was "
        "trained with another split, prompts get other ids and answers are worse; convert the model again"
    )
    return "default"


def token_types(
    tokens: Sequence[str], types: Sequence[int], merges: Iterable[tuple[str, str]], special: Iterable[int]
) -> list[int]:
    """The type of each token, those that are control tokens by their spelling corrected from normal to control.

    Args:
      tokens: the vocabulary.
      types: as the file has them.
      merges: pairs that are merged; what they build is text.
      special: ids that the metadata names as beginning or end.
    """
    built = {left + right for left, right in merges}
    named = set(special)
    wrong = [
        i
        for i, (token, of_type) in enumerate(zip(tokens, types, strict=True))
        if of_type == gguf.TokenType.NORMAL
        and token not in built
        and (_NAMED_CONTROL if i in named else _CONTROL).fullmatch(token)
    ]
    if not wrong:
        return list(types)
    _log.warning(
        "the GGUF file types %d tokens that look like control tokens as plain text (%s): they are read as control "
        "tokens, or chat markup would be spelled out",
        len(wrong),
        ", ".join(tokens[i] for i in wrong[:4]) + (", ..." if len(wrong) > 4 else ""),
    )
    corrected = dict.fromkeys(wrong, int(gguf.TokenType.CONTROL))
    return [corrected.get(i, of_type) for i, of_type in enumerate(types)]
