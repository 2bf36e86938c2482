"""Attention's output with K in parts: against float64, which steps use it, and that it adds no kernel."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from shapes import META, meta_model

from mlx_gptoss.backends import cuda
from mlx_gptoss.backends.base import Limits, Row
from mlx_gptoss.backends.cuda.cache import Cache
from mlx_gptoss.backends.cuda.decode import Buffers, Decoder
from mlx_gptoss.backends.cuda.kernels import linear, norm, tiles
from mlx_gptoss.backends.cuda.ranks import Ranks
from mlx_gptoss.config import PRESETS
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights.split import RankShard

MULTIPROCESSORS = 132  # of an H200
FORMATS = ["mxfp4", "nvfp4", "fp8-dynamic", "mlx-4bit", "mlx-8bit", "int4-autoround"]
EPS = 1e-5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def split_early(monkeypatch) -> None:
    """Steps of two rows have K in parts, too: more rows take the interpreter longer."""
    monkeypatch.setattr(tiles, "SPLIT_FROM", 1)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("kind", ["bfloat16", "mxfp4", "nvfp4", "fp8", "affine4", "affine8"])
@pytest.mark.parametrize("tokens", [3, 17])
def test_parts_and_their_sum(stored, close, device, split_early, kind, tokens, dtype, tolerance):
    """40 rows, which no tile divides, and 1,024 columns. Each part is the product of its own columns; the norm adds
    them, a bias and the residual, and stores that before it normalizes it."""
    weight = stored(kind, 40, 1024)
    y, x, bias, gain = (random(*s, seed=i) for i, s in enumerate(((tokens, 1024), (tokens, 40), (40,), (40,))))
    y, x, bias, gain = (t.to(device, dtype) for t in (y, x, bias, gain))
    _, parts = tiles.split_k(tokens, weight.matrix, dtype)
    assert parts > 1
    partial = torch.full((parts, tokens, 40), torch.nan, device=device)
    linear.split_linear(y, weight.matrix, partial)
    for part, columns in enumerate(torch.arange(1024).chunk(parts)):
        close(partial[part], y.double().cpu()[:, columns] @ weight.values[:, columns].T, tolerance)
    wanted = y.double().cpu() @ weight.values.T + bias.double().cpu() + x.double().cpu()
    out = torch.full((tokens, 40), torch.nan, device=device, dtype=dtype)
    norm.rms_norm(x, gain, EPS, out, partial=partial, bias=bias)
    close(x, wanted, tolerance)
    normed = wanted * (wanted.square().mean(-1, keepdim=True) + EPS).rsqrt() * gain.double().cpu()
    close(out, normed, tolerance)
    x.copy_(wanted)
    norm.rms_norm(x, gain, EPS, out, partial=torch.zeros_like(partial), bias=None)
    close(out, normed, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "parts"), [(64, 1), (192, 1), (256, 2)])
def test_few_columns_are_in_fewer_parts_or_whole(stored, columns, parts, dtype):
    """One head has 64 columns, less than a step."""
    assert tiles.split_k(9, stored("mxfp4", 40, columns).matrix, dtype)[1] == parts


def test_a_step_matches_plain_torch(mini, device, split_early):
    """Two rows, in slots that other sequences have used."""
    results = []
    for kernels in (True, False):
        checkpoint, limits = checkpoints.open(mini / "mxfp4"), Limits(2, 32, 16)
        runner = cuda.load(checkpoint, device=str(device), dtype="float32", limits=limits, kernels=kernels)
        prompts, greedy = ((3, 4, 5, 6), (50, 51)), Sampling(temperature=0)
        runner.submit([Row(slot, 0, prompt, greedy, prompt) for slot, prompt in enumerate(prompts)]).wait()
        rows = [Row(slot, len(prompt), (7 + slot,), greedy) for slot, prompt in enumerate(prompts)]
        results.append(runner.submit(rows).wait())
    assert [ours.token for ours in results[0]] == [plain.token for plain in results[1]]
    assert np.allclose(*([sampled.logprob for sampled in result] for result in results), atol=1e-4)


@pytest.mark.parametrize("preset", ["20b", "120b"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_product_of_a_step_has_a_program_for_each_multiprocessor(no_kernels, preset, form):
    """But qkv with 64 rows, of which tiles.py says why."""
    for rows in (1, 16, 32, 64):
        run_a_step(preset, form, rows)
        few = {made.kernel for made in no_kernels if "SPLIT" in made.options and prod(made.grid) < MULTIPROCESSORS}
        assert few <= ({"_qkv_kernel"} if rows == 64 else set())
        no_kernels.clear()


@pytest.mark.parametrize(("rows", "parts"), [(1, 1), (8, 1), (16, 8), (32, 4), (64, 4)])
def test_parts_add_no_kernel(no_kernels, monkeypatch, rows, parts):
    run_a_step("20b", "mlx-4bit", rows)
    split = [made.options["PARTS"] for made in no_kernels if made.kernel == "_linear_kernel"]
    assert split == [parts, parts, 1]  # two layers and lm_head
    kernels = [made.kernel for made in no_kernels]
    no_kernels.clear()
    monkeypatch.setattr(tiles, "SPLIT_FROM", 64)
    run_a_step("20b", "mlx-4bit", rows)
    assert [made.kernel for made in no_kernels] == kernels


def test_a_product_that_ranks_add_up_is_whole():
    """The norm would add the parts of this rank alone."""
    model = meta_model(replace(PRESETS["20b"], num_hidden_layers=1, layer_types=("full_attention",)), "mxfp4")
    assert Buffers(model, 64, 16, META).parts_of_out == [4]
    model = replace(model, ranks=Ranks(RankShard.of(model.config, 0, 2)))
    assert Buffers(model, 64, 16, META).parts_of_out == [1]


def run_a_step(preset: str, form: str, rows: int) -> None:
    """A step of a sliding and a full layer on torch's meta device."""
    config = replace(PRESETS[preset], num_hidden_layers=2, layer_types=PRESETS[preset].layer_types[:2])
    model = meta_model(config, form)
    cache = Cache(config, rows, 1024, model.dtype, META, whole=True)
    decoder = Decoder(model, cache, torch.zeros(rows, dtype=torch.int64, device=META), 1024)
    decoder._run(decoder._ready(rows), ())
