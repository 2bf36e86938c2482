"""Every kernel that gpt-oss-20b launches compiles to a cubin for three generations of GPUs, and spills no register."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

REPORT = Path(__file__).parent / "report.py"
EXPECTED = {"embed", "qkv", "decode", "linear", "router", "gate_up_one_token", "down_one_token"}  # one row
EXPECTED |= {"merge_splits", "draw_blocks", "draw_rows"}
EXPECTED |= {"rms_norm", "sort_pairs", "gate_up_grouped", "down_grouped", "sum_experts"}  # several rows
EXPECTED |= {"rope", "prefill"}
EXPECTED |= {"quantize", "dequantize"}  # keys and values in 8 bits


SHARED = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes, the limit of a program
PRODUCTS = {"qkv", "linear", "gate_up_one_token", "down_one_token", "gate_up_grouped", "down_grouped"}


def report(*options: str, triton: str | None = None) -> list[dict]:
    """Run report.py in another process, where the interpreter is off. triton: a folder with another Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if triton is not None:
        places = [triton, str(Path(__file__).parents[2]), environment.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    out = subprocess.run(
        [sys.executable, REPORT, "--json", *options], capture_output=True, text=True, env=environment, timeout=3600
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout)


def check(compiled: list[dict], archs: set[int]) -> None:
    assert {c["arch"] for c in compiled} == archs
    for arch in archs:
        assert {c["kernel"] for c in compiled if c["arch"] == arch} >= EXPECTED
    for c in compiled:
        assert c["spills"] == 0 and c["registers"] <= 255, c
        assert c["shared"] <= SHARED[c["arch"]], c
        assert not c["late_writes"], c  # wrong results on sm_90, see sass.py
        assert c["early"] == (0 if c["arch"] >= 90 else None), c  # a kernel before it may still write what it reads
        if c["kernel"] in PRODUCTS and c["stages"] > 1:
            assert not c["waits"], c  # for a load, in each step


@pytest.mark.parametrize(
    "arch", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(120, marks=pytest.mark.slow)]
)
def test_kernels_of_the_published_checkpoint(arch):
    compiled = report("--format", "mxfp4", "--arch", str(arch), "--rows", "1", "16")
    check(compiled, {arch})
    for c in compiled:
        if arch == 90 and c["kernel"].endswith("grouped") and "prefill" in c["what"] and c["stages"] > 1:
            assert c["in_flight"], c  # weights are decoded while the tensor cores multiply the ones before


@pytest.mark.parametrize(("form", "most"), [("mxfp4", 3.7), ("mlx-4bit", 4.5)])
@pytest.mark.parametrize(
    "arch", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(120, marks=pytest.mark.slow)]
)
def test_a_matrix_vector_product_keeps_up_with_memory(form, most, arch):
    """Few instructions per weight in the products of a one-row step. An H200's 132 multiprocessors issue 4 warp
    instructions a cycle each, which is 3.7 for each 4-bit weight at the speed of its memory."""
    compiled = report("--format", form, "--arch", str(arch), "--rows", "1")
    found = [c for c in compiled if c["kernel"] in PRODUCTS and "1 row" in c["what"]]
    assert {c["kernel"] for c in found} == {"qkv", "linear", "gate_up_one_token", "down_one_token"}
    for c in found:
        assert c["per_weight"] <= most and not c["waits"], c


@pytest.mark.slow
def test_kernels_of_every_format():
    """Of both models in one go, because most of their kernels are the same."""
    formats = ["bf16", "fp8-dynamic", "int4-autoround", "nvfp4", "mlx-4bit", "mlx-8bit", "mlx-mxfp8", "mlx-mxfp4-q4"]
    options = ["--preset", "20b", "120b", "--arch", "80", "90", "120", "--rows", "1", "2", "64"]
    check(report("--format", *formats, *options), {80, 90, 120})


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.6", "3.7", "3.8", "3.9"])
def test_no_triton_overwrites_an_operand_in_flight(version):
    """Every product of the formats that are decoded, for sm_90, with each Triton that TRITONS names: folders made by
    `pip install --no-deps --target FOLDER triton==3.6.0`, separated by colons."""
    folders = {triton_version(folder): folder for folder in os.environ.get("TRITONS", "").split(os.pathsep) if folder}
    if version not in folders and version != ".".join(triton.__version__.split(".")[:2]):
        pytest.skip(f"TRITONS has no folder with Triton {version}")
    formats = ["mxfp4", "nvfp4", "fp8-dynamic", "mlx-4bit", "mlx-8bit", "int4-autoround"]
    options = ["--format", *formats, "--arch", "90", "--rows", "1", "16", "32", "64"]
    check(report(*options, triton=folders.get(version)), {90})


def triton_version(folder: str) -> str:
    """Of the Triton in a folder: its first two numbers."""
    path = next(Path(folder).glob("triton-*.dist-info"))
    return ".".join(path.name.removeprefix("triton-").split(".")[:2])
