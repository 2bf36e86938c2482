"""How many launches a decoded token costs: the primitives in one step's graph, counted without running it.

On a GPU every primitive that computes is one kernel or more to launch, and at a few microseconds each they are what
holds decoding below the bandwidth bound. The graph is the same on every device but for mx.fast's operations, which
MLX expands on a CPU: while a graph is counted each of them is one placeholder.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...errors import BackendUnavailable
from ...sampling import Sampling
from ...weights.tensor import Weights
from ..base import Limits, Row
from .elementwise import compiled
from .kernels.choose import Chooser, score_factor
from .kernels.verdicts import Verdicts
from .load import load_model
from .runner import MlxRunner

# Primitives that only look at memory in another way.
VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze",
    "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
PEER = """
import json
import sys
from pathlib import Path
import mlx.core as mx
from mlx_gptoss.backends.mlx.launches import primitives, traced
mx.set_default_device(mx.cpu)
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load_model
with traced():
    model, sampler = load_model(Path(sys.argv[1]))[0], make_sampler(temp=float(sys.argv[2]))
    cache, token, made, counts = make_prompt_cache(model), mx.array([1]), [], []
    for _ in range(3):  # mlx_lm.generate.generate_step
        logits = model(token[None], cache=cache)[:, -1, :]
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        token = sampler(logprobs)
        made += [token, logprobs]
        counts.append(primitives(made))
print(json.dumps(counts[2] - counts[1]))
"""


class AllPassed(Verdicts):
    """As if every check had passed; nothing is written."""

    def __init__(self) -> None:
        super().__init__(Path(), "")

    def find(self, check: str) -> str:
        return ""


def launches_per_token(checkpoint: Weights, temperature: float = 0.0, *, custom_kernels: bool = False) -> int:
    """Launches of one decode step at batch 1. Loads the whole checkpoint. The number depends on its layers and on how
    they are stored, not on their sizes. custom_kernels: with all that the model can use."""
    samplings = [Sampling(temperature=temperature, seed=0)]
    return launches_of(decode_step(checkpoint, samplings, custom_kernels=custom_kernels))


def decode_step(
    checkpoint: Weights,
    samplings: Sequence[Sampling],
    *,
    unequal: bool = False,
    kv_bits: int | None = None,
    custom_kernels: bool = False,
) -> Counter[str]:
    """The primitives by name of one decode step with a row for each sampling, as on a GPU: bfloat16 activations,
    compiled. Nothing is run. unequal: each row is one token longer than the one before it. custom_kernels: with all
    that the model can use; each launch is a Depends."""
    cpu = mx.Device(mx.cpu)
    made: list[mx.array] = []
    with mx.stream(cpu), traced():
        config = checkpoint.config
        chooser = Chooser(config, mx.bfloat16, score_factor(config), kv_bits, AllPassed()) if custom_kernels else None
        model = load_model(checkpoint, mx.bfloat16, compiled(), global_scales=lambda: True, chooser=chooser)
        runner = MlxRunner(model, Limits(len(samplings), 64, 64, kv_bits=kv_bits), cpu)
        lengths = [1 + slot * unequal for slot in range(len(samplings))]
        for slot, (sampling, length) in enumerate(zip(samplings, lengths, strict=True)):
            prompt = (1,) * length
            made += runner.build([Row(slot, 0, prompt, sampling, prompt)]).arrays
        before = primitives(made)
        rows = [Row(slot, length, None, samplings[slot]) for slot, length in enumerate(lengths)]
        after = primitives([*made, *runner.build(rows).arrays])
        runner.close()
        return after - before


def mlx_lm_launches_per_token(checkpoint: Path, temperature: float = 0.0) -> int:
    """As launches_per_token, of mlx-lm. Raises BackendUnavailable where mlx-lm cannot count it."""
    return launches_of(mlx_lm_decode_step(checkpoint, temperature))


def mlx_lm_decode_step(checkpoint: Path, temperature: float = 0.0) -> Counter[str]:
    """As decode_step for one row, of mlx-lm, in a process of its own. Raises BackendUnavailable where it cannot."""
    words = [sys.executable, "-c", PEER, str(checkpoint), str(temperature)]
    out = subprocess.run(words, capture_output=True, text=True)
    if out.returncode:
        reason = out.stderr.strip().splitlines()[-1:]
        raise BackendUnavailable(f"mlx-lm could not load {checkpoint} ({' '.join(reason)}): pip install mlx-lm")
    return Counter(json.loads(out.stdout))


def count(arrays: Sequence[mx.array]) -> int:
    """Primitives that compute, in the graph of unevaluated arrays."""
    return launches_of(primitives(arrays))


def launches_of(found: Counter[str]) -> int:
    """The number of those that compute."""
    return sum(number for name, number in found.items() if name not in VIEWS)


def primitives(arrays: Sequence[mx.array]) -> Counter[str]:
    """How often each primitive is in the graph of unevaluated arrays, by name."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *arrays)
    return Counter(re.findall(r'label ="(\w+)", shape=rectangle', dot.getvalue()))


@contextmanager
def traced() -> Iterator[None]:
    """Within it, operations of mx.fast, custom kernels and mx.dequantize build one primitive each, of the right shape
    and no use, and a global scale is left out, which MLX refuses on a CPU."""
    places: dict[tuple[Any, str], Callable[..., Any]] = {
        (mx.fast, "rms_norm"): _like,
        (mx.fast, "rope"): _like,
        (mx.fast, "scaled_dot_product_attention"): _like,
        (mx.fast, "metal_kernel"): lambda **_: _outputs,
        (mx, "dequantize"): _decoded,
        (mx, "gather_qmm"): partial(_without_global_scale, mx.gather_qmm),
    }
    kept = {place: getattr(*place) for place in places}
    try:
        for (module, name), stand_in in places.items():
            setattr(module, name, stand_in)
        yield
    finally:
        for (module, name), function in kept.items():
            setattr(module, name, function)


def _like(x: mx.array, *others: Any, **options: Any) -> mx.array:
    """One primitive that depends on all arrays given and has the shape of the first."""
    depends = [a for a in (*others, *options.values()) if isinstance(a, mx.array)]
    like: mx.array = mx.depends([x], depends or [mx.array(0)])[0]
    return like


def _outputs(
    *, inputs: list[mx.array], output_shapes: list[tuple[int, ...]], output_dtypes: list[mx.Dtype], **_: Any
) -> list[mx.array]:
    """As a custom kernel's outputs: one primitive that depends on all inputs."""
    outputs = [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
    mx.eval(outputs)
    found: list[mx.array] = mx.depends(outputs, inputs)
    return found


def _without_global_scale(
    product: Callable[..., mx.array], *arrays: Any, global_scale: mx.array | None = None, **options: Any
) -> mx.array:
    return product(*arrays, **options)


def _decoded(codes: mx.array, scales: mx.array, *others: Any, bits: int = 4, **options: Any) -> mx.array:
    dtype = mx.bfloat16 if scales.dtype == mx.uint8 else scales.dtype
    rows = mx.zeros((*codes.shape[:-1], codes.shape[-1] * 32 // bits), dtype)
    mx.eval(rows)
    return _like(rows, codes, scales, *others)
