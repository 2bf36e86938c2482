"""Keys and values in 8 bits: the recipe of the weights' codec bit for bit, and attention over them (test_attention.py)
against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlx_gptoss.backends.cuda import quantized_kv as plain
from mlx_gptoss.backends.cuda.kernels import quantized_kv as kernels
from mlx_gptoss.backends.cuda.quantized_kv import Packed
from mlx_gptoss.weights.quantization import encode_affine
from mlx_gptoss.weights.tensor import AFFINE8

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def vectors(device, dtype=torch.float32) -> torch.Tensor:
    """[3, 5, 14, 64]: random ones of all sizes, and ones at the recipe's edges, as views of a wider tensor."""
    x = torch.randn((3, 14, 7, 64), generator=torch.Generator().manual_seed(3))
    x *= torch.logspace(-4, 4, 14)[:, None, None]
    x[0, 0], x[0, 1], x[0, 2], x[0, 3] = 0, 1.5, -2.5, 1e-30
    x[0, 4, :, 1:] = x[0, 4, :, :1]  # equal
    x[0, 5] = x[0, 5].abs() + 100  # one sign, far from zero
    x[0, 6] = -x[0, 6].abs()
    x[0, 7, :, 0], x[0, 7, :, 1] = 3.0, -3.0  # ends of one size
    return x.to(device, dtype)[:, :, 1:6].transpose(1, 2)


@dtypes
def test_codes_scales_and_biases_are_those_of_the_codec(device, dtype):
    x = vectors(device, dtype)
    groups = x.float().cpu().contiguous().numpy().reshape(-1, 64)
    codes, scale, bias = encode_affine(groups, AFFINE8)
    for packed in (plain.pack(x), kernels.pack(x)):
        assert packed.shape == x.shape
        assert (packed.codes.cpu().numpy().reshape(-1, 64) == codes).all()
        assert packed.scale_bias.cpu().numpy().reshape(-1, 2).tobytes() == np.stack([scale, bias], -1).tobytes()


@dtypes
def test_decoding_for_a_prompt(device, close, dtype):
    """One slot of a cache, and of that the first 70 entries."""
    packed = plain.pack(torch.randn((3, 2, 100, 64), generator=torch.Generator().manual_seed(1)).to(device))
    part = packed[1:2, :, :70]
    wanted = part.codes.double() * part.scale_bias[..., :1].double() + part.scale_bias[..., 1:].double()
    close(plain.as_computed(part, dtype), wanted, 2e-7 if dtype == torch.float32 else 5e-3)
    close(kernels.dequantize(part, dtype), wanted, 1e-6 if dtype == torch.float32 else 5e-3)


def test_rows_go_to_their_places(device):
    """Three rows of a step, of which one is idle; nothing else is written."""
    S, KV, C = 4, 3, 6
    fresh = torch.randn((2, 3, KV, 1, 64), generator=torch.Generator().manual_seed(2)).to(device, torch.bfloat16)
    slots, positions = (torch.tensor(v, dtype=torch.int32, device=device) for v in ([2, 0, 3], [5, -1, 0]))
    arrays = [torch.full((2, S, KV, C, 64), 7, dtype=torch.uint8, device=device)]
    arrays.append(torch.full((2, S, KV, C, 2), torch.nan, device=device))
    wanted = [array.clone() for array in arrays]
    kernels.write_rows(fresh, arrays, slots, positions)
    for row, slot, position in ((0, 2, 5), (2, 3, 0)):
        packed = plain.pack(fresh[:, row, :, 0])
        wanted[0][:, slot, :, position], wanted[1][:, slot, :, position] = packed.codes, packed.scale_bias
    assert torch.equal(arrays[0], wanted[0])
    assert torch.equal(arrays[1].nan_to_num(-1.0), wanted[1].nan_to_num(-1.0))


def test_every_code_centered_is_exact(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 4, 64)
    ones = torch.tensor([1.0, 0.0], device=device).expand(1, 1, 4, 2).contiguous()
    assert (kernels.dequantize(Packed(codes, ones), torch.float32) == codes).all()
