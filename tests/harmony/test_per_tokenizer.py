"""Caches by tokenizer: the latest results are kept, as far as their weights allow, and go with the tokenizer."""

from __future__ import annotations

import gc
import weakref

from mlx_gptoss.api import NANO
from mlx_gptoss.harmony.grammar import CACHED_BYTES, json_grammar
from mlx_gptoss.harmony.per_tokenizer import cached
from mlx_gptoss.tokenizer import Tokenizer


class Made:
    """What a test keeps: whether it still exists shows whether the cache has it."""


def test_the_results_used_last_are_kept_up_to_the_limit(nano: Tokenizer) -> None:
    calls: list[str] = []

    @cached(10, len)
    def make(tokenizer: Tokenizer, text: str) -> Made:
        calls.append(text)
        return Made()

    first = weakref.ref(make(nano, "aaaa"))
    second = weakref.ref(make(nano, "bbbb"))
    assert make(nano, "aaaa") is first() and calls == ["aaaa", "bbbb"]
    third = weakref.ref(make(nano, "cccc"))  # 12: the one that was used longest ago goes
    gc.collect()
    assert second() is None and first() is not None and third() is not None
    make(nano, "d" * 10)
    gc.collect()
    assert first() is None and third() is None


def test_a_result_above_the_limit_is_returned_and_not_kept(nano: Tokenizer) -> None:
    @cached(10, len)
    def make(tokenizer: Tokenizer, text: str) -> Made:
        return Made()

    large = make(nano, "a" * 11)
    kept = weakref.ref(large)
    del large
    gc.collect()
    assert kept() is None
    assert make(nano, "b") is make(nano, "b")


def test_results_go_with_their_tokenizer() -> None:
    @cached(2)
    def make(tokenizer: Tokenizer, text: str) -> Made:
        return Made()

    tokenizer = Tokenizer.from_folder(NANO)
    kept = weakref.ref(make(tokenizer, "a"))
    assert make(tokenizer, "a") is kept()
    del tokenizer
    gc.collect()
    assert kept() is None


def test_many_large_schemas_are_not_all_kept(nano: Tokenizer) -> None:
    made = []
    for number in range(100):  # by their definitions 1.3 MB each, twice as much in all as the cache keeps
        names = [f"property_number_{number}_{index}" for index in range(300)]
        schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
        made.append(weakref.ref(json_grammar(schema, nano, "schema")))
    gc.collect()
    kept = [grammar() is not None for grammar in made]
    assert kept == sorted(kept)  # the latest ones
    assert 20 < sum(kept) < CACHED_BYTES >> 20
