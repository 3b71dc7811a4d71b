"""Forms compiled by llguidance into matchers, which say after every token which tokens may follow."""

import collections
import re
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

from nitsum_jax.engine.step.masks import mask_words
from nitsum_jax.errors import InvalidInputError, one_line
from nitsum_jax.runtime.structured.forms import MAX_FORM_CHARS, SPACES, FormKind, FormSpec

_KEPT = 128
_ANCHOR = "\n"
_LIMITS = LLParserLimits(verbose_errors=False)


class FormTokenizer(Protocol):
    """The part of `Tokenizer` that forms need."""

    # ruff: noqa: D102
    @property
    def vocab_size(self) -> int: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    def token_bytes(self, token_id: int, skip_special: bool = False) -> bytes: ...
    def encode(self, text: str, add_special: bool = True) -> list[int]: ...


class GrammarMatcher:
    """Follows one output; see `nitsum_jax.engine.request.TokenMatcher`."""

    def __init__(self, inner: LLMatcher, vocab: int) -> None:
        self._inner = inner
        self._vocab = vocab

    def accept(self, token: int) -> None:
        """Follows a token.

        Raises:
          ValueError: it may not come next.
        """
        if not self._inner.consume_token(token):
            raise ValueError(one_line(self._inner.get_error()) or f"token {token} may not come next")

    def restart(self) -> None:
        """Before the first token again."""
        self._inner.reset()

    def allowed(self, mask: np.ndarray) -> None:
        """Writes the bits of the tokens that may follow, i32[W]."""
        bits = np.frombuffer(self._inner.compute_bitmask(), np.int32)
        count = min(bits.size, mask.size)
        mask[:count] = bits[:count]
        if self._inner.is_error():
            raise ValueError(one_line(self._inner.get_error()))

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._inner.is_stopped()) and not self._inner.is_error()


class GrammarForm:
    """A compiled form; see `nitsum_jax.engine.request.OutputForm`."""

    def __init__(self, inner: LLMatcher, vocab: int, spec: FormSpec) -> None:
        """Makes the first mask, which is the same for all outputs.

        Raises:
          ValueError: nothing can be said that holds the form.
        """
        self._inner = inner
        self._vocab = vocab
        self.spec = spec  # from which another process compiles it again
        self.first_mask = np.zeros(mask_words(vocab), np.int32)
        self.matcher().allowed(self.first_mask)
        if not self.first_mask.any():
            raise ValueError("no token of the model can begin it")

    def matcher(self) -> GrammarMatcher:
        """For one output."""
        return GrammarMatcher(self._inner.deep_copy(), self._vocab)


class FormCompiler:
    """Compiles forms for one tokenizer, and keeps those that were used last; thread-safe."""

    def __init__(self, tokenizer: FormTokenizer, vocab: int, eos_ids: Sequence[int]) -> None:
        """Reads no tokens yet: that may take a second, and most servers never need it.

        Args:
          tokenizer: of the model.
          vocab: V of the model.
          eos_ids: what ends an output.
        """
        self._of_model = tokenizer
        self._vocab = vocab
        self._eos_ids = list(eos_ids)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._forms: collections.OrderedDict[FormSpec, GrammarForm] = collections.OrderedDict()

    def compile(self, spec: FormSpec) -> GrammarForm:
        """A form for outputs; takes milliseconds to seconds the first time.

        Raises:
          InvalidInputError: it is malformed, or uses what is not supported; the text has the reason.
        """
        with self._lock:
            if (known := self._forms.get(spec)) is not None:
                self._forms.move_to_end(spec)
                return known
            if len(spec.text) > MAX_FORM_CHARS:
                raise InvalidInputError(f"the {spec.kind.value} is too long: give at most {MAX_FORM_CHARS} characters")
            tokenizer = self._ready()
        try:
            matcher = LLMatcher(tokenizer, _grammar_of(spec), log_level=0, limits=_LIMITS)
            if matcher.is_error():
                raise ValueError(matcher.get_error())
            form = GrammarForm(matcher, self._vocab, spec)
        except Exception as error:  # whatever is wrong with it, it is the client's
            raise InvalidInputError(f"the {spec.kind.value} cannot be used: {_reason(error)}") from None
        with self._lock:
            self._forms[spec] = form
            while len(self._forms) > _KEPT:
                self._forms.popitem(last=False)
        return form

    def _ready(self) -> LLTokenizer:
        if self._tokenizer is None:
            tokens = TokenizerWrapper(TokensOfModel(self._of_model, self._vocab, self._eos_ids))
            self._tokenizer = LLTokenizer(tokens, eos_token=self._eos_ids or None)
        return self._tokenizer


class TokensOfModel:
    """A tokenizer as llguidance takes it: what each token says, by our own reading of it."""

    def __init__(self, tokenizer: FormTokenizer, vocab: int, eos_ids: Sequence[int]) -> None:
        """Reads all tokens.

        Args:
          tokenizer: of the model.
          vocab: V of the model.
          eos_ids: what ends an output.
        """
        self._tokenizer = tokenizer
        # One that never comes, where a model has none: forms then end where nothing may follow.
        self.eos_token_id = eos_ids[0] if eos_ids else vocab
        self.bos_token_id = None
        self.special_token_ids = sorted({*tokenizer.special_ids, *eos_ids, self.eos_token_id})
        size = max(vocab, tokenizer.vocab_size) if eos_ids else vocab
        self.tokens = [tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b"" for token in range(size)]
        if not eos_ids:
            self.tokens.append(b"<no end>")
        special = frozenset(self.special_token_ids)
        self._plain = {said: token for token, said in enumerate(self.tokens) if said and token not in special}
        self._longest = max(map(len, self._plain), default=0)
        self._special = special

    def __call__(self, text: bytes) -> list[int]:
        """The tokens that say a text within an output: no others may be told, as masks are made of them."""
        ids = self._tokenizer.encode(text.decode(errors="replace"), add_special=False)
        if self._says(ids, text):
            return ids
        # SentencePiece puts a space before a text that begins; behind something it does not begin.
        anchor = self._tokenizer.encode(_ANCHOR, add_special=False)
        behind = self._tokenizer.encode(_ANCHOR + text.decode(errors="replace"), add_special=False)
        ids = behind[len(anchor) :]
        return ids if behind[: len(anchor)] == anchor and self._says(ids, text) else self._longest_first(text)

    def _says(self, ids: Sequence[int], text: bytes) -> bool:
        return b"".join(self.tokens[one] for one in ids) == text and self._special.isdisjoint(ids)

    def _longest_first(self, text: bytes) -> list[int]:
        """Where the tokenizer changes what it reads, or reads a special token: always the longest token that fits."""
        ids: list[int] = []
        at = 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            size = next((size for size in sizes if text[at : at + size] in self._plain), None)
            if size is None:
                return ids  # nothing says the rest
            ids.append(self._plain[text[at : at + size]])
            at += size
        return ids


def _grammar_of(spec: FormSpec) -> str:
    match spec.kind:
        case FormKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(spec.text, overrides={"whitespace_pattern": SPACES})
        case FormKind.REGEX:
            return LLMatcher.grammar_from_regex(spec.text)
        case FormKind.GRAMMAR:
            gbnf = re.search(r"^\s*root\s*::=", spec.text, re.MULTILINE)
            return LLMatcher.grammar_from_lark(any_to_lark(spec.text) if gbnf else spec.text)


def _reason(error: Exception) -> str:
    text = one_line(str(error).replace("<non-verbose/>", ""), 300)
    return "nothing can hold it" if text.startswith("NoExtension") else text
