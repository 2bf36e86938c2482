"""What this machine is, as far as it matters to a model, and what to change about it.

Facts are JSON values under short names. A finding is a sentence on what may be wrong, and what to do about it.
"""

from __future__ import annotations

import mmap
import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from ..loading.hub import cache_folder
from ..loading.memory import gigabytes
from ..machine import OPEN_FILES, chip, command, cores, gpu_cores, system_available
from .selftest import Machine, Result

PACKAGES = (
    "mlx-gptoss", "mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "torch", "triton", "numpy", "tokenizers",
    "llguidance",
)  # fmt: skip
PREFIXES = ("MLX_", "OMP_", "CUDA_", "TRITON_", "HF_HUB_", "HF_HOME", "HF_ENDPOINT", "METAL_", "MTL_", "PYTORCH_")
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")  # in the name of a variable whose value stays here
CREDENTIALS = re.compile(r"//[^/\s]*@")  # of an address
WHEELS = ("mlx", "mlx-metal", "mlx-cpu")
MATRIX_KERNEL = b"steel_gemm_fused_nax"  # a name in the library of 0.32.4's wheel for macOS 26
FILES = 1024  # open files that a busy server needs
DISK = 15 << 30  # bytes: gpt-oss-20b as published and room to work
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")  # its version, where the driver shows it
GOOD_SHARE = 30.0  # percent of the bound by bytes, of a GPU's decode step


@dataclass(frozen=True)
class Finding:
    """what: may be wrong. do: what to do about it."""

    what: str
    do: str


def facts(machine: Machine) -> dict[str, Any]:
    """Versions, chip, memory, limits and variables. Without secrets, and with nothing of what the user does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    cache = cache_folder()
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: number for name in PACKAGES if (number := _version(name))},
        "wheels": {name: tag for name in WHEELS if (tag := _wheel_tag(name))},
        "os": f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform(),
        "architecture": platform.machine(),
        "chip": chip(),
        "gpu_cores": gpu_cores(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "available_bytes": system_available(),
        "backend": machine.backend,
        "dtype": machine.kernels.dtype,
        "device": machine.kernels.facts(),
        "variables": _variables(),
        "open_files": {"soft": _limit(soft), "hard": _limit(hard)},
        "hub_cache": {"path": _without_home(cache), "free_bytes": _free(cache)},
    }
    if sys.platform == "darwin":
        found["iogpu.wired_limit_mb"] = _number(command("sysctl", "-n", "iogpu.wired_limit_mb"))
        found["rosetta"] = command("sysctl", "-n", "sysctl.proc_translated") == "1"
        found["matrix_kernels"] = matrix_kernels(_metal_library(), str(found["os"]), found["device"])
    elif NVIDIA_DRIVER.exists():
        found["nvidia_driver"] = NVIDIA_DRIVER.read_text().splitlines()[0]
    return found


def matrix_kernels(library: Path | None, system: str, device: Mapping[str, Any]) -> dict[str, bool]:
    """What MLX needs to multiply on an M5's matrix units (mlx/backend/metal/device.cpp, is_nax_available): kernels in
    its library, which the wheels for macOS 14 and 15 leave out, macOS 26.2, and an architecture of generation 17."""
    in_library = False
    if library is not None and library.exists() and library.stat().st_size:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            in_library = content.find(MATRIX_KERNEL) >= 0
    digits = re.search(r"(\d+).$", str(device.get("architecture", "")))
    return {
        "in_library": in_library,
        "macos": _numbers(system.removeprefix("macOS ")) >= (26, 2),
        "chip": digits is not None and int(digits[1]) >= 17,
    }


def findings(found: Mapping[str, Any], machine: Machine, results: Sequence[Result]) -> list[Finding]:
    """What to change about the machine of these facts."""
    return [*_packages(found, machine), *_settings(found, machine), *_speeds(machine, results)]


def _packages(found: Mapping[str, Any], machine: Machine) -> Iterator[Finding]:
    packages, device = found["packages"], found["device"]
    mac = str(found["os"]).startswith("macOS")
    if found.get("rosetta") or (mac and found["architecture"] == "x86_64"):
        yield Finding("this Python is built for Intel and cannot use Metal", "install Python for arm64")
    elif mac and machine.backend == "mlx" and not device.get("metal"):
        yield Finding("MLX finds no Metal GPU", "reinstall it: pip install --force-reinstall mlx mlx-metal")
    if mac and "mlx" in packages and _numbers(packages["mlx"]) < (0, 32, 4):
        yield Finding(f"mlx {packages['mlx']} computes wrongly on M5 in some modes", "pip install -U 'mlx>=0.32.4'")
    matrix = found.get("matrix_kernels", {})
    if matrix.get("chip") and not (matrix["in_library"] and matrix["macos"]):
        yield Finding(
            "MLX does not use this chip's matrix units",
            "update to macOS 26.2 or newer, then: pip install --force-reinstall mlx mlx-metal",
        )
    driver = found.get("nvidia_driver")
    if driver and machine.backend == "mlx" and "torch" not in packages:
        yield Finding("there is an NVIDIA driver and no torch", "pip install 'mlx-gptoss[cuda]'")
    elif driver and not machine.kernels.on_gpu and "torch" in packages:
        yield Finding(
            "there is an NVIDIA driver, and the checks ran on the CPU",
            "install a torch built for CUDA (pytorch.org), unless --device cpu was meant",
        )
    if device.get("compute capability") == "9.0" and _numbers(packages.get("triton", "9")) < (3, 9):
        yield Finding(
            f"triton {packages['triton']} has a race on H100 and H200 (triton-lang/triton#9433)",
            "pip install -U 'triton>=3.9', with the torch that pins it",
        )


def _settings(found: Mapping[str, Any], machine: Machine) -> Iterator[Finding]:
    variables, hard = found["variables"], found["open_files"]["hard"]
    if hard is not None and hard < FILES:  # `serve` raises the soft limit itself
        yield Finding(f"open files are limited to {hard}", f"before `serve`, as root: ulimit -Hn {OPEN_FILES}")
    free = found["hub_cache"]["free_bytes"]
    if free < DISK:
        yield Finding(
            f"{found['hub_cache']['path']} has {gigabytes(free)} free, and gpt-oss-20b takes 13.8 GB",
            "free some space, or set HF_HUB_CACHE to a folder on a larger disk",
        )
    if variables.get("TRITON_INTERPRET", "0") not in ("", "0"):
        yield Finding("TRITON_INTERPRET is set, and kernels run in Python", "unset TRITON_INTERPRET")
    if "MLX_DISABLE_COMPILE" in variables:
        yield Finding("MLX_DISABLE_COMPILE is set: more launches a token", "unset MLX_DISABLE_COMPILE")
    buffers = found["device"].get("command_buffers", {"enough": True})
    if not buffers["enough"]:
        yield Finding(
            f"{buffers['mb']} MB and {buffers['ops']} launches a command buffer are so many ({buffers['why']}) that "
            "steps of gpt-oss-20b cannot overlap",
            "unset MLX_MAX_OPS_PER_BUFFER and MLX_MAX_MB_PER_BUFFER",
        )
    if found.get("nvidia_driver") and variables.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Finding("CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES")
    threads = variables.get("OMP_NUM_THREADS", "")
    if not machine.kernels.on_gpu and threads.isdigit() and 0 < int(threads) < found["cores"]:
        yield Finding(f"OMP_NUM_THREADS leaves {threads} of {found['cores']} cores", "unset OMP_NUM_THREADS")
    if not machine.kernels.on_gpu and machine.kernels.dtype != "float32":
        yield Finding(
            f"{machine.kernels.dtype} on a CPU is slow, and with MLX inexact",
            "leave out --dtype",
        )
    if "M5" in found["chip"] and machine.kernels.dtype == "float32" and variables.get("MLX_ENABLE_TF32") != "0":
        yield Finding("float32 products on an M5 are TF32 by default", "set MLX_ENABLE_TF32=0 where exactness matters")
    wired, memory = found.get("iogpu.wired_limit_mb") or 0, found["memory_bytes"]
    if wired << 20 > memory - (4 << 30):
        yield Finding(
            f"iogpu.wired_limit_mb is {wired}, which leaves macOS less than 4 GB",
            f"sudo sysctl iogpu.wired_limit_mb={max(0, (memory >> 20) - 4096)}",
        )


def _speeds(machine: Machine, results: Sequence[Result]) -> Iterator[Finding]:
    for measured in (measured for result in results for measured in result.measured):
        if machine.kernels.on_gpu and measured.unit == "%" and measured.value < GOOD_SHARE:
            yield Finding(
                f"a decode step reaches {measured.value:.0f}% of what the memory's bandwidth allows",
                "close what else uses the GPU, check the power mode, and compare with `mlx-gptoss bench`",
            )


def _wheel_tag(package: str) -> str | None:
    """Such as py3-none-macosx_26_0_arm64: for which system a package was built."""
    try:
        text = distribution(package).read_text("WHEEL") or ""
    except PackageNotFoundError:
        return None
    tags = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("Tag:")]
    return tags[0] if tags else None


def _metal_library() -> Path | None:
    """The file of MLX's Metal kernels."""
    try:
        return Path(str(distribution("mlx-metal").locate_file("mlx/lib/mlx.metallib")))
    except PackageNotFoundError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """The numbers of a version: 3.9.0+cpu is (3, 9, 0)."""
    parts = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def _variables() -> dict[str, str]:
    """Those that change how the backends compute, and where models are. Addresses lose their name and password."""
    return {
        name: _without_home(CREDENTIALS.sub("//", value))
        for name, value in sorted(os.environ.items())
        if name.startswith(PREFIXES) and not any(word in name for word in SECRET)
    }


def _without_home(path: str | Path) -> str:
    """With ~ in place of the home folder, whose name is the user's."""
    home = str(Path.home())
    return str(path) if home == "/" else str(path).replace(home, "~")


def _limit(value: int) -> int | None:
    """None is unlimited."""
    return None if value == resource.RLIM_INFINITY else value


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _free(folder: Path) -> int:
    """Bytes free on the disk of a folder that may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
