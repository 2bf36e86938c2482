"""What the tests of checkpoints share: copies of the small checkpoints, and their tensors read and written without the
code under test."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mlx_gptoss.config import ModelConfig
from mlx_gptoss.weights.config_json import published
from mlx_gptoss.weights.formats import recipe_of
from mlx_gptoss.weights.params import parameters
from mlx_gptoss.weights.safetensors import DTYPES
from mlx_gptoss.weights.writer import Writer

NUMPY_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype("u1"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
}


@pytest.fixture
def copied(mini, tmp_path):
    """copied("mxfp4") -> a copy of that small checkpoint, which a test may damage."""

    def copy(name: str) -> Path:
        shutil.copytree(mini / name, tmp_path / name, copy_function=shutil.copyfile)
        return tmp_path / name

    return copy


@pytest.fixture(scope="session")
def read_tensors():
    """read_tensors(folder) -> {name: array} of its safetensors files."""

    def read(folder: Path) -> dict[str, np.ndarray]:
        found = {}
        for name, info, data in _stored(folder):
            found[name] = np.frombuffer(data, NUMPY_DTYPES[info["dtype"]]).reshape(info["shape"])
        return found

    return read


@pytest.fixture(scope="session")
def write_tensors():
    """write_tensors(folder, {name: array}) replaces all tensors of a folder by these, in one file."""

    def write(folder: Path, tensors: dict[str, np.ndarray]) -> None:
        for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
            path.unlink()
        names = {dtype: name for name, dtype in NUMPY_DTYPES.items()} | {np.dtype("i8"): "I64"}
        header, at = {}, 0
        for name, array in tensors.items():
            header[name] = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
            at += array.nbytes
        text = json.dumps(header).encode()
        data = b"".join(array.tobytes() for array in tensors.values())
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)

    return write


@pytest.fixture(scope="session")
def digests():
    """digests(folder) -> {name: [dtype, shape, start of the SHA-256 of its bytes]} of every tensor."""

    def digest(folder: Path) -> dict[str, list]:
        return {
            name: [info["dtype"], info["shape"], hashlib.sha256(data).hexdigest()[:16]]
            for name, info, data in _stored(folder)
        }

    return digest


def _stored(folder: Path):
    """(name, entry of the header, bytes) of every tensor in a folder."""
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        for name, info in json.loads(data[8:end]).items():
            if name != "__metadata__":
                first, last = (end + offset for offset in info["data_offsets"])
                yield name, info, data[first:last]


@pytest.fixture(scope="session")
def random_checkpoint():
    """random_checkpoint(folder, config, name) writes a checkpoint of random weights, with the Writer alone.

    name: bf16, or mxfp4 with random codes. Every expert, or every row of a matrix, is the same. The parameters named in
    `wide` are float32 values that bfloat16 cannot hold.
    """

    def write(folder: Path, config: ModelConfig, name: str = "bf16", wide: tuple[str, ...] = ()) -> Path:
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        params = parameters(config)
        target_format, _ = recipe_of(name)
        units = target_format.units(name, params, dict.fromkeys(wide, "F32"))
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
        content = published(config) | target_format.config_entries(name, params) | {"swiglu_alpha": config.swiglu_alpha}
        (folder / "config.json").write_text(json.dumps(content))
        return folder

    return write
