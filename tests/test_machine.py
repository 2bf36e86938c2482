"""What a process does to its own limits, in a process of its own."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from mlx_gptoss import machine

RAISE = """
import resource, sys
from mlx_gptoss.machine import raise_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
print(raise_open_files(int(sys.argv[3])), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "found"),
    [(256, 900, 700, (700, 700, 900)), (256, 512, 700, (512, 512, 512)), (600, 900, 500, (600, 600, 900))],
)
def test_the_soft_limit_rises_as_far_as_the_hard_one(soft, hard, wanted, found):
    words = [sys.executable, "-c", RAISE, str(soft), str(hard), str(wanted)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert tuple(map(int, done.stdout.split())) == found


def test_a_kernel_that_refuses_leaves_the_limit(monkeypatch):
    """macOS says that its hard limit is infinite, and refuses more than kern.maxfilesperproc."""

    def refuse(which, limits):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(machine.resource, "setrlimit", refuse)
    assert machine.raise_open_files() == 256


def test_a_chip_has_a_name():
    assert machine.chip()


def test_programs_that_fail_say_nothing():
    assert machine.command("false") == machine.command("no-such-program-anywhere") == ""
