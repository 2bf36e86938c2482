"""This side of a peer: starts its process, asks it over a pipe, one JSON object a line each way, and ends it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_gptoss.errors import GptOssError
from mlx_gptoss.measure.timing import Case

PEERS = {"mlx-lm": "mlx_lm", "transformers": "transformers"}  # name -> the package it needs; with_PACKAGE.py times it


class Peer:
    """A loaded model of another program, as benchmark.py times it (TimedEngine). A context manager.

    folder: the checkpoint. device: "cpu" or "gpu". dtype: of activations; None is the program's own choice.
    Raises GptOssError if the program is not installed or fails, with what it said last.
    """

    def __init__(self, name: str, folder: Path, form: str, device: str, dtype: str | None) -> None:
        package = PEERS[name]
        if find_spec(package) is None:
            raise GptOssError(f"{name} is not installed: pip install {name}")
        self.engine = name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        words = [sys.executable, "-m", f"{__package__}.with_{package}", str(folder), device, dtype or "own"]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said)
        try:
            loaded = self._answer()
        except BaseException:
            self.__exit__()
            raise
        self.engine = f"{name} {loaded['version']}"
        self.backend, self.device, self.load_s = loaded["backend"], loaded["device"], float(loaded["load_s"])
        self.format = f"{form}, computed in {loaded['dtype']}"

    def begin(self, case: Case) -> None:
        self._ask("begin", **asdict(case))

    def prefill(self) -> float:
        return float(self._ask("prefill"))

    def fill(self) -> None:
        self._ask("fill")

    def decode(self) -> float:
        return float(self._ask("decode"))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [T, V], by way of a file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "logits.npy"
            self._ask("logits", ids=list(ids), path=str(path))
            found: NDArray[np.float32] = np.load(path)
        return found

    def peak_memory(self) -> int:
        return int(self._ask("peak_memory"))

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._said):
            file.close()

    def _ask(self, what: str, **details: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"what": what, **details}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which the missing answer tells
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            said = self._said.read().decode(errors="replace").strip().splitlines()
            raise GptOssError(f"{self.engine} failed: {' | '.join(said[-3:]) or 'without a word'}")
        return json.loads(line)
