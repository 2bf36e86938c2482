"""The cost of a grammar's mask with the published vocabulary, relative to a decoding step on a CPU.

The step is that of four full-size layers of gpt-oss-20b with synthetic weights. Run it with
python -m pytest -s -m slow tests/harmony/test_mask_cost.py
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.backends.base import Limits
from mlx_gptoss.engine import Engine, Request
from mlx_gptoss.harmony.grammar import Grammar, Matcher, json_grammar
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.tokenizer import RETURN, Tokenizer
from mlx_gptoss.weights.synthetic import Synthetic, preset

ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 30}},
        "kind": {"enum": ["red", "green", "blue"]},
        "price": {"type": "number", "minimum": 0},
        "sold": {"type": "string", "format": "date-time"},
        "size": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 99}, {"type": "null"}]},
    },
    "required": ["name", "tags", "kind", "price", "sold", "size"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 1000}
RECORD = {
    "name": 'A "very" old bottle of wine from Jurançon, said to be from 1961',
    "tags": ["wine", "white", "naïve", "日本"],
    "kind": "green",
    "price": 1234.5,
    "sold": "2024-05-06T07:08:09Z",
    "size": 42,
}
TOKENS, TURNS = 12, 5


@dataclass
class JsonOnly:
    """A guide whose whole text is under a grammar."""

    matcher: Matcher

    def mask(self) -> bytes:
        return self.matcher.mask()

    def accept(self, token: int) -> None:
        self.matcher.accept(token)

    def ends_with(self, token: int) -> bool | None:
        return None


def seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def mask_seconds(grammar: Grammar, tokenizer: Tokenizer) -> list[float]:
    """Return the seconds that each token of a JSON text takes, in two layouts: computing its mask and accepting it."""
    times = []
    for indent in (None, 2):
        matcher = grammar.matcher(tokenizer.special(RETURN))
        for id in tokenizer.encode(json.dumps([RECORD] * 4, ensure_ascii=False, indent=indent)[:-1].rstrip()):
            times.append(seconds(matcher.mask) + seconds(lambda matcher=matcher, id=id: matcher.accept(id)))
    return times


def applying_seconds(backend: str, module: Any, mask: bytes, vocabulary: int) -> float:
    """Return how much longer sampling takes with a mask than without, including the read of the result."""
    sample = import_module(".sample", module.__name__)
    array = import_module("mlx.core").array if backend == "mlx" else import_module("torch").tensor
    logits, sampling = array(np.random.default_rng(0).normal(size=(1, vocabulary)).astype(np.float32)), Sampling(seed=1)
    state = sample.SamplerState.begin(sampling, (1,), 1, vocabulary)

    def draw(*masks: bytes) -> None:
        sample.sample_tokens(logits, [sampling], [state], [0], masks).tokens.item()

    times = {masks: [] for masks in ((), (mask,))}
    for _ in range(200):
        for masks, taken in times.items():
            taken.append(seconds(lambda masks=masks: draw(*masks)))
    free, masked = (statistics.median(taken) for taken in times.values())
    return masked - free


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_costs_under_a_tenth_of_a_decoding_step(published: Tokenizer, backend_module, backend: str) -> None:
    module, weights = backend_module(backend), Synthetic(preset("20b", 4), "mxfp4")
    grammar = json_grammar(SCHEMA, published, "schema")
    prompt = tuple(range(1000, 1016))

    def decode(guided: bool) -> float:
        guide = JsonOnly(grammar.matcher(published.special(RETURN))) if guided else None
        return engine.submit(Request(prompt, TOKENS, Sampling(seed=1), guide=guide)).drain().decode_s / (TOKENS - 1)

    with Engine(lambda: module.load(weights, device="cpu", dtype=None, limits=Limits(1, 128, 64))) as engine:
        decode(True), decode(False)
        steps = [(decode(True), decode(False)) for _ in range(TURNS)]
    masked, free = (statistics.median(column) for column in zip(*steps, strict=True))
    masks = np.sort(mask_seconds(grammar, published))
    apply = applying_seconds(backend, module, grammar.matcher(200002).mask(), weights.config.vocab_size)
    share = (masks.mean() + apply) / free
    print(
        f"\n{backend}: mask p50 {np.median(masks) * 1e6:.0f} us, p99 {masks[int(0.99 * len(masks))] * 1e6:.0f} us, "
        f"mean {masks.mean() * 1e6:.0f} us of {len(masks)} tokens; applying it {apply * 1e6:.0f} us; step "
        f"{free * 1e3:.1f} ms: {share:.2%}. Whole steps, {TURNS} turns each: {masked * 1e3:.1f} ms with a mask"
    )
    assert share < 0.1
