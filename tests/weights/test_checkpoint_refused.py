"""Refusing: a checkpoint that is damaged, malicious or of another model gives one error that says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.safetensors import INDEX, MappedFile

BF16 = np.dtype(ml_dtypes.bfloat16)
SHARD = "model-00000-of-00003.safetensors"


def edit(folder: Path, name: str, change) -> None:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


def remove(name):
    return lambda tensors: tensors.pop(name)


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(name, array):
    return lambda tensors: tensors.update({name: array})


LAYER = "model.layers.1."
TENSOR_DAMAGE = {
    "a missing tensor": (remove(f"{LAYER}self_attn.sinks"), r"1 missing: model\.layers\.1\.self_attn\.sinks"),
    "missing blocks": (remove(f"{LAYER}mlp.experts.down_proj_blocks"), "1 missing: .*down_proj_blocks"),
    "missing scales": (remove(f"{LAYER}mlp.experts.gate_up_proj_scales"), "1 missing: .*gate_up_proj_scales"),
    "a missing head": (remove("lm_head.weight"), r"1 missing: lm_head\.weight"),
    "an unknown tensor": (put("model.rotary", np.zeros(2, np.float32)), "1 unknown: model.rotary"),
    "a second layout": (
        put(f"{LAYER}mlp.experts.down_proj", np.zeros((6, 64, 192), BF16)),
        r"1 unknown: model\.layers\.1\.mlp\.experts\.down_proj",
    ),
    "a wrong shape": (
        put(f"{LAYER}mlp.router.weight", np.zeros((192, 6), BF16)),
        r"1 of a wrong shape: .*router\.weight \[192, 6\] instead of \[6, 192\]",
    ),
    "a wrong shape of blocks": (
        put(f"{LAYER}mlp.experts.down_proj_blocks", np.zeros((6, 192, 32), np.uint8)),
        r"1 of a wrong shape: .*down_proj_blocks",
    ),
    "a wrong dtype": (put("model.norm.weight", np.zeros(192, np.int64)), "1 of a wrong dtype: model.norm.weight I64"),
    "a scalar instead of a vector": (
        put("model.norm.weight", np.zeros((), np.float32)),
        "1 of a wrong shape: model.norm.weight",
    ),
    "one layer too many": (
        lambda tensors: tensors.update({k.replace("s.1.", "s.2."): v for k, v in tensors.items() if LAYER in k}),
        r"19 unknown: model\.layers\.2\..* and 15 more",
    ),
    "transformers 5.14's names": (
        rename(f"{LAYER}mlp.experts.down_proj_blocks", f"{LAYER}mlp.experts.down_proj$"),
        r"ending in \$ come from a bug in transformers 5\.14",
    ),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_wrong_tensors_are_listed_before_any_is_read(damage, copied, monkeypatch, read_tensors, write_tensors):
    change, message = TENSOR_DAMAGE[damage]
    folder = copied("mxfp4")
    tensors = read_tensors(folder)
    change(tensors)
    write_tensors(folder, tensors)
    monkeypatch.setattr(MappedFile, "get", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.open(folder)
    assert len(str(caught.value)) < 800


def quantization(change):
    def apply(data):
        change(data["quantization"])

    return apply


CONFIG_DAMAGE = {
    "another model": (lambda data: data.update(model_type="llama"), "model_type 'llama'"),
    "no layers": (lambda data: data.update(num_hidden_layers=0), "num_hidden_layers"),
    "no experts": (lambda data: data.update(num_local_experts=0), "num_local_experts"),
    "millions of layers": (lambda data: data.update(num_hidden_layers=2**24 - 1), "only 77 tensors"),
    "fewer layers": (lambda data: data.update(num_hidden_layers=1, layer_types=["full_attention"]), "unknown"),
    "a size that is text": (lambda data: data.update(hidden_size="192"), "hidden_size"),
    "a size that is a fraction": (lambda data: data.update(hidden_size=192.0), "hidden_size"),
    "another size": (lambda data: data.update(vocab_size=128), "wrong shape"),
    "other bits": (quantization(lambda block: block.update(bits=8)), "says .* but its tensors are"),
    "another mode": (quantization(lambda block: block.update(mode="mxfp4")), "says .* but its tensors are"),
    "another group": (quantization(lambda block: block.update(group_size=32)), "says .* but its tensors are"),
    "a router without its 8 bits": (quantization(lambda block: block.pop("model.layers.0.mlp.router")), "mlp.router"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_wrong_configs_are_refused(damage, copied):
    change, message = CONFIG_DAMAGE[damage]
    folder = copied("mlx-4bit")
    edit(folder, "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(folder)


def write(name, data):
    def apply(folder):
        path = folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    return apply


def link(name, target):
    def apply(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return apply


def mapped_to(file, tensor="lm_head.weight"):
    return lambda folder: edit(folder, INDEX, lambda data: data["weight_map"].update({tensor: file}))


def config_as_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def tensor_twice(folder):
    (folder / INDEX).unlink()
    shutil.copyfile(folder / SHARD, folder / "a.safetensors")


def fifo(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


FILE_DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "is not a checkpoint"),
    "a config that is not an object": (write("config.json", b"[]"), "not a JSON object"),
    "a config that is not JSON": (write("config.json", b"\x80pickle"), "not UTF-8"),
    "a nested config": (write("config.json", b'{"a":' * 10**5), "not valid JSON"),
    "a config that is a folder": (config_as_folder, "not a checkpoint"),
    "a config that is a pipe": (fifo, "not a checkpoint"),
    "a huge config": (write("config.json", b" " * (16 * 2**20 + 1)), "more than the config.json of any checkpoint"),
    "a duplicate key": (write("config.json", b'{"hidden_size": 1, "hidden_size": 2}'), "'hidden_size' twice"),
    "a config outside the folder": (link("config.json", "/etc/hostname"), "not a file of its folder"),
    "a shard outside the folder": (link(SHARD, "/etc/hostname"), "not a file of its folder"),
    "a missing shard": (lambda folder: (folder / SHARD).unlink(), f"lacks '?{SHARD}"),
    "a shard that is a dangling link": (link(SHARD, "nowhere"), f"lacks '?{SHARD}"),
    "a truncated shard": (lambda folder: os.truncate(folder / SHARD, 300_000), "is truncated"),
    "an empty index": (write(INDEX, b'{"weight_map": {}}'), "no weight_map"),
    "an index of numbers": (mapped_to(3), "no weight_map of names"),
    "an index into the parent": (mapped_to("../mxfp4/" + SHARD), "not a plain file name"),
    "an index to dots": (mapped_to(".."), "not a plain file name"),
    "an absolute index": (mapped_to("/etc/passwd"), "not a plain file name"),
    "an index with a zero byte": (mapped_to("model\0.safetensors"), "not a plain file name"),
    "an index with a long name": (mapped_to("x" * 5000), "not a plain file name"),
    "an index to the wrong shard": (mapped_to("model-00001-of-00003.safetensors"), "disagree about 1 tensors"),
    "an index with more tensors": (mapped_to(SHARD, "extra"), "disagree about 1 tensors .'extra'"),
    "a tensor in two files": (tensor_twice, "is in both"),
    "no weights": (lambda folder: [path.unlink() for path in folder.glob("*.safetensors")], "no .safetensors file"),
}


@pytest.mark.parametrize("damage", FILE_DAMAGE)
def test_wrong_files_are_refused(damage, copied):
    change, message = FILE_DAMAGE[damage]
    folder = copied("mxfp4")
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(folder)


def test_a_path_that_is_not_a_folder_is_refused(tmp_path, mini):
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a file"):
        checkpoint.open(mini / "mxfp4" / "config.json")


def test_nan_scales_are_refused_when_they_are_read(copied, read_tensors, write_tensors):
    folder = copied("mxfp4")
    tensors = read_tensors(folder)
    name = f"{LAYER}mlp.experts.down_proj_scales"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 100, 1] = 255
    write_tensors(folder, tensors)
    opened = checkpoint.open(folder)
    opened.summary()
    opened.read("layers.1.experts.gate.weight")
    with pytest.raises(CheckpointError, match=r"layers\.1\.experts\.down\.weight has a scale that is not a number"):
        opened.read("layers.1.experts.down.weight")


def test_mlx_in_groups_that_mlx_does_not_have_names_the_module(mini, tmp_path, read_tensors, write_tensors):
    folder = tmp_path / "g16"
    convert(mini / "mxfp4", folder, "mlx-4bit")
    tensors = read_tensors(folder)
    for part in ("scales", "biases"):
        tensors[f"lm_head.{part}"] = np.repeat(tensors[f"lm_head.{part}"], 4, axis=-1)
    write_tensors(folder, tensors)
    with pytest.raises(CheckpointError, match="lm_head is quantized to 4 bits in affine groups of 16"):
        checkpoint.open(folder)
