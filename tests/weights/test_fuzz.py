"""Random damage to the headers, configs and indexes of every format gives a model or one CheckpointError.

Formats that tests/data does not have are written first, by the encoders of their own tests or by the judges (judges/).
The cases run in a few subprocesses, which report other exceptions. Their peak memory is bounded.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import family
import pytest
from judges import base

from .formats import test_bitsandbytes, test_gguf_types

FOLDERS = [
    "mxfp4", "mxfp4-original", "mlx-4bit", "mlx-mxfp4-all", "fp8-dynamic", "fp8-half-split", "int4-autoround", "nvfp4",
    "nvfp4-bf16",
]  # fmt: skip

JUDGED = [  # (judge, case)
    ("compressed_tensors", "w8a8"), ("compressed_tensors", "w8a16"), ("bitsandbytes", "nf4-experts-double"),
    ("gptqmodel", "gptq-4bit"), ("auto_round", "autoround-asym-w4"), ("quark", "quark-mxfp4"), ("torchao", "int8"),
]  # fmt: skip

FUZZ = r"""
import json, os, random, shutil, sys, time, traceback
from pathlib import Path
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint
from mlx_gptoss.weights.conversion_plan import plan_conversion
from mlx_gptoss.weights.formats import WRITERS

source, workplace, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
chance = random.Random(source.name)
ODD = [0, -1, 1, 2, 3, 7, 63, 64, 65, 2**24 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**400, -(10**400), 0.5, 64.0,
       -0.0, 1e308, float("inf"), float("nan"), True, False, None, "", "64", "../x", "/etc/passwd", "model.safetensors",
       "\ud800", "a" * 300, [], [[]], {}, [64], ["full_attention"], {"a": 1}, {"rope_type": "yarn"}]

def peak():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def paths_in(value, path=()):
    # the paths of everything inside a JSON value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in ((*path, key), *paths_in(inner, (*path, key)))]

def damage(value):
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
            inner[last] += chance.choice([-1, 1, -64, 64, 2**32, -2**32])
        else:
            inner[last] = chance.choice(ODD)

def text_of(value):
    text = json.dumps(value)
    if chance.random() < 0.05:
        text = text.replace('": ', '": 1, "', 1)
    if chance.random() < 0.05:
        text = text[: chance.randrange(len(text) + 1)]
    return text.encode("utf-8", "surrogatepass")

def damaged_text(text):
    # JSON inside of JSON or of a tensor: torchao's metadata, bitsandbytes' states
    value = json.loads(text)
    damage(value)
    return text_of(value)

def is_json(text):
    return isinstance(text, str) and text[:1] in ("{", "[")

def damaged_header(data):
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
        text = damaged_text(data[first:last])[: last - first].ljust(last - first)
        return data[:first] + text + data[last:]
    if what < 0.5 and any(map(is_json, header.get("__metadata__", {}).values())):
        metadata = header["__metadata__"]
        name = chance.choice([name for name, value in metadata.items() if is_json(value)])
        metadata[name] = damaged_text(metadata[name]).decode("utf-8", "replace")
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]
    if what < 0.5:  # a tensor in which all bytes are equal: scales that are NaN
        name = chance.choice([n for n in header if n != "__metadata__"])
        first, last = (8 + length + x for x in header[name]["data_offsets"])
        return data[:first] + bytes([chance.choice([0x7F, 0x80, 0xFF])]) * (last - first) + data[last:]
    damage(header)
    text = text_of(header)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]

GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
ODD_INTS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 42, 43, 255, 256, 257, 2**15, 2**16, 2**31, 2**32 - 1, 2**40, 2**62,
            2**63, 2**64 - 1, 0x7FC00000, 0x7F800000, 0xFF800000]

def numbers_of(data):
    # (offset, size) of the numbers of a GGUF header, in groups: the counts, then one for each entry and tensor
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

def damaged_gguf(data):
    groups, end = GGUF_NUMBERS
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

def use(folder):
    opened = checkpoint.open(folder)
    opened.summary()
    if opened.embedded_files() is not None:
        opened.tokenizer()
    plan_conversion(opened, chance.choice(sorted(WRITERS)))
    for param, weight in opened.weights():
        assert param.name

def damaged_copy():
    name = chance.choice([path.name for path in source.iterdir() if path.suffix in (".json", ".safetensors", ".gguf")
                          and not path.name.startswith(("tokenizer", "hf_quant", "quantization"))])
    folder = workplace / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in source.iterdir():
        if path.name != name:
            shutil.copyfile(path, folder / path.name)
    if name.endswith(".gguf"):
        (folder / name).write_bytes(damaged_gguf((source / name).read_bytes()))
    elif name.endswith(".json"):
        value = json.loads((source / name).read_text())
        damage(value)
        (folder / name).write_bytes(text_of(value))
    else:
        (folder / name).write_bytes(damaged_header((source / name).read_bytes()))
    return folder

for path in source.glob("*.gguf"):
    GGUF_NUMBERS = numbers_of(path.read_bytes())
use(source)
before, refused, escaped, slowest, longest = peak(), 0, [], 0.0, 0
for _ in range(rounds):
    folder = damaged_copy()
    started = time.process_time()
    try:
        use(folder)
    except CheckpointError as error:
        refused += 1
        longest = max(longest, len(str(error)) - str(error).count(str(folder)) * len(str(folder)))
    except Exception as error:
        escaped.append(f"{traceback.format_exc()[-600:]}")
    slowest = max(slowest, time.process_time() - started)
report = {"refused": refused, "escaped": escaped, "slowest": slowest, "longest": longest, "peak": peak() - before}
print(json.dumps(report))
"""


def fuzz(source: Path, folder: Path, rounds: int) -> dict:
    """The report of FUZZ, run in a process of its own that damages copies of `source` in `folder`."""
    arguments = [sys.executable, "-W", "error", "-c", FUZZ, str(source), str(folder), str(rounds)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def bnb(folder: Path, mini: Path) -> None:
    """NF4 of the attention and, a module each, of the experts."""
    family.write_checkpoint(
        folder, test_bitsandbytes.CONFIG, test_bitsandbytes.layout(test_bitsandbytes.own_encoder, True)[0]
    )


def gguf_types(name: str):
    def write(folder: Path, mini: Path) -> None:
        folder.mkdir()
        config = test_gguf_types.small_config(mini)
        test_gguf_types.write(folder / "model", mini, config, test_gguf_types.MIXTURES[name])
        (folder / "model.f32.gguf").unlink()

    return write


def judged(module: str, case: str):
    """What the judge of a tool makes in a case; the test skips without the tool."""

    def write(folder: Path, mini: Path) -> None:
        judge = importlib.import_module(f"judges.with_{module}")
        if judge.version() is None:
            pytest.skip(f"{judge.NAME} is not installed")
        make = next(row.cases[case] for row in judge.ROWS if case in row.cases)
        make(base.write_source(folder.parent / "source"), folder)

    return write


def copied_gguf(folder: Path, mini: Path) -> None:
    folder.mkdir()
    (folder / "model.gguf").write_bytes((mini / "gguf/model.gguf").read_bytes())


WRITTEN = {
    "bnb": bnb,
    "gguf": copied_gguf,
    **{f"gguf-{name}": gguf_types(name) for name in test_gguf_types.MIXTURES},
    "fp8-block": judged("compressed_tensors", "fp8-block"),
    "w4a16-asym": judged("compressed_tensors", "w4a16-asym-g64"),
}
OTHERS = {  # those of tools that are not in the extra `test`
    **{f"{module}:{case}": judged(module, case) for module, case in JUDGED},
}


def check(found: dict, rounds: int) -> None:
    assert found["escaped"] == []
    assert rounds / 4 < found["refused"] < rounds  # some damage is harmless
    assert found["slowest"] < 5
    assert found["longest"] < 2000
    assert found["peak"] < 200e6


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


@needs_proc
@pytest.mark.parametrize("name", FOLDERS)
def test_damage_gives_one_clear_error(mini, tmp_path, name):
    check(fuzz(mini / name, tmp_path, 300), 300)


@needs_proc
@pytest.mark.parametrize("name", WRITTEN)
def test_damage_to_a_written_checkpoint(mini, tmp_path, name):
    WRITTEN[name](tmp_path / name, mini)
    check(fuzz(tmp_path / name, tmp_path, 40), 40)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("name", [*FOLDERS, *WRITTEN, *OTHERS])
def test_much_damage(mini, tmp_path, name):
    folder = mini / name
    if name not in FOLDERS:
        folder = tmp_path / name.replace(":", "-")
        (WRITTEN | OTHERS)[name](folder, mini)
    check(fuzz(folder, tmp_path, 3000), 3000)


SIZE = r"""
import sys
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint
def peak():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
checkpoint.open(sys.argv[1])
before = peak()
try:
    checkpoint.open(sys.argv[2])
except CheckpointError as error:
    print(peak() - before, len(str(error)), error)
"""


def write_shard(path: Path, entries: dict) -> None:
    text = json.dumps(entries, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def empty_tensors(count: int, start: int = 0) -> dict:
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    return {f"model.layers.{number}.self_attn.rotary_emb.inv_freq": entry for number in range(start, start + count)}


def many_shards(folder):
    for number in range(6):
        write_shard(folder / f"{number}.safetensors", empty_tensors(70_000, 70_000 * number))


def a_long_name(folder):
    write_shard(folder / "model.safetensors", {"a" * 10**7: {"dtype": "F128"}})


def a_long_dtype(folder):
    entry = {"dtype": "F" * 10**7, "shape": [0], "data_offsets": [0, 0]}
    write_shard(folder / "model.safetensors", {"a": entry})


def a_long_model_type(folder):
    write_shard(folder / "model.safetensors", empty_tensors(100))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "x" * 10**7}))


def a_long_index(folder):
    write_shard(folder / "model.safetensors", empty_tensors(1))
    mapped = {f"model.layers.{number}.a": "model.safetensors" for number in range(300_000)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapped}))


def an_index_of_many_files(folder):
    write_shard(folder / "model.safetensors", empty_tensors(1))
    mapped = {f"{number}": f"../{number}" for number in range(400_000)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapped}))


def a_deep_config(folder):
    write_shard(folder / "model.safetensors", empty_tensors(100))
    (folder / "config.json").write_text("[" * 500_000 + "]" * 500_000)


def a_long_number(folder):
    write_shard(folder / "model.safetensors", empty_tensors(100))
    (folder / "config.json").write_text('{"model_type": "gpt_oss", "num_hidden_layers": ' + "9" * 10**7 + "}")


def a_config_larger_than_memory(folder):
    write_shard(folder / "model.safetensors", empty_tensors(100))
    with (folder / "config.json").open("wb") as file:
        file.truncate(2**40)


HUGE_FILES = [
    many_shards, a_long_name, a_long_dtype, a_long_model_type, a_long_index, an_index_of_many_files, a_deep_config,
    a_long_number, a_config_larger_than_memory,
]  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("write", HUGE_FILES)
def test_huge_files_take_little_memory(mini, tmp_path, write):
    (tmp_path / "config.json").write_bytes((mini / "mxfp4/config.json").read_bytes())
    write(tmp_path)
    arguments = [sys.executable, "-c", SIZE, str(mini / "mxfp4"), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, check=True)
    peak, length, message = done.stdout.split(maxsplit=2)
    assert int(peak) < 200e6
    assert int(length) <= 2000, message[:300]


def test_more_shards_than_open_files_are_allowed_is_one_error(mini, tmp_path):
    resource = pytest.importorskip("resource")
    (tmp_path / "config.json").write_bytes((mini / "mxfp4/config.json").read_bytes())
    for number in range(80):
        write_shard(tmp_path / f"{number}.safetensors", empty_tensors(1, number))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
    arguments = [sys.executable, "-c", limit + SIZE, str(mini / "mxfp4"), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, check=True)
    assert resource and "(Too many open files)" in done.stdout
