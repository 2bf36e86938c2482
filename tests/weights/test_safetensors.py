"""The container: malicious headers give one clear error, and the safetensors package reads what the Writer writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import safetensors
from mlx_gptoss.weights.safetensors import MappedFile, TensorInfo, read_header
from mlx_gptoss.weights.writer import Writer

BF16 = np.dtype(ml_dtypes.bfloat16)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def file_bytes(header, data=b"\0" * 8, length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


DUPLICATE = b'{"a":%s,"a":%s}' % (json.dumps(entry()).encode(), json.dumps(entry()).encode())
ATTACKS = {
    "an empty file": (b"", "truncated"),
    "half a length": (b"\x08\0\0", "truncated"),
    "a length past the end": (file_bytes({"a": entry()}, length=10**6), "truncated"),
    "the largest length": (file_bytes({"a": entry()}, length=2**64 - 1), "truncated"),
    "a header of 100 MB": (file_bytes(b"{" + b" " * 100 * 2**20 + b"}"), "has a header of"),
    "a million items": (file_bytes(b'{"a":[' + b"1," * 10**6 + b"1]}"), "more items"),
    "many small lists": (file_bytes(b'{"a":[' + b"[[[[[]]]]]," * 10**5 + b"1]}" + b" " * 9), "more items"),
    "deep nesting": (file_bytes(b"[" * 10**5), "not valid JSON"),
    "text that is not JSON": (file_bytes(b"{oops"), "not valid JSON"),
    "a list": (file_bytes([entry()]), "not a JSON object"),
    "bytes that are not UTF-8": (file_bytes(b'{"\xff\xfe": 1}'), "not UTF-8"),
    "a duplicate name": (file_bytes(DUPLICATE), "'a' twice"),
    "metadata of numbers": (file_bytes({"__metadata__": {"format": 1}, "a": entry()}), "__metadata__"),
    "an entry that is not an object": (file_bytes({"a": [1, 2]}), "exactly dtype, shape and data_offsets"),
    "an entry without offsets": (file_bytes({"a": {"dtype": "F32", "shape": [2]}}), "exactly dtype"),
    "an unknown dtype": (file_bytes({"a": entry("F128")}), "unknown dtype 'F128'"),
    "a dtype that is not text": (file_bytes({"a": entry(["F32"])}), "unknown dtype"),
    "a negative size": (file_bytes({"a": entry(shape=(-2,))}), "natural numbers"),
    "a fractional size": (file_bytes({"a": entry(shape=(2.0,))}), "natural numbers"),
    "a size that is not a number": (file_bytes({"a": entry(shape=(True,))}), "natural numbers"),
    "a size beyond 64 bits": (file_bytes({"a": entry(shape=(2**64,))}), "natural numbers"),
    "sizes that overflow 64 bits": (file_bytes({"a": entry(shape=(2**40, 2**40))}), "bytes where"),
    "many dimensions": (file_bytes({"a": entry(shape=(1,) * 100)}), "100 dimensions"),
    "a negative offset": (file_bytes({"a": entry(offsets=(-8, 0))}), "natural numbers"),
    "reversed offsets": (file_bytes({"a": entry(offsets=(8, 0))}), "bytes where"),
    "offsets of another size": (file_bytes({"a": entry(offsets=(0, 4))}, b"\0" * 4), "4 bytes where F32 .2. takes 8"),
    "offsets past the end": (file_bytes({"a": entry(offsets=(0, 8))}, b"\0" * 7), "truncated: it has 7 of 8"),
    "a gap": (file_bytes({"a": entry(offsets=(8, 16))}, b"\0" * 16), "gap or an overlap before 'a'"),
    "an overlap": (file_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), "overlap before 'b'"),
    "bytes of no tensor": (file_bytes({"a": entry()}, b"\0" * 12), "4 bytes that belong to no tensor"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_malicious_files_are_refused(attack, tmp_path):
    data, message = ATTACKS[attack]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(tmp_path / "model.safetensors")
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


PEAK = """
import sys
from pathlib import Path
from mlx_gptoss.weights.safetensors import read_header
def peak():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
try:
    read_header(Path(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("item", ['"%07d":0', '"%07d":{}', '"%07d":[[]]', '"%07d":[[[[]]]]'])
def test_the_largest_headers_take_little_memory(tmp_path, item):
    """Headers with the maximum number of items, of any kind, take less than 170 MB."""
    count = safetensors.MAX_ITEMS // (1 + item.count("{") + item.count("[")) - 2
    (tmp_path / "large").write_bytes(file_bytes(("{" + ",".join(item % i for i in range(count)) + "}").encode()))
    arguments = [sys.executable, "-c", PEAK, str(tmp_path / "large")]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    error, peak = done.stdout.split()
    assert error == "CheckpointError"
    assert int(peak) < 170e6


def test_the_file_that_the_attacks_vary_is_valid(tmp_path):
    entries = {"__metadata__": {"format": "pt"}, "a": entry(), "none": entry("U8", (0,), (8, 8))}
    (tmp_path / "a").write_bytes(file_bytes(entries))
    header = read_header(tmp_path / "a")
    assert header.metadata == {"format": "pt"}
    assert header.tensors["a"] == TensorInfo("a", "F32", (2,))
    assert MappedFile(tmp_path / "a").get("none").shape == (0,)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "nowhere.safetensors")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 60))
def test_a_damaged_file_is_read_or_refused(tmp_path, place, byte, cut):
    """With one byte changed and the end cut off, the tensors are read or a CheckpointError is raised."""
    entries = {"__metadata__": {"format": "mlx"}, "a": entry(), "b": entry("U8", (3, 1), (8, 11))}
    data = bytearray(file_bytes(entries, bytes(range(11))))
    data[place % len(data)] = byte
    (tmp_path / "damaged").write_bytes(data[: len(data) - cut])
    try:
        file = MappedFile(tmp_path / "damaged")
    except CheckpointError:
        return
    for name, info in file.header.tensors.items():
        assert file.get(name).nbytes == info.nbytes


INFOS = [
    TensorInfo("byte", "U8", (3,)),
    TensorInfo("half", "BF16", (5, 3)),
    TensorInfo("word", "U32", (4, 2)),
    TensorInfo("single", "F32", (2, 3, 4)),
    TensorInfo("scalar", "F32", ()),
]


def values_of(info: TensorInfo) -> np.ndarray:
    rng = np.random.default_rng(len(info.name))
    return rng.integers(0, 100, info.shape).astype(safetensors.DTYPES[info.dtype])


def write(folder, shard_bytes=10**9):
    """A Writer that has written INFOS in reverse order, the rows of each in two halves."""
    writer = Writer(folder, INFOS, {"format": "pt"}, shard_bytes)
    for info in reversed(INFOS):
        values = values_of(info)
        half = len(values) // 2 if info.shape else 0
        if half:
            writer.write(info.name, half, values[half:])
            writer.write(info.name, 0, values[:half])
        else:
            writer.write(info.name, 0, values)
    return writer


@pytest.mark.parametrize(("shard_bytes", "files"), [(10**9, 1), (100, 2)])
def test_the_safetensors_package_reads_what_is_written(tmp_path, shard_bytes, files):
    writer = write(tmp_path, shard_bytes)
    writer.finish()
    assert sum(verify() for verify in writer.verification_jobs()) == sum(info.nbytes for info in INFOS)
    writer.close()
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == files
    found = {}
    for path in paths:
        file = MappedFile(path)
        with safe_open(path, "numpy") as reader:
            assert reader.metadata() == {"format": "pt"}
            for name in reader.keys():  # noqa: SIM118
                found[name] = path.name
                if name != "half":  # the package does not support bfloat16 for numpy
                    assert np.array_equal(reader.get_tensor(name), file.get(name))
        for name, info in file.header.tensors.items():
            assert np.array_equal(file.get(name), values_of(info))
            assert file.get(name).flags.aligned
            assert not file.get(name).flags.writeable
    if files > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == found
        assert paths[0].name == "model-00001-of-00002.safetensors"


def test_missing_rows_are_noticed(tmp_path):
    writer = Writer(tmp_path, INFOS[:2], {})
    writer.write("byte", 0, values_of(INFOS[0]))
    with pytest.raises(ValueError, match="3 of 33 bytes"):
        writer.finish()
    writer.close()


def test_rows_outside_a_tensor_are_refused(tmp_path):
    writer = Writer(tmp_path, INFOS, {})
    with pytest.raises(ValueError, match="outside its shape"):
        writer.write("half", 4, np.zeros((2, 3), BF16))
    writer.close()


def test_bytes_that_change_on_the_disk_are_noticed(tmp_path):
    writer = write(tmp_path)
    writer.finish()
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    with pytest.raises(OSError, match="other bytes"):
        for verify in writer.verification_jobs():
            verify()
    writer.close()


def test_released_pages_are_read_again(tmp_path):
    values = np.arange(300_000, dtype=np.float32).reshape(3, -1)
    writer = Writer(tmp_path, [TensorInfo("a", "F32", values.shape)], {})
    writer.write("a", 0, values)
    writer.finish()
    writer.close()
    file = MappedFile(tmp_path / "model.safetensors")
    view = file.get("a")
    assert np.array_equal(view, values)
    file.release_array(view[1:2])
    file.release_array(view.T)
    file.release_array(values)  # not part of this file, so ignored
    file.release_all()
    assert np.array_equal(view, values)
