"""Converting: the same bytes as the reference tools write, and no loss where the target can hold the values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_gptoss.config import ModelConfig
from mlx_gptoss.weights import checkpoint, codecs
from mlx_gptoss.weights import convert as conversion
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.formats import WRITERS, recipe_of
from mlx_gptoss.weights.tensor import FP8_ROW, Dense, Quantized

MLX = ["mlx-4bit", "mlx-8bit", "mlx-mxfp8", "mlx-nvfp4", "mlx-mxfp4", "mlx-mxfp4-q8", "mlx-mxfp4-q4"]
MLX += ["mlx-3bit", "mlx-6bit"]
TARGETS = ["mxfp4", "bf16", *MLX]
ALL_FORMATS = [*TARGETS, "fp8-dynamic", "int4-autoround", "nvfp4"]


def metadata(folder: Path) -> dict[str, str]:
    data = next(folder.glob("*.safetensors")).read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


@pytest.fixture(scope="session")
def written(mini, tmp_path_factory):
    """A folder with the small mxfp4 checkpoint in every format, by the format's name."""
    root = tmp_path_factory.mktemp("written")
    for name in ALL_FORMATS:
        convert(mini / "mxfp4", root / name, name)
    return root


@pytest.fixture(scope="session")
def tool_digests(mini):
    """The digests of the same model as transformers, OpenAI's tools and mlx-lm wrote it."""
    return json.loads((mini / "digests.json").read_text())


@pytest.mark.parametrize("name", TARGETS)
def test_tensors_equal_those_of_the_reference_tools(written, tool_digests, name, digests):
    assert digests(written / name) == tool_digests[name]
    assert metadata(written / name) == {"format": "mlx" if name in MLX else "pt"}


@pytest.mark.parametrize("name", TARGETS)
def test_the_original_layout_gives_the_same_tensors(mini, tool_digests, name, tmp_path, digests):
    report = convert(mini / "mxfp4-original", tmp_path / name, name)
    assert report.source_format == "mxfp4-original"
    assert digests(tmp_path / name) == tool_digests[name]


@pytest.mark.parametrize("between", ["bf16", "mlx-mxfp4", "mxfp4"])
def test_converting_back_restores_the_tensors(written, tool_digests, between, tmp_path, digests):
    """Also through bf16: the codes of MXFP4 are recovered from its values."""
    convert(written / between, tmp_path / "back", "mxfp4")
    assert digests(tmp_path / "back") == tool_digests["mxfp4"]
    convert(written / between, tmp_path / "bf16", "bf16")
    assert digests(tmp_path / "bf16") == tool_digests["bf16"]


LOSSLESS = [
    *((source, target) for source in ("mxfp4", "mxfp4-original", "gguf/model.gguf", "nvfp4-bf16")
      for target in ("mxfp4", "bf16", "mlx-mxfp4", "mlx-mxfp4-q8", "mlx-mxfp4-q4")),
    *((source, "nvfp4") for source in ("mxfp4", "mxfp4-original", "gguf/model.gguf")),
    ("int4-autoround", "mlx-4bit"),
    ("mlx-mxfp4-all", "mxfp4"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target"), LOSSLESS)
def test_values_of_experts_do_not_change(mini, source, target, tmp_path):
    """From each source to the formats that can hold its values exactly."""
    convert(mini / source, tmp_path / "out", target)
    before, after = checkpoint.open(mini / source), checkpoint.open(tmp_path / "out")
    for param in before.params:
        if param.role == "experts":
            values = codecs.dequantize(after.read(param.name))
            assert np.array_equal(values, codecs.dequantize(before.read(param.name))), param.name


@pytest.mark.parametrize("source", ["nvfp4-bf16", "gguf/model.gguf"])
@pytest.mark.parametrize("target", ["mxfp4", "mlx-mxfp4"])
def test_the_codes_of_mxfp4_are_recovered(mini, tool_digests, source, target, tmp_path, digests):
    convert(mini / source, tmp_path / "out", target)
    assert digests(tmp_path / "out") == tool_digests[target]


@pytest.mark.parametrize("target", ALL_FORMATS)
@pytest.mark.parametrize("source", ALL_FORMATS)
def test_every_format_converts_to_every_format(written, source, target, tmp_path):
    report = convert(written / source, tmp_path / "out", target)
    assert (report.source_format, report.format) == (source, target)
    assert report.bytes == checkpoint.open(tmp_path / "out").size_bytes
    assert_close(written / source, tmp_path / "out", target)


@pytest.mark.parametrize("target", ALL_FORMATS)
@pytest.mark.parametrize("source", ["gguf/model.gguf", "gguf/model-q8_0.gguf", "fp8-half-split", "mlx-mxfp4-all"])
def test_read_only_formats_convert_to_every_format(mini, source, target, tmp_path):
    convert(mini / source, tmp_path / "out", target)
    assert_close(mini / source, tmp_path / "out", target)


def assert_close(source: Path, result: Path, target: str) -> None:
    """Equal values where the target stores them as the source does, else equal within a quantizer's error."""
    before, after = checkpoint.open(source), checkpoint.open(result)
    assert after.format == target
    assert after.config == before.config
    for (param, old), (_, new) in zip(before.weights(), after.weights(), strict=True):
        _, spec = recipe_of(target)[1][param.role] if param.is_matrix else ("", None)
        if isinstance(new, Quantized):
            assert new.spec == spec
        values, wanted = codecs.dequantize(new), codecs.dequantize(old)
        same_spec = isinstance(old, Quantized) and old.spec == spec
        is_kept = same_spec and (spec == FP8_ROW or (old.outer is None and target != "int4-autoround"))
        float16 = target == "int4-autoround" and param.role == "experts"
        if before.format == target or is_kept or not (param.is_matrix or float16):
            assert np.array_equal(values, wanted), param.name
        else:
            # Affine steps are 15/7 as wide in 3 bits as in 4.
            bound = 0.13 * (15 / 7 if isinstance(new, Quantized) and new.spec.bits == 3 else 1)
            assert np.linalg.norm(values - wanted) < bound * np.linalg.norm(wanted), param.name


@pytest.mark.parametrize("name", MLX)
def test_mlx_configs_name_every_quantized_module(written, name, digests):
    data = json.loads((written / name / "config.json").read_text())
    assert data["quantization"] == data["quantization_config"]
    named = {key: entry for key, entry in data["quantization"].items() if isinstance(entry, dict)}
    assert set(named) == {key.removesuffix(".scales") for key in digests(written / name) if key.endswith(".scales")}
    assert all(set(entry) == {"group_size", "bits", "mode"} for entry in named.values())
    if "model.layers.0.mlp.router" in named:
        assert named["model.layers.0.mlp.router"] == {"group_size": 64, "bits": 8, "mode": "affine"}


def test_config_equals_the_published_one(written, mini):
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (written / "mxfp4", mini / "mxfp4"))
    assert ours["quantization_config"] == theirs["quantization_config"]
    assert {key: ours[key] for key in theirs if key in ours} == theirs
    assert "quantization_config" not in json.loads((written / "bf16" / "config.json").read_text())


def test_tokenizer_files_are_copied(written, mini):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (written / "mlx-4bit" / name).read_bytes() == (mini / "mxfp4" / name).read_bytes()
    assert {path.name for path in (written / "bf16").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_report_and_progress_agree(mini, tmp_path, digests):
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


def test_vectors_that_bfloat16_cannot_hold_stay_float32(tmp_path, digests, random_checkpoint):
    config = ModelConfig(
        num_hidden_layers=1, hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, vocab_size=64, eos_token_id=(), swiglu_alpha=1.5,
    )  # fmt: skip
    source = random_checkpoint(tmp_path / "source", config, wide=("norm.weight", "layers.0.experts.up.bias"))
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


def test_rows_that_groups_do_not_divide_stay_dense_as_in_mlx_lm(tmp_path, random_checkpoint):
    config = ModelConfig(
        num_hidden_layers=2, hidden_size=96, intermediate_size=160, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, vocab_size=100,
    )  # fmt: skip
    source = random_checkpoint(tmp_path / "source", config)
    convert(source, tmp_path / "mlx", "mlx-4bit")
    opened = checkpoint.open(tmp_path / "mlx")
    dense = {param.kind for param, weight in opened.weights() if param.is_matrix and isinstance(weight, Dense)}
    assert dense == {param.kind for param in opened.params if param.is_matrix and param.shape[-1] in (96, 160)}
    assert isinstance(opened.read("layers.0.attention.o.weight"), Quantized)
    convert(source, tmp_path / "mxfp4", "mxfp4")
    assert checkpoint.open(tmp_path / "mxfp4").summary().roles["experts"]["bits"] == 4.25


def test_a_large_result_has_shards_and_an_index(mini, tmp_path, monkeypatch, digests):
    monkeypatch.setattr(conversion, "SHARD_BYTES", 200_000)
    convert(mini / "mxfp4", tmp_path / "out", "mlx-mxfp4")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert digests(tmp_path / "out") == json.loads((mini / "digests.json").read_text())["mlx-mxfp4"]


def test_a_source_of_links_in_a_hub_cache(mini, tool_digests, tmp_path, digests):
    """In huggingface-hub's layout, snapshots/<revision>/<file> -> ../../blobs/<hash>. The result has no links."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((mini / "mxfp4").iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    convert(snapshot, tmp_path / "out", "mlx-mxfp4-q8")
    assert digests(tmp_path / "out") == tool_digests["mlx-mxfp4-q8"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (mini / "mxfp4" / "tokenizer.json").read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_converting_to_the_same_format_is_a_verified_copy(mini, tool_digests, tmp_path, digests):
    seen = set()
    convert(mini / "mxfp4", tmp_path / "out", "mxfp4", progress=lambda done, total, what: seen.add(what))
    assert digests(tmp_path / "out") == tool_digests["mxfp4"]
    assert "verifying" in seen


def test_every_writable_format_is_tested():
    assert set(ALL_FORMATS) == set(WRITERS)
