"""The two files of a batch, in OpenAI's format: one request per line, and their answers, appended as they arrive.

An answer identifies its line by the custom_id. A line without a usable custom_id is identified by its number, in
`error.line`. So an interrupted batch can be resumed: lines with an answer are done, and an incomplete last line of the
answers is cut off.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import GptOssError, InvalidRequest
from ..machine import sync_folder
from .errors import dump_json
from .guard import Gate

MAX_LINE_BYTES = Gate.max_body_bytes  # the limit of the server
FIELDS = ("custom_id", "method", "url", "body")
KEY_BYTES = 16
KEY = f"S{KEY_BYTES}"
ANSWER_PREFIX = b'{"id":"batch_req_'  # every answer starts with this
BLANK, PENDING, UNIDENTIFIED, DUPLICATE, DONE = range(5)  # states of a line: no custom_id, or one of an earlier line


class LineError(Exception):
    """A line that is not a valid request. code: OpenAI's code where there is one."""

    code: str
    param: str | None

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param

    def body(self, line: int) -> dict[str, Any]:
        """The `error` object of an answer. line: the number of the line, from 1."""
        return {"code": self.code, "message": str(self), "param": self.param, "line": line}


def parse_line(line: bytes) -> dict[str, Any]:
    """Parse a line into an object with a custom_id. Raises LineError."""
    if len(line) > MAX_LINE_BYTES:
        raise LineError("line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        fields = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise LineError("invalid_json_line", f"the line is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise LineError("invalid_json_line", "the line is not a JSON object")
    if not isinstance(fields.get("custom_id"), str) or not fields["custom_id"]:
        message = "custom_id is missing: give each line a string of its own"
        raise LineError("missing_required_parameter", message, "custom_id")
    return fields


def check_line(fields: dict[str, Any], urls: Sequence[str]) -> None:
    """Raise LineError unless the fields are complete and ask for one of `urls`."""
    for name in FIELDS:
        if name not in fields:
            raise LineError("missing_required_parameter", f"{name} is missing", name)
    for name in (name[:100] for name in fields if name not in FIELDS):
        raise LineError("unknown_parameter", f"{name} is not a field of a batch request: leave it out", name)
    if fields["method"] != "POST":
        raise LineError("invalid_method", "method must be POST", "method")
    if fields["url"] not in urls:
        raise LineError("invalid_url", f"url must be one of {', '.join(urls)}", "url")


def answer_entry(custom_id: str | None, **result: Any) -> dict[str, Any]:
    """One line of the answers. result: `response` or `error`."""
    id = f"batch_req_{secrets.token_hex(12)}"
    return {"id": id, "custom_id": custom_id, "response": None, "error": None, **result}


def is_failed(entry: dict[str, Any]) -> bool:
    """Whether an answer is an error or has a status other than 200."""
    response = entry.get("response")
    return not isinstance(response, dict) or response.get("status_code") != 200


class RequestFile:
    """The lines of a request file and their states. Keeps 25 bytes per line in memory, not the text.

    Raises InvalidRequest if the file has no valid request.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InvalidRequest(f"{path} is not a file: name a file with one request per line")
        self._path = path
        self._states = bytearray()
        keys, first_error = bytearray(), None
        for number, line in _lines(path):
            self._states.append(PENDING if line.strip() else BLANK)
            key = _key(f"line {number}")
            if self._states[-1] == PENDING:
                try:
                    key = _key("id " + parse_line(line)["custom_id"])
                except LineError as error:
                    self._states[-1] = UNIDENTIFIED
                    first_error = first_error or f"line {number}: {error}"
            keys += key
        if PENDING not in self._states:
            raise InvalidRequest(f"{path} contains no request; {first_error or 'it is empty'}")
        self.total: int = len(self._states) - self._states.count(BLANK)
        self._sort(np.frombuffer(keys, dtype=KEY))

    def _sort(self, keys: Any) -> None:
        """Sort the keys for lookup, and mark lines that repeat a custom_id."""
        self._line_indices = np.argsort(keys, kind="stable")
        self._keys = keys[self._line_indices]
        duplicates = self._line_indices[1:][self._keys[1:] == self._keys[:-1]]
        np.frombuffer(self._states, dtype=np.uint8)[duplicates] = DUPLICATE

    def mark_answered(self, entry: dict[str, Any]) -> bool:
        """Mark the line of an answer as done. Returns False if no line is waiting for this answer."""
        custom_id, error = entry["custom_id"], entry.get("error")
        if isinstance(custom_id, str):
            key = np.frombuffer(_key("id " + custom_id), dtype=KEY)
            position = int(np.searchsorted(self._keys, key)[0])
            index = int(self._line_indices[position]) if (self._keys[position : position + 1] == key).any() else -1
            expected_states: tuple[int, ...] = (PENDING,)
        else:
            number = error.get("line") if isinstance(error, dict) else None
            index = number - 1 if isinstance(number, int) else -1
            expected_states = (UNIDENTIFIED, DUPLICATE)
        if not 0 <= index < len(self._states) or self._states[index] not in expected_states:
            return False
        self._states[index] = DONE
        return True

    def pending(self) -> Iterator[tuple[int, bytes, bool]]:
        """Yield the lines without an answer: number, content, and whether an earlier line has the same custom_id."""
        for (number, line), state in zip(_lines(self._path), self._states, strict=False):  # the file may have grown
            if state in (PENDING, UNIDENTIFIED, DUPLICATE):
                yield number, line, state == DUPLICATE


class AnswerFile:
    """The answer file, locked by this process. Its existing answers are marked in `requests`. Close it in the end.

    retry: remove the answers that failed, so that their lines are pending again.
    Raises InvalidRequest if the file does not hold answers to these requests, and GptOssError if another process is
    writing it.
    """

    done: int
    failed: int

    def __init__(self, path: Path, requests: RequestFile, *, retry: bool = False) -> None:
        self.done = self.failed = 0
        self._path = path
        self._requests = requests
        self._size, self._new, before = 0, False, path.exists()
        self._file = self._open()
        try:
            self._lock()
            self._new = not before
            if retry:
                self._remove_failed()
            self._size = self._resume()
            os.ftruncate(self._file, self._size)
            sync_folder(path.absolute().parent)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unlock the file. If it has no answer and did not exist before, remove it."""
        if self._new and not self._size:
            self._path.unlink(missing_ok=True)
        os.close(self._file)

    def append(self, entries: Sequence[dict[str, Any]]) -> None:
        """Write and fsync all entries, or none of them. Raises GptOssError."""
        data = b"".join(dump_json(entry) + b"\n" for entry in entries)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.pwrite(self._file, rest, self._size + len(data) - len(rest)) :]
            os.fsync(self._file)
        except BaseException as error:  # also KeyboardInterrupt, which Python 3.10 raises in here
            with contextlib.suppress(OSError):  # else the next run cuts the incomplete line off
                os.ftruncate(self._file, self._size)
            if not isinstance(error, OSError):
                raise
            hint = f"its {self.done} answers are kept, and the same command resumes after them"
            raise GptOssError(f"{self._path} could not be written ({error.strerror}); {hint}") from error
        self._size += len(data)
        for entry in entries:
            expected = self._record(entry)
            assert expected, entry["custom_id"]

    def _record(self, entry: dict[str, Any]) -> bool:
        """Count an answer that is on disk. Returns False if no line is waiting for it."""
        expected = self._requests.mark_answered(entry)
        self.done += expected
        self.failed += expected and is_failed(entry)
        return expected

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise GptOssError(f"{self._path} cannot be written: {error.strerror}") from error

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise InvalidRequest(f"{self._path} is not a regular file: a batch needs one to resume from")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GptOssError(f"another process is writing {self._path}: wait for it, or name another file") from None

    def _resume(self) -> int:
        """Record the complete lines of the file. Returns their size in bytes."""
        size = 0
        for number, line, entry in self._entries():
            if not self._record(entry):
                what = f"answers {str(entry['custom_id'])[:100]!r}, which no line of the requests is waiting for"
                raise InvalidRequest(f"line {number} of {self._path} {what}: name another file for these requests")
            size += len(line)
        return size

    def _remove_failed(self) -> None:
        """Replace the file by one without the answers that failed."""
        with tempfile.NamedTemporaryFile(dir=self._path.parent, prefix=f".{self._path.name}-", delete=False) as kept:
            try:
                for _, line, entry in self._entries():
                    if not is_failed(entry):
                        kept.write(line)
                kept.flush()
                os.fchmod(kept.fileno(), stat.S_IMODE(os.fstat(self._file).st_mode))
                os.fsync(kept.fileno())
                os.replace(kept.name, self._path.resolve())
            except BaseException as error:
                Path(kept.name).unlink(missing_ok=True)
                if isinstance(error, OSError):
                    raise GptOssError(f"{self._path} could not be rewritten: {error.strerror}") from error
                raise
        old, self._file = self._file, self._open()
        os.close(old)
        self._lock()

    def _entries(self) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
        """Yield the complete lines: number, content, and the parsed answer."""
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") and (line.startswith(ANSWER_PREFIX) or ANSWER_PREFIX.startswith(line)):
                    return
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    entry = None
                if not line.startswith(ANSWER_PREFIX) or not isinstance(entry, dict) or "custom_id" not in entry:
                    raise InvalidRequest(
                        f"{self._path} is not an answer file, see its line {number}: name another file"
                    )
                yield number, line, entry


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield all lines with their numbers from 1. A line over the limit is cut off just after it."""
    with path.open("rb") as file:
        for number in count(1):
            line = rest = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES)
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _key(name: str) -> bytes:
    """A hash of fixed size."""
    return blake2b(name.encode(errors="surrogatepass"), digest_size=KEY_BYTES).digest()
