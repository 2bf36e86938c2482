"""GGUF files convert to the other formats without loss, and are found in folders, through links and in split files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.weights import checkpoint, codecs, gguf
from mlx_gptoss.weights.convert import convert


@pytest.fixture(scope="module")
def model(mini) -> bytes:
    return (mini / "gguf" / "model.gguf").read_bytes()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_to_mxfp4_gives_the_source_checkpoint_back(mini, tmp_path, load_tensors, tensor_bytes):
    convert(mini / "gguf" / "model.gguf", tmp_path / "new", "mxfp4")
    assert tensor_bytes(load_tensors(tmp_path / "new")) == tensor_bytes(load_tensors(mini / "mxfp4"))
    converted = checkpoint.open(tmp_path / "new")
    assert converted.stop_ids == checkpoint.open(mini / "gguf" / "model.gguf").stop_ids
    text = "self.name: 12"
    assert converted.tokenizer().encode(text) == Tokenizer.from_folder(mini / "nvfp4").encode(text)


def test_to_mlx_mxfp4_gives_the_same_as_the_source_checkpoint(mini, tmp_path, load_tensors, tensor_bytes):
    for name, source in {"a": mini / "gguf" / "model.gguf", "b": mini / "mxfp4"}.items():
        convert(source, tmp_path / name, "mlx-mxfp4")
    assert tensor_bytes(load_tensors(tmp_path / "a")) == tensor_bytes(load_tensors(tmp_path / "b"))


def test_q8_0_to_bf16_rounds_each_value_once(mini, tmp_path):
    convert(mini / "gguf" / "model-q8_0.gguf", tmp_path / "new", "bf16")
    source, result = checkpoint.open(mini / "gguf" / "model-q8_0.gguf"), checkpoint.open(tmp_path / "new")
    for param, weight in source.weights():
        expected = torch.from_numpy(codecs.dequantize(weight)).to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(codecs.dequantize(result.read(param.name)), expected, param.name)


# Where the file is


def test_a_folder_with_one_gguf_file_opens_that_file(tmp_path, model):
    write(tmp_path / "a.gguf", model)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')  # belongs to something else
    assert checkpoint.open(tmp_path).format == "gguf"
    assert 7 not in checkpoint.open(tmp_path).stop_ids
    convert(tmp_path, tmp_path.parent / f"{tmp_path.name}.new", "mxfp4")
    assert 7 not in checkpoint.open(tmp_path.parent / f"{tmp_path.name}.new").stop_ids
    write(tmp_path / "b.gguf", model)
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF models \(a\.gguf, b\.gguf\); give the path of one"):
        checkpoint.open(tmp_path)


def test_a_link_to_the_file_is_followed(tmp_path, model):
    (tmp_path / "there").mkdir()
    (tmp_path / "here.gguf").symlink_to(write(tmp_path / "there" / "model.gguf", model))
    assert checkpoint.open(tmp_path / "here.gguf").format == "gguf"


def split(model: bytes, folder: Path) -> tuple[Path, Path]:
    """The model as two files: all metadata and the first layer's tensors in one, the other tensors in the other."""
    header = gguf.read_header(write(folder / "whole", model))
    infos, offsets = header.tensors.tensors, header.tensors.offsets

    def described_at(name: str) -> int:
        return model.index(struct.pack("<Q", len(name)) + name.encode())

    def part(path: Path, names: list[str], entries: int, metadata: bytes) -> Path:
        described, data = b"", b""
        for name in names:
            dimensions = len(infos[name].shape) - (infos[name].dtype == "U8")  # blocks add a dimension
            start = described_at(name)
            described += model[start : start + 8 + len(name) + 4 + 8 * dimensions + 4] + struct.pack("<Q", len(data))
            raw = model[offsets[name] : offsets[name] + infos[name].nbytes]
            data += raw + b"\0" * (-len(raw) % 32)
        head = b"GGUF" + struct.pack("<IQQ", 3, len(names), entries) + metadata + described
        return write(path, head + b"\0" * (-len(head) % 32) + data)

    (entries,) = struct.unpack_from("<Q", model, 16)
    metadata = model[24 : described_at(next(iter(infos)))]
    first, others = [name for name in infos if "blk.0" in name], [name for name in infos if "blk.0" not in name]
    return (
        part(folder / "m-00001-of-00002.gguf", first, entries, metadata),
        part(folder / "m-00002-of-00002.gguf", others, 0, b""),
    )


def test_a_split_model_opens_by_any_of_its_files(mini, tmp_path, model):
    whole = checkpoint.open(mini / "gguf" / "model.gguf")
    first, second = split(model, tmp_path)
    for path in (first, second, tmp_path):
        for param, weight in checkpoint.open(path).weights():
            np.testing.assert_array_equal(codecs.dequantize(weight), codecs.dequantize(whole.read(param.name)))
    second.unlink()
    with pytest.raises(CheckpointError, match=r"lacks m-00002-of-00002\.gguf"):
        checkpoint.open(first)
    second.symlink_to(mini / "gguf" / "model.gguf")
    with pytest.raises(CheckpointError, match="is not a file of its folder"):
        checkpoint.open(first)


def test_a_number_of_parts_that_no_model_has_is_refused(tmp_path, model):
    path = write(tmp_path / "m-00001-of-99999.gguf", model)
    with pytest.raises(CheckpointError, match="one of 99999 parts; no gpt-oss model has more than 1000"):
        checkpoint.open(path)
