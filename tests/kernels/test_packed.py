"""Matrices as the kernels read them: packed and back, padding, and both ways of applying scales."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mlx_gptoss.backends.base import padded_groups
from mlx_gptoss.backends.cuda.kernels import linear
from mlx_gptoss.backends.cuda.kernels.fused import Fused
from mlx_gptoss.backends.cuda.load import fuse
from mlx_gptoss.backends.cuda.matrices import PackedMatrix, pack

QUANTIZED = ["mxfp4", "nvfp4", "mxfp8", "fp8", "affine4", "affine8", "affine4-f16", "affine4-g32"]


@pytest.fixture
def matrices(weight, device):
    """matrices(kind, *shape): the same random matrix as stored and packed. largest: the largest scale."""

    def make(kind: str, *shape: int, largest: float | None = None, **options) -> tuple:
        made = weight(kind, *shape, **options)
        if largest is not None:
            made.scale[...] = made.scale * (largest / np.abs(made.scale.astype(np.float32)).max())
            made.scale.flat[0] = largest
        return fuse([made], device), pack(fuse([made], device))

    return make


@pytest.mark.parametrize("kind", QUANTIZED)
def test_packing_changes_no_weight(matrices, device, kind):
    """Of a bank of experts, of one expert, and of rows by their ids; and codes and scales come back as they were."""
    stored, packed = matrices(kind, 3, 6, 320)
    assert isinstance(packed, PackedMatrix) and packed.shape == stored.shape == (3, 6, 320)
    assert torch.equal(packed.decode(torch.float32), stored.decode(torch.float32))
    assert torch.equal(packed.at(1).decode(torch.float32), stored.at(1).decode(torch.float32))
    ids = torch.tensor([[2, 0], [0, 1]], device=device)
    assert torch.equal(packed.at(ids).decode(torch.float32), stored.at(ids).decode(torch.float32))
    back = packed.unpack()
    assert torch.equal(back.codes, stored.codes)
    assert stored.scale is None or torch.equal(back.scale, stored.scale)


def test_rows_of_scales_are_whole_multiples_of_16_bytes(matrices):
    for kind in QUANTIZED:
        stored, packed = matrices(kind, 4, 2880)
        if stored.scale is not None:
            extra = packed.scale[:, stored.scale.shape[1] :]
            assert packed.scale.stride(0) * packed.scale.itemsize % 16 == 0 and not extra.view(torch.uint8).any()
            assert packed.scale.shape[1] == padded_groups(stored.scale.shape[1], stored.scale.itemsize)
    assert padded_groups(90, 1) == 96 and padded_groups(45, 2) == 48 and padded_groups(96, 1) == 96


@pytest.mark.parametrize(
    ("kind", "scales", "small"),
    [
        ("mxfp4", {"exponents": (0, 129)}, True),
        ("mxfp4", {"exponents": (129, 130)}, False),
        ("affine4", {"largest": 0.49}, True),
        ("affine4", {"largest": 0.5}, False),
        ("affine4", {"largest": 100.0}, False),
        ("nvfp4", {}, False),
        ("fp8", {}, False),
    ],
)
def test_which_scales_are_small(matrices, kind, scales, small):
    assert matrices(kind, 8, 320, **scales)[1].small_scales is small


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("kind", "scales"), [("mxfp4", {"exponents": (90, 129)}), ("affine4", {"largest": 0.49})])
def test_both_ways_of_scaling_give_the_same_bits(matrices, device, kind, scales, tokens):
    """A constant folded into the scales, or applied to the values: each bfloat16 weight is the same."""
    _, packed = matrices(kind, 32, 320, **scales)
    x = torch.randn((tokens, 320), generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    folded, plain = torch.empty((tokens, 32), device=device), torch.empty((tokens, 32), device=device)
    linear.linear(x, packed, folded)
    linear.linear(x, replace(packed, small_scales=False), plain)
    assert torch.equal(folded, plain) and folded.isfinite().all() and folded.any()


@pytest.mark.parametrize("largest", [0.5, 30.0])
def test_large_scales(matrices, device, close, largest):
    """A constant would overflow these scales; the values take it."""
    stored, packed = matrices("affine4", 32, 320, largest=largest)
    x = torch.randn((2, 320), generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    out = torch.empty((2, 32), device=device)
    linear.linear(x, packed, out)
    close(out, x.double().cpu() @ stored.decode(torch.float32).double().cpu().T, 1e-2)


def test_large_scales_are_logged_once(weight, device, caplog):
    ops = Fused()
    for kind, exponents in (("mxfp4", (110, 129)), ("nvfp4", (0, 1)), ("mxfp4", (129, 140)), ("mxfp4", (129, 140))):
        ops.stored(fuse([weight(kind, 4, 64, exponents=exponents)], device))
    assert ["decoded in two steps" in record.message for record in caplog.records] == [True]
