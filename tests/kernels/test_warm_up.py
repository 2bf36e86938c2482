"""No request compiles a kernel: all that it launches is compiled when the model is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import triton

from mlx_gptoss.backends.cuda.kernels import launch

SCRIPT = Path(__file__).parent / "after_warm_up.py"


@pytest.mark.parametrize(
    ("form", "slots"),
    [("mxfp4", 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("mxfp4", 1), ("mlx-4bit", 4)))],
)
def test_no_request_compiles_a_kernel(form, slots):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, SCRIPT, form, str(slots)]
    out = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=900)
    assert out.returncode == 0, out.stderr[-3000:]
    found = json.loads(out.stdout)
    assert found["missing"] == [] and found["launches"] > 40


class Kernel:
    """Stands for a Triton kernel: counts how often it is compiled and run, and by which threads."""

    @staticmethod
    def fn() -> None:
        """A kernel that does not wait for the one before it."""

    def __init__(self) -> None:
        self.compiled: list[dict] = []
        self.ran: list[dict] = []

    def warmup(self, *args, grid, **options) -> None:
        self.compiled.append({"grid": grid, **options})

    def __getitem__(self, grid):
        return lambda *args, **options: self.ran.append({"grid": grid, **options})


def test_compiling_runs_nothing_and_only_this_thread_compiles():
    kernel = Kernel()
    with launch.compiling():
        launch.launch(kernel, (3,), torch.zeros(1), num_warps=4)
        other = threading.Thread(target=launch.launch, args=(kernel, (5,), torch.zeros(1)))
        other.start()
        other.join()
    launch.launch(kernel, (7,), torch.zeros(1))
    assert [c["grid"] for c in kernel.compiled] == [(3,)] and kernel.compiled[0]["num_warps"] == 4
    assert [c["grid"] for c in kernel.ran] == [(5,), (7,)]


@pytest.mark.parametrize(("capability", "early"), [(80, False), (90, True), (120, True)])
def test_only_a_kernel_that_waits_for_its_inputs_starts_early(monkeypatch, capability, early):
    """One that does not wait would read what the kernel before it has yet to write."""
    monkeypatch.setattr(launch.tiles, "capability", lambda device: capability)
    waiting, other = Kernel(), Kernel()
    waiting.fn = lambda: launch.wait_for_inputs()
    for kernel in (waiting, other):
        launch.launch(kernel, (1,), torch.zeros(1))
    assert waiting.ran[0].get("launch_pdl", False) is early and "launch_pdl" not in other.ran[0]


def test_kernels_are_compiled_side_by_side_and_all_in_the_end(monkeypatch, caplog):
    """A barrier that only two compilations at once can pass, in Triton's own mode for it; and a line that says so."""
    monkeypatch.setattr(launch, "_SILENT_S", 0.01)
    barrier, finished = threading.Barrier(2, timeout=60), []

    class Slow(Kernel):
        def warmup(self, *args, grid, **options) -> None:
            mode = triton.runtime._async_compile.active_mode.get()
            mode.submit(grid, compile_kernel, finished.append, lambda kernel: None)

    def compile_kernel() -> str:
        barrier.wait()
        while not caplog.records:
            time.sleep(0.01)
        return "kernel"

    with launch.compiling():
        for n in range(2):
            launch.launch(Slow(), (n,), torch.zeros(1))
    assert finished == ["kernel", "kernel"]
    assert ["compiling the kernels" in record.message for record in caplog.records] == [True]


def test_an_error_of_the_compiler_is_raised():
    class Broken(Kernel):
        def warmup(self, *args, grid, **options) -> None:
            raise ValueError("cannot compile")

    with pytest.raises(ValueError, match="cannot compile"), launch.compiling():
        launch.launch(Broken(), (1,), torch.zeros(1))
    kernel = Kernel()
    launch.launch(kernel, (1,), torch.zeros(1))
    assert kernel.ran
