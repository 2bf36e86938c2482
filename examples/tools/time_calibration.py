"""Predict how long `convert --calibrate` takes for gpt-oss-20b, from the parts of one layer with random weights.

    python examples/tools/time_calibration.py

Processor time is counted, so that other programs do not matter: with OPENBLAS_NUM_THREADS=1 it is that of one core.
Attention and an expert are timed with two numbers of tokens each; what grows with them is extrapolated to the 65,536
tokens of the default text, of which an expert gets 8,192 on average."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlx_gptoss.calibration.layer import Layer, Routing, Streams
from mlx_gptoss.calibration.linear import Target
from mlx_gptoss.calibration.memory import HEAD_ROWS, Memory
from mlx_gptoss.calibration.moments import MomentSums
from mlx_gptoss.calibration.store import Store
from mlx_gptoss.config import GPT_OSS_20B
from mlx_gptoss.weights import codecs, search
from mlx_gptoss.weights.formats import recipe_of
from mlx_gptoss.weights.synthetic import Synthetic
from mlx_gptoss.weights.tensor import AFFINE4

TEXT, WINDOW = 65_536, 2048
FEW, MANY = 2048, 6144
config = replace(GPT_OSS_20B.first_layers(1), num_local_experts=4, vocab_size=HEAD_ROWS)
source = Synthetic(config, "mxfp4")
target = Target.of(source, recipe_of("mlx-4bit")[1], symmetric=False)
rng = np.random.default_rng(0)


def timed(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def streams(tokens: int) -> Streams:
    x = rng.standard_normal((tokens, config.hidden_size), np.float32)
    return Streams(x, x + np.float32(0.02) * rng.standard_normal(x.shape, np.float32))


def layer_seconds(tokens: int, folder: Path) -> tuple[float, float]:
    """Attention with these tokens, and an expert that gets all of them."""
    store = Store(folder / str(tokens), target.dtype)
    memory = Memory(1, 2**34, 2**34)
    layer = Layer(
        source, target, store.begin("layer-0"), 0, [WINDOW] * (tokens // WINDOW), memory,
        lambda name, width: store.stream(name, (tokens, width)), lambda _: None,
    )  # fmt: skip
    before, after = streams(tokens), streams(tokens)
    matrices = {name: layer._matrix(f"experts.{name}") for name in ("gate", "up", "down")}
    every = Routing(np.zeros((tokens, 1), np.intp), np.ones((tokens, 1), np.float32))
    attention = timed(lambda: layer._attention(before, after))
    return attention, timed(lambda: layer._expert(0, matrices, before, (every, every)))


def at(tokens: int, few: float, many: float) -> float:
    """Seconds with this many tokens, along the line through the two that were timed."""
    return few + (many - few) * (tokens - FEW) / (MANY - FEW)


with tempfile.TemporaryDirectory() as folder:
    (attention_few, expert_few), (attention_many, expert_many) = (
        layer_seconds(tokens, Path(folder)) for tokens in (FEW, MANY)
    )
sums = MomentSums(config.hidden_size, with_mean=False)
pair = streams(FEW)
sums.add(pair.original, pair.actual)
moments = sums.moments()
head = source.read("lm_head.weight")
rows = timed(lambda: moments.quantize(codecs.dequantize(head), AFFINE4, target.dtype))
table = timed(lambda: search.quantize(head, AFFINE4, target.dtype))
attention = at(TEXT, attention_few, attention_many)
expert = at(TEXT * config.num_experts_per_tok // GPT_OSS_20B.num_local_experts, expert_few, expert_many)
one_layer = attention + GPT_OSS_20B.num_local_experts * expert
blocks = GPT_OSS_20B.vocab_size / HEAD_ROWS
total = GPT_OSS_20B.num_hidden_layers * one_layer + blocks * (rows + table)
print(
    f"attention {attention:.0f} s, an expert {expert:.1f} s, a layer {one_layer:.0f} s; lm_head {blocks * rows:.0f} s,"
)
print(f"embedding table {blocks * table:.0f} s; gpt-oss-20b {total / 3600:.1f} hours of one core")
