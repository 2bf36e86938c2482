"""Compute the same products again and again: `python tests/kernels/race.py [--runs 200] [--format mxfp4 ...]`.

Triton's kernels here add in a fixed order, so every run must give the same bits, and so must a kernel whose loads are
not pipelined (one stage). A difference is a race in the machine code (sass.py) or a fault of the device. Prints a JSON
object for each case: runs, how many of them differed from the first, and how many values differ with one stage. Ends
with 1 if anything differed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from tune import with_stages

from mlx_gptoss.backends.cuda.kernels import linear, norm, tiles
from mlx_gptoss.backends.cuda.kernels.fused import Fused
from mlx_gptoss.backends.cuda.load import load_model
from mlx_gptoss.backends.cuda.matrices import Matrix
from mlx_gptoss.backends.cuda.model import GptOss
from mlx_gptoss.backends.cuda.runner import MAX_ROWS
from mlx_gptoss.config import PRESETS
from mlx_gptoss.weights.synthetic import Synthetic


def cases(model: GptOss, tokens: list[int]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Each product with decoded weights, for each number of tokens: its name, and what computes it."""
    block, device = model.blocks[0], model.embed.at(slice(0, 1)).decode(model.dtype).device
    generator = torch.Generator().manual_seed(1)
    for count in tokens:
        x = torch.randn((count, model.config.hidden_size), generator=generator).to(device, model.dtype)
        scores = block.mlp.router(x)
        yield f"experts, {count} tokens", lambda x=x, s=scores: block.mlp.ops.mixture(x, s, block.mlp.experts)
        yield f"qkv, {count} tokens", lambda x=x: block.attention.qkv(x)
        out = block.attention.out.matrices[0]
        _, parts = tiles.split_k(count, out, model.dtype)
        if count <= MAX_ROWS and parts > 1:
            y = torch.randn((count, out.shape[1]), generator=generator).to(device, model.dtype)
            yield f"output in {parts} parts, {count} tokens", partial(_in_parts, y, out, parts)


def _in_parts(y: Tensor, out: Matrix, parts: int) -> Tensor:
    """y [T, K] @ out [N, K]^T -> [T, N], as a step of decoding computes it: in parts, which the norm adds up."""
    each = y.new_empty((parts, len(y), out.shape[0]), dtype=torch.float32)
    linear.split_linear(y, out, each)
    total = y.new_zeros(each.shape[1:])
    norm.rms_norm(total, torch.ones_like(total[0]), 1e-5, torch.empty_like(total), partial=each)
    return total


def race(form: str, preset: str, runs: int, tokens: list[int], device: torch.device) -> Iterator[dict[str, object]]:
    """The result of each case of one format."""
    config = replace(PRESETS[preset], num_hidden_layers=1, layer_types=PRESETS[preset].layer_types[:1])
    model = load_model(Synthetic(config, form), torch.bfloat16, device, Fused())
    for name, run in cases(model, tokens):
        first = run()
        different = sum(not torch.equal(run(), first) for _ in range(runs))
        with with_stages(1):
            single = run()
        counts = {"runs": runs, "different": different, "values_different_with_1_stage": int((single != first).sum())}
        yield {"format": form, "case": name, **counts}


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="20b" if on_gpu else "tiny", choices=PRESETS)
    parser.add_argument("--format", nargs="+", default=["mxfp4", "mlx-4bit"])
    parser.add_argument("--runs", type=int, default=200 if on_gpu else 2)
    parser.add_argument("--tokens", nargs="+", type=int, default=[32, 64, 4096] if on_gpu else [32, 80])
    options = parser.parse_args()
    bad = 0
    with torch.inference_mode():
        for form in options.format:
            device = torch.device("cuda" if on_gpu else "cpu")
            for result in race(form, options.preset, options.runs, options.tokens, device):
                print(json.dumps(result), flush=True)
                bad += bool(result["different"] or result["values_different_with_1_stage"])
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
