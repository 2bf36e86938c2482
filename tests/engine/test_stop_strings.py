"""Stop strings against a naive search, however the text is cut."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gptoss.engine import StopStrings
from mlx_gptoss.errors import InvalidRequest

words = st.text("abc", min_size=1, max_size=5)


def naive(stops: list[str], text: str) -> tuple[str, str | None]:
    """Text before the stop string that is complete first (the longest of those), and that string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    automaton = StopStrings(stops)
    shown = ""
    for piece in pieces:
        emit, stopped = automaton.push(piece)
        shown += emit
        if stopped:
            assert automaton.matched is not None
            assert automaton.push("more") == ("", True)
            assert automaton.flush() == ""
            return shown, automaton.matched
    return shown + automaton.flush(), None


def pieces(text: str, cuts: list[int]) -> list[str]:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(borders)]


@given(st.lists(words, max_size=5), st.text("abcd", max_size=40), st.lists(st.integers(0, 40), max_size=10))
def test_equals_the_naive_search_wherever_the_borders_fall(stops: list[str], text: str, cuts: list[int]) -> None:
    assert run(stops, pieces(text, cuts)) == naive(stops, text)


@given(st.lists(words, min_size=1, max_size=5), st.text("abcd", max_size=30))
def test_holds_back_exactly_what_may_still_become_a_stop_string(stops: list[str], text: str) -> None:
    automaton = StopStrings(stops)
    shown = ""
    for end, char in enumerate(text, start=1):
        emit, stopped = automaton.push(char)
        shown += emit
        if stopped:
            return
        open_ends = [
            n
            for n in range(end + 1)
            if any(s != text[end - n : end] and s.startswith(text[end - n : end]) for s in stops)
        ]
        assert shown == text[: end - max(open_ends)]


def test_examples() -> None:
    assert run(["</s>"], ["Hello <", "/", "s> not this"]) == ("Hello ", "</s>")
    assert run(["</s>"], ["a < b", " </", "p>"]) == ("a < b </p>", None)
    assert run(["aab"], ["aaab"]) == ("a", "aab")
    assert run(["abcd", "bc"], ["xabcd"]) == ("xa", "bc")
    assert run(["b", "ab"], ["xab"]) == ("x", "ab")
    assert run(["\n\n", "User:"], ["fine\n", "\nUser:"]) == ("fine", "\n\n")
    assert run(["終わり"], ["これで終", "わり。"]) == ("これで", "終わり")
    assert run([], ["any", "thing"]) == ("anything", None)


def test_text_that_can_begin_no_stop_string_comes_at_once() -> None:
    automaton = StopStrings(["STOP"])
    assert automaton.push("hello") == ("hello", False)
    assert automaton.push("hello S") == ("hello ", False)
    assert automaton.push("T") == ("", False)
    assert automaton.push("ART") == ("START", False)
    assert automaton.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="must not be empty"):
        StopStrings(["ok", ""])


def test_hostile_repetition_stays_linear() -> None:
    automaton = StopStrings(["a" * 2000 + "b"])
    begin = time.thread_time()
    for _ in range(200):
        automaton.push("a" * 1000)
    assert time.thread_time() - begin < 2.0
