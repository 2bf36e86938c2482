"""What selftest advises about a machine, from the facts of machines that are not here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mlx_gptoss.measure.facts import MATRIX_KERNEL, facts, findings, matrix_kernels
from mlx_gptoss.measure.selftest import Measured, Result

LINUX = {
    "packages": {"mlx": "0.32.4", "torch": "2.13.0", "triton": "3.9.0"},
    "os": "Linux-6.1",
    "architecture": "x86_64",
    "chip": "Intel Xeon",
    "cores": 8,
    "memory_bytes": 32 << 30,
    "device": {},
    "variables": {},
    "open_files": {"soft": 4096, "hard": None},
    "hub_cache": {"path": "~/hub", "free_bytes": 100 << 30},
}
MAC = {
    **LINUX, "os": "macOS 26.1", "architecture": "arm64", "chip": "Apple M5", "device": {"metal": True},
    "rosetta": False, "packages": {"mlx": "0.32.4"}, "iogpu.wired_limit_mb": 0,
}  # fmt: skip


def advice(facts, *, backend="mlx", on_gpu=False, dtype="float32", results=()):
    machine = SimpleNamespace(backend=backend, kernels=SimpleNamespace(on_gpu=on_gpu, dtype=dtype))
    return [f"{finding.what}: {finding.do}" for finding in findings(facts, machine, results)]


def test_a_machine_in_order_gets_no_advice():
    assert advice(LINUX) == []
    assert advice({**LINUX, "open_files": {"soft": 256, "hard": None}}) == []  # `serve` raises it
    without_units = {"in_library": True, "macos": True, "chip": False}
    assert advice({**MAC, "matrix_kernels": without_units}, on_gpu=True, dtype="bfloat16") == []
    assert advice(MAC, on_gpu=True, dtype="bfloat16") == []


@pytest.mark.parametrize(
    ("facts", "where", "words"),
    [
        ({**LINUX, "open_files": {"soft": 256, "hard": 512}}, {}, ("limited to 512", "ulimit -Hn 4096")),
        (
            {**MAC, "matrix_kernels": {"in_library": False, "macos": True, "chip": True}},
            {"on_gpu": True, "dtype": "bfloat16"},
            ("matrix units", "26.2", "--force-reinstall"),
        ),
        ({**LINUX, "hub_cache": {"path": "~/hub", "free_bytes": 5 << 30}}, {}, ("5.4 GB free", "HF_HUB_CACHE")),
        ({**LINUX, "nvidia_driver": "NVRM", "packages": {"mlx": "1"}}, {}, ("NVIDIA driver", "mlx-gptoss[cuda]")),
        ({**LINUX, "nvidia_driver": "NVRM"}, {"backend": "cuda"}, ("ran on the CPU", "pytorch.org")),
        ({**LINUX, "variables": {"OMP_NUM_THREADS": "1"}}, {}, ("1 of 8 cores", "unset")),
        ({**LINUX, "variables": {"TRITON_INTERPRET": "1"}}, {}, ("run in Python", "unset")),
        (
            {**LINUX, "packages": {"triton": "3.6.0"}, "device": {"compute capability": "9.0"}},
            {"backend": "cuda", "on_gpu": True, "dtype": "bfloat16"},
            ("race on H100", "triton>=3.9"),
        ),
        (LINUX, {"dtype": "bfloat16"}, ("bfloat16 on a CPU", "leave out --dtype")),
        ({**MAC, "packages": {"mlx": "0.32.0"}}, {"on_gpu": True, "dtype": "bfloat16"}, ("M5", "mlx>=0.32.4")),
        ({**MAC, "rosetta": True, "architecture": "x86_64", "chip": "Apple M1"}, {}, ("cannot use Metal", "arm64")),
        (
            {
                **MAC,
                "device": {"metal": True, "command_buffers": {"ops": 50, "mb": 2000, "why": "set", "enough": False}},
            },
            {"on_gpu": True, "dtype": "bfloat16"},
            ("cannot overlap", "unset MLX_MAX_OPS_PER_BUFFER"),
        ),
        (MAC, {"on_gpu": True}, ("TF32", "MLX_ENABLE_TF32=0")),
        (
            {**MAC, "iogpu.wired_limit_mb": 32000},
            {"on_gpu": True, "dtype": "bfloat16"},
            ("less than 4 GB", "wired_limit_mb=28672"),
        ),
    ],
)
def test_each_finding_says_what_to_do(facts, where, words):
    (found,) = advice(facts, **where)
    for word in words:
        assert word in found


def test_a_slow_gpu_is_noticed():
    slow = Result("speed, a decode step", 1.0, measured=(Measured("share of the bound by bytes", 12.0, "%"),))
    (found,) = advice(MAC, on_gpu=True, dtype="bfloat16", results=[slow])
    assert "12%" in found and "power mode" in found
    assert advice(LINUX, results=[slow]) == []  # a CPU is bound by its arithmetic


def test_facts_have_no_secrets_and_no_name_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "zebedee"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "zebedee/models"))
    monkeypatch.setenv("HF_ENDPOINT", "https://zebedee:hunter2@mirror.example/hf")
    monkeypatch.setenv("HF_HUB_TOKEN", "hunter2")
    found = facts(SimpleNamespace(backend="mlx", kernels=SimpleNamespace(on_gpu=False, dtype="float32", facts=dict)))
    assert found["variables"]["HF_ENDPOINT"] == "https://mirror.example/hf"
    assert found["variables"]["HF_HOME"] == "~/models"
    assert "hunter2" not in str(found) and "zebedee" not in str(found)


def test_matrix_kernels_need_the_wheel_the_system_and_the_chip(tmp_path):
    with_kernels, without = tmp_path / "26.metallib", tmp_path / "15.metallib"
    with_kernels.write_bytes(b"MTLB" + bytes(9000) + MATRIX_KERNEL + b"_bfloat16" + bytes(9000))
    without.write_bytes(b"MTLB" + bytes(9000) + b"steel_gemm_fused_nt")
    (tmp_path / "empty").write_bytes(b"")
    for library, system, architecture, wanted in [
        (with_kernels, "macOS 26.2", "applegpu_g17s", (True, True, True)),
        (with_kernels, "macOS 26.1", "applegpu_g16s", (True, False, False)),
        (without, "macOS 27.0.1", "applegpu_g17g", (False, True, True)),
        (None, "macOS 15.6", "", (False, False, False)),
        (tmp_path / "empty", "macOS 26.3", "applegpu_g18d", (False, True, True)),
        (tmp_path / "none", "Linux-6.1", "x86_64", (False, False, False)),
    ]:
        found = matrix_kernels(library, system, {"architecture": architecture})
        assert (found["in_library"], found["macos"], found["chip"]) == wanted


def test_the_wheel_is_named():
    found = facts(SimpleNamespace(backend="mlx", kernels=SimpleNamespace(on_gpu=False, dtype="float32", facts=dict)))
    assert "mlx" in found["wheels"] and "-" in found["wheels"]["mlx"]
