"""Prompts that share their beginnings, answered by the mock model with a prompt cache in a folder; the folder's files,
damaged."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

from mock_runner import VOCAB, expected, mock_engine

from mlx_gptoss import Sampling
from mlx_gptoss.backends.base import Limits
from mlx_gptoss.engine import PrefixFiles, Request

LIMITS = Limits(slots=2, max_context=64, chunk=8)
MEMORY = 50  # bytes: four of the mock's snapshots, so that most are read from files
FORKS = random.Random(1)
COMMON = [FORKS.randrange(VOCAB) for _ in range(20)]
REQUESTS = [
    Request((*COMMON, *(FORKS.randrange(VOCAB) for _ in range(20))), 4, Sampling(seed=seed)) for seed in range(6)
]
KNOWN = REQUESTS[:3]  # those with files in `filled`


def answer(
    folder: Path,
    requests: list[Request] = KNOWN,
    max_bytes: int = 1 << 20,
    started: Callable[[], object] = lambda: None,
) -> int:
    """Run requests through an engine that keeps its cache in a folder. Returns how many prompt tokens were cached.

    started: called once the engine has started. Asserts the tokens, and that the engine closes without an error.
    """
    files = PrefixFiles(folder, "mock", max_bytes)
    cached = 0
    with mock_engine(LIMITS, prefix_bytes=MEMORY, prefix_files=files) as (engine, _):
        started()
        for one in requests:
            stream = engine.submit(one)
            assert [token.id for token in stream] == expected(one, LIMITS)[0]
            cached += stream.drain().cached_tokens
        assert engine.status.running == 0
        closing = time.monotonic()
    assert time.monotonic() - closing < 20
    return cached


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.kv"))


def craft(path: Path, data: bytes | None = None, **changes: object) -> None:
    """Rewrite a file with another snapshot, whose size and digest the header gives, and other fields."""
    header, _, old = path.read_bytes().partition(b"\n")
    data = old if data is None else data
    digest = hashlib.sha256(data).hexdigest()
    fields = {**json.loads(header), "bytes": len(data), "sha256": digest, **changes}
    path.write_bytes(json.dumps(fields).encode() + b"\n" + data)


def corrupt(folder: Path, what: str, which: int, at: float, value: int) -> None:
    """Damage one file, or two."""
    files = files_in(folder)
    path, other = files[which % len(files)], files[(which * 7 + value) % len(files)]
    data = path.read_bytes()
    place = int(at * (len(data) - 1)) if data else 0
    match what:
        case "flip" if data:
            path.write_bytes(data[:place] + bytes([data[place] ^ (value or 1)]) + data[place + 1 :])
        case "truncate":
            path.write_bytes(data[:place])
        case "extend":
            path.write_bytes(data + bytes([value]) * (place + 1))
        case "insert":
            path.write_bytes(data[:place] + bytes([value]) + data[place:])
        case "swap":
            path.write_bytes(other.read_bytes())
            other.write_bytes(data)
        case "swap snapshots":
            mine, _, snapshot = data.partition(b"\n")
            theirs, _, others = other.read_bytes().partition(b"\n")
            path.write_bytes(mine + b"\n" + others)
            other.write_bytes(theirs + b"\n" + snapshot)
        case "remove":
            path.unlink()
            other.unlink(missing_ok=True)
