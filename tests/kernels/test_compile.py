"""Every kernel that gpt-oss-20b launches compiles to a cubin for three generations of GPUs, and spills no register."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPORT = Path(__file__).parent / "report.py"
EXPECTED = {"embed", "qkv", "decode", "linear", "router", "gate_up_one_token", "down_one_token"}  # one row
EXPECTED |= {"merge_splits", "draw_blocks", "draw_rows"}
EXPECTED |= {"rms_norm", "sort_pairs", "gate_up_grouped", "down_grouped", "sum_experts"}  # several rows
EXPECTED |= {"rope", "prefill"}


def report(*options: str) -> list[dict]:
    """Run report.py in another process, where the interpreter is off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, REPORT, "--json", *options], capture_output=True, text=True, env=environment, timeout=900
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout)


def check(compiled: list[dict], archs: set[int]) -> None:
    assert {c["arch"] for c in compiled} == archs
    for arch in archs:
        assert {c["kernel"] for c in compiled if c["arch"] == arch} >= EXPECTED
    for c in compiled:
        assert c["spills"] == 0 and c["registers"] <= 255, c
        assert c["shared"] <= 99 << 10, c  # a program's limit on sm_120, the smallest of the three


def test_kernels_of_the_published_checkpoint():
    check(report("--format", "mxfp4", "--arch", "80", "90", "120", "--rows", "1", "16"), {80, 90, 120})


def test_a_matrix_vector_product_keeps_up_with_memory():
    """Few instructions per weight in the products that take most of a one-row step. An H200's 132 multiprocessors issue
    4 warp instructions a cycle each, which is 3.7 for each 4-bit weight at the speed of its memory."""
    compiled = report("--format", "mxfp4", "mlx-4bit", "--arch", "90", "--rows", "1")
    for c in compiled:
        weights = {"gate_up_one_token": 16 * 256, "down_one_token": 64 * 128, "linear": 16 * 256}.get(c["kernel"])
        if weights and "1 row" in c["what"]:
            assert c["loop"] * 32 * c["warps"] / weights < 6.5, c


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["20b", "120b"])
def test_kernels_of_every_format(preset):
    formats = ["bf16", "fp8-dynamic", "int4-autoround", "nvfp4", "mlx-4bit", "mlx-8bit", "mlx-mxfp8", "mlx-mxfp4-q4"]
    options = ["--preset", preset, "--arch", "80", "90", "120", "--rows", "1", "2", "64"]
    check(report("--format", *formats, *options), {80, 90, 120})
