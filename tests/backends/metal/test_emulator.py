"""The emulator: it computes what Metal would, and finds what is wrong with a kernel."""

from __future__ import annotations

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from emulator import check_address_spaces, clang
from metal_numbers import narrow, wide

from mlx_gptoss.backends.mlx.kernels import metal as texts
from mlx_gptoss.backends.mlx.kernels.attention import Attend
from mlx_gptoss.backends.mlx.kernels.norm import AddNorm
from mlx_gptoss.backends.mlx.kernels.router import Router


def launch(compiled, body: str, x: mx.array, dtype: mx.Dtype = mx.float32, threads: int = 64, size: int = 64):
    """A kernel of one threadgroup: x -> y, `size` values"""
    kernel = compiled.metal_kernel("test", ["x"], ["y"], body)
    (y,) = kernel(
        inputs=[x],
        template=[("T", x.dtype), ("Y", dtype), ("N", x.size)],
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(size,)],
        output_dtypes=[dtype],
    )
    return wide(y)


@pytest.mark.parametrize(("dtype", "numpy"), [(mx.bfloat16, ml_dtypes.bfloat16), (mx.float16, np.float16)])
def test_narrow_floats_convert_as_numpys(compiled, dtype, numpy):
    """Each of them to float and back, and floats between them."""
    body = "for (uint i = thread_index_in_threadgroup; i < N; i += 64) y[i] = Y(float(x[i]));"
    every = np.arange(1 << 16, dtype=np.uint16)
    found = launch(compiled, body, mx.array(every).view(dtype), mx.float32, size=1 << 16)
    assert np.array_equal(found, every.view(numpy).astype(np.float64), equal_nan=True)
    rng = np.random.default_rng(0)
    sizes = rng.normal(size=1 << 16) * 2.0 ** rng.integers(-45, 40, 1 << 16)
    halfway = every.view(numpy)[:-1].astype(np.float32) / 2 + every.view(numpy)[1:].astype(np.float32) / 2
    for floats in (sizes.astype(np.float32), halfway[np.isfinite(halfway)]):
        found = launch(compiled, body, mx.array(floats), dtype, size=len(floats))
        with np.errstate(over="ignore"):
            assert np.array_equal(found, floats.astype(numpy).astype(np.float64))


def test_operations_of_a_simdgroup(compiled):
    x = np.random.default_rng(1).normal(size=64)
    given = narrow(x, mx.float32)
    for body, wanted in (
        ("simd_sum(a)", [half.sum() for half in x.reshape(2, 32) for _ in range(32)]),
        ("simd_max(a)", [half.max() for half in x.reshape(2, 32) for _ in range(32)]),
        ("simd_min(a)", [half.min() for half in x.reshape(2, 32) for _ in range(32)]),
        ("simd_shuffle_xor(a, 5)", x[np.arange(64) ^ 5]),
    ):
        text = f"const float a = x[thread_position_in_grid.x]; y[thread_position_in_grid.x] = {body};"
        assert np.allclose(launch(compiled, text, given), wanted, rtol=1e-5, atol=1e-6), body


WRONG = {
    "outside its arrays": "y[thread_index_in_threadgroup] = x[thread_index_in_threadgroup + 1000];",
    "outside its arrays ": "y[thread_index_in_threadgroup + N] = x[0];",
    "undefined": "float a[4] = {0}; a[int(x[thread_index_in_threadgroup]) + 4] = 1; y[0] = a[0];",
    "undefined ": "y[0] = float(((const device uint4*)(x + 1))->x);",
    "different places": "if (thread_index_in_simdgroup < 5) y[0] = simd_sum(x[0]);",
    "different places ": "if (thread_index_in_threadgroup < 32) threadgroup_barrier(mem_flags::mem_threadgroup);",
    "does not compile": "const T a = x[0] * 1.0; y[0] = undeclared;",
}


@pytest.mark.parametrize("reason", WRONG, ids=str.strip)
def test_a_wrong_kernel_is_found(compiled, reason):
    with pytest.raises(RuntimeError, match=reason.strip()):
        launch(compiled, WRONG[reason], mx.zeros(64))


def test_memory_that_was_not_written_is_nan(compiled):
    """Not even what the launch before it left there."""
    body = "threadgroup float a[N]; const uint i = thread_index_in_threadgroup; if (x[i] > 0) a[i] = 1; y[i] = a[i];"
    assert not np.isnan(launch(compiled, body, mx.ones(64))).any()
    assert np.isnan(launch(compiled, body, mx.zeros(64))).all()


@pytest.mark.parametrize(
    ("name", "barrier"),
    [("norm", "threadgroup_barrier"), ("attention", "threadgroup_barrier"), ("attention", "simdgroup_barrier")],
)
def test_a_missing_barrier_is_found(run, metal, monkeypatch, name, barrier):
    """The kernel's result depends on the order of the threads, or is not even a number."""
    if metal is None:
        pytest.skip("a GPU need not show it")
    text = texts._text(name)
    before, line, after = text.rpartition(f"{barrier}(mem_flags::mem_threadgroup);")
    if barrier == "simdgroup_barrier":  # before the last one, operations of the simdgroup already keep lanes in step
        before, line, after = text.partition(line)
    monkeypatch.setattr(texts, "_text", lambda wanted: before + after if wanted == name else "")
    with pytest.raises(AssertionError):
        if name == "norm":
            found = run(AddNorm(1e-5), *(mx.ones(s) for s in ((3, 192), (3, 192), 192)))
        else:
            q, kv = mx.random.normal((1, 16, 1, 64)), mx.random.normal((2, 1, 2, 300, 64))
            indices = [mx.array([0]), mx.array([200])]
            found = run(Attend(0.1), q, [kv], *(i.astype(mx.int32) for i in indices), None, mx.zeros(16), 201)
        assert all(np.isfinite(array).all() for array in found)


def test_address_spaces_are_kept_apart(compiled, metal, tmp_path):
    """As Metal's compiler does it, with a clang: of every kernel compiled here, and of one that mixes them."""
    if clang() is None:
        pytest.skip("there is no clang (clang++ or pip install ziglang)")
    wrong = "threadgroup float a[4]; const device float* p = a; y[0] = p[0];"
    launch(compiled, wrong, mx.zeros(64))
    Router()(mx.zeros((1, 32)), 4)
    Router()(mx.zeros((1, 4)), 4)  # less than 8 values lie in constant memory
    for name, text in compiled.sources.items():
        complaint = check_address_spaces(text, tmp_path)
        assert bool(complaint) == (wrong in text), f"{name}: {complaint}"
