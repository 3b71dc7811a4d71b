"""Stop strings in streamed text: found over any borders, with no more text held back than must be."""

from collections.abc import Sequence


class StopMatcher:
    """Cuts a text that comes in pieces before the first stop string that completes in it.

    Text that may be the beginning of a stop string is held back until more text decides it. Each stop string has its
    own automaton (Knuth, Morris, Pratt), so the work per character does not depend on the text before, and
    the result does not depend on where the pieces are cut. Of stop strings that complete at the same character the
    longest wins.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)  # length of the longest prefix of the stop that ends the text so far
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Takes the next piece and returns the text that is certain to be output; nothing after a match."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        pending = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            completed = self._advance(char)
            if completed is not None:
                self.matched = completed
                self._held = ""
                return pending[: end - len(completed)]
        keep = max(self._states)
        ready = pending[: len(pending) - keep]
        self._held = pending[len(pending) - keep :]
        return ready

    def flush(self) -> str:
        """The text still held back, when no more will come."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        completed: str | None = None
        for index, stop in enumerate(self._stops):
            state, failure = self._states[index], self._failures[index]
            while state and stop[state] != char:
                state = failure[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                if completed is None or len(stop) > len(completed):
                    completed = stop
                state = failure[state - 1]
            self._states[index] = state
        return completed


def _failure_table(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = table[length - 1]
        if stop[index] == stop[length]:
            length += 1
        table[index] = length
    return table
