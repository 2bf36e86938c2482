"""Runs the npm programs that talk to the server, each with a home of its own and under a time limit."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

FOLDER = os.environ.get("CLIENT_PROGRAMS")  # where `npm install` put the programs: the parent of node_modules
SECONDS = 180


def find_program(name: str, package: str) -> str:
    """The path of a program, from CLIENT_PROGRAMS or PATH; the test skips where it is not installed."""
    path = f"{FOLDER}/node_modules/.bin{os.pathsep}{os.environ['PATH']}" if FOLDER else None
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"no {name}: npm install {package}, and name the folder in CLIENT_PROGRAMS")
    return str(Path(found).absolute())


def run(command: Sequence[str], home: Path, environment: Mapping[str, str], folder: Path | None = None) -> str:
    """The program's output. Fails if it returns an error or takes longer than SECONDS.

    The program sees no other environment than PATH, HOME and what is given, so that no account or setting of the
    machine plays a part.
    """
    ended = subprocess.run(
        command,
        cwd=folder or home,
        env={"PATH": os.environ["PATH"], "HOME": str(home), "NO_PROXY": "127.0.0.1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert ended.returncode == 0, f"{command[0]} returned {ended.returncode}:\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def project(home: Path) -> Path:
    """A folder for the program to work in, with one file."""
    folder = home / "project"
    folder.mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("Buy milk.\n")
    return folder
