"""The memory of a process and its descendants."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


def memory_of_tree(pid: int) -> int:
    """Bytes of memory that a process and its descendants use. On Linux without what is backed by files."""
    if sys.platform != "linux":
        return _by_ps(pid)
    total, left, seen = 0, [pid], set()
    while left:
        one = left.pop()
        if one in seen:
            continue
        seen.add(one)
        try:
            resident, shared = Path(f"/proc/{one}/statm").read_text().split()[1:3]
            total += (int(resident) - int(shared)) * PAGE
            for thread in os.listdir(f"/proc/{one}/task"):
                left += map(int, Path(f"/proc/{one}/task/{thread}/children").read_text().split())
        except (OSError, ValueError):  # it has ended
            continue
    return total


def _by_ps(pid: int) -> int:
    """The same from ps, for macOS."""
    try:
        out = subprocess.run(["ps", "-axo", "pid=,ppid=,rss="], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    rows = [tuple(map(int, line.split())) for line in out.stdout.splitlines()]
    tree = {pid}
    for _ in range(len(rows)):
        found = {one for one, parent, _ in rows if parent in tree} - tree
        if not found:
            break
        tree |= found
    return sum(kib << 10 for one, _, kib in rows if one in tree)
