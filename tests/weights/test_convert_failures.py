"""Converting, when something goes wrong: nothing half-written is left, and nothing that was there is lost."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from mlx_gptoss.config import ModelConfig
from mlx_gptoss.errors import CheckpointError, GptOssError
from mlx_gptoss.weights import checkpoint
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.safetensors import MappedFile
from mlx_gptoss.weights.writer import Writer


@pytest.fixture
def old_checkpoint(tmp_path):
    """A destination with an old checkpoint, which must be the only thing there afterwards, and unchanged."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    yield tmp_path / "out"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    assert (tmp_path / "out" / "config.json").read_text() == "old"


@pytest.mark.parametrize("when", ["writing", "verifying"])
def test_an_interruption_leaves_nothing(mini, old_checkpoint, when):
    def stop(done, total, what):
        if what == when and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(mini / "mxfp4", old_checkpoint, "bf16", overwrite=True, progress=stop)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate", "pread"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_leaves_nothing(mini, old_checkpoint, monkeypatch, call, after):
    real, calls = getattr(os, call), []

    def full(*args):
        calls.append(args)
        if len(calls) > after * (20 if call in ("pwrite", "pread") else 0):
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(GptOssError, match=r"could not be written \(No space left on device\); nothing"):
        convert(mini / "mxfp4", old_checkpoint, "mlx-4bit", overwrite=True)
    monkeypatch.undo()


def test_bytes_that_change_on_the_disk_are_noticed(mini, old_checkpoint, monkeypatch):
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: bytes([real(*args)[0] ^ 1]) + real(*args)[1:])
    with pytest.raises(GptOssError, match="the disk returned other bytes"):
        convert(mini / "mxfp4", old_checkpoint, "mlx-4bit", overwrite=True)


def test_the_old_checkpoint_comes_back_if_the_rename_fails(mini, old_checkpoint, monkeypatch):
    real = Path.rename

    def failing(self, target):
        if self.name == "checkpoint":
            raise OSError(18, "Invalid cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(GptOssError, match="Invalid cross-device link"):
        convert(mini / "mxfp4", old_checkpoint, "mlx-4bit", overwrite=True)


def test_a_disk_without_space_is_noticed_before_writing(mini, old_checkpoint, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**5))
    monkeypatch.setattr(Writer, "write", lambda *args: pytest.fail("something was written"))
    with pytest.raises(GptOssError, match=r"takes 0\.00 GB but only 0\.00 GB are free"):
        convert(mini / "mxfp4", old_checkpoint, "mlx-4bit", overwrite=True)


def test_a_nan_weight_is_named(mini, old_checkpoint, tmp_path_factory):
    source = tmp_path_factory.mktemp("damaged") / "bf16"
    convert(mini / "mxfp4", source, "bf16")
    path = source / "model.safetensors"
    info = MappedFile(path)
    data = bytearray(path.read_bytes())
    data[info.header.offsets["model.layers.1.self_attn.q_proj.weight"] + 1] = 0x7F
    data[info.header.offsets["model.layers.1.self_attn.q_proj.weight"]] = 0xFF
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.q\.weight: a weight is NaN or infinite"):
        convert(source, old_checkpoint, "mlx-4bit", overwrite=True)


def test_an_existing_destination_is_refused(mini, old_checkpoint):
    with pytest.raises(GptOssError, match=r"exists already; .* --overwrite \(overwrite=True in Python\)"):
        convert(mini / "mxfp4", old_checkpoint, "mlx-4bit")


def test_only_checkpoints_are_overwritten(mini, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"")
    with pytest.raises(GptOssError, match="not a checkpoint"):
        convert(mini / "mxfp4", tmp_path / "photos", "mlx-4bit", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(GptOssError, match="not a folder"):
        convert(mini / "mxfp4", tmp_path / "file", "mlx-4bit", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    with pytest.raises(GptOssError, match="not a folder"):
        convert(mini / "mxfp4", tmp_path / "link", "mlx-4bit", overwrite=True)


def test_empty_folders_and_checkpoints_are_overwritten(mini, tmp_path):
    (tmp_path / "out").mkdir()
    convert(mini / "mxfp4", tmp_path / "out", "mlx-mxfp4")
    convert(mini / "mxfp4", tmp_path / "out", "mlx-4bit", overwrite=True)
    assert checkpoint.open(tmp_path / "out").format == "mlx-4bit"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_destination_that_overlaps_the_source_is_refused(mini, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(mini / "mxfp4", source, copy_function=shutil.copyfile)
    for target in (source, source / "inside", tmp_path, source / ".." / "source"):
        with pytest.raises(GptOssError, match="is, contains or is inside the source"):
            convert(source, target, "mlx-4bit", overwrite=True)
    (tmp_path / "alias").symlink_to(source)
    with pytest.raises(GptOssError, match="is, contains or is inside the source"):
        convert(tmp_path / "alias", source, "mlx-4bit", overwrite=True)
    assert checkpoint.open(source).format == "mxfp4"


@pytest.mark.parametrize(("name", "why"), [("mlx-5bit", "is not a format"), ("mxfp4-original", "read but not written")])
def test_unknown_formats_are_refused_with_the_list(mini, tmp_path, name, why):
    with pytest.raises(GptOssError, match=f"{why}.*mlx-4bit"):
        convert(mini / "mxfp4", tmp_path / "out", name)


def test_a_link_out_of_the_folder_is_not_copied(mini, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(mini / "mxfp4", source, copy_function=shutil.copyfile)
    (source / "chat_template.jinja").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="not a file of its folder"):
        convert(source, tmp_path / "out", "mlx-4bit")
    assert not (tmp_path / "out").exists()


def test_rows_that_mxfp4_cannot_group_are_refused(tmp_path, random_checkpoint):
    config = ModelConfig(
        num_hidden_layers=1, hidden_size=64, intermediate_size=80, num_attention_heads=1, num_key_value_heads=1,
        num_local_experts=4, vocab_size=10,
    )  # fmt: skip
    source = random_checkpoint(tmp_path / "source", config)
    with pytest.raises(CheckpointError, match="down_proj has rows of 80 values"):
        convert(source, tmp_path / "out", "mxfp4")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
