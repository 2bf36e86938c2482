"""Prompt lookup drafts, against a search through the text."""

from __future__ import annotations

import random

import pytest

from mlx_gptoss.engine.lookup import PromptLookup


def by_search(tokens: list[int], max_drafts: int) -> tuple[int, ...]:
    """The continuation of the latest earlier occurrence of the last three tokens, or else of the last two."""
    for length in (3, 2):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                text = list(tokens)
                for _ in range(max_drafts):  # a repetition is continued
                    text.append(text[start + length + len(text) - len(tokens)])
                return tuple(text[len(tokens) :])
    return ()


@pytest.mark.parametrize("alphabet", [1, 2, 4, 30])
def test_drafts_follow_the_latest_occurrence_of_the_longest_match(alphabet):
    tokens = random.Random(alphabet).choices(range(alphabet), k=120)
    lookup = PromptLookup(tokens[:5])
    for position, token in enumerate(tokens[5:], 5):
        assert lookup.propose(3) == by_search(tokens[:position], 3)
        assert lookup.propose(0) == ()
        lookup.add(token)


def test_text_without_repetition_gets_no_drafts():
    assert PromptLookup(range(50)).propose(3) == ()
    assert PromptLookup([7]).propose(3) == ()
