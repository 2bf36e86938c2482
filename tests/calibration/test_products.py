"""Large products on a backend's device: torch and MLX on their CPUs, which stand for GPUs, against numpy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss import api
from mlx_gptoss.backends import find_backend
from mlx_gptoss.backends.base import NUMPY_PRODUCTS, Products
from mlx_gptoss.calibration.memory import plan_memory
from mlx_gptoss.calibration.moments import MomentSums
from mlx_gptoss.config import GPT_OSS_20B
from mlx_gptoss.errors import BackendUnavailable, InvalidRequest
from mlx_gptoss.loading import products
from mlx_gptoss.loading.products import find_products
from mlx_gptoss.weights import checkpoint, codecs
from mlx_gptoss.weights.tensor import AFFINE4


@pytest.fixture(params=["mlx", "cuda"])
def matmul(request):
    if request.param == "cuda":
        pytest.importorskip("torch")
    return find_backend(request.param)[0].matmul("cpu")


def test_products_are_numpys_to_rounding(matmul):
    """Of transposed, strided and read-only arrays, from several threads."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((200, 300), np.float32) for _ in range(2))
    fixed = a.copy()
    fixed.flags.writeable = False
    pairs = [(a, b.T), (a.T, b), (a[::2, :100], b[50:150]), (fixed, b.T), (a[:0], b.T), (a[:, :0], b[:0])]
    with ThreadPoolExecutor(3) as pool:
        for (left, right), found in zip(pairs, pool.map(lambda pair: matmul(*pair), pairs), strict=True):
            exact = left.astype(np.float64) @ right.astype(np.float64)
            assert found.dtype == np.float32 and found.shape == exact.shape
            scale = np.abs(left).astype(np.float64) @ np.abs(right)
            assert (np.abs(found - exact) <= 1e-6 * scale).all()


def test_codes_are_numpys_but_for_near_ties(matmul):
    """A value between two codes may fall to the other one, and those after it make up for that."""
    rng = np.random.default_rng(1)
    mixing = rng.standard_normal((256, 256), np.float32) / 16
    x = rng.standard_normal((2000, 256), np.float32) @ mixing
    actual = x + 0.02 * rng.standard_normal(x.shape, np.float32)
    weight = rng.standard_normal((128, 256), np.float32)
    stored = []
    for product in (np.matmul, matmul):
        sums = MomentSums(256, matmul=product)
        for rows in np.split(np.arange(2000), 4):
            sums.add(x[rows], actual[rows])
        moments = sums.moments()
        stored.append(codecs.dequantize(moments.quantize(weight, AFFINE4, codecs.BFLOAT16)))
    errors = [float(np.square(actual @ (each - weight).T).sum()) for each in stored]
    assert (stored[0] == stored[1]).mean() > 0.98
    assert errors[1] == pytest.approx(errors[0], rel=2e-3)


def test_a_whole_model(mini, tmp_path, matmul, monkeypatch):
    """The result is as near to the source as numpy's."""
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(f"{n} + {n * 7} = {n * 8}, and so on. " * 3 for n in range(12)))
    mlx_gptoss.convert(mini / "mxfp4", tmp_path / "numpy", "mlx-4bit", calibrate=text)
    used = []

    def counted(a, b):
        used.append(a.shape)
        return matmul(a, b)

    monkeypatch.setattr(api, "find_products", lambda *_: Products("another device", counted, on_device=True))
    mlx_gptoss.convert(mini / "mxfp4", tmp_path / "other", "mlx-4bit", calibrate=text)
    assert len(used) > 100
    ids = list(range(40, 90))
    logits = []
    for folder in (mini / "mxfp4", tmp_path / "numpy", tmp_path / "other"):
        with mlx_gptoss.load(folder) as model:
            logits.append(model.logits(ids))
    errors = [float(np.square(each - logits[0]).mean()) for each in logits[1:]]
    assert errors[1] == pytest.approx(errors[0], rel=0.2)
    stored = [checkpoint.open(tmp_path / name) for name in ("numpy", "other")]
    for name in "qkv":  # the same inputs; behind them are those that other codes have changed
        one, other = (codecs.dequantize(each.read(f"layers.0.attention.{name}.weight")) for each in stored)
        assert (one == other).mean() > 0.8


def test_which_products_compute(monkeypatch):
    assert find_products("mlx", "cpu") is NUMPY_PRODUCTS
    gpu = SimpleNamespace(device_name=lambda device: "Apple M9", matmul=lambda device: np.dot)
    monkeypatch.setattr(products, "find_backend", lambda name: (gpu, "mlx"))
    assert find_products() == Products("mlx on Apple M9", np.dot, on_device=True)

    def missing(name):
        raise BackendUnavailable("not installed")

    monkeypatch.setattr(products, "find_backend", missing)
    assert find_products() is NUMPY_PRODUCTS
    for named in ({"backend": "cuda"}, {"device": "gpu"}):
        with pytest.raises(BackendUnavailable):
            find_products(**named)


def test_refusals(mini, tmp_path):
    with pytest.raises(InvalidRequest, match="backend must be auto"):
        mlx_gptoss.convert(mini / "mxfp4", tmp_path / "out", calibrate=True, backend="abacus")


def test_memory_counts_what_is_copied():
    on_cpu, on_device = (plan_memory(GPT_OSS_20B, 65_536, 2048, on_device=flag).total_bytes for flag in (False, True))
    assert 0 < on_device - on_cpu < 6e8
