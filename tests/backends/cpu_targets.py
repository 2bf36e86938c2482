"""Processors that kernels are tested for: this one, it as if its vectors were narrower, and Arm's, emulated."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from llvmlite import binding

from mlx_gptoss.backends.mlx.cpu import emit
from mlx_gptoss.backends.mlx.cpu.emit import Target

Field = int | tuple[np.ndarray, int]  # of a kernel's table: a value, or an array and an offset into it


def _targets() -> dict[str, Target]:
    """This processor, and as if it had only AVX2, or only SSE."""
    features = dict(binding.get_host_cpu_features())
    found = {"here": Target.here()}
    if features.get("avx512vl"):
        first = {name: on and name != "avx512vbmi" for name, on in features.items()}
        found["avx-512, 8 lanes"] = Target.of("skylake-avx512", first)
    if features.get("avx2"):
        avx2 = {name: on and not name.startswith("avx512") for name, on in features.items()}
        found["avx2"] = Target.of("haswell", avx2)
    if features.get("sse4.2"):
        wide = ("avx", "fma", "f16c", "vaes", "vpclmul", "xop")
        found["sse"] = Target.of("x86-64-v2", {n: on and not n.startswith(wide) for n, on in features.items()})
    return found


TARGETS = [
    pytest.param(found, id=name, marks=() if name == "here" else pytest.mark.slow) for name, found in _targets().items()
]


class Neon:
    """Processors with NEON: kernels are compiled for them here, and run by QEMU."""

    target = Target.of("cortex-a72", {"neon": True})

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._folder = folder
        binding.initialize_all_targets()
        binding.initialize_all_asmprinters()
        machine = binding.Target.from_triple("aarch64-unknown-linux-gnu").create_target_machine(
            cpu=self.target.cpu, features=self.target.features, opt=3, reloc="pic"
        )
        monkeypatch.setattr(emit, "_machine", lambda target: machine)

    def compiled(self, module) -> bytes:
        return emit.compiled(module, self.target)

    def load(self, module) -> None:
        """The program that `run` runs."""
        compiler, self._emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
        if compiler is None or self._emulator is None:
            pytest.skip("needs gcc for aarch64 (gcc-aarch64-linux-gnu, libc6-dev-arm64-cross) and qemu-user")
        (self._folder / "kernel.o").write_bytes(self.compiled(module))
        main = Path(__file__).with_name("run_kernel.c")
        command = [compiler, "-O1", "-static", "-o", self._folder / "program", main, self._folder / "kernel.o"]
        subprocess.run(command, check=True)

    def run(self, table: Sequence[Field], out: np.ndarray) -> np.ndarray:
        """Run the kernel once and return what it leaves in `out`, one of the table's arrays."""
        arrays = list({id(field[0]): field[0] for field in table if isinstance(field, tuple)}.values())
        arrays = [array for array in arrays if array is not out] + [out]
        number = {id(array): i for i, array in enumerate(arrays)}
        fields = [(number[id(f[0])], f[1]) if isinstance(f, tuple) else (-1, f) for f in table]
        head = [(len(fields), len(arrays)), fields, [array.nbytes for array in arrays]]
        content = [np.array(part, np.int64) for part in head] + arrays
        (self._folder / "in").write_bytes(b"".join(array.tobytes() for array in content))
        subprocess.run([self._emulator, *(self._folder / name for name in ("program", "in", "out"))], check=True)
        return np.fromfile(self._folder / "out", out.dtype).reshape(out.shape)
