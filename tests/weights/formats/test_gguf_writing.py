"""GGUF files are written as llama.cpp's converter writes them: every tensor and every key of the metadata."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from mlx_gptoss_cli.main import group

from mlx_gptoss.errors import CheckpointError, GptOssError
from mlx_gptoss.loading.plan import NANO
from mlx_gptoss.weights import checkpoint, codecs, gguf
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.formats.gguf import GGUF_NAMES, tensor_name
from mlx_gptoss.weights.tensor import MXFP4, Dense

FROM_LLAMA_CPP = {"gguf": "model-q8_0.gguf", "gguf-bf16": "model.gguf"}


@pytest.fixture(scope="module")
def written(mini, tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    for name in GGUF_NAMES:
        convert(mini / "mxfp4", root / name, name)
    return root


def content(path: Path) -> tuple[dict, dict]:
    """The tensors (type, shape and bytes) and the metadata of a file."""
    header, data = gguf.read_header(path), path.read_bytes()
    offsets = header.tensors.offsets
    tensors = {n: (i, data[offsets[n] : offsets[n] + i.nbytes]) for n, i in header.tensors.tensors.items()}
    lists = (gguf.StringArray, np.ndarray)
    return tensors, {key: list(v) if isinstance(v, lists) else v for key, v in header.metadata.items()}


@pytest.mark.parametrize("name", FROM_LLAMA_CPP)
def test_the_file_equals_that_of_llama_cpps_converter(mini, written, name):
    ours, theirs = content(written / name / "model.gguf"), content(mini / "gguf" / FROM_LLAMA_CPP[name])
    assert ours[0] == theirs[0]
    named = {"general.name": name, "general.size_label": "6x500K"}
    assert ours[1] | named == theirs[1] | named
    assert [path.name for path in (written / name).iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_it_opens_with_the_same_config_tokenizer_and_experts(mini, written, name):
    source, result = checkpoint.open(mini / "mxfp4"), checkpoint.open(written / name)
    assert result.format == "gguf"
    assert set(source.stop_ids) <= set(result.stop_ids)
    assert {**vars(result.config), "eos_token_id": 0} == {**vars(source.config), "eos_token_id": 0}
    assert result.tokenizer().encode("self.name: 12") == source.tokenizer().encode("self.name: 12")
    bound = {"gguf": 1e-2, "gguf-f16": 1e-3, "gguf-bf16": 0}[name]
    for param, weight in source.weights():
        got, wanted = codecs.dequantize(result.read(param.name)), codecs.dequantize(weight)
        exact = param.role in ("experts", "router") or not param.is_matrix
        assert np.abs(got - wanted).max() <= (0 if exact else bound) * np.abs(wanted).max(), param.name


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_the_gguf_package_reads_the_same_values(written, name):
    package = pytest.importorskip("gguf", reason="the gguf package is not installed")
    from gguf.quants import dequantize

    theirs = {
        t.name: dequantize(t.data, t.tensor_type) for t in package.GGUFReader(written / name / "model.gguf").tensors
    }
    for param, weight in checkpoint.open(written / name).weights():
        np.testing.assert_array_equal(codecs.dequantize(weight), theirs[tensor_name(param)], param.name)


def test_gguf_to_gguf_changes_no_byte(mini, tmp_path):
    convert(mini / "gguf" / "model-q8_0.gguf", tmp_path / "new", "gguf")
    assert content(tmp_path / "new" / "model.gguf")[0] == content(mini / "gguf" / "model-q8_0.gguf")[0]


def test_other_experts_become_mxfp4_once(mini, tmp_path):
    convert(mini / "mlx-4bit", tmp_path / "new", "gguf")
    found = checkpoint.open(tmp_path / "new").read("layers.0.experts.up.weight")
    assert not isinstance(found, Dense) and found.spec == MXFP4


def test_the_chat_template_goes_inside(mini, tmp_path):
    source = tmp_path / "source"
    convert(mini / "mxfp4", source, "bf16")
    (source / "chat_template.jinja").write_text("{{ messages }} é")
    convert(source, tmp_path / "new", "gguf")
    assert gguf.read_header(tmp_path / "new/model.gguf").metadata["tokenizer.chat_template"] == "{{ messages }} é"
    convert(tmp_path / "new", tmp_path / "back", "mxfp4")
    assert (tmp_path / "back/chat_template.jinja").read_text() == "{{ messages }} é"


def test_a_config_that_gguf_cannot_say_is_refused(mini, tmp_path):
    source = tmp_path / "source"
    convert(mini / "mxfp4", source, "bf16")
    settings = json.loads((source / "config.json").read_text())
    settings["rope_scaling"]["truncate"] = True
    (source / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="GGUF has no keys for this model's yarn; convert it to mxfp4"):
        convert(source, tmp_path / "new", "gguf")
    assert not (tmp_path / "new").exists()


def test_values_that_float16_lacks_are_refused(tmp_path, edited):
    source = edited("nvfp4-bf16", lambda tensors: tensors["lm_head.weight"].fill_(1e6))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: a weight is too large for float16; choose gguf-bf16"):
        convert(source, tmp_path / "f16", "gguf-f16")
    convert(source, tmp_path / "bf16", "gguf-bf16")


def test_the_command_writes_and_replaces_a_gguf(mini, tmp_path):
    words = ["convert", str(mini / "mxfp4"), str(tmp_path / "new"), "--to", "gguf"]
    done = CliRunner().invoke(group, words)
    assert done.exit_code == 0 and "mxfp4 -> gguf: 713 kB" in done.output
    with pytest.raises(GptOssError, match="exists already"):
        convert(mini / "mxfp4", tmp_path / "new", "gguf")
    convert(mini / "mxfp4", tmp_path / "new", "gguf-f16", overwrite=True)
    assert gguf.read_header(tmp_path / "new/model.gguf").metadata["general.file_type"] == 1


def test_a_tokenizer_that_splits_in_its_own_way_is_refused(tmp_path):
    """The bundled model's does: a GGUF file would be read with gpt-oss's pattern, and every prompt would differ."""
    with pytest.raises(CheckpointError, match="splits text in its own way"):
        convert(NANO, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()
