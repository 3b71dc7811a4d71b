import itertools

import hypothesis
from hypothesis import strategies as st

from nitsum_jax.runtime.streams.stops import StopMatcher

_LETTERS = st.text(alphabet="abc", max_size=40)
_STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)


def _reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Tries every end position, and of the stops that end there the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@hypothesis.given(_LETTERS, _STOPS, st.lists(st.integers(0, 40), max_size=10))
def test_result_does_not_depend_on_where_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    borders = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(text[a:b]) for a, b in itertools.pairwise(borders)) + matcher.flush()
    assert (shown, matcher.matched) == _reference(text, stops)


@hypothesis.given(_LETTERS, _STOPS)
def test_holds_back_exactly_what_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for end, char in enumerate(text, start=1):
        shown += matcher.push(char)
        if matcher.matched is not None:
            return
        may_begin = [n for n in range(end + 1) if any(stop.startswith(text[end - n : end]) for stop in stops)]
        assert text[:end] == shown + text[end - max(may_begin, default=0) : end]


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("a ENDing b") == "a "
    assert matcher.push("more") == ""
    assert matcher.flush() == ""
    assert matcher.matched == "END"


def test_a_stop_string_that_overlaps_its_own_beginning() -> None:
    matcher = StopMatcher(["aab"])
    assert [matcher.push(char) for char in "aaab"] == ["", "", "a", ""]
    assert matcher.matched == "aab"
