"""The self-test finds kernels that compute wrongly, on both backends, and passes those that do not.

Small shapes: the widths of gpt-oss are those of the command itself (tests/cli/test_selftest.py).
"""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest

from mlx_gptoss.backends import find_backend
from mlx_gptoss.config import TINY
from mlx_gptoss.measure import selftest, selftest_kernels, selftest_model
from mlx_gptoss.measure.selftest import Check, Compared, Machine, Measured, Skipped
from mlx_gptoss.weights.synthetic import Synthetic

CONFIG = replace(TINY, num_attention_heads=8, num_key_value_heads=2, vocab_size=5000)
BACKENDS = ["mlx", "cuda"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few keys and rows; a whole vocabulary in place of gpt-oss's."""
    monkeypatch.setattr(selftest_kernels, "KEYS", (127, 300))
    monkeypatch.setattr(selftest_kernels, "ROWS", (1, 4, 40))
    monkeypatch.setattr(selftest_kernels, "LM_HEAD_ROWS", 1024)
    monkeypatch.setattr(selftest_model, "_weights", lambda machine: Synthetic(TINY, "mxfp4"))
    monkeypatch.setattr(selftest_model, "END", 300)
    monkeypatch.setattr(selftest_model, "LONG", 1024)


def machine_of(name: str, **options) -> Machine:
    if name == "cuda":
        pytest.importorskip("torch")
    module, _ = find_backend(name)
    code = import_module(f"mlx_gptoss.backends.{name}.selftest")
    return Machine(module, name, code.Kernels(CONFIG, "cpu", None, **options), "cpu", None)


def results(machine: Machine, *names: str) -> dict[str, selftest.Result]:
    """Of the checks with these names, or of all but the speeds."""
    try:
        checks = [*selftest_kernels.checks(machine), *selftest_model.checks(machine)]
        return {
            check.name: selftest.run(check)
            for check in checks
            if (check.name in names if names else not check.name.startswith("speed"))
        }
    finally:
        machine.kernels.close()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_machine_that_computes_correctly_passes(name):
    found = results(machine_of(name))
    assert not {key: (result.worst, result.problem) for key, result in found.items() if not result.ok}
    missing = {"attention, the fused kernel", "K/V written in place"}
    unsupported = {"mlx": set(), "cuda": missing}
    assert {key for key, result in found.items() if not result.ran} == unsupported[name]
    assert all(skipped.reason for result in found.values() for skipped in result.skipped)


def scaled(function, factor):
    return lambda *args, **options: function(*args, **options) * factor


def replaced(owner, attribute, make):
    """(monkeypatch, backend's package) -> owner.attribute is make(owner.attribute), where owner is "module.Class"."""

    def apply(monkeypatch, package):
        module, _, kind = owner.partition(".")
        target = import_module(f"{package}.{module}")
        target = getattr(target, kind) if kind else target
        monkeypatch.setattr(target, attribute, make(getattr(target, attribute)))

    return apply


def off(function):
    """A thousandth too large."""
    return scaled(function, 1.001)


def without_one(swiglu):
    """gate * sigmoid * up, as every other model has it."""

    def run(gate, up, *rest):
        return swiglu(gate, up - 1, *rest)

    return run


def broken_mlx_swiglu(monkeypatch, package):
    code = import_module(f"{package}.selftest")
    monkeypatch.setattr(code, "UNCOMPILED", replace(code.UNCOMPILED, swiglu=without_one(code.UNCOMPILED.swiglu)))


def one_noise_for_all(monkeypatch, package):
    """Every row draws with the first row's noise and every step with the first step's."""
    code = import_module(f"{package}.selftest")
    noise = code.UNCOMPILED.add_gumbel_noise
    same = lambda logits, temperature, keys: noise(logits, temperature, keys * 0)  # noqa: E731
    monkeypatch.setattr(code, "UNCOMPILED", replace(code.UNCOMPILED, add_gumbel_noise=same))


def wider(mask):
    """A bool mask of which each query also sees the next key; "causal" as it is."""
    if isinstance(mask, str):
        return mask
    import mlx.core as mx

    return mask | mx.concatenate([mask[..., :1], mask[..., :-1]], axis=-1)


def copying(write):
    """What the last steps wrote to is still held, so that each step writes to a copy."""
    held = []

    def run(cache, *rest):
        held[:] = [*held[-3:], cache.reshape(-1)]  # of two layers
        return write(cache, *rest)

    return run


def both(name, change):
    """MLX's quantized matrices, and those of a CPU, by which kernels multiply if llvmlite is installed."""

    def breaks(monkeypatch, package):
        for place in ("layers.QuantizedMatrix", "host.HostMatrix"):
            replaced(place, name, change)(monkeypatch, package)

    return breaks


def every(*faults):
    """Of decoding by MLX, and in numpy if llvmlite is installed."""

    def breaks(monkeypatch, package):
        for fault in faults:
            fault(monkeypatch, package)

    return breaks


def copying_in_numpy(attend):
    """As copying, of a layer that decodes in numpy."""
    import mlx.core as mx

    held = []

    def run(block, x, base, cache, *rest):
        found = attend(block, x, base, cache, *rest)
        held[:] = [*held[-3:], cache.arrays[0] + 0]
        mx.eval(held)
        return found

    return run


def of_other_rows(attend):
    """Queries, keys and values of a batch in the reverse order."""
    return lambda self, qkv, *rest: attend(self, np.ascontiguousarray(qkv[::-1]), *rest)


MLX_FAULTS = {
    "a product off by a thousandth": (
        "linear, mxfp4",
        both("matmul", off),
    ),
    "experts off by a thousandth": (
        "experts, mxfp4",
        both("gather", off),
    ),
    "lm_head off by a thousandth": (
        "lm_head, bfloat16",
        replaced("host.HostMatrix", "matmul", off),
    ),
    "an up without its one": ("experts, affine 4-bit, groups of 64", broken_mlx_swiglu),
    "rows of the wrong tokens": (
        "embeddings",
        both("rows", lambda f: lambda self, ids, dtype: f(self, ids + 1, dtype)),
    ),
    "positions off by one": (
        "RoPE",
        replaced("model.Rotary", "__call__", lambda f: lambda self, x, offsets: f(self, x, offsets + 1)),
    ),
    "attention without its sink": (
        "attention, full",
        replaced("host", "_attend", lambda f: lambda q, k, v, sink, seen, out: f(q, k, v, sink - 99, seen, out)),
    ),
    "a window of one key too many": (
        "attention, sliding",
        replaced("model.Attention", "_within_window", lambda f: lambda self, q, k, v, w: f(self, q, k, v, w + 1)),
    ),
    "unequal rows that see each other's length": (
        "attention, full, two sequences",
        replaced("cache", "_causal_mask", lambda f: lambda starts, end, heads: f([end for _ in starts], end, heads)),
    ),
    "the fused kernel without its sink": (
        "attention, the fused kernel",
        replaced(
            "selftest", "fused", lambda f: lambda q, k, v, scale, mask, sinks: f(q, k, v, scale, mask, sinks - 99)
        ),
    ),
    "the fused kernel with bool masks that see one key too many": (
        "attention, the fused kernel",
        replaced(
            "selftest", "fused", lambda f: lambda q, k, v, scale, mask, sinks: f(q, k, v, scale, wider(mask), sinks)
        ),
    ),
    "keys in 8 bits, off by a tenth": (
        "attention, 8-bit K/V",
        replaced("cache", "pack", lambda f: lambda kv: f(kv * 0.8)),
    ),
    "a grammar's mask ignored": ("sampler, likeliest token", replaced("sample", "_mask", lambda f: lambda x, masks: x)),
    "one noise for all rows": ("sampler, random draws", one_noise_for_all),
    "a prefix restored without its beginning": (
        "prefix cache, save and restore",
        replaced("cache.FullCache", "restore", lambda f: lambda self, slot, chain: f(self, slot, chain[1:])),
    ),
    "a batch that mixes its rows": (
        "sequences of a batch",
        every(
            replaced(
                "cache", "_causal_mask", lambda f: lambda starts, end, heads: f([end for _ in starts], end, heads)
            ),
            replaced("host_step.TokenAttention", "__call__", of_other_rows),
        ),
    ),
    "a cache that is copied": (
        "K/V written in place",
        every(replaced("cache", "_write", copying), replaced("host_step.HostBlock", "attend", copying_in_numpy)),
    ),
}
CUDA_FAULTS = {
    "a product off by a thousandth": (
        "linear, mxfp4",
        replaced("plain.TorchOperations", "product", off),
    ),
    "experts off by a thousandth": (
        "experts, nvfp4",
        replaced("plain.TorchOperations", "mixture", off),
    ),
    "a scale ignored": (
        "linear, mxfp8",
        replaced("matrices", "_scales", lambda f: scaled(f, 0.99)),
    ),
    "an up without its one": ("experts, bfloat16", replaced("plain", "clamped_swiglu", without_one)),
    "positions off by one": (
        "RoPE",
        replaced("model.Rotary", "rotation", lambda f: lambda self, positions: f(self, positions + 1)),
    ),
    "attention without its sink": (
        "attention, sliding",
        replaced("plain", "_attend", lambda f: lambda q, k, v, mask, sinks, scale: f(q, k, v, mask, sinks - 99, scale)),
    ),
    "unequal rows that see each other's length": (
        "attention, full, two sequences",
        replaced("cache", "_causal_mask", lambda f: lambda offsets, end: f(offsets * 0 + end, end)),
    ),
    "keys in 8 bits, off by a tenth": (
        "attention, 8-bit K/V",
        replaced("plain", "pack", lambda f: lambda x: f(x * 0.8)),
    ),
    "a grammar's mask ignored": ("sampler, likeliest token", replaced("sample", "_mask", lambda f: lambda x, masks: x)),
    "one noise for all rows": (
        "sampler, random draws",
        replaced("sample", "noise_keys", lambda f: lambda seeds, positions: f([0] * len(seeds), [0] * len(seeds))),
    ),
    "a prefix restored without its beginning": (
        "prefix cache, save and restore",
        replaced("cache.FullCache", "restore", lambda f: lambda self, slot, chain: f(self, slot, chain[1:])),
    ),
}
FAULTS = {
    f"{name}: {fault}": (name, *case)
    for name, faults in (("mlx", MLX_FAULTS), ("cuda", CUDA_FAULTS))
    for fault, case in faults.items()
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_is_broken_on_purpose_is_found(fault, monkeypatch):
    name, check, breaks = FAULTS[fault]
    machine_of(name).kernels.close()  # skips without torch
    breaks(monkeypatch, f"mlx_gptoss.backends.{name}")
    result = results(machine_of(name), check)[check]
    assert not result.ok and result.advice, result.worst


@pytest.mark.slow
def test_the_triton_kernels_pass_in_the_interpreter(monkeypatch):
    """What a GPU would run, on small shapes. Decode steps take their own way through the experts and attention."""
    pytest.importorskip("triton")
    monkeypatch.setattr(selftest_kernels, "KEYS", (140,))
    monkeypatch.setattr(selftest_kernels, "QUERIES", (1, 4))
    monkeypatch.setattr(selftest_kernels, "PROMPTS", (33,))
    monkeypatch.setattr(selftest_kernels, "ROWS", (1, 4))
    machine = machine_of("cuda", kernels=True)
    names = (
        "RoPE", "attention, full", "attention, sliding", "attention, full, two sequences",
        "attention, sliding, two sequences", "linear, mxfp4", "experts, mxfp4", "experts, affine 4-bit, groups of 64",
    )  # fmt: skip
    found = results(machine, *names)
    assert set(found) == set(names)
    assert not {key: (result.worst, result.problem) for key, result in found.items() if not result.ok}
    assert {case.case for case in found["experts, mxfp4"].compared} == {
        "1 row, decode", "1 row, prefill", "4 rows, decode", "4 rows, prefill",
    }  # fmt: skip


def check_of(*outcomes) -> Check:
    return Check("it", lambda: iter(outcomes), "replace it")


def test_what_is_not_a_number_fails():
    for error in (math.nan, math.inf, 0.2):
        result = selftest.run(check_of(Compared("fine", 0.01, 0.1), Compared("wrong", error, 0.1)))
        assert not result.ok and result.worst.case == "wrong"
    assert selftest.run(check_of(Compared("exact", 0.0, 0.0))).ok
    assert not selftest.run(check_of(Compared("not exact", 1e-9, 0.0))).ok


def test_a_check_that_raises_fails_and_keeps_what_it_found():
    def cases():
        yield Compared("first", 0.0, 1.0)
        raise RuntimeError("[metal] command buffer failed")

    result = selftest.run(Check("it", cases))
    assert not result.ok and len(result.compared) == 1
    assert result.problem == "RuntimeError: [metal] command buffer failed"


def test_nothing_but_skipped_cases_is_no_success():
    result = selftest.run(check_of(Skipped("all", "it needs a GPU")))
    assert not result.ran and result.skipped[0].reason == "it needs a GPU"
    assert selftest.run(check_of(Measured("speed", 3.0, "GB/s"))).ran


def test_errors_are_relative_to_what_is_computed():
    wanted = np.array([3.0, -3.0], np.float32)
    assert selftest.relative_error(wanted + np.float32(0.3), wanted) == pytest.approx(0.1)
    assert selftest.relative_error(np.array([np.nan, 0.0], np.float32), wanted) == math.inf
    with pytest.raises(ValueError, match="shape"):
        selftest.relative_error(wanted[None], wanted)


def test_checks_by_name():
    plan = selftest.plan("mlx", "cpu", None, ["RMS", "linear*4-bit*64"])
    try:
        assert [check.name for check in plan.checks] == ["RMSNorm", "linear, affine 4-bit, groups of 64"]
    finally:
        plan.close()


def test_the_check_of_writes_in_place_has_a_model_whose_steps_overlap():
    """On a Mac a step has to be cut into enough command buffers, so the model has many layers; here two do."""
    machine = machine_of("mlx")
    machine.kernels.layers_in_flight = lambda: 5
    (case,) = results(machine, "K/V written in place")["K/V written in place"].compared
    assert "50 steps of 5 layers" in case.case and case.ok


def test_float32_is_not_tf32(monkeypatch):
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    for dtype, value in (("bfloat16", None), ("float32", "0")):
        selftest.plan("mlx", "cpu", dtype, ["RMS"]).close()
        assert selftest.os.environ.get("MLX_ENABLE_TF32") == value
