import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.runtime.text.stops import StopMatcher

letters = st.text(st.sampled_from("abc"), max_size=30)
stop_lists = st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=5), max_size=5)


def search(text: str, stops: list[str]) -> tuple[int, str] | None:
    """The rule by brute force: (end, stop) of the first stop string to be completed, the longest at that end."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


def feed(matcher: StopMatcher, parts: list[str]) -> tuple[str, str | None]:
    out = []
    for part in parts:
        emit, matched = matcher.push(part)
        out.append(emit)
        if matched is not None:
            assert matcher.push("abc") == ("", matched)
            return "".join(out), matched
    return "".join(out) + matcher.finish(), None


@settings(deadline=None, max_examples=300)
@given(text=letters, stops=stop_lists, include=st.booleans(), cuts=st.sets(st.integers(0, 30)))
def test_equals_a_search_of_the_whole_text(text: str, stops: list[str], include: bool, cuts: set[int]) -> None:
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    found = search(text, stops)
    if found is None:
        expected: tuple[str, str | None] = (text, None)
    else:
        end, stop = found
        expected = (text[:end] if include else text[: end - len(stop)], stop)
    parts = [text[start:end] for start, end in itertools.pairwise(borders)]
    for cut in (parts, list(text), [text]):
        assert feed(StopMatcher(stops, include), cut) == expected


@settings(deadline=None, max_examples=200)
@given(text=letters, stops=stop_lists)
def test_holds_back_only_what_may_become_a_stop(text: str, stops: list[str]) -> None:
    matcher, seen, emitted = StopMatcher(stops, False), "", ""
    for char in text:
        emit, matched = matcher.push(char)
        if matched is not None:
            return
        seen, emitted = seen + char, emitted + emit
        held = [size for stop in stops for size in range(1, len(stop)) if seen.endswith(stop[:size])]
        assert emitted == seen[: len(seen) - max(held, default=0)]


@pytest.mark.parametrize("stop", ["]", "^", "-", "\\", "a-z", "[^b]"])
def test_characters_that_a_pattern_would_read(stop: str) -> None:
    assert StopMatcher([stop], False).push(f"xmz{stop}b") == ("xmz", stop)


def test_work_does_not_grow_with_held_text_or_stops() -> None:
    # Each step follows at most one failure link for each character taken, so links are at most as many as characters.
    stops = ["a" * 500 + "b", *(f"{number:04}" for number in range(2000))]
    matcher = StopMatcher(stops, False)
    emitted = 0
    for _ in range(3000):
        emit, matched = matcher.push("a")
        assert matched is None
        emitted += len(emit)
    assert emitted == 2500
    assert matcher.push("b") == ("", stops[0])
