"""Progress on a terminal's stderr: bytes loaded, downloaded or written; prompt tokens read; tokens per second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from mlx_gptoss.errors import GptOssError

from .terminal import StatusLine, new_console

if TYPE_CHECKING:
    from mlx_gptoss import Model
    from mlx_gptoss.engine import Status

T = TypeVar("T")

PREFILL_AFTER_S = 2.0  # a prompt that takes longer gets a bar
REFRESH_S = 0.25


@contextmanager
def byte_bar(description: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar of bytes. Yields the function that updates it: update(bytes done, bytes in all, description)."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = new_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)  # moves to and fro until the first update
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


@contextmanager
def count_bar(description: str) -> Iterator[Callable[[int, int, str], None]]:
    """As byte_bar, of things that are counted."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = new_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


def with_prefill_bar(events: Iterator[T], model: Model) -> Iterator[T]:
    """The events, and while the next one is waited for, a bar for the prompt that is being computed, on a terminal's
    stderr. It appears after PREFILL_AFTER_S and is gone before the event is passed on."""
    console = new_console(stderr=True)
    if not console.is_terminal:
        yield from events
        return
    bar = _PrefillBar(model, console)
    try:
        while True:
            bar.wait()
            try:
                event = next(events)
            except StopIteration:
                return
            finally:
                bar.hide()
            yield event
    finally:
        bar.close()


class _PrefillBar:
    """The bar, drawn by a thread of its own between wait() and hide()."""

    def __init__(self, model: Model, console: Any) -> None:
        self._model, self._console = model, console
        self._lock = threading.Lock()  # held while something is drawn
        self._since: float | None = None
        self._bar: Any = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefill bar", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        self._since = time.monotonic()

    def hide(self) -> None:
        """Remove the bar. Nothing more is drawn before the next wait()."""
        with self._lock:
            self._since = None
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def close(self) -> None:
        self.hide()
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(REFRESH_S):
            with self._lock:
                if self._since is not None and time.monotonic() - self._since > PREFILL_AFTER_S:
                    self._draw()

    def _draw(self) -> None:
        status = _status(self._model)
        if status is None or not status.prompt_tokens:
            return
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.add_task("Reading the prompt, tokens", total=None)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=status.prefilled_tokens, total=status.prompt_tokens)


def with_speed(events: Iterator[T], model: Model) -> Iterator[T]:
    """The events, with the tokens generated so far and per second on the terminal's bottom line."""
    line = StatusLine()
    if not line.active:
        yield from events
        return
    first = last = 0  # tokens when the reply began to be watched, and at the last look
    started = shown_at = 0.0
    try:
        for event in events:
            now = time.perf_counter()
            if now - shown_at >= REFRESH_S and (status := _status(model)) is not None:
                shown_at, count = now, status.completion_tokens
                if not started or count < last:  # the first reply, or the next one after a tool's result
                    first, started = count, now
                last = count
                speed = f", {(count - first) / (now - started):.1f} tok/s" if now > started else ""
                line.show(f"{count} tokens{speed}")
            yield event
    finally:
        line.clear()


def _status(model: Model) -> Status | None:
    try:
        return model.status
    except GptOssError:  # it has been closed
        return None
