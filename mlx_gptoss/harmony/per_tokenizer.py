"""Caches of what is made from a tokenizer. They are dropped together with it, so a model that is closed and let go of
leaves nothing behind."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Concatenate, Generic, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from ..tokenizer import Tokenizer

Key = ParamSpec("Key")
Made = TypeVar("Made")
Function = Callable[Concatenate[Tokenizer, Key], Made]


def cached(limit: int, weigh: Callable[..., int] | None = None) -> Callable[[Function[Key, Made]], Function[Key, Made]]:
    """A decorator that keeps the latest results of function(tokenizer, *key) for each tokenizer.

    limit: how many, or with `weigh` the sum of weigh(*key) over those kept. The results must not refer to the
    tokenizer: the cache would then keep it alive.
    """

    def decorate(function: Function[Key, Made]) -> Function[Key, Made]:
        caches: WeakKeyDictionary[Tokenizer, _Latest[Made]] = WeakKeyDictionary()

        def call(tokenizer: Tokenizer, /, *key: Key.args, **named: Key.kwargs) -> Made:
            cache = caches.get(tokenizer)
            if cache is None:
                cache = caches.setdefault(tokenizer, _Latest(limit))
            weight = 1 if weigh is None else weigh(*key, **named)
            return cache.get((key, *named.items()), weight, lambda: function(tokenizer, *key, **named))

        call.__doc__ = function.__doc__
        return call

    return decorate


class _Latest(Generic[Made]):
    """The results that were used last, up to a sum of weights. Threads may share it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._weight = 0
        self._results: OrderedDict[object, tuple[Made, int]] = OrderedDict()  # the one used last is at the end
        self._lock = Lock()

    def get(self, key: object, weight: int, make: Callable[[], Made]) -> Made:
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
                return self._results[key][0]
        made = make()  # without the lock: two threads may make the same
        with self._lock:
            if key not in self._results:
                self._results[key] = made, weight
                self._weight += weight
            while self._weight > self._limit:
                self._weight -= self._results.popitem(last=False)[1][1]
        return made
