"""convert: equal bytes to what the reference tools wrote, lossless routes lossless, and nothing half-written, ever."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_gptoss.config import ModelConfig, published
from mlx_gptoss.errors import CheckpointError, GptOssError
from mlx_gptoss.weights import checkpoint, codecs
from mlx_gptoss.weights import convert as conversion
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.formats import WRITERS, recipe_of
from mlx_gptoss.weights.params import parameters
from mlx_gptoss.weights.safetensors import DTYPES
from mlx_gptoss.weights.tensor import FP8_ROW, Dense, Quantized
from mlx_gptoss.weights.writer import Writer

MLX = ["mlx-4bit", "mlx-8bit", "mlx-mxfp8", "mlx-nvfp4", "mlx-mxfp4", "mlx-mxfp4-q8", "mlx-mxfp4-q4"]
TARGETS = ["mxfp4", "bf16", *MLX]
EVERY = [*TARGETS, "fp8-dynamic", "int4-autoround", "nvfp4"]


def digests(folder: Path) -> dict[str, list]:
    """Of every tensor: dtype, shape and the start of the SHA-256 of its bytes."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        for name, info in json.loads(data[8:end]).items():
            if name != "__metadata__":
                first, last = (end + offset for offset in info["data_offsets"])
                found[name] = [info["dtype"], info["shape"], hashlib.sha256(data[first:last]).hexdigest()[:16]]
    return found


def metadata(folder: Path) -> dict[str, str]:
    data = next(folder.glob("*.safetensors")).read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def synthetic(folder: Path, config: ModelConfig, form: str = "bf16", wide: tuple[str, ...] = ()) -> Path:
    """A checkpoint of random weights, made with the Writer alone: bf16, or mxfp4 with random codes. Every expert, or
    row of a matrix, is the same. Parameters named in `wide` are float32 that bfloat16 cannot hold."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    params = parameters(config)
    writer_format, _ = recipe_of(form)
    units = writer_format.units(form, params, dict.fromkeys(wide, "F32"))
    tensors = [info for unit in units for info in unit.tensors]
    writer = Writer(folder, tensors, {"format": "pt"})
    for info in tensors:
        if info.dtype == "U8":
            low, high = (118, 124) if info.name.endswith("_scales") else (0, 256)
            values = rng.integers(low, high, info.shape[1:], dtype=np.uint8)
        else:
            values = (rng.standard_normal(info.shape[1:], np.float32) * np.float32(0.02)).astype(DTYPES[info.dtype])
        for row in range(info.shape[0]):
            writer.write(info.name, row, values)
    writer.finish()
    writer.close()
    content = published(config) | writer_format.config_entries(form, params) | {"swiglu_alpha": config.swiglu_alpha}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def written(mini, tmp_path_factory):
    """The mxfp4 fixture in every format, by name."""
    root = tmp_path_factory.mktemp("written")
    for name in EVERY:
        convert(mini / "mxfp4", root / name, name)
    return root


@pytest.fixture(scope="session")
def tools(mini):
    """The digests of what transformers, OpenAI's tools and mlx-lm wrote of the same model."""
    return json.loads((mini / "digests.json").read_text())


@pytest.mark.parametrize("name", TARGETS)
def test_equals_what_the_tools_wrote(written, tools, name):
    assert digests(written / name) == tools[name]
    assert metadata(written / name) == {"format": "mlx" if name in MLX else "pt"}


@pytest.mark.parametrize("name", TARGETS)
def test_the_original_layout_gives_the_same_files(mini, tools, name, tmp_path):
    report = convert(mini / "mxfp4-original", tmp_path / name, name)
    assert report.source_format == "mxfp4-original"
    assert digests(tmp_path / name) == tools[name]


@pytest.mark.parametrize("between", ["bf16", "mlx-mxfp4", "mxfp4"])
def test_lossless_routes_lead_back(written, tools, between, tmp_path):
    """bf16 that came from MXFP4: its codes are found again."""
    convert(written / between, tmp_path / "back", "mxfp4")
    assert digests(tmp_path / "back") == tools["mxfp4"]
    convert(written / between, tmp_path / "bf16", "bf16")
    assert digests(tmp_path / "bf16") == tools["bf16"]


LOSSLESS = [
    *((source, target) for source in ("mxfp4", "mxfp4-original", "gguf/model.gguf", "nvfp4-bf16")
      for target in ("mxfp4", "bf16", "mlx-mxfp4", "mlx-mxfp4-q8", "mlx-mxfp4-q4")),
    *((source, "nvfp4") for source in ("mxfp4", "mxfp4-original", "gguf/model.gguf")),
    ("int4-autoround", "mlx-4bit"),
    ("mlx-mxfp4-all", "mxfp4"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target"), LOSSLESS)
def test_experts_come_through_bit_for_bit(mini, source, target, tmp_path):
    """The values of experts are those of the source; and what MXFP4 and bfloat16 hold is what the tools wrote."""
    convert(mini / source, tmp_path / "out", target)
    before, after = checkpoint.open(mini / source), checkpoint.open(tmp_path / "out")
    for param in before.params:
        if param.role == "experts":
            values = codecs.dequantize(after.read(param.name))
            assert np.array_equal(values, codecs.dequantize(before.read(param.name))), param.name


@pytest.mark.parametrize("source", ["nvfp4-bf16", "gguf/model.gguf"])
@pytest.mark.parametrize("target", ["mxfp4", "mlx-mxfp4"])
def test_the_codes_of_mxfp4_are_found_again(mini, tools, source, target, tmp_path):
    convert(mini / source, tmp_path / "out", target)
    assert digests(tmp_path / "out") == tools[target]


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("source", EVERY)
def test_any_to_any(written, source, target, tmp_path):
    report = convert(written / source, tmp_path / "out", target)
    assert (report.source_format, report.format) == (source, target)
    assert report.bytes == checkpoint.open(tmp_path / "out").size_bytes
    assert_close(written / source, tmp_path / "out", target)


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("source", ["gguf/model.gguf", "gguf/model-q8_0.gguf", "fp8-half-split", "mlx-mxfp4-all"])
def test_what_is_only_read_to_any(mini, source, target, tmp_path):
    convert(mini / source, tmp_path / "out", target)
    assert_close(mini / source, tmp_path / "out", target)


def assert_close(source: Path, result: Path, target: str) -> None:
    """The same numbers where the target stores them as the source did, else within a quantizer's error."""
    before, after = checkpoint.open(source), checkpoint.open(result)
    assert after.format == target
    assert after.config == before.config
    for (param, old), (_, new) in zip(before.weights(), after.weights(), strict=True):
        _, spec = recipe_of(target)[1][param.role] if param.is_matrix else ("", None)
        if isinstance(new, Quantized):
            assert new.spec == spec
        values, wanted = codecs.dequantize(new), codecs.dequantize(old)
        stored_so = isinstance(old, Quantized) and old.spec == spec and old.outer is None and target != "int4-autoround"
        same_kind = before.format == target or (isinstance(old, Quantized) and (old.spec, spec) == (FP8_ROW, FP8_ROW))
        float16 = target == "int4-autoround" and param.role == "experts"
        if same_kind or stored_so or not (param.is_matrix or float16):
            assert np.array_equal(values, wanted), param.name
        else:
            assert np.linalg.norm(values - wanted) < 0.13 * np.linalg.norm(wanted), param.name


@pytest.mark.parametrize("name", MLX)
def test_mlx_configs_name_every_quantized_module(written, name):
    data = json.loads((written / name / "config.json").read_text())
    assert data["quantization"] == data["quantization_config"]
    named = {key: entry for key, entry in data["quantization"].items() if isinstance(entry, dict)}
    assert set(named) == {key.removesuffix(".scales") for key in digests(written / name) if key.endswith(".scales")}
    assert all(set(entry) == {"group_size", "bits", "mode"} for entry in named.values())
    if "model.layers.0.mlp.router" in named:
        assert named["model.layers.0.mlp.router"] == {"group_size": 64, "bits": 8, "mode": "affine"}


def test_the_published_config(written, mini):
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (written / "mxfp4", mini / "mxfp4"))
    assert ours["quantization_config"] == theirs["quantization_config"]
    assert {key: ours[key] for key in theirs if key in ours} == theirs
    assert "quantization_config" not in json.loads((written / "bf16" / "config.json").read_text())


def test_what_belongs_beside_weights_is_copied(written, mini):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (written / "mlx-4bit" / name).read_bytes() == (mini / "mxfp4" / name).read_bytes()
    assert {path.name for path in (written / "bf16").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_report_and_progress(mini, tmp_path):
    seen = []
    report = convert(mini / "mxfp4", tmp_path / "a" / "b", progress=lambda *args: seen.append(args))
    assert report.format == "mlx-4bit"
    assert report.destination == tmp_path / "a" / "b"
    assert report.parameters == 868_692
    assert report.tensors == len(digests(report.destination))
    assert report.seconds > 0 and report.working_bytes > 0
    for what in ("writing", "verifying"):
        done = [entry[0] for entry in seen if entry[2] == what]
        assert done == sorted(done) and done[-1] == report.bytes
    assert {entry[1] for entry in seen} == {report.bytes}


def test_vectors_that_bfloat16_cannot_hold_stay_float32(tmp_path):
    config = ModelConfig(
        num_hidden_layers=1, hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, vocab_size=64, eos_token_id=(), swiglu_alpha=1.5,
    )  # fmt: skip
    source = synthetic(tmp_path / "source", config, wide=("norm.weight", "layers.0.experts.up.bias"))
    assert digests(source)["model.layers.0.mlp.experts.gate_up_proj_bias"][0] == "F32"
    convert(source, tmp_path / "mxfp4", "mxfp4")
    convert(source, tmp_path / "mlx", "mlx-4bit")
    assert digests(tmp_path / "mxfp4")["model.norm.weight"][0] == "F32"
    assert digests(tmp_path / "mxfp4")["model.layers.0.mlp.experts.gate_up_proj_bias"][0] == "F32"
    assert digests(tmp_path / "mlx")["model.layers.0.mlp.experts.up_proj.bias"][0] == "F32"
    assert digests(tmp_path / "mlx")["model.layers.0.mlp.experts.down_proj.bias"][0] == "BF16"
    again = checkpoint.open(tmp_path / "mxfp4")
    for name in ("norm.weight", "layers.0.experts.up.bias"):
        wanted = checkpoint.open(source).read(name)
        assert np.array_equal(codecs.dequantize(again.read(name)), codecs.dequantize(wanted))
    assert again.config.swiglu_alpha == 1.5
    assert "eos_token_id" not in json.loads((tmp_path / "mxfp4" / "config.json").read_text())


def test_rows_that_groups_do_not_divide_stay_dense_as_in_mlx_lm(tmp_path):
    config = ModelConfig(
        num_hidden_layers=2, hidden_size=96, intermediate_size=160, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, vocab_size=100,
    )  # fmt: skip
    source = synthetic(tmp_path / "source", config)
    convert(source, tmp_path / "mlx", "mlx-4bit")
    opened = checkpoint.open(tmp_path / "mlx")
    dense = {param.kind for param, weight in opened.weights() if param.is_matrix and isinstance(weight, Dense)}
    assert dense == {param.kind for param in opened.params if param.is_matrix and param.shape[-1] in (96, 160)}
    assert isinstance(opened.read("layers.0.attention.o.weight"), Quantized)
    convert(source, tmp_path / "mxfp4", "mxfp4")
    assert checkpoint.open(tmp_path / "mxfp4").summary().roles["experts"]["bits"] == 4.25


def test_mxfp4_of_rows_that_it_cannot_cut_is_refused(tmp_path):
    config = ModelConfig(
        num_hidden_layers=1, hidden_size=64, intermediate_size=80, num_attention_heads=1, num_key_value_heads=1,
        num_local_experts=4, vocab_size=10,
    )  # fmt: skip
    source = synthetic(tmp_path / "source", config)
    with pytest.raises(CheckpointError, match="down_proj has rows of 80 values"):
        convert(source, tmp_path / "out", "mxfp4")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_shards_and_index(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "SHARD_BYTES", 200_000)
    convert(mini / "mxfp4", tmp_path / "out", "mlx-mxfp4")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert digests(tmp_path / "out") == json.loads((mini / "digests.json").read_text())["mlx-mxfp4"]


# ------------------------------------------------------------------------------------------ what can go wrong


@pytest.fixture
def place(tmp_path):
    """Where a conversion goes that must not leave anything: an old checkpoint, to be found untouched afterwards."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    yield tmp_path / "out"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    assert (tmp_path / "out" / "config.json").read_text() == "old"


@pytest.mark.parametrize("when", ["writing", "verifying"])
def test_an_interruption_leaves_nothing(mini, place, when):
    def stop(done, total, what):
        if what == when and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(mini / "mxfp4", place, "bf16", overwrite=True, progress=stop)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate", "pread"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_leaves_nothing(mini, place, monkeypatch, call, after):
    real, calls = getattr(os, call), []

    def full(*args):
        calls.append(args)
        if len(calls) > after * (20 if call in ("pwrite", "pread") else 0):
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(GptOssError, match=r"could not be written \(No space left on device\); nothing"):
        convert(mini / "mxfp4", place, "mlx-4bit", overwrite=True)
    monkeypatch.undo()


def test_bytes_that_change_on_the_way_are_noticed(mini, place, monkeypatch):
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: bytes([real(*args)[0] ^ 1]) + real(*args)[1:])
    with pytest.raises(GptOssError, match="the disk returned other bytes"):
        convert(mini / "mxfp4", place, "mlx-4bit", overwrite=True)


def test_a_rename_that_fails_brings_the_old_one_back(mini, place, monkeypatch):
    real = Path.rename

    def failing(self, target):
        if self.name == "checkpoint":
            raise OSError(18, "Invalid cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(GptOssError, match="Invalid cross-device link"):
        convert(mini / "mxfp4", place, "mlx-4bit", overwrite=True)


def test_a_disk_without_room_is_seen_before_writing(mini, place, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**5))
    monkeypatch.setattr(Writer, "write", lambda *args: pytest.fail("something was written"))
    with pytest.raises(GptOssError, match=r"takes 0\.00 GB but only 0\.00 GB are free"):
        convert(mini / "mxfp4", place, "mlx-4bit", overwrite=True)


def test_weights_that_are_no_numbers_are_named(mini, place, tmp_path_factory):
    source = tmp_path_factory.mktemp("damaged") / "bf16"
    convert(mini / "mxfp4", source, "bf16")
    path = source / "model.safetensors"
    info = checkpoint.MappedFile(path)
    data = bytearray(path.read_bytes())
    data[info.header.offsets["model.layers.1.self_attn.q_proj.weight"] + 1] = 0x7F
    data[info.header.offsets["model.layers.1.self_attn.q_proj.weight"]] = 0xFF
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.q\.weight: a weight is NaN or infinite"):
        convert(source, place, "mlx-4bit", overwrite=True)


def test_what_is_in_the_way_stays(mini, place):
    with pytest.raises(GptOssError, match=r"exists already; .* --overwrite \(overwrite=True in Python\)"):
        convert(mini / "mxfp4", place, "mlx-4bit")


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


def test_overwriting_and_empty_folders(mini, tmp_path):
    (tmp_path / "out").mkdir()
    convert(mini / "mxfp4", tmp_path / "out", "mlx-mxfp4")
    convert(mini / "mxfp4", tmp_path / "out", "mlx-4bit", overwrite=True)
    assert checkpoint.open(tmp_path / "out").format == "mlx-4bit"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_source_is_never_the_destination(mini, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(mini / "mxfp4", source, copy_function=shutil.copyfile)
    for place in (source, source / "inside", tmp_path, source / ".." / "source"):
        with pytest.raises(GptOssError, match="is, holds or lies in the source"):
            convert(source, place, "mlx-4bit", overwrite=True)
    (tmp_path / "alias").symlink_to(source)
    with pytest.raises(GptOssError, match="is, holds or lies in the source"):
        convert(tmp_path / "alias", source, "mlx-4bit", overwrite=True)
    assert checkpoint.open(source).format == "mxfp4"


def test_a_source_in_a_hub_cache_of_links(mini, tools, tmp_path):
    """huggingface-hub: snapshots/<revision>/<file> -> ../../blobs/<hash>; the result has no links."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((mini / "mxfp4").iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    convert(snapshot, tmp_path / "out", "mlx-mxfp4-q8")
    assert digests(tmp_path / "out") == tools["mlx-mxfp4-q8"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (mini / "mxfp4" / "tokenizer.json").read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_format_into_itself_is_a_verified_copy(mini, tools, tmp_path):
    seen = set()
    convert(mini / "mxfp4", tmp_path / "out", "mxfp4", progress=lambda done, total, what: seen.add(what))
    assert digests(tmp_path / "out") == tools["mxfp4"]
    assert "verifying" in seen


@pytest.mark.parametrize(("name", "why"), [("mlx-5bit", "is not a format"), ("mxfp4-original", "read but not written")])
def test_unknown_targets_are_refused_with_the_list(mini, tmp_path, name, why):
    with pytest.raises(GptOssError, match=f"{why}.*mlx-4bit"):
        convert(mini / "mxfp4", tmp_path / "out", name)


def test_a_hostile_companion_is_not_copied(mini, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(mini / "mxfp4", source, copy_function=shutil.copyfile)
    (source / "chat_template.jinja").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="not a file of its folder"):
        convert(source, tmp_path / "out", "mlx-4bit")
    assert not (tmp_path / "out").exists()


MEASURE = """
import sys
from mlx_gptoss.weights.convert import convert
def peak():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
report = convert(*sys.argv[1:4], search=sys.argv[4] or None)
print(peak() - before, report.working_bytes, report.source_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("source", "target", "search"),
    [
        ("bf16", "mlx-4bit", ""),
        ("mxfp4", "bf16", ""),
        ("bf16", "mxfp4", ""),
        ("mxfp4", "nvfp4", ""),
        ("bf16", "fp8-dynamic", ""),
        ("mxfp4", "int4-autoround", ""),
        ("mxfp4", "mlx-4bit", "mse"),
    ],
)
def test_memory_stays_within_its_bound(source, target, search, tmp_path):
    """However big the checkpoint: the stated working memory, and pages of the source for a few chunks at most."""
    config = replace(
        ModelConfig(),
        num_hidden_layers=2,
        layer_types=(),
        hidden_size=1024,
        intermediate_size=1024,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=4096,
    )
    synthetic(tmp_path / source, config, source)
    arguments = [str(tmp_path / source), str(tmp_path / "out"), target, search]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], check=True, capture_output=True, text=True)
    peak, working, size = (int(number) for number in done.stdout.split())
    assert size > 120e6
    assert peak < working + 40e6
    if source == "bf16":
        assert peak < size  # and the bound says something


def test_every_name_is_tested():
    assert set(EVERY) == set(WRITERS)
