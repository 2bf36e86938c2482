"""Damaged, hostile and contradictory GGUF files raise one clear CheckpointError, and use little memory."""

from __future__ import annotations

import random
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint, gguf
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.formats import gguf_metadata
from mlx_gptoss.weights.tensor import Dense, Quantized

U32, F32, STRING, ARRAY = 4, 6, 8, 9  # metadata types


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
    """The file with the value of a key replaced by another of the same length."""
    at = data.index(text(key)) + 8 + len(key)
    head = data[at : at + 4] if kind is None else struct.pack("<I", kind)
    return data[:at] + head + value + data[at + 4 + len(value) :]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


DATA = b"\0" * 128
ATTACKS = {
    "an empty file": (b"", "is not a GGUF file"),
    "another magic": (b"GGML" + bytes(60), "is not a GGUF file"),
    "only the magic": (b"GGUF", "truncated"),
    "version 1": (b"GGUF" + struct.pack("<III", 1, 0, 0), "has GGUF version 1"),
    "a big-endian file": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
    "a file that ends in the counts": (container()[:20], "truncated"),
    "2^63 tensors": (container(counts=(2**63, 0)), "claims 9223372036854775808 tensors"),
    "2^63 entries": (container(counts=(0, 2**63)), "9223372036854775808 metadata entries"),
    "more entries claimed than stored": (container([entry("a", U32, bytes(4))], counts=(0, 2))[:41], "truncated"),
    "a key of 2^64 bytes": (container([b"\xff" * 8 + b"a"]), "truncated"),
    "a key that is not text": (container([entry(b"\xff\xfe", U32, bytes(4))]), "not UTF-8"),
    "a key twice": (container([entry("a", U32, bytes(4))] * 2), "metadata 'a' twice"),
    "an unknown metadata type": (container([entry("a", 77, bytes(4))]), "unknown type 77"),
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
    "an unsupported quantization": (
        container((), [tensor(kind=15)], DATA),
        "a is Q8_K, which cannot be read; Q1_0 to Q8_0",
    ),
    "an unknown tensor type": (container((), [tensor(kind=1000)], DATA), "of the unknown type 1000"),
    "a name that is not text": (container((), [tensor(b"\xff")], DATA), "not UTF-8"),
    "a name that cannot be printed": (container((), [tensor("a\x1b[31m")], DATA), "cannot be printed"),
    "an offset past the end": (container((), [tensor(offset=2**63)], DATA), "truncated: 'a' ends at"),
    "an unaligned offset": (container((), [tensor(offset=4)], DATA), "unaligned"),
    "an overlap": (
        container((), [tensor(shape=(24,)), tensor("b", offset=64)], DATA + DATA),
        "'b' at 64, inside another",
    ),
    "a tensor twice": (container((), [tensor(), tensor(offset=128)], DATA + DATA), "two tensors of one name"),
    "truncated data": (container((), [tensor()], DATA[:-1]), "truncated: 'a' ends at"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_files_are_refused(attack, tmp_path):
    data, message = ATTACKS[attack]
    path = write(tmp_path / "model.gguf", data)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.open(path)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
    assert str(caught.value).isprintable()


def test_a_well_formed_file_from_the_same_builders_is_read(tmp_path):
    entries = [
        entry("a", U32, struct.pack("<I", 5)),
        entry("b", ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + text("é")),
    ]
    path = write(tmp_path / "model.gguf", container(entries, [tensor(), tensor("b", (8, 4), 1, 128)], DATA + DATA[:64]))
    header = gguf.read_header(path)
    assert header.metadata["a"] == 5 and list(header.metadata["b"]) == ["x", "é"] and header.metadata["b"][-1:] == ["é"]
    assert header.tensors.tensors["b"].shape == (4, 8) and header.tensors.tensors["b"].dtype == "F16"


@pytest.mark.parametrize(
    "strings", [2**20, 2**21, 2**22 - 100], ids=["maximum strings", "too many strings", "a full header"]
)
def test_memory_is_bounded(tmp_path, strings):
    array = struct.pack("<IQ", STRING, strings) + bytes(8) * strings
    entries = [entry("tokenizer.ggml.tokens", ARRAY, array), entry("more", STRING, text(b"x" * 2**25))]
    path = write(tmp_path / "model.gguf", container(entries))
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
    "another number of heads": (U32_OF["attention.head_count"], struct.pack("<I", 8), None, "of a wrong shape"),
    "a fractional EOS id": (
        "tokenizer.ggml.eos_token_id",
        struct.pack("<f", 1),
        F32,
        "tokenizer.ggml.eos_token_id must be",
    ),
    "a theta that is not a number": ("gpt-oss.rope.freq_base", struct.pack("<f", np.nan), None, "rope_theta must be"),
    "an unknown rope type": ("gpt-oss.rope.scaling.type", text("line"), None, "rope type 'line'"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused(case, tmp_path, model):
    key, value, kind, message = CONTRADICTIONS[case]
    path = write(tmp_path / "model.gguf", patched(model, key, value, kind))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checkpoint.open(path)


def test_a_missing_key_and_a_list_instead_of_a_number_are_refused(tmp_path, model):
    key = "gpt-oss.expert_used_count"
    other = model.replace(text("gpt-oss.embedding_length"), text("gpt-oss.embedding_strength"[:24]))
    with pytest.raises(CheckpointError, match=r"by its metadata: .*hidden_size is missing"):
        checkpoint.open(write(tmp_path / "a.gguf", other))
    metadata = dict(gguf.read_header(write(tmp_path / "b.gguf", model)).metadata)
    with pytest.raises(CheckpointError, match=f"{key} is a list"):
        gguf_metadata.config_json({**metadata, key: np.arange(3)}, {})


def test_missing_and_unknown_tensors_are_listed(tmp_path, model):
    other = model.replace(text("blk.1.attn_sinks.weight"), text("blk.1.attn_drain.weight"))
    with pytest.raises(
        CheckpointError, match=r"1 missing: blk\.1\.attn_sinks\.weight; 1 unknown: blk\.1\.attn_drain\.weight"
    ):
        checkpoint.open(write(tmp_path / "a.gguf", other))


def test_scales_that_are_not_numbers_are_refused(mini, tmp_path):
    for name, tensor_name, raw in (
        ("model.gguf", "blk.1.ffn_up_exps.weight", b"\xff"),
        ("model-q8_0.gguf", "output.weight", b"\x00\x7e"),
    ):
        data = bytearray((mini / "gguf" / name).read_bytes())
        at = gguf.read_header(mini / "gguf" / name).tensors.offsets[tensor_name]
        data[at : at + len(raw)] = raw
        opened = checkpoint.open(write(tmp_path / name, bytes(data)))
        with pytest.raises(CheckpointError, match="has a scale that is not a number"):
            list(opened.weights())


TOKENIZERS = {
    "another kind": ("tokenizer.ggml.model", text("bert"), "tokenizer is 'bert'"),
    "another pre-tokenizer": ("tokenizer.ggml.pre", text("qwen-2"), "with 'qwen-2', not"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_other_tokenizers_are_refused(case, tmp_path, model):
    key, value, message = TOKENIZERS[case]
    opened = checkpoint.open(write(tmp_path / "model.gguf", patched(model, key, value)))
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
    """Changed bytes in the header and truncated files raise CheckpointError, and nothing else."""
    chance = random.Random(7)
    start = min(gguf.read_header(write(tmp_path / "whole", model)).tensors.offsets.values())
    refused = 0
    for _ in range(300):
        data = bytearray(model[: chance.randrange(len(model))] if chance.random() < 0.2 else model)
        for _ in range(chance.choice([1, 1, 2, 8])):
            at = chance.randrange(min(start, len(data)))
            data[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        try:
            opened = checkpoint.open(write(tmp_path / "model.gguf", bytes(data)))
            opened.tokenizer()
            for _, weight in opened.weights():
                assert isinstance(weight, (Dense, Quantized))
        except CheckpointError as error:
            refused += 1
            assert len(str(error)) < 1000 + len(str(tmp_path))
    assert 50 < refused < 300
