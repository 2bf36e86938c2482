"""Where the log goes: standard error, written by a thread of its own. A reader that stops does not stop the server."""

from __future__ import annotations

import atexit
import logging
import queue
import sys
import threading
from typing import Final, TextIO

from .request_log import JsonFormatter, TextFormatter

LEVELS: Final = ("error", "warning", "info", "debug")
FORMATS: Final = ("text", "json")
MAX_LINES: Final = 10_000  # lines kept while they cannot be written; further ones are counted and dropped
END_S: Final = 2.0  # seconds that the end of the process waits for the last lines


class BackgroundHandler(logging.Handler):
    """Formats records where they are made, and writes the lines from a thread."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_LINES)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="mlx-gptoss log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1
        except Exception:  # as in logging's own handlers: a record that cannot be formatted is reported on stderr
            self.handleError(record)

    def close(self) -> None:
        """Write the lines that are left, for at most END_S."""
        super().close()
        if self._thread.is_alive():
            try:
                self._lines.put(None, timeout=END_S)
            except queue.Full:
                return
            self._thread.join(END_S)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            notice = f"{dropped} lines of the log were dropped: it was not read\n" if dropped else ""
            try:
                self._stream.write(f"{notice}{line}\n")
                self._stream.flush()
            except (OSError, ValueError):  # closed: nobody reads
                continue


def configure_logging(level: str, form: str, stream: TextIO | None = None) -> BackgroundHandler:
    """Log to `stream`, by default standard error, from `level` on. form: "text" or "json".

    Other packages, uvicorn among them, log warnings and errors only.
    """
    handler = BackgroundHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    for earlier in [each for each in root.handlers if isinstance(each, BackgroundHandler)]:
        root.removeHandler(earlier)
        earlier.close()
    root.addHandler(handler)
    root.setLevel(logging.ERROR if level == "error" else logging.WARNING)
    logging.getLogger("mlx_gptoss").setLevel(level.upper())
    atexit.register(handler.close)
    return handler
