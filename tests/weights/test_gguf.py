"""GGUF: what llama.cpp's converter wrote is read bit for bit, run as stored and converted without loss; the gguf
package agrees where it is installed; hostile files get one clear error and little memory."""

from __future__ import annotations

import json
import random
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file

import mlx_gptoss
from mlx_gptoss.backends import mlx as backend
from mlx_gptoss.backends.base import Limits
from mlx_gptoss.config import read_config
from mlx_gptoss.errors import CheckpointError, GptOssError
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.weights import checkpoint, codecs, gguf
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.formats import gguf as gguf_format
from mlx_gptoss.weights.formats import gguf_metadata
from mlx_gptoss.weights.tensor import AFFINE8_G32, MXFP4, Dense, Quantized

MODELS = {"model.gguf": "reference", "model-q8_0.gguf": "gguf-q8_0.reference"}
U32, F32, STRING, ARRAY, U64 = 4, 6, 8, 9, 10


@pytest.fixture(scope="module")
def model(mini) -> bytes:
    return (mini / "gguf" / "model.gguf").read_bytes()


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str | bytes = "a", shape=(32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def container(entries=(), tensors=(), data: bytes = b"", counts: tuple[int, int] | None = None) -> bytes:
    tensor_count, entry_count = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, entry_count) + b"".join((*entries, *tensors))
    return head + b"\0" * (-len(head) % 32) + data


def patched(data: bytes, key: str, value: bytes, kind: int | None = None) -> bytes:
    """The file with another value of the same length behind a key."""
    at = data.index(text(key)) + 8 + len(key)
    head = data[at : at + 4] if kind is None else struct.pack("<I", kind)
    return data[:at] + head + value + data[at + 4 + len(value) :]


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    def raw(value: torch.Tensor) -> bytes:
        return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return {name: (value.dtype, tuple(value.shape), raw(value)) for name, value in tensors.items()}


# Reading


@pytest.mark.parametrize("name", MODELS)
def test_runs_as_stored(mini, relative_error, name):
    wanted = load_numpy(mini / f"{MODELS[name]}.safetensors")
    opened = checkpoint.open(mini / "gguf" / name)
    assert opened.format == "gguf"
    runner = backend.load(opened, device="cpu", dtype="float32", limits=Limits(1, 200, 64))
    got = runner.logits(wanted["prompt"].tolist())
    assert relative_error(got, wanted["logits"]) < 2e-5
    assert np.abs(got - wanted["logits"]).max() < 1e-4


def test_generates_as_the_reference(mini):
    wanted = load_numpy(mini / "reference.safetensors")
    with mlx_gptoss.load(mini / "gguf" / "model.gguf", backend="mlx", device="cpu") as opened:
        done = opened.complete(wanted["prompt"].tolist(), max_tokens=8, sampling=mlx_gptoss.Sampling(temperature=0))
        assert list(done.ids) == wanted["greedy"][: len(done.ids)].tolist()
        assert opened.tokenizer.decode(opened.tokenizer.encode("Hi, you")) == "Hi, you"


def test_summary(mini):
    summary = mlx_gptoss.describe(mini / "gguf" / "model-q8_0.gguf")
    assert summary.format == "gguf"
    assert {role: kind["format"] for role, kind in summary.roles.items()} == {
        "attention": "affine8-g32",
        "experts": "mxfp4",
        "router": "f32",
        "embed": "affine8-g32",
        "lm_head": "affine8-g32",
    }
    assert summary.roles["experts"]["bits"] == 4.25 and summary.roles["embed"]["bits"] == 8.5


@pytest.mark.parametrize("name", MODELS)
def test_the_gguf_package_decodes_the_same(mini, name):
    package = pytest.importorskip("gguf", reason="the gguf package is not installed")
    from gguf.quants import dequantize

    opened = checkpoint.open(mini / "gguf" / name)
    reader = package.GGUFReader(mini / "gguf" / name)
    theirs = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    assert len(theirs) == len(opened.params)
    for param, weight in opened.weights():
        np.testing.assert_array_equal(codecs.dequantize(weight), theirs[gguf_format.tensor_name(param)], param.name)
    header = gguf.read_header(mini / "gguf" / name)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            ours = header.metadata[key]
            assert (list(ours) if isinstance(ours, (gguf.StringArray, np.ndarray)) else ours) == field.contents(), key


def test_mxfp4_is_rearranged_without_a_change():
    blocks = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 17), dtype=np.uint8)
    found = gguf_format.repack_mxfp4(blocks)
    assert found.spec == MXFP4
    for at in np.ndindex(3, 5):
        for group in range(4):
            packed = blocks[(*at, group)][1:]
            elements = [*(packed & 15), *(packed >> 4)]
            row = codecs.unpack(found.codes[at], 4)
            assert row[32 * group : 32 * group + 32].tolist() == elements
            assert found.scale[(*at, group)] == blocks[(*at, group)][0]


@pytest.mark.parametrize("scale, dtype", [(0.01, "float16"), (6e-8, "float16"), (511.5, "float16"), (60000, "float32")])
def test_q8_0_is_affine_without_a_change(scale, dtype):
    values = np.arange(-128, 128, dtype=np.int8).reshape(2, 4, 32)
    scales = np.full((2, 4, 1), scale, np.float16)
    scales[1] *= -1
    found = gguf_format.repack_q8_0(np.concatenate([scales.view(np.uint8), values.view(np.uint8)], axis=-1))
    assert found.spec == AFFINE8_G32 and found.scale.dtype == found.bias.dtype == dtype
    wanted = (values.astype(np.float64) * scales.astype(np.float64)).reshape(2, 128)
    np.testing.assert_array_equal(codecs.dequantize(found), wanted)


def test_config_is_that_of_the_checkpoint_it_was_made_of(mini):
    wanted = read_config(json.loads((mini / "mxfp4" / "config.json").read_text()))
    opened = checkpoint.open(mini / "gguf" / "model.gguf")
    generation = json.loads((mini / "nvfp4" / "generation_config.json").read_text())
    assert sorted(opened.stop_ids) == sorted(generation["eos_token_id"])
    for name in vars(wanted):
        if name != "eos_token_id":
            assert getattr(opened.config, name) == getattr(wanted, name), name
    assert opened.config.eos_token_id[0] == wanted.eos_token_id[0]


@pytest.fixture(scope="module")
def tokenizers(mini) -> tuple[Tokenizer, Tokenizer]:
    return checkpoint.open(mini / "gguf" / "model.gguf").tokenizer(), Tokenizer.from_folder(mini / "nvfp4")


def test_tokenizer_has_the_same_vocabulary(tokenizers):
    ours, theirs = tokenizers
    assert dict(ours.specials) == dict(theirs.specials) and ours.vocab_size == theirs.vocab_size
    assert all(ours.token_bytes(id) == theirs.token_bytes(id) for id in range(ours.vocab_size))


@settings(max_examples=200, deadline=None)
@given(value=st.text(max_size=80) | st.text(alphabet="def self.:=()\n #in rtestoandl'S0123", max_size=80))
def test_tokenizer_encodes_the_same(tokenizers, value):
    ours, theirs = tokenizers
    assert ours.encode(value) == theirs.encode(value)
    assert ours.decode(ours.encode(value)) == value


# Converting


def test_to_mxfp4_gives_back_the_checkpoint_it_was_made_of(mini, tmp_path):
    convert(mini / "gguf" / "model.gguf", tmp_path / "new", "mxfp4")
    assert bits(stored(tmp_path / "new")) == bits(stored(mini / "mxfp4"))
    again = checkpoint.open(tmp_path / "new")
    assert again.stop_ids == checkpoint.open(mini / "gguf" / "model.gguf").stop_ids
    assert again.tokenizer().encode("self.name: 12") == Tokenizer.from_folder(mini / "nvfp4").encode("self.name: 12")


def test_to_mlx_mxfp4_is_the_same_as_from_the_original(mini, tmp_path):
    for name, source in {"a": mini / "gguf" / "model.gguf", "b": mini / "mxfp4"}.items():
        convert(source, tmp_path / name, "mlx-mxfp4")
    assert bits(stored(tmp_path / "a")) == bits(stored(tmp_path / "b"))


def test_q8_0_to_bf16_rounds_each_value_once(mini, tmp_path):
    convert(mini / "gguf" / "model-q8_0.gguf", tmp_path / "new", "bf16")
    source, result = checkpoint.open(mini / "gguf" / "model-q8_0.gguf"), checkpoint.open(tmp_path / "new")
    for param, weight in source.weights():
        wanted = torch.from_numpy(codecs.dequantize(weight)).to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(codecs.dequantize(result.read(param.name)), wanted, param.name)


def test_gguf_is_not_written(mini, tmp_path):
    with pytest.raises(GptOssError, match="read but not written"):
        convert(mini / "mxfp4", tmp_path / "new", "gguf")


# Where the file may be


def test_a_folder_with_one_file_is_that_file(mini, tmp_path, model):
    written(tmp_path / "a.gguf", model)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')  # of something else
    assert checkpoint.open(tmp_path).format == "gguf"
    assert 7 not in checkpoint.open(tmp_path).stop_ids
    convert(tmp_path, tmp_path.parent / f"{tmp_path.name}.new", "mxfp4")
    assert 7 not in checkpoint.open(tmp_path.parent / f"{tmp_path.name}.new").stop_ids
    written(tmp_path / "b.gguf", model)
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF models \(a\.gguf, b\.gguf\); give the path of one"):
        checkpoint.open(tmp_path)


def test_a_link_to_the_file_is_followed(tmp_path, model):
    (tmp_path / "there").mkdir()
    (tmp_path / "here.gguf").symlink_to(written(tmp_path / "there" / "model.gguf", model))
    assert checkpoint.open(tmp_path / "here.gguf").format == "gguf"


def split(model: bytes, folder: Path) -> tuple[Path, Path]:
    """The fixture as two files: all metadata and the first layer's tensors in one, the other tensors in the other."""
    header = gguf.read_header(written(folder / "whole", model))
    infos, places = header.tensors.tensors, header.tensors.offsets
    cut = model.index(text(next(iter(infos)))) - 8 * 3  # behind the metadata
    start = model.index(text(next(iter(infos))))
    assert cut < start
    parts = []
    for number, mine in enumerate([[n for n in infos if "blk.0" in n], [n for n in infos if "blk.0" not in n]]):
        described, data = [], b""
        for name in mine:
            shape = list(infos[name].shape[::-1])
            kind = {"F32": 0, "BF16": 30}.get(infos[name].dtype, 39)
            if kind == 39:
                shape = [shape[1] * 32, *shape[2:]]
            described.append(tensor(name, shape, kind, len(data)))
            raw = model[places[name] : places[name] + infos[name].nbytes]
            data += raw + b"\0" * (-len(raw) % 32)
        head = b"GGUF" + struct.pack("<IQQ", 3, len(mine), 0 if number else struct.unpack_from("<Q", model, 16)[0])
        head += b"" if number else model[24:start]
        head += b"".join(described)
        parts.append(written(folder / f"m-{number + 1:05d}-of-00002.gguf", head + b"\0" * (-len(head) % 32) + data))
    return parts[0], parts[1]


def test_a_split_model_is_opened_by_any_of_its_files(mini, tmp_path, model):
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


# Files that are not good

DATA = b"\0" * 128
ATTACKS = {
    "an empty file": (b"", "is not a GGUF file"),
    "another magic": (b"GGML" + bytes(60), "is not a GGUF file"),
    "only the magic": (b"GGUF", "truncated"),
    "version 1": (b"GGUF" + struct.pack("<III", 1, 0, 0), "has GGUF version 1"),
    "a big-endian file": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
    "counts that end the file": (container()[:20], "truncated"),
    "2^63 tensors": (container(counts=(2**63, 0)), "claims 9223372036854775808 tensors"),
    "2^63 entries": (container(counts=(0, 2**63)), "9223372036854775808 metadata entries"),
    "more entries than there are": (container([entry("a", U32, bytes(4))], counts=(0, 2))[:41], "truncated"),
    "a key of 2^64 bytes": (container([b"\xff" * 8 + b"a"]), "truncated"),
    "a key that is not text": (container([entry(b"\xff\xfe", U32, bytes(4))]), "not UTF-8"),
    "a key twice": (container([entry("a", U32, bytes(4))] * 2), "metadata 'a' twice"),
    "an unknown type": (container([entry("a", 77, bytes(4))]), "unknown type 77"),
    "a string past the end": (container([entry("a", STRING, struct.pack("<Q", 2**40))]), "truncated"),
    "an array of arrays": (container([entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "unknown type 9"),
    "2^62 numbers": (container([entry("a", ARRAY, struct.pack("<IQ", U32, 2**62))]), "truncated"),
    "2^62 strings": (container([entry("a", ARRAY, struct.pack("<IQ", STRING, 2**62))]), "array of 4611686018427387904"),
    "strings past the end": (container([entry("a", ARRAY, struct.pack("<IQ", STRING, 2**20))]), "truncated"),
    "an alignment of 0": (container([entry("general.alignment", U32, struct.pack("<I", 0))]), "alignment 0"),
    "an alignment of 24": (container([entry("general.alignment", U32, struct.pack("<I", 24))]), "alignment 24"),
    "an alignment of text": (container([entry("general.alignment", STRING, text("32"))]), "alignment '32'"),
    "no dimensions": (container((), [tensor(shape=())], DATA), "'a' 0 dimensions"),
    "2^31 dimensions": (container((), [text("a") + struct.pack("<I", 2**31)], DATA), "2147483648 dimensions"),
    "a dimension of 0": (container((), [tensor(shape=(0,))], DATA), r"shape \[0\]"),
    "dimensions that overflow": (container((), [tensor(shape=(2**40, 2**40))], DATA), "truncated: 'a' ends at"),
    "half a block": (container((), [tensor(shape=(40,), kind=39)], DATA), r"shape \[40\]"),
    "a type of another tool": (container((), [tensor(kind=12)], DATA), "a is Q4_K, which cannot be read; MXFP4"),
    "an unknown tensor type": (container((), [tensor(kind=1000)], DATA), "of the unknown type 1000"),
    "a name that is not text": (container((), [tensor(b"\xff")], DATA), "not UTF-8"),
    "a name that cannot be printed": (container((), [tensor("a\x1b[31m")], DATA), "cannot be printed"),
    "an offset past the end": (container((), [tensor(offset=2**63)], DATA), "truncated: 'a' ends at"),
    "an offset between": (container((), [tensor(offset=4)], DATA), "unaligned"),
    "an overlap": (
        container((), [tensor(shape=(24,)), tensor("b", offset=64)], DATA + DATA),
        "'b' at 64, inside another",
    ),
    "a tensor twice": (container((), [tensor(), tensor(offset=128)], DATA + DATA), "two tensors of one name"),
    "data that is cut off": (container((), [tensor()], DATA[:-1]), "truncated: 'a' ends at"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_files_are_refused(attack, tmp_path):
    data, message = ATTACKS[attack]
    path = written(tmp_path / "model.gguf", data)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.open(path)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
    assert str(caught.value).isprintable()


def test_the_plain_file_of_the_attacks_is_good(tmp_path):
    entries = [
        entry("a", U32, struct.pack("<I", 5)),
        entry("b", ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + text("é")),
    ]
    path = written(
        tmp_path / "model.gguf", container(entries, [tensor(), tensor("b", (8, 4), 1, 128)], DATA + DATA[:64])
    )
    header = gguf.read_header(path)
    assert header.metadata["a"] == 5 and list(header.metadata["b"]) == ["x", "é"] and header.metadata["b"][-1:] == ["é"]
    assert header.tensors.tensors["b"].shape == (4, 8) and header.tensors.tensors["b"].dtype == "F16"


@pytest.mark.parametrize(
    "strings", [2**20, 2**21, 2**22 - 100], ids=["the most strings", "too many strings", "a full header"]
)
def test_memory_is_bounded(tmp_path, strings):
    array = struct.pack("<IQ", STRING, strings) + bytes(8) * strings
    entries = [entry("tokenizer.ggml.tokens", ARRAY, array), entry("more", STRING, text(b"x" * 2**25))]
    path = written(tmp_path / "model.gguf", container(entries))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"no vocabulary is that large|header of more than"):
            checkpoint.open(path)
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()


U32_OF = {
    name: f"gpt-oss.{name}" for name in ("block_count", "expert_count", "embedding_length", "attention.head_count")
}
CONTRADICTIONS = {
    "another architecture": ("general.architecture", text("gpt-osx"), None, "architecture is 'gpt-osx'"),
    "no layers": (U32_OF["block_count"], struct.pack("<I", 0), None, "num_hidden_layers must be a positive integer"),
    "too many layers": (
        U32_OF["block_count"],
        struct.pack("<I", 2**31),
        None,
        "2147483648 layers but there are only 41",
    ),
    "no experts": (U32_OF["expert_count"], struct.pack("<I", 0), None, "num_local_experts must be a positive integer"),
    "more experts": (U32_OF["expert_count"], struct.pack("<I", 7), None, "of a wrong shape"),
    "a fractional width": (
        U32_OF["embedding_length"],
        struct.pack("<f", 0.5),
        F32,
        "hidden_size must be a positive int",
    ),
    "heads that do not fit": (U32_OF["attention.head_count"], struct.pack("<I", 8), None, "of a wrong shape"),
    "another vocabulary": (
        "tokenizer.ggml.eos_token_id",
        struct.pack("<f", 1),
        F32,
        "tokenizer.ggml.eos_token_id must be",
    ),
    "a theta that is not a number": ("gpt-oss.rope.freq_base", struct.pack("<f", np.nan), None, "rope_theta must be"),
    "other rope": ("gpt-oss.rope.scaling.type", text("line"), None, "rope type 'line'"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused(case, tmp_path, model):
    key, value, kind, message = CONTRADICTIONS[case]
    path = written(tmp_path / "model.gguf", patched(model, key, value, kind))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checkpoint.open(path)


def test_a_missing_setting_and_a_list_of_them_are_refused(tmp_path, model):
    key = "gpt-oss.expert_used_count"
    other = model.replace(text("gpt-oss.embedding_length"), text("gpt-oss.embedding_strength"[:24]))
    with pytest.raises(CheckpointError, match=r"by its metadata: .*hidden_size is missing"):
        checkpoint.open(written(tmp_path / "a.gguf", other))
    metadata = dict(gguf.read_header(written(tmp_path / "b.gguf", model)).metadata)
    with pytest.raises(CheckpointError, match=f"{key} is a list"):
        gguf_metadata.config_json({**metadata, key: np.arange(3)}, {})


def test_tensors_missing_or_left_over_are_listed(tmp_path, model):
    other = model.replace(text("blk.1.attn_sinks.weight"), text("blk.1.attn_drain.weight"))
    with pytest.raises(
        CheckpointError, match=r"1 missing: blk\.1\.attn_sinks\.weight; 1 unknown: blk\.1\.attn_drain\.weight"
    ):
        checkpoint.open(written(tmp_path / "a.gguf", other))


def test_scales_that_are_not_numbers_are_refused(mini, tmp_path):
    for name, tensor_name, raw in (
        ("model.gguf", "blk.1.ffn_up_exps.weight", b"\xff"),
        ("model-q8_0.gguf", "output.weight", b"\x00\x7e"),
    ):
        data = bytearray((mini / "gguf" / name).read_bytes())
        at = gguf.read_header(mini / "gguf" / name).tensors.offsets[tensor_name]
        data[at : at + len(raw)] = raw
        opened = checkpoint.open(written(tmp_path / name, bytes(data)))
        with pytest.raises(CheckpointError, match="has a scale that is not a number"):
            list(opened.weights())


TOKENIZERS = {
    "another kind": ("tokenizer.ggml.model", text("bert"), "tokenizer is 'bert'"),
    "another splitting": ("tokenizer.ggml.pre", text("qwen-2"), "with 'qwen-2', not"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_other_tokenizers_are_refused(case, tmp_path, model):
    key, value, message = TOKENIZERS[case]
    opened = checkpoint.open(written(tmp_path / "model.gguf", patched(model, key, value)))
    with pytest.raises(CheckpointError, match=message):
        opened.tokenizer()
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "model.gguf", tmp_path / "new", "mxfp4")
    assert not (tmp_path / "new").exists()


def test_tokens_that_contradict_each_other_are_refused(mini):
    metadata = dict(gguf.read_header(mini / "gguf" / "model.gguf").metadata)
    for change in (
        {"tokenizer.ggml.token_type": np.ones(7, np.int32)},
        {"tokenizer.ggml.tokens": metadata["tokenizer.ggml.merges"]},
        {"tokenizer.ggml.merges": metadata["tokenizer.ggml.tokens"]},
    ):
        with pytest.raises(CheckpointError, match="contradict each other"):
            gguf_metadata.companion_files({**metadata, **change})
    with pytest.raises(CheckpointError, match="lacks tokens, merges or token types"):
        gguf_metadata.companion_files({key: value for key, value in metadata.items() if not key.endswith("merges")})
    without = {key: value for key, value in metadata.items() if not key.startswith("tokenizer.")}
    assert gguf_metadata.companion_files(without).keys() == {"generation_config.json"}


def test_random_damage_is_an_error_or_a_model(tmp_path, model):
    """Bytes of the header changed, and files cut off: never anything but a CheckpointError."""
    chance = random.Random(7)
    start = min(gguf.read_header(written(tmp_path / "whole", model)).tensors.offsets.values())
    refused = 0
    for _ in range(300):
        data = bytearray(model[: chance.randrange(len(model))] if chance.random() < 0.2 else model)
        for _ in range(chance.choice([1, 1, 2, 8])):
            at = chance.randrange(min(start, len(data)))
            data[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        try:
            opened = checkpoint.open(written(tmp_path / "model.gguf", bytes(data)))
            opened.tokenizer()
            for _, weight in opened.weights():
                assert isinstance(weight, (Dense, Quantized))
        except CheckpointError as error:
            refused += 1
            assert len(str(error)) < 1000 + len(str(tmp_path))
    assert 50 < refused < 300
