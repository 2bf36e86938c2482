"""Random damage to the headers, configs and indexes of every format gives a model or one CheckpointError.

Formats that tests/data does not have are written first, by the encoders of their own tests or by the judges (judges/).
The damage (damage.py) runs in subprocesses, which report other exceptions. Their peak memory is bounded.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import family
import pytest
from damage import fuzz
from judges import base

from .formats import test_bitsandbytes, test_gguf_types

FOLDERS = [
    "mxfp4", "mxfp4-original", "mlx-4bit", "mlx-mxfp4-all", "fp8-dynamic", "fp8-half-split", "int4-autoround", "nvfp4",
    "nvfp4-bf16",
]  # fmt: skip

JUDGED = [  # (judge, case)
    ("compressed_tensors", "w8a8"), ("compressed_tensors", "w8a16"), ("bitsandbytes", "nf4-experts-double"),
    ("gptqmodel", "gptq-4bit"), ("auto_round", "autoround-asym-w4-g128"), ("quark", "quark-mxfp4"), ("torchao", "int8"),
]  # fmt: skip


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
