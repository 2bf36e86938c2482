"""What the tests of the formats share: reading stored tensors without the code under test, and edited checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlx_gptoss.weights import checkpoint, codecs


@pytest.fixture(scope="session")
def load_tensors():
    """load_tensors(folder) -> all tensors of a checkpoint's safetensors files, by name."""

    def load(folder: Path) -> dict[str, torch.Tensor]:
        return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}

    return load


@pytest.fixture(scope="session")
def tensor_bytes():
    """tensor_bytes(tensors) -> dtype, shape and bytes of every tensor, to compare two checkpoints exactly."""

    def describe(tensor: torch.Tensor) -> tuple:
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return tensor.dtype, tuple(tensor.shape), data

    return lambda tensors: {name: describe(tensor) for name, tensor in tensors.items()}


@pytest.fixture(scope="session")
def decode():
    """decode(folder, name) -> the weight of a parameter by its canonical name, float32."""
    return lambda folder, name: codecs.dequantize(checkpoint.open(folder).read(name))


@pytest.fixture(scope="session")
def decode_matrices():
    """decode_matrices(folder) -> every weight and bias of attention and experts by canonical name, float32."""

    def decode(folder: Path) -> dict[str, np.ndarray]:
        weights = checkpoint.open(folder).weights()
        return {p.name: codecs.dequantize(weight) for p, weight in weights if p.role in ("attention", "experts")}

    return decode


@pytest.fixture(scope="session")
def checkpoint_path(mini, shared):
    """checkpoint_path("fp8-dynamic") -> its path in tests/data or else among the shared files; the test skips without
    either."""

    def find(name: str) -> Path:
        paths = [root / name for root in (mini, shared / "fixtures" / "mini")]
        existing = next((path for path in paths if path.exists()), None)
        return existing or pytest.skip(f"the fixture {name} is not in this checkout, and the shared files are absent")

    return find


@pytest.fixture
def edited(checkpoint_path, load_tensors, tmp_path):
    """edited("nvfp4", tensors, config) -> the folder of a copy of that fixture.

    tensors, config: functions that change the dict of tensors and the parsed config.json in place.
    """

    def edit(
        name: str,
        tensors: Callable[[dict], object] = lambda tensors: None,
        config: Callable[[dict], object] = lambda settings: None,
    ) -> Path:
        source, folder = checkpoint_path(name), tmp_path / "edited"
        folder.mkdir()
        changed, settings = load_tensors(source), json.loads((source / "config.json").read_text())
        tensors(changed)
        config(settings)
        save_file({key: value.contiguous() for key, value in changed.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return edit
