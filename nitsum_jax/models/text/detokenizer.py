"""Token ids to text: at once, piece by piece, and token by token, such that the three agree.

What a model says continues a text.  Sentencepiece spells " world" and the "world" that begins a text alike and drops
the space of the latter when it decodes, so an output decoded by itself would lose the space between prompt and output.
Here the ids are those of a continuation unless the caller says that they begin a text.
"""

import abc
import codecs
import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders

from nitsum_jax.errors import InvalidInputError

# Characters that stand for bytes in byte-level vocabularies: printable Latin-1 for itself, the rest from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF_CHAR = {chr(b): b for b in _PRINTABLE}
_BYTE_OF_CHAR |= {chr(0x100 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_UNKNOWN = "\ufffd"


class StreamDecoder(abc.ABC):
    """Turns ids into text piece by piece, such that the pieces joined are the text of all ids.

    Nothing half-done is ever handed out: bytes that may still become a character wait for the next token.  U+FFFD
    stands only for bytes that cannot become one any more (or for a U+FFFD that the model said).
    """

    @abc.abstractmethod
    def push(self, ids: Iterable[int]) -> str:
        """Takes new ids; returns the text that is ready, often "".

        Raises:
          InvalidInputError: an id is negative or does not fit 32 bits.
        """

    @abc.abstractmethod
    def flush(self) -> str:
        """Ends the stream; returns what waited, an unfinished character as U+FFFD."""


class Detokenizer:
    """The way back of one tokenizer; immutable and thread-safe."""

    def __init__(self, inner: HfTokenizer) -> None:
        """Looks at the decoder of `inner`, which must not change any more."""
        self._inner = inner
        self.special_ids = frozenset(i for i, token in inner.get_added_tokens_decoder().items() if token.special)
        self._pieces = _pieces_of(inner)

    def stream(self, skip_special: bool, starts_text: bool, shown: frozenset[str] = frozenset()) -> StreamDecoder:
        """A decoder for ids as they come.

        Args:
          skip_special: whether special tokens say nothing, or are spelled.
          shown: special tokens that are spelled all the same, where every token stands for known bytes.
          starts_text: whether the ids begin a text; else they continue one.
        """
        if self._pieces is None:
            return _WindowDecoder(self._inner, skip_special, None if starts_text else self._anchor)
        silent = self.special_ids if skip_special else frozenset()
        spelled = {self._inner.token_to_id(token) for token in shown}
        return _ByteDecoder(self._pieces, silent - spelled, starts_text)

    def token_bytes(self, token_id: int, skip_special: bool) -> bytes:
        """What one token says in the midst of a text.

        Raises:
          InvalidInputError: the id is negative or does not fit 32 bits.
        """
        if skip_special and token_id in self.special_ids:
            return b""
        if self._pieces is not None:
            return self._pieces.read(_checked(token_id))
        alone = _WindowDecoder(self._inner, False, self._anchor)
        return (alone.push((token_id,)) + alone.flush()).encode()

    @functools.cached_property
    def _anchor(self) -> int | None:
        """A token that says something whatever follows: behind it others say what they say in the midst of a text."""
        for token in range(self._inner.get_vocab_size()):
            text = self._inner.decode([token])
            if text and _UNKNOWN not in text and self._inner.decode([token, token]).startswith(text):
                return token
        return None


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """A decoder taken apart: known bytes for every token.

    Attributes:
      read: what a token says in the midst of a text.
      read_first: what it says where it is the first one of a text; None for an id that is no token.
      strip: how many spaces the beginning of a text loses.
    """

    read: Callable[[int], bytes]
    read_first: Callable[[int], bytes | None] | None
    strip: int


class _ByteDecoder(StreamDecoder):
    """For byte-level, metaspace and byte-fallback vocabularies, in which every token stands for known bytes.

    tokenizers.decoders.DecodeStream would hold text back for as long as it ends in U+FFFD, and fails when a run of
    fallback bytes turns out invalid after a part of it was shown; bytes have neither trouble, and cost O(1) a token.
    """

    def __init__(self, pieces: _Pieces, skipped: frozenset[int], starts_text: bool) -> None:
        self._read = pieces.read
        self._read_first = pieces.read_first if starts_text else None
        self._strip = pieces.strip if starts_text else 0
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        return self._text(b"".join(self._bytes(_checked(i)) for i in ids if i not in self._skipped))

    def flush(self) -> str:
        return self._text(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        if self._read_first is None:
            return self._read(token_id)
        first = self._read_first(token_id)
        if first is None:
            return b""
        self._read_first = None
        return first

    def _text(self, data: bytes, final: bool = False) -> str:
        text = self._utf8.decode(data, final)
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


class _WindowDecoder(StreamDecoder):
    """For any other kind of decoder: the tokenizers package's own stream, and the full text for the rest at the end."""

    def __init__(self, inner: HfTokenizer, skip_special: bool, anchor: int | None) -> None:
        """Begins.

        Args:
          inner: the tokenizer.
          skip_special: whether special tokens say nothing.
          anchor: a token that the ids are decoded behind, so that they continue a text; None where they begin one.
        """
        self._inner = inner
        self._skip_special = skip_special
        self._stream = decoders.DecodeStream(skip_special_tokens=skip_special)
        self._ids: list[int] = []
        self._shown = 0
        if anchor is not None:
            self.push((anchor,))
            self._shown = len(inner.decode([anchor]))

    def push(self, ids: Iterable[int]) -> str:
        text = ""
        for i in ids:
            self._ids.append(_checked(i))
            with contextlib.suppress(Exception):  # it may give up on invalid bytes; then flush() brings the rest
                text += self._stream.step(self._inner, i) or ""
        self._shown += len(text)
        return text

    def flush(self) -> str:
        rest = self._inner.decode(self._ids, skip_special_tokens=self._skip_special)[self._shown :]
        self._shown += len(rest)
        return rest


def _pieces_of(inner: HfTokenizer) -> _Pieces | None:
    """The decoder of a tokenizer taken apart; None if one token's text depends on the others in some unknown way."""
    # The pickling state is the decoder's JSON; inner.to_str() would write the whole vocabulary for it.
    steps = _flat(json.loads(inner.decoder.__getstate__())) if inner.decoder is not None else []
    kinds = [step["type"] for step in steps]
    strip = 0
    if kinds[-2:] == ["Fuse", "Strip"] and steps[-1]["content"] == " " and not steps[-1]["stop"]:
        strip = steps[-1]["start"]
        steps, kinds = steps[:-1], kinds[:-1]
    if kinds[-1:] == ["Fuse"]:
        steps, kinds = steps[:-1], kinds[:-1]

    # Every token of every stream asks; the common ones are few.
    def cached(of_token: Callable[[str], bytes]) -> Callable[[int], bytes]:
        return functools.lru_cache(maxsize=2**16)(lambda i: of_token(inner.id_to_token(i) or ""))

    if kinds == ["ByteLevel"]:
        return _Pieces(cached(_byte_level_bytes), None, strip)
    to_bytes: Callable[[str], bytes] = str.encode
    if kinds[-1:] == ["ByteFallback"]:
        to_bytes, steps, kinds = _byte_fallback_bytes, steps[:-1], kinds[:-1]
    elif not steps:
        return None
    if kinds == ["Metaspace"]:
        space = steps[0]["replacement"]
        dropped = "" if steps[0]["prepend_scheme"] != "never" else " "

        def read_first(i: int) -> bytes | None:
            token = inner.id_to_token(i)
            return None if token is None else to_bytes(token.replace(space, dropped))

        return _Pieces(cached(lambda token: to_bytes(token.replace(space, " "))), read_first, strip)
    pairs = [(step["pattern"].get("String"), step["content"]) for step in steps if step["type"] == "Replace"]
    if len(pairs) < len(steps) or any(pattern is None for pattern, _ in pairs):
        return None

    def replaced(token: str) -> bytes:
        for pattern, content in pairs:
            token = token.replace(pattern, content)
        return to_bytes(token)

    return _Pieces(cached(replaced), None, strip)


def _flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a decoder; those of sequences in sequences, too."""
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flat(inner)]


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHAR[c] for c in token)
    except KeyError:  # an added token that is spelled as plain text
        return token.encode("utf-8")


def _byte_fallback_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.encode("utf-8")


def _checked(token_id: int) -> int:
    if not 0 <= token_id < 2**32:
        raise InvalidInputError(f"token id {token_id} is out of range: ids are 0 to the vocabulary size")
    return token_id
