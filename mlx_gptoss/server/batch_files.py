"""The two files of a batch, in OpenAI's form: requests, one a line, and their answers, added as they come.

A line that can be told by its custom_id is answered under it; one that cannot is answered by its number, `error.line`.
So an interrupted batch can go on: what stands in the file of answers is done, half a last line is cut off.
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

MAX_LINE_BYTES = Gate.max_body_bytes  # what the server takes
FIELDS = ("custom_id", "method", "url", "body")
KEY_BYTES = 16
KEY = f"S{KEY_BYTES}"
ANSWER_PREFIX = b'{"id":"batch_req_'  # how every answer begins
BLANK, PENDING, UNIDENTIFIED, DUPLICATE, DONE = range(5)


class LineError(Exception):
    """A line that is no request. code: OpenAI's where it has one."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param

    def body(self, line: int) -> dict[str, Any]:
        return {"code": self.code, "message": str(self), "param": self.param, "line": line}


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object of a line, with a custom_id. Raises LineError."""
    if len(line) > MAX_LINE_BYTES:
        raise LineError("line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        fields = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise LineError("invalid_json_line", f"the line is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise LineError("invalid_json_line", "the line is not a JSON object")
    if not isinstance(fields.get("custom_id"), str) or not fields["custom_id"]:
        message = "custom_id is missing: give each line a text of its own"
        raise LineError("missing_required_parameter", message, "custom_id")
    return fields


def check_line(fields: dict[str, Any], urls: Sequence[str]) -> None:
    """Raises LineError unless the line asks for one of `urls`."""
    for name in FIELDS:
        if name not in fields:
            raise LineError("missing_required_parameter", f"{name} is missing", name)
    for name in (name[:100] for name in fields if name not in FIELDS):
        raise LineError("unknown_parameter", f"{name} is not a field of a batch's line: leave it out", name)
    if fields["method"] != "POST":
        raise LineError("invalid_method", "method must be POST", "method")
    if fields["url"] not in urls:
        raise LineError("invalid_url", f"url must be one of {', '.join(urls)}", "url")


def answer_entry(custom_id: str | None, **result: Any) -> dict[str, Any]:
    """A line of answers. result: response or error."""
    name = f"batch_req_{secrets.token_hex(12)}"
    return {"id": name, "custom_id": custom_id, "response": None, "error": None, **result}


def failed(entry: dict[str, Any]) -> bool:
    response = entry.get("response")
    return not isinstance(response, dict) or response.get("status_code") != 200


class RequestFile:
    """The lines of a file of requests, and which of them wait for an answer. Holds 25 bytes for each, not its text.

    Raises InvalidRequest for a file without a single request.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InvalidRequest(f"{path} is not a file: name one with a request in each line")
        self._path = path
        self._states = bytearray()
        keys, first = bytearray(), None
        for number, line in _lines(path):
            self._states.append(PENDING if line.strip() else BLANK)
            key = _key(f"line {number}")
            if self._states[-1] == PENDING:
                try:
                    key = _key("id " + parse_line(line)["custom_id"])
                except LineError as error:
                    self._states[-1] = UNIDENTIFIED
                    first = first or f"line {number}: {error}"
            keys += key
        if PENDING not in self._states:
            raise InvalidRequest(f"{path} holds no request; {first or 'it is empty'}")
        self.total = len(self._states) - self._states.count(BLANK)
        self._sort(np.frombuffer(keys, dtype=KEY))

    def _sort(self, keys: Any) -> None:
        """Have custom_ids looked up; lines that repeat one are told apart."""
        self._line_indices = np.argsort(keys, kind="stable")
        self._keys = keys[self._line_indices]
        duplicates = self._line_indices[1:][self._keys[1:] == self._keys[:-1]]
        np.frombuffer(self._states, dtype=np.uint8)[duplicates] = DUPLICATE

    def mark_answered(self, entry: dict[str, Any]) -> bool:
        """Take note of an answer; False if no line waits for it."""
        custom_id, error = entry["custom_id"], entry.get("error")
        if isinstance(custom_id, str):
            key = np.frombuffer(_key("id " + custom_id), dtype=KEY)
            at = int(np.searchsorted(self._keys, key)[0])
            place = int(self._line_indices[at]) if (self._keys[at : at + 1] == key).any() else -1
            expected: tuple[int, ...] = (PENDING,)
        else:
            number = error.get("line") if isinstance(error, dict) else None
            place = number - 1 if isinstance(number, int) else -1
            expected = (UNIDENTIFIED, DUPLICATE)
        if not 0 <= place < len(self._states) or self._states[place] not in expected:
            return False
        self._states[place] = DONE
        return True

    def pending(self) -> Iterator[tuple[int, bytes, bool]]:
        """Lines without an answer: number, content, and whether the custom_id stood in an earlier line."""
        for (number, line), state in zip(_lines(self._path), self._states, strict=False):  # it may have grown since
            if state in (PENDING, UNIDENTIFIED, DUPLICATE):
                yield number, line, state == DUPLICATE


class AnswerFile:
    """The file of answers, held by this process alone. What it has is taken off `requests`. To be closed.

    retry: take out the answers that failed, so that their lines wait again.
    Raises InvalidRequest if it is not the answers of a batch of these requests, and GptOssError if another process
    writes it.
    """

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
        """Without a single answer there is no file, unless there was one before."""
        if self._new and not self._size:
            self._path.unlink(missing_ok=True)
        os.close(self._file)

    def append(self, entries: Sequence[dict[str, Any]]) -> None:
        """Bring whole lines to the disk, or none. Raises GptOssError."""
        data = b"".join(dump_json(entry) + b"\n" for entry in entries)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.pwrite(self._file, rest, self._size + len(data) - len(rest)) :]
            os.fsync(self._file)
        except BaseException as error:  # Ctrl-C, too, which Python 3.10 has break in here
            with contextlib.suppress(OSError):  # then the next start cuts it off
                os.ftruncate(self._file, self._size)
            if not isinstance(error, OSError):
                raise
            kept = f"the {self.done} answers in it are kept, and the same command goes on after them"
            raise GptOssError(f"{self._path} could not be written ({error.strerror}); {kept}") from error
        self._size += len(data)
        for entry in entries:
            waited = self._record(entry)
            assert waited, entry["custom_id"]

    def _record(self, entry: dict[str, Any]) -> bool:
        """Count an answer that is on the disk; False if no line waited for it."""
        waited = self._requests.mark_answered(entry)
        self.done += waited
        self.failed += waited and failed(entry)
        return waited

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise GptOssError(f"{self._path} cannot be written: {error.strerror}") from error

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise InvalidRequest(f"{self._path} is not a file: the answers need one, to go on from")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GptOssError(f"another process is writing {self._path}; wait for it, or name another file") from None

    def _resume(self) -> int:
        """Take over the whole lines; returns their bytes."""
        size = 0
        for number, line, entry in self._entries():
            if not self._record(entry):
                what = f"answers {str(entry['custom_id'])[:100]!r}, for which no line of the requests waits"
                raise InvalidRequest(f"line {number} of {self._path} {what}; name another file for these requests")
            size += len(line)
        return size

    def _remove_failed(self) -> None:
        """Put a file without the answers that failed in the place of this one."""
        with tempfile.NamedTemporaryFile(dir=self._path.parent, prefix=f".{self._path.name}-", delete=False) as kept:
            try:
                for _, line, entry in self._entries():
                    if not failed(entry):
                        kept.write(line)
                kept.flush()
                os.fchmod(kept.fileno(), stat.S_IMODE(os.fstat(self._file).st_mode))
                os.fsync(kept.fileno())
                os.replace(kept.name, self._path.resolve())
            except BaseException as error:
                Path(kept.name).unlink(missing_ok=True)
                if isinstance(error, OSError):
                    raise GptOssError(f"{self._path} could not be written anew: {error.strerror}") from error
                raise
        old, self._file = self._file, self._open()
        os.close(old)
        self._lock()

    def _entries(self) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
        """Whole lines: number, content, and what it says."""
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
                        f"{self._path} is no file of answers, see its line {number}; name another file"
                    )
                yield number, line, entry


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """All lines, from 1. Of one that is too long, as much as shows that."""
    with path.open("rb") as file:
        for number in count(1):
            line = rest = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES)
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _key(name: str) -> bytes:
    return blake2b(name.encode(errors="surrogatepass"), digest_size=KEY_BYTES).digest()
