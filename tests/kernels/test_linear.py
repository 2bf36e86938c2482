"""Products with stored matrices against float64: every Spec, few and many tokens, sizes that no tile divides."""

from __future__ import annotations

import pytest
import torch

from mlx_gptoss.backends.cuda.kernels import linear as kernels
from mlx_gptoss.backends.cuda.kernels import norm, qkv

KINDS = ["bfloat16", "mxfp4", "nvfp4", "mxfp8", "fp8", "affine4", "affine8", "affine4-f16", "affine4-g32"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
EPS = 1e-5


def random(*shape: int, dtype=torch.float32, seed: int = 0, device=None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double().cpu()
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double().cpu()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_spec(stored, close, device, kind, tokens, dtype):
    """40 rows and 320 columns: neither is a multiple of its block size."""
    weight = stored(kind, 40, 320)
    x = random(tokens, 320, dtype=dtype, device=device)
    out = torch.full((tokens, 40), torch.nan, device=device)
    kernels.linear(x, weight.matrix, out)
    close(out, x.double().cpu() @ weight.values.T, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4", "mxfp8", "fp8", "bfloat16"])
def test_bfloat16_weights_are_exact(stored, close, device, kind):
    """Every weight of these formats is exact in bfloat16, so only the float32 sums are rounded. Tensor cores do not
    round but cut off each of the 320 products where the largest of a sum has its last bit, 2^-23 of it (Fasi, Higham,
    Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor cores, 2021)."""
    weight = stored(kind, 40, 320)
    x = random(3, 320, dtype=torch.bfloat16, device=device)
    out = torch.empty((3, 40), device=device)
    kernels.linear(x, weight.matrix, out)
    close(out, x.double().cpu() @ weight.values.T, 320 * 2**-23 if device.type == "cuda" else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exponent", [0, 1, 2, 64, 127, 128, 200, 240])
def test_extreme_exponents(stored, close, device, dtype, exponent):
    """Scales from 2^-127, where they and the products are subnormal, to near the largest float32."""
    weight = stored("mxfp4", 16, 64, exponents=(exponent, exponent + 1))
    factor = 2.0 ** (127 - max(exponent, 1))  # keeps the sums in range
    x = (random(2, 64, device=device) * factor if exponent < 127 else random(2, 64, device=device)).to(dtype)
    out = torch.empty((2, 16), device=device)
    kernels.linear(x, weight.matrix, out)
    close(out, x.double().cpu() @ weight.values.T, 1e-5)


@pytest.mark.parametrize("tokens", [1, 5])
def test_bias_residual_and_norm(stored, close, device, tokens):
    """All three in one kernel, with the output in place of the residual."""
    weight = stored("affine4", 48, 192)
    x, gain, bias = random(tokens, 192, device=device), random(192, seed=1, device=device), random(48, seed=2)
    before = random(tokens, 48, seed=3)
    out = before.clone().to(device)
    kernels.linear(x, weight.matrix, out, bias=bias.to(device), residual=out, norm=gain, eps=EPS)
    close(out, rms_norm(x, gain) @ weight.values.T + bias.double() + before.double(), 1e-5)


def test_output_in_columns_of_a_wider_tensor(stored, close, device):
    weight = stored("mxfp4", 32, 64)
    x = random(2, 64, device=device)
    wide = torch.full((2, 64), 7.0, device=device)
    kernels.linear(x, weight.matrix, wide[:, 16:48])
    close(wide[:, 16:48], x.double().cpu() @ weight.values.T, 1e-5)
    assert (wide[:, :16] == 7).all() and (wide[:, 48:] == 7).all()


def test_norm_alone(close, device):
    x, gain = random(3, 200, device=device), random(200, seed=1, device=device)
    out = torch.empty_like(x)
    norm.rms_norm(x, gain, EPS, out)
    close(out, rms_norm(x, gain), 1e-6)


@pytest.mark.parametrize("kind", ["bfloat16", "affine8", "nvfp4"])
def test_embeddings_of_given_and_sampled_tokens(stored, close, device, kind):
    """Row 0 is given its token, row 1 takes the token that its slot sampled last, row 2 is idle."""
    weight = stored(kind, 30, 192)
    out = torch.full((3, 192), torch.nan, device=device)
    given = torch.tensor([7, -1, -1], device=device)
    last = torch.tensor([0, 0, 29, 0], device=device)
    slots, positions = (torch.tensor(v, dtype=torch.int32, device=device) for v in ([0, 2, 1], [4, 9, -1]))
    kernels.embed(given, last, slots, positions, weight.matrix, out)
    close(out[:2], weight.values[[7, 29]], 1e-6)
    assert (out[2] == 0).all()


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("split", [False, True], ids=["fused", "separate q, k and v"])
def test_qkv_rotates_and_writes_the_cache(stored, close, device, ring, tokens, split):
    """3 query heads and 1 KV head, a cache of 8 entries, a ring or not; the last of several rows is idle."""
    H, KV, S, C, D = 3, 1, 5, 8, 192
    kinds = ["mxfp4", "affine4", "affine8"] if split else ["mxfp4"]
    shapes = [H * 64, KV * 64, KV * 64] if split else [(H + 2 * KV) * 64]
    parts = [stored(kind, rows, D, seed=i) for i, (kind, rows) in enumerate(zip(kinds, shapes, strict=True))]
    x, gain = random(tokens, D, device=device), random(D, seed=1, device=device)
    bias = random((H + 2 * KV) * 64, seed=2)
    angles = torch.arange(40)[:, None] * 150000.0 ** -(torch.arange(32) / 32)
    table = (angles.cos().to(device), angles.sin().to(device))
    slots = torch.tensor([3, 0, 4, 1][:tokens], dtype=torch.int32)
    positions = torch.tensor([19 if ring else 5, 7, 0, -1][:tokens], dtype=torch.int32)
    q = torch.full((tokens, H, 64), 9.0, device=device)
    keys, values = (torch.full((S, KV, C, 64), 9.0, device=device) for _ in "kv")
    qkv.project_qkv(
        x,
        tuple(part.matrix for part in parts),
        bias.to(device),
        table,
        slots.to(device),
        positions.to(device),
        q,
        keys,
        values,
        norm=gain,
        eps=EPS,
    )
    y = (rms_norm(x, gain) @ torch.cat([part.values for part in parts]).T + bias.double()).view(tokens, -1, 64)
    rotated = y.clone()
    for t, p in enumerate(positions.tolist()):
        c, s = angles[p].cos().double(), angles[p].sin().double()
        a, b = y[t, : H + KV, :32], y[t, : H + KV, 32:]
        rotated[t, : H + KV] = torch.cat([a * c - b * s, b * c + a * s], dim=-1)
    wanted_keys, wanted_values = (torch.full((S, KV, C, 64), 9.0, dtype=torch.float64) for _ in "kv")
    wanted_q = torch.full((tokens, H, 64), 9.0, dtype=torch.float64)
    for t, (slot, p) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        if p >= 0:
            wanted_q[t] = rotated[t, :H]
            wanted_keys[slot, :, p % C], wanted_values[slot, :, p % C] = rotated[t, H : H + KV], rotated[t, H + KV :]
    close(q, wanted_q, 1e-5)
    close(keys, wanted_keys, 1e-5)
    close(values, wanted_values, 1e-5)
