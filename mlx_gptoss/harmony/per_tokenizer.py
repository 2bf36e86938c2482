"""Caches of what is made from a tokenizer. They are dropped together with it, so a model that is closed and let go of
leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Concatenate, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary, ref

from ..tokenizer import Tokenizer

Key = ParamSpec("Key")
Made = TypeVar("Made")


def cached(
    maxsize: int,
) -> Callable[[Callable[Concatenate[Tokenizer, Key], Made]], Callable[Concatenate[Tokenizer, Key], Made]]:
    """A decorator that keeps the last `maxsize` results of function(tokenizer, *key) for each tokenizer.

    The results must not refer to the tokenizer: the cache would then keep it alive.
    """

    def decorate(
        function: Callable[Concatenate[Tokenizer, Key], Made],
    ) -> Callable[Concatenate[Tokenizer, Key], Made]:
        caches: WeakKeyDictionary[Tokenizer, Callable[Key, Made]] = WeakKeyDictionary()

        def call(tokenizer: Tokenizer, /, *key: Key.args, **named: Key.kwargs) -> Made:
            cache = caches.get(tokenizer)
            if cache is None:
                new = cast("Callable[Key, Made]", lru_cache(maxsize)(_weakly(function, tokenizer)))
                cache = caches.setdefault(tokenizer, new)
            return cache(*key, **named)

        call.__doc__ = function.__doc__
        return call

    return decorate


def _weakly(function: Callable[Concatenate[Tokenizer, Key], Made], tokenizer: Tokenizer) -> Callable[Key, Made]:
    """Return the function for one tokenizer, without a reference to it. Callers have one."""
    reference = ref(tokenizer)

    def make(*key: Key.args, **named: Key.kwargs) -> Made:
        tokenizer = reference()
        assert tokenizer is not None
        return function(tokenizer, *key, **named)

    return make
