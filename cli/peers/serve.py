"""The peer's side: answers what process.py asks, and times it here, where nothing but the model runs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_gptoss.measure.timing import CPU_WARM_PROMPT, WARM_STEPS, Case, prompts


class Program(Protocol):
    """One model loaded by another program, for as many sequences of one length as it is given."""

    version: str
    backend: str
    device: str
    dtype: str
    vocab: int

    def start(self) -> None:
        """Forget all sequences."""
        ...

    def feed(self, ids: Sequence[Sequence[int]]) -> None:
        """The next tokens of every sequence, [B][L]; done when the token after them is chosen."""
        ...

    def decode(self, steps: int) -> None:
        """Feed back what was chosen last, `steps` times, and wait for the end."""
        ...

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]: ...

    def peak_memory(self) -> int: ...


class Server:
    """Answers one question after the other about one program; `begin` comes first."""

    case: Case
    tokens: Sequence[Sequence[int]]

    def __init__(self, program: Program) -> None:
        self.program = program

    def begin(self, **case: int) -> None:
        self.case = Case(**case)
        self.tokens = prompts(self.program.vocab, self.case)
        self._feed(0, min(self.case.prompt, CPU_WARM_PROMPT) if self.program.device == "cpu" else self.case.prompt)
        self.program.decode(WARM_STEPS)

    def prefill(self) -> float:
        return _seconds(lambda: self._feed(0, self.case.prompt))

    def fill(self) -> None:
        if self.case.context > self.case.prompt:
            self._feed(self.case.prompt, self.case.context)
        self.program.decode(WARM_STEPS)

    def decode(self) -> float:
        return _seconds(lambda: self.program.decode(self.case.generate))

    def logits(self, ids: list[int], path: str) -> None:
        np.save(path, self.program.logits(ids))

    def peak_memory(self) -> int:
        return self.program.peak_memory()

    def _feed(self, start: int, end: int) -> None:
        if start == 0:
            self.program.start()
        self.program.feed([ids[start:end] for ids in self.tokens])


def serve(load: Callable[[Path, str, str | None], Program]) -> None:
    """The whole life of a peer's process. load(folder, device, dtype) makes the program; see process.Peer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    folder, device, dtype = sys.argv[1:]
    started = time.perf_counter()
    program = load(Path(folder), device, None if dtype == "own" else dtype)
    facts = {key: getattr(program, key) for key in ("version", "backend", "device", "dtype")}
    _reply(answers, {**facts, "load_s": time.perf_counter() - started})
    server = Server(program)
    for line in sys.stdin:
        question = json.loads(line)
        _reply(answers, getattr(server, question.pop("what"))(**question))


def _reply(answers: Any, content: Any) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
