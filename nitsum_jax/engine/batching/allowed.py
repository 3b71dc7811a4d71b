"""What a sequence may say next, where its request holds the output to a form or to given tokens.

The mask for the next token can only be made when the token before it is known.  So such a sequence takes part in every
other step of its instance while the rest go on, two steps in flight as ever; masks are made by a thread, while the step
in between runs.  All state belongs to the sequence and to the host, so it stays what it is wherever the sequence goes.
"""

import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nitsum_jax.engine.request import Request, TokenMatcher
from nitsum_jax.engine.step.masks import mask_words, only, without

_LOG = logging.getLogger(__name__)
_RESTART = -1  # in place of a token


class AllowedTokens:
    """Of one sequence; used by the engine's thread, which has its matcher followed by that of the `MaskMaker`.

    Attributes:
      owner: the sequence.
      mask: for the next token, i32[W]; None while it is being made.
    """

    def __init__(self, request: Request, vocab: int, owner: Any) -> None:
        """Begins before the first token.

        Args:
          request: with a form, or with tokens that its output begins with.
          vocab: V.
          owner: the sequence.
        """
        self.owner = owner
        self.version = 0
        self._vocab = vocab
        self._forced = request.forced_ids
        self._stops = request.stop_token_ids
        self._min_tokens = request.min_tokens
        self._said = 0
        self._first = None if request.form is None else request.form.first_mask
        self.matcher: TokenMatcher | None = None if request.form is None else request.form.matcher()
        self.mask: np.ndarray | None = None
        self._look()

    @property
    def binds(self) -> bool:
        """Whether anything is forbidden from here on."""
        return self.matcher is not None or self._said < len(self._forced)

    @property
    def given(self) -> bool:
        """Whether the next token is one that the request gave: it ends nothing."""
        return self._said < len(self._forced)

    def said(self, token: int) -> int | None:
        """Takes the next token; returns it if the matcher must follow it."""
        follows = self.matcher is not None and self._said >= len(self._forced)
        self._said += 1
        self.version += 1
        self.mask = None
        if follows:
            return token
        self._look()
        return None

    def go_on(self, tokens: Sequence[int]) -> None:
        """Another engine has made these tokens of the output; before anybody else knows the sequence.

        There is no mask afterwards where nothing may follow.

        Raises:
          ValueError: the form does not allow them.
        """
        followed = False
        for token in tokens:
            if self.said(token) is not None and self.matcher is not None:
                self.matcher.accept(token)
                followed = True
        if followed and self.matcher is not None and not self.matcher.ended:
            mask = np.zeros(mask_words(self._vocab), np.int32)
            self.matcher.allowed(mask)
            self.made(mask)

    def restart(self) -> int | None:
        """The output is made again from its first token; returns what to tell the matcher, if there is one."""
        self._said = 0
        self.version += 1
        self._look()
        return None if self.matcher is None else _RESTART

    def made(self, mask: np.ndarray) -> None:
        """The mask that was waited for has come."""
        self.mask = without(mask, self._stops) if self._said - len(self._forced) < self._min_tokens else mask

    def _look(self) -> None:
        """What needs no matcher: a token that was given, and the beginning of a form."""
        if self._said < len(self._forced):
            self.mask = only(self._forced[self._said], self._vocab)
        elif self._said == len(self._forced) and self._first is not None:
            self.made(self._first)


@dataclasses.dataclass(frozen=True, slots=True)
class MadeMask:
    """What the matcher of a sequence says after a token.

    Attributes:
      allowed: of the sequence.
      version: that the mask is for.
      mask: i32[W]; None if nothing follows.
      error: why the form cannot be followed any more.
    """

    allowed: AllowedTokens
    version: int
    mask: np.ndarray | None
    error: str | None = None


class MaskMaker:
    """A thread that makes masks, one after another; it starts with the first."""

    def __init__(self, vocab: int, on_made: Callable[[Sequence[MadeMask]], None]) -> None:
        """Waits for something to do.

        Args:
          vocab: V.
          on_made: called on the thread with all masks that it has made since.
        """
        self._words = mask_words(vocab)
        self._on_made = on_made
        self._queue: queue.SimpleQueue[tuple[AllowedTokens, int, int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def follow(self, allowed: AllowedTokens, token: int) -> None:
        """Has the matcher of a sequence follow a token, and makes the mask behind it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="nitsum-masks", daemon=True)
            self._thread.start()
        self._queue.put((allowed, token, allowed.version))

    def close(self) -> None:
        """Ends the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            made = [self._make(*item)]
            while not self._queue.empty():
                item = self._queue.get()
                if item is None:
                    return
                made.append(self._make(*item))
            self._on_made([one for one in made if one is not None])

    def _make(self, allowed: AllowedTokens, token: int, version: int) -> MadeMask | None:
        matcher = allowed.matcher
        assert matcher is not None
        try:
            if token == _RESTART:
                matcher.restart()
                return None  # the first mask is known
            matcher.accept(token)
            if matcher.ended:
                return MadeMask(allowed, version, None)
            mask = np.zeros(self._words, np.int32)
            matcher.allowed(mask)
            return MadeMask(allowed, version, mask)
        except Exception as error:  # a fault of one form must not end the thread of all
            _LOG.warning("a form cannot be followed: %s", error)
            return MadeMask(allowed, version, None, str(error))
