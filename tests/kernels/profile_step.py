"""Where the time of a decoding step goes: `python tests/kernels/profile_step.py [--format mxfp4 ...] [--rows 1 32]`.

Replays the step's CUDA graph under torch.profiler (CUPTI) and prints one JSON object for each format and number of
rows: microseconds of a step, and of each kernel with how often it runs; the rest is the gaps between kernels.
Without a GPU, each launch in Triton's interpreter is timed, and the times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import replace

import torch

from mlx_gptoss.backends.base import Row
from mlx_gptoss.backends.cuda.cache import Cache
from mlx_gptoss.backends.cuda.decode import Decoder
from mlx_gptoss.backends.cuda.kernels import attention, linear, lora, moe, norm, qkv, routing, sample
from mlx_gptoss.backends.cuda.kernels.fused import Fused
from mlx_gptoss.backends.cuda.load import load_model
from mlx_gptoss.config import PRESETS
from mlx_gptoss.weights.synthetic import Synthetic

STEPS = 10


def profile(decoder: Decoder, rows: int, context: int, device: torch.device) -> dict[str, object]:
    """A step of some rows at the end of a context: its microseconds, and those of its kernels."""
    feed = [Row(slot, context - 1, None) for slot in range(rows)]

    def step() -> None:
        decoder.step(feed, [0] * rows, [1.0] * rows)

    step()
    totals: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    if device.type != "cuda":
        began = time.perf_counter()
        _time_launches(step, totals, counts)
        whole, steps = 1e6 * (time.perf_counter() - began), 1
    else:
        steps = STEPS
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        first.record()
        for _ in range(steps):
            step()
        last.record()
        last.synchronize()
        whole = 1e3 * first.elapsed_time(last) / steps
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            for _ in range(steps):
                step()
            torch.cuda.synchronize()
        for event in found.key_averages():
            totals[event.key] += event.device_time_total
            counts[event.key] += event.count
    kernels = {
        name.strip("_").removesuffix("_kernel"): {"us": round(us / steps, 2), "count": round(counts[name] / steps, 2)}
        for name, us in totals.most_common()
    }
    return {"step_us": round(whole, 1), "kernels_us": round(sum(totals.values()) / steps, 1), "kernels": kernels}


def _time_launches(step, totals: Counter[str], counts: Counter[str]) -> None:
    """Run a step in the interpreter with each launch timed."""
    modules = (attention, linear, lora, moe, norm, qkv, routing, sample)
    original = linear.launch

    def launch(kernel, *args, **options) -> None:
        began = time.perf_counter()
        original(kernel, *args, **options)
        name = getattr(kernel, "fn", kernel).__name__
        totals[name] += 1e6 * (time.perf_counter() - began)
        counts[name] += 1

    for module in modules:
        module.launch = launch
    try:
        step()
    finally:
        for module in modules:
            module.launch = original


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="20b" if on_gpu else "tiny", choices=PRESETS)
    parser.add_argument("--format", nargs="+", default=["mxfp4", "mlx-4bit"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 32] if on_gpu else [1, 2])
    parser.add_argument("--context", type=int, default=1024 if on_gpu else 32)
    parser.add_argument("--layers", type=int, help="Of the preset's layers, only so many.")
    options = parser.parse_args()
    device = torch.device("cuda" if on_gpu else "cpu")
    config = PRESETS[options.preset]
    layers = options.layers or config.num_hidden_layers
    config = replace(config, num_hidden_layers=layers, layer_types=config.layer_types[:layers])
    with torch.inference_mode():
        for form in options.format:
            model = load_model(Synthetic(config, form), torch.bfloat16, device, Fused())
            for rows in options.rows:
                cache = Cache(config, rows, options.context, model.dtype, device, whole=True)
                last = torch.zeros(rows, dtype=torch.int64, device=device)
                found = profile(Decoder(model, cache, last, options.context), rows, options.context, device)
                print(json.dumps({"format": form, "rows": rows, "context": options.context, **found}), flush=True)


if __name__ == "__main__":
    main()
