"""The output of one request on its way to the client: text, tokens and times."""

from collections.abc import Sequence

from nitsum_jax.server.backend import TextStream
from nitsum_jax.server.stops import StopMatcher


class OutputText:
    """Turns token ids into text that may be shown, and ends the output at a stop string."""

    def __init__(self, text_stream: TextStream, stops: Sequence[str]) -> None:
        self._text_stream = text_stream
        self._matcher = StopMatcher(stops)
        self._one_by_one = bool(stops)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the output, if one did."""
        return self._matcher.matched

    def push(self, ids: Sequence[int]) -> tuple[Sequence[int], str]:
        """Takes new ids and returns those that belong to the output, and the text that is ready.

        The ids that spell a stop string belong to the output (they have been streamed before anyone could know);
        those after it do not.
        """
        if not self._one_by_one:
            return ids, self._text_stream.push(ids)
        text = ""
        for index, token in enumerate(ids):
            text += self._matcher.push(self._text_stream.push([token]))
            if self.stopped_by is not None:
                return ids[: index + 1], text
        return ids, text

    def finish(self) -> str:
        """The rest of the text, when no more ids will come."""
        return self._matcher.push(self._text_stream.flush()) + self._matcher.flush()


class OutputTimes:
    """First and last token time of one output, on the clock of the engine (seconds)."""

    def __init__(self, arrival_s: float) -> None:
        self._arrival_s = arrival_s
        self._first_s = 0.0
        self._last_s = 0.0
        self.tokens = 0

    def add(self, tokens: int, time_s: float) -> None:
        """Notes that so many tokens came at this time."""
        if not tokens:
            return
        if not self.tokens:
            self._first_s = time_s
        self._last_s = time_s
        self.tokens += tokens

    @property
    def ttft_ms(self) -> float | None:
        """Arrival to first token in milliseconds; None while there is none."""
        return (self._first_s - self._arrival_s) * 1e3 if self.tokens else None

    @property
    def tpot_ms(self) -> float | None:
        """(last token time - first token time) / (tokens - 1) in milliseconds; None below two tokens."""
        return (self._last_s - self._first_s) * 1e3 / (self.tokens - 1) if self.tokens > 1 else None
