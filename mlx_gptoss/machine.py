"""What this machine has and does: chip, cores, how fast it copies memory, open files, sockets, the cache's folder,
folders brought to the disk."""

from __future__ import annotations

import os
import platform
import re
import resource
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OPEN_FILES = 4096  # that a server asks for: 1024 connections, the files of its models, and its tools' pipes
COPY_BYTES = 128 << 20  # bytes: more than caches hold
COPY_RUNS = 10
SGEMM_RUNS = 5


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chip() -> str:
    """The processor's name, such as "Apple M4 Max"."""
    if sys.platform == "darwin":
        return command("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_cores() -> int | None:
    """Cores of this Mac's GPU; None on anything else, or if macOS does not say."""
    if sys.platform != "darwin":
        return None
    found = re.search(r'"gpu-core-count" = (\d+)', command("ioreg", "-r", "-d", "1", "-c", "AGXAccelerator"))
    return int(found[1]) if found else None


def command(*words: str) -> str:
    """The output of one of the system's programs; empty if it fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def raise_open_files(wanted: int = OPEN_FILES) -> int:
    """Raise this process's soft limit on open files to `wanted`, or to the hard limit if that is lower: macOS starts
    programs with 256. Returns the limit that holds afterwards, at most sys.maxsize."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    target = wanted if hard == unlimited else min(wanted, hard)
    if soft == unlimited or soft >= target:
        return sys.maxsize if soft == unlimited else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    except (ValueError, OSError):  # the kernel's own limit is lower than the hard limit that it reports
        return soft
    return target


def ram_copy_bandwidth() -> float:
    """Bytes per second of a copy by all cores, reads and writes counted; the best of COPY_RUNS."""
    import numpy as np

    threads = cores()
    source = np.ones((threads, COPY_BYTES // threads), np.uint8)
    target = np.zeros_like(source)

    def copy(thread: int) -> None:
        np.copyto(target[thread], source[thread])

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(COPY_RUNS):
            started = time.perf_counter()
            list(pool.map(copy, range(threads)))
            best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best


def sgemm_flops() -> float:
    """Multiplications and additions a second of numpy's float32 product; the best of SGEMM_RUNS."""
    import numpy as np

    size, best = 2048, float("inf")
    a = np.full((size, size), 0.5, np.float32)
    for _ in range(SGEMM_RUNS):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def mac_memory() -> int:
    """Bytes of RAM of this Mac; 0 on anything else."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if sys.platform == "darwin" else 0


def system_available() -> int:
    """Bytes of RAM that a new program can take without swapping: Linux's MemAvailable within the control group's
    limit; elsewhere all physical memory less an eighth for the system."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 7 // 8
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min(available, _cgroup_room())


def _cgroup_room(root: Path = Path("/sys/fs/cgroup")) -> int:
    """What control group version 2 leaves this process."""
    limit, current = root / "memory.max", root / "memory.current"
    if not limit.exists() or not current.exists() or limit.read_text().strip() == "max":
        return 2**63 - 1
    used = int(current.read_text())
    stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    return int(limit.read_text()) - used + int(stat.get("inactive_file", 0))


def cache_folder() -> Path:
    """Where the program keeps what it can find out again."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-gptoss"
    configured = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(configured) if os.path.isabs(configured) else Path.home() / ".cache") / "mlx-gptoss"


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A socket that listens there. Raises OSError or OverflowError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
