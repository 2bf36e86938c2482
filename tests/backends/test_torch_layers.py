"""The torch backend's matrices: decoding of every Spec compared with codecs.py, products, and devices."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product as every

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-gptoss[cuda]')")

import torch

from mlx_gptoss.backends import cuda as backend
from mlx_gptoss.backends.cuda import layers, plain
from mlx_gptoss.backends.cuda.load import fuse
from mlx_gptoss.backends.cuda.model import Rotary
from mlx_gptoss.errors import BackendUnavailable, InvalidRequest
from mlx_gptoss.weights import codecs
from mlx_gptoss.weights.tensor import FP8_ROW, MXFP4, MXFP8, NVFP4, Dense, Quantized, Spec

CPU = torch.device("cpu")
AFFINE = [Spec("uint", bits, group, "float") for bits, group in every((4, 8), (32, 64, 128))]
SPECS = [MXFP4, NVFP4, MXFP8, FP8_ROW, *AFFINE]


def any_codes(spec: Spec, *lead: int, width: int = 256, seed: int = 0) -> Quantized:
    """A weight with every code, random scales of both signs, and one outer factor per row."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (*lead, width * spec.bits // 8), dtype=np.uint8)
    if spec.element == "e4m3":
        codes[(codes & 127) == 127] = 0  # NaN
    scale = bias = None
    if spec.group:
        shape = (*lead, width // spec.group)
        if spec.scale == "float":
            scale, bias = (rng.normal(size=shape).astype(np.float16) for _ in "sb")
        else:
            scale = rng.integers(0, 120 if spec.scale == "e4m3" else 140, shape, dtype=np.uint8)
    outer = rng.normal(size=(*lead, 1)).astype(np.float32)
    return Quantized(spec, codes, scale, bias, outer)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_format_decodes_bit_for_bit(spec):
    weight = any_codes(spec, 3, 40)
    matrix = fuse([weight], CPU)
    assert matrix.shape == (3, 40, 256)
    decoded = matrix.decode(torch.float32).numpy()
    assert decoded.tobytes() == codecs.dequantize(weight).tobytes()
    ids = torch.tensor([[2, 0], [1, 1]])
    assert matrix.at(ids).decode(torch.float32).numpy().tobytes() == decoded[ids.numpy()].tobytes()


def test_weights_that_are_views_of_a_file_are_contiguous_on_the_device():
    """Transposed views, as in ModelOpt, and every other row, as OpenAI's gate and up."""
    weight = any_codes(NVFP4, 3, 40)
    codes = np.ascontiguousarray(weight.codes.swapaxes(-1, -2)).swapaxes(-1, -2)
    gate, up = (Quantized(NVFP4, codes[:, i::2], weight.scale[:, i::2], None, weight.outer[:, i::2]) for i in (0, 1))
    matrix = fuse([gate, up], CPU)
    assert matrix.codes.is_contiguous() and matrix.scale.is_contiguous()
    wanted = codecs.dequantize(weight)
    assert np.array_equal(matrix.decode(torch.float32), np.concatenate([wanted[:, ::2], wanted[:, 1::2]], axis=1))


def test_every_scale_byte_decodes_to_its_value():
    codes = np.full((255, 16), 0x22, dtype=np.uint8)  # all 1.0
    scale = np.arange(255, dtype=np.uint8)[:, None]
    decoded = fuse([Quantized(MXFP4, codes, scale)], CPU).decode(torch.float32)[:, 0].numpy()
    assert decoded.tolist() == [2.0**e for e in range(-127, 128)]  # 2^-127 is subnormal and not 0


@pytest.mark.parametrize("outers", [(None, None), (2.0, 2.0), (2.0, 3.0), (None, 0.5)], ids=str)
def test_fused_rows_keep_their_own_factors(outers):
    parts = [
        Quantized(NVFP4, w.codes, w.scale, None, None if outer is None else np.float32(outer))
        for w, outer in zip((any_codes(NVFP4, 8, seed=1), any_codes(NVFP4, 4, seed=2)), outers, strict=True)
    ]
    wanted = np.concatenate([codecs.dequantize(part) for part in parts])
    assert np.array_equal(fuse(parts, CPU).decode(torch.float32).numpy(), wanted)


@pytest.mark.parametrize("spec", [MXFP4, AFFINE[1], None], ids=str)
@pytest.mark.parametrize("block", [1, 256 * 7, 1 << 20])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("threads", [1, 3])
def test_products_in_blocks(monkeypatch, spec, block, tokens, threads):
    """Blocks that do not divide the rows; one row at a time; dense bfloat16 under float32."""
    monkeypatch.setattr(plain, "CPU_BLOCK", block)
    weight = (
        Dense(codecs.dequantize(any_codes(MXFP4, 40)).astype(codecs.BFLOAT16)) if spec is None else any_codes(spec, 40)
    )
    x = np.random.default_rng(3).normal(size=(tokens, 256)).astype(np.float32)
    y = plain.TorchOperations(threads).product(torch.from_numpy(x), fuse([weight], CPU)).numpy()
    wanted = x.astype(np.float64) @ codecs.dequantize(weight).astype(np.float64).T
    assert np.allclose(y, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_linear_parts_that_are_stored_differently_are_concatenated():
    parts = [any_codes(MXFP4, 24, seed=1), any_codes(AFFINE[0], 8, seed=2)]
    bias = torch.arange(32.0)
    linear = layers.Linear(tuple(fuse([part], CPU) for part in parts), bias, plain.TorchOperations(1))
    x = torch.ones(2, 3, 256)
    wanted = np.concatenate([codecs.dequantize(part).sum(axis=1) for part in parts]) + np.arange(32)
    assert linear(x).shape == (2, 3, 32)
    assert np.allclose(linear(x)[1, 2].numpy(), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_its_threads_leave_the_threads_of_others_alone():
    def threads_here() -> int:
        with ThreadPoolExecutor(1) as fresh:
            return fresh.submit(torch.get_num_threads).result()

    before = threads_here()
    torch.set_num_threads(3)
    try:
        ops = plain.TorchOperations(3)
        assert torch.get_num_threads() == threads_here() == 3
        weight = any_codes(MXFP4, 40)
        ops.product(torch.ones(1, 256), fuse([weight], CPU))
        assert torch.get_num_threads() == threads_here() == 3
    finally:
        torch.set_num_threads(before)


def test_far_positions_are_turned_exactly():
    frequencies = np.array([1.0, 0.1])
    rotation = Rotary(torch.from_numpy(frequencies), 1.0).rotation(torch.tensor([[131071]]))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4)
    z = (np.array([1.0, 2.0]) + 1j * np.array([3.0, 4.0])) * np.exp(1j * 131071 * frequencies)
    assert np.allclose(plain.TorchOperations(1).rotate(x, rotation).flatten().numpy(), [*z.real, *z.imag], atol=1e-6)


def test_devices_and_dtypes():
    assert backend.pick_device("cpu") == CPU
    assert backend.dtype_name("cpu", None) == "float32"
    assert backend.dtype_name("cpu", "bfloat16") == "bfloat16"
    for wrong in ("tpu", "cuda:x", "cuda:-1", ""):
        with pytest.raises(InvalidRequest, match="device must be"):
            backend.pick_device(wrong)
    with pytest.raises(InvalidRequest, match="dtype must be"):
        backend.dtype_name("cpu", "int8")
    with pytest.raises(BackendUnavailable, match=r"finds .* CUDA device"):
        backend.pick_device("cuda:99")


def test_without_a_gpu_the_cpu_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.pick_device(None) == CPU
    assert backend.available_memory(None) > 0
    for name in ("cuda", "gpu", "cuda:0"):
        with pytest.raises(BackendUnavailable, match=r"no CUDA device .*mlx-gptoss\[cuda\]"):
            backend.pick_device(name)


def test_the_backend_needs_nothing_but_torch():
    code = "import sys, mlx_gptoss.backends.cuda; print([m for m in ('mlx.core', 'triton') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
