"""Random damage to copies of a checkpoint or an adapter: to config and headers, to JSON inside of them, to bytes.

`fuzz` runs this file in a process of its own, which opens the damaged copies and reports every exception that is not a
CheckpointError, with its own peak memory.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

from mlx_gptoss.config import PRESETS
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint
from mlx_gptoss.weights.adapters import open_adapter
from mlx_gptoss.weights.adapters.summary import summarize
from mlx_gptoss.weights.conversion_plan import plan_conversion
from mlx_gptoss.weights.formats import WRITERS

ODD = [
    0, -1, 1, 2, 3, 7, 63, 64, 65, 2**24 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**400, -(10**400), 0.5, 64.0,
    -0.0, 1e308, float("inf"), float("nan"), True, False, None, "", "64", "../x", "/etc/passwd", "model.safetensors",
    "\ud800", "a" * 300, [], [[]], {}, [64], ["full_attention"], {"a": 1}, {"rope_type": "yarn"},
]  # fmt: skip


def peak():
    """Bytes of memory that this process has used at most."""
    return 1024 * next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )


def paths_in(value, path=()):
    """The paths of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in ((*path, key), *paths_in(inner, (*path, key)))]


def damage(chance, value):
    """Change, remove or rename some entries of a JSON value in place."""
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        found = paths_in(value)
        if not found:
            return
        *way, last = chance.choice(found)
        inner = value
        for key in way:
            inner = inner[key]
        what = chance.random()
        if what < 0.2:
            del inner[last]
        elif what < 0.3 and isinstance(inner, dict):
            inner[str(chance.choice(ODD))[:300]] = inner.pop(last)
        elif what < 0.4 and isinstance(inner[last], int) and not isinstance(inner[last], bool):
            inner[last] += chance.choice([-1, 1, -64, 64, 2**32, -(2**32)])
        else:
            inner[last] = chance.choice(ODD)


def text_of(chance, value):
    """The JSON text of a value, seldom with a key twice or cut off."""
    text = json.dumps(value)
    if chance.random() < 0.05:
        text = text.replace('": ', '": 1, "', 1)
    if chance.random() < 0.05:
        text = text[: chance.randrange(len(text) + 1)]
    return text.encode("utf-8", "surrogatepass")


def damaged_text(chance, text):
    """JSON inside of JSON or of a tensor: torchao's metadata, bitsandbytes' states."""
    value = json.loads(text)
    damage(chance, value)
    return text_of(chance, value)


def is_json(text):
    return isinstance(text, str) and text[:1] in ("{", "[")


def damaged_header(chance, data):
    """A safetensors file with damage to its header, to JSON inside of it, or to bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    what = chance.random()
    if what < 0.1:
        claimed = chance.choice([0, 1, length - 1, length + 1, 2**24, 2**40, 2**63, 2**64 - 1])
        return claimed.to_bytes(8, "little") + data[8:]
    if what < 0.2:
        return data[: chance.randrange(len(data))]
    if what < 0.35:  # single bytes of anything, scales included
        data = bytearray(data)
        for _ in range(40):
            data[chance.randrange(len(data))] = chance.choice([0, 0x7F, 0x80, 0xFF])
        return bytes(data)
    states = [n for n in header if ".quant_state." in n]
    if what < 0.5 and states:
        first, last = (8 + length + x for x in header[chance.choice(states)]["data_offsets"])
        text = damaged_text(chance, data[first:last])[: last - first].ljust(last - first)
        return data[:first] + text + data[last:]
    if what < 0.5 and any(map(is_json, header.get("__metadata__", {}).values())):
        metadata = header["__metadata__"]
        name = chance.choice([name for name, value in metadata.items() if is_json(value)])
        metadata[name] = damaged_text(chance, metadata[name]).decode("utf-8", "replace")
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]
    if what < 0.5:  # a tensor in which all bytes are equal: scales that are NaN
        name = chance.choice([n for n in header if n != "__metadata__"])
        first, last = (8 + length + x for x in header[name]["data_offsets"])
        return data[:first] + bytes([chance.choice([0x7F, 0x80, 0xFF])]) * (last - first) + data[last:]
    damage(chance, header)
    text = text_of(chance, header)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
ODD_INTS = [
    0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 42, 43, 255, 256, 257, 2**15, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63,
    2**64 - 1, 0x7FC00000, 0x7F800000, 0xFF800000,
]  # fmt: skip


def numbers_of(data):
    """(numbers, end) of a GGUF header.

    numbers: (offset, size) of each, in groups: the counts, then one group for each entry and tensor.
    """

    def take(size):
        nonlocal at
        group.append((at, size))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def value(kind):
        nonlocal at
        if kind == 8:
            length = take(8)
            at += length
        elif kind == 9:
            element, count = take(4), take(8)
            for _ in range(count):
                value(element)
        else:
            take(GGUF_SIZES[kind])

    at, group = 4, []
    groups = [group]
    take(4)
    tensors, entries = take(8), take(8)
    for _ in range(entries):
        groups.append(group := [])
        value(8)
        value(take(4))
    for _ in range(tensors):
        groups.append(group := [])
        value(8)
        for _ in range(take(4)):
            take(8)
        take(4), take(8)
    return groups, at


def damaged_gguf(chance, data, numbers):
    """A GGUF file with damage to the numbers of its header, as numbers_of finds them, or to bytes."""
    groups, end = numbers
    what = chance.random()
    if what < 0.1:
        return data[: chance.randrange(len(data))]
    data = bytearray(data)
    if what < 0.6:
        for _ in range(chance.choice([1, 1, 1, 2, 4])):
            at, size = chance.choice(chance.choice(groups))
            number = int.from_bytes(data[at : at + size], "little")
            number = chance.choice([*ODD_INTS, number + 1, number - 1]) % 2 ** (8 * size)
            data[at : at + size] = number.to_bytes(size, "little")
    else:  # bytes of the header, or of anything, scales included
        for _ in range(chance.choice([1, 4, 40])):
            data[chance.randrange(end if what < 0.8 else len(data))] = chance.choice([0, 0x7C, 0x7F, 0x80, 0xFF])
    return data


def damaged_copy(chance, source, workplace, numbers):
    """A copy of `source` in which one file is damaged. numbers: numbers_of its GGUF file."""
    name = chance.choice(
        [
            path.name
            for path in source.iterdir()
            if path.suffix in (".json", ".safetensors", ".gguf")
            and not path.name.startswith(("tokenizer", "hf_quant", "quantization"))
        ]
    )
    folder = workplace / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in source.iterdir():
        if path.name != name:
            shutil.copyfile(path, folder / path.name)
    if name.endswith(".gguf"):
        (folder / name).write_bytes(damaged_gguf(chance, (source / name).read_bytes(), numbers))
    elif name.endswith(".json"):
        value = json.loads((source / name).read_text())
        damage(chance, value)
        (folder / name).write_bytes(text_of(chance, value))
    else:
        (folder / name).write_bytes(damaged_header(chance, (source / name).read_bytes()))
    return folder


def use_checkpoint(chance, folder):
    """Open a checkpoint, describe it, plan a conversion and read every weight."""
    opened = checkpoint.open(folder)
    opened.summary()
    if opened.embedded_files() is not None:
        opened.tokenizer()
    plan_conversion(opened, chance.choice(sorted(WRITERS)))
    for param, _ in opened.weights():
        assert param.name


def use_adapter(folder, config):
    """Describe an adapter for the model of a config and for another, open it and read every factor."""
    with contextlib.suppress(CheckpointError):
        summarize(folder, {"model": config, "other": PRESETS["20b"]})
    adapter = open_adapter(folder, config)
    for name in adapter.entries:
        adapter.stacked([name])
    assert adapter.nbytes(2) > 0


def report(source, workplace, rounds, model=None):
    """What `fuzz` returns. The name of `source` seeds the damage."""
    chance = random.Random(source.name)
    numbers = next((numbers_of(path.read_bytes()) for path in source.glob("*.gguf")), None)
    config = None if model is None else checkpoint.open(model).config

    def use(folder):
        use_checkpoint(chance, folder) if config is None else use_adapter(folder, config)

    use(source)
    before, refused, escaped, slowest, longest = peak(), 0, [], 0.0, 0
    for _ in range(rounds):
        folder = damaged_copy(chance, source, workplace, numbers)
        started = time.process_time()
        try:
            use(folder)
        except CheckpointError as error:
            refused += 1
            longest = max(longest, len(str(error)) - str(error).count(str(folder)) * len(str(folder)))
        except Exception:  # what the test fails for
            escaped.append(traceback.format_exc()[-600:])
        slowest = max(slowest, time.process_time() - started)
    return {"refused": refused, "escaped": escaped, "slowest": slowest, "longest": longest, "peak": peak() - before}


def fuzz(source: Path, workplace: Path, rounds: int, model: Path | None = None) -> dict:
    """Damage copies of `source`, a checkpoint or, if a model is given, an adapter for it.

    Returns how many copies were refused, the other exceptions as text ("escaped"), the CPU seconds of the slowest copy,
    the characters of the longest message without the folder, and the bytes by which the peak memory grew.
    """
    words = [sys.executable, "-W", "error", __file__, source, workplace, rounds, *([] if model is None else [model])]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps(report(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *map(Path, sys.argv[4:]))))
