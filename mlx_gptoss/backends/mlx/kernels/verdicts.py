"""What the checks of custom kernels found on this machine, kept in a file from one start to the next.

JSON: by machine (chip, macOS, MLX and the kernels' texts), by check: "" if it passed, or why it did not.
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from ....errors import CheckpointError
from ....untrusted.json_file import parse_json, read_file
from .metal import texts_digest

FILE_NAME = "metal-kernels.json"
MAX_BYTES, MAX_ITEMS, MAX_MACHINES = 1 << 20, 10_000, 8
UNFINISHED = "its check did not end; `mlx-gptoss selftest` repeats it"

Found = dict[str, str]


def machine_key(device: mx.Device) -> str:
    """What the verdicts depend on."""
    chip = mx.device_info(device).get("device_name", "GPU")
    return f"{chip}, macOS {platform.mac_ver()[0]}, MLX {mx.__version__}, kernels {texts_digest()}"  # type: ignore[attr-defined]


class Verdicts:
    """The verdicts of one machine. folder: of the file. A file that cannot be read has none; one that cannot be
    written costs the checks at the next start."""

    def __init__(self, folder: Path, machine: str) -> None:
        self._path = folder / FILE_NAME
        self._machine = machine

    def all(self) -> Found:
        """Every check's verdict: "" if it passed, or why it did not."""
        return self._read().get(self._machine, {})

    def find(self, check: str) -> str | None:
        """A check's verdict; None if it has none."""
        return self.all().get(check)

    def put(self, check: str, verdict: str) -> None:
        """Remember a verdict. Machines that were seen first are forgotten first."""
        machines = self._read()
        found = {**machines.pop(self._machine, {}), check: verdict}
        machines = {**dict(list(machines.items())[1 - MAX_MACHINES :]), self._machine: found}
        temporary = self._path.with_name(f"{FILE_NAME}.{os.getpid()}")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(machines, indent=1), encoding="utf-8")
            os.replace(temporary, self._path)

    def _read(self) -> dict[str, Found]:
        try:
            value = parse_json(read_file(self._path, MAX_BYTES), FILE_NAME, MAX_ITEMS)
        except CheckpointError:  # none yet, or a damaged one
            return {}
        if not isinstance(value, dict):
            return {}
        return {key: _checked(found) for key, found in value.items() if isinstance(found, dict)}


def _checked(found: dict[str, object]) -> Found:
    return {check: verdict for check, verdict in found.items() if isinstance(verdict, str)}
