"""Stop strings against a naive search, however the text is split."""

from __future__ import annotations

import time
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gptoss.engine import StopStrings
from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.sampling import MAX_STOP_CHARACTERS, MAX_STOPS

words = st.text("abc", min_size=1, max_size=5)


def naive(stops: list[str], text: str) -> tuple[str, str | None]:
    """The text before the stop string that completes first (the longest if several do), and that string."""
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
        visible, stopped = automaton.push(piece)
        shown += visible
        if stopped:
            assert automaton.matched is not None
            assert automaton.push("more") == ("", True)
            assert automaton.flush() == ""
            return shown, automaton.matched
    return shown + automaton.flush(), None


def split(text: str, positions: list[int]) -> list[str]:
    boundaries = [0, *sorted(min(position, len(text)) for position in positions), len(text)]
    return [text[a:b] for a, b in pairwise(boundaries)]


@given(st.lists(words, max_size=5), st.text("abcd", max_size=40), st.lists(st.integers(0, 40), max_size=10))
def test_equals_the_naive_search_however_the_text_is_split(stops: list[str], text: str, positions: list[int]) -> None:
    assert run(stops, split(text, positions)) == naive(stops, text)


@given(st.lists(words, min_size=1, max_size=5), st.text("abcd", max_size=30))
def test_holds_back_exactly_the_text_that_may_begin_a_stop_string(stops: list[str], text: str) -> None:
    automaton = StopStrings(stops)
    shown = ""
    for end, char in enumerate(text, start=1):
        visible, stopped = automaton.push(char)
        shown += visible
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


def test_text_that_cannot_begin_a_stop_string_is_shown_at_once() -> None:
    automaton = StopStrings(["STOP"])
    assert automaton.push("hello") == ("hello", False)
    assert automaton.push("hello S") == ("hello ", False)
    assert automaton.push("T") == ("", False)
    assert automaton.push("ART") == ("START", False)
    assert automaton.flush() == ""


def test_an_empty_stop_string_is_rejected() -> None:
    with pytest.raises(InvalidRequest, match="must not be empty"):
        StopStrings(["ok", ""])


def test_adversarial_repetition_takes_linear_time() -> None:
    automaton = StopStrings(["a" * 2000 + "b"])
    begin = time.thread_time()
    for _ in range(200):
        automaton.push("a" * 1000)
    assert time.thread_time() - begin < 2.0


def test_memory_is_a_few_bytes_per_character() -> None:
    stops = [chr(ord("a") + n) * MAX_STOP_CHARACTERS for n in range(MAX_STOPS)]
    tracemalloc.start()
    automaton = StopStrings(stops)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert automaton.matched is None
    assert kept < 10 * MAX_STOPS * MAX_STOP_CHARACTERS


def test_a_long_stop_string_among_short_ones() -> None:
    """A failure table of more than 65,535 entries has wider numbers."""
    long = "ab" * 50_000 + "c"
    assert run([long, "x"], ["ab" * 60_000, "cx"]) == ("ab" * 10_000, long)
    assert run([long, "x"], ["ab" * 40_000, "cx"]) == ("ab" * 40_000 + "c", "x")
