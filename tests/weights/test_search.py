"""--search mse: the same storage, no group worse than with the recipe, and close to the optimum."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_gptoss.api import NANO
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint, codecs, quantization, search
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.tensor import AFFINE4, AFFINE8, MXFP4, Dense, Quantized


def relative(weight: Quantized, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(codecs.dequantize(weight) - wanted) / np.linalg.norm(wanted))


def errors_of_both(values: np.ndarray) -> tuple[float, float]:
    """The relative errors of the recipe and of the search."""
    plain = quantization.quantize(values, AFFINE4)
    return relative(plain, values), relative(search.to_spec(Dense(values), AFFINE4), values)


def gaussian(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 1280), np.float32) * np.float32(0.02)


def through_mxfp4(values: np.ndarray) -> np.ndarray:
    return codecs.dequantize(quantization.quantize(values, MXFP4))


def test_error_on_weights_from_mxfp4():
    before, after = errors_of_both(through_mxfp4(gaussian(64)))
    assert before == pytest.approx(0.0906, abs=0.001)
    assert after == pytest.approx(0.0741, abs=0.001)


def test_error_on_gaussian_weights():
    before, after = errors_of_both(gaussian(64))
    assert before == pytest.approx(0.0910, abs=0.001)
    assert after == pytest.approx(0.0825, abs=0.001)


def test_error_on_the_bundled_model():
    opened = checkpoint.open(NANO)
    names = [param.name for param in opened.params if param.role == "experts" and param.is_matrix]
    before, after = np.mean([errors_of_both(codecs.dequantize(opened.read(name))) for name in names], axis=0)
    assert 0.088 < before < 0.096
    assert after < 0.073


def test_error_is_close_to_the_best_of_a_fine_grid():
    """The grid has 80 x 120 steps and edges, too many to try on a whole model."""
    groups = through_mxfp4(gaussian(1, 3)).reshape(-1, 64)
    found = search.to_spec(Dense(groups), AFFINE4)
    ours = ((codecs.dequantize(found) - groups) ** 2).sum()
    best = 0.0
    for group in groups:
        amax = np.abs(group).max()
        step, edge = (x[..., None] for x in np.meshgrid(np.linspace(0.03, 0.15, 80), -np.linspace(0, 1.2, 120)))
        errors = []
        for side in (amax, -amax):
            code = np.clip(np.rint((group / side - edge) / step), 0, 15)
            errors.append((((code * step + edge) * side - group) ** 2).sum(axis=-1).min())
        best += min(errors)
    assert ours < 1.06 * best


VALUES = st.one_of(
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1e-8, -1e-8, 1e-38, -1e-45, 1e4, 3e37, -3e37, 0.5, 6.0]),
)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:mlx_gptoss.weights.quantization")  # huge equal values overflow
@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=64), st.sampled_from([codecs.BFLOAT16, np.dtype(np.float32)]))
@example([0.0, 2.0**-24], codecs.BFLOAT16)  # the recipe's scale is below 1e-7
def test_no_group_gets_worse(values, dtype):
    group = np.resize(np.array(values, np.float32), (1, 64))
    recipe, found = quantization.quantize(group, AFFINE4, dtype), search.to_spec(Dense(group), AFFINE4, dtype)
    before, squares = (((codecs.dequantize(w).astype(np.float64) - group) ** 2).sum() for w in (recipe, found))
    assert squares <= before * (1 + 1e-4) + 1e-13 * float(np.abs(group).max()) ** 2


def test_nan_values_are_refused():
    values = gaussian(2)
    values[1, 70] = np.nan
    with pytest.raises(CheckpointError, match="NaN"):
        search.to_spec(Dense(values), AFFINE4)


def test_8_bit_weights_are_not_searched():
    values = gaussian(2)
    found, recipe = search.to_spec(Dense(values), AFFINE8), quantization.quantize(values, AFFINE8)
    assert np.array_equal(found.codes, recipe.codes)
    assert np.array_equal(found.scale, recipe.scale)


def test_a_float16_scale_stays_float16():
    values = gaussian(2)
    found = search.to_spec(Dense(values), AFFINE4, np.dtype(np.float16))
    assert found.scale.dtype == found.bias.dtype == np.float16
    assert relative(found, values) <= relative(search.to_spec(Dense(values), AFFINE4), values)


def layout(folder):
    opened = checkpoint.open(folder)
    return {name: (info.dtype, info.shape) for name, info in opened.tensors.items()}


@pytest.mark.parametrize("target", ["mlx-4bit", "mlx-mxfp4-q4"])
def test_a_converted_checkpoint_has_smaller_errors_in_the_same_layout(mini, tmp_path, target):
    convert(mini / "mxfp4", tmp_path / "recipe", target)
    convert(mini / "mxfp4", tmp_path / "search", target, search="mse")
    assert layout(tmp_path / "search") == layout(tmp_path / "recipe")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("recipe", "search")]
    assert configs[0] == configs[1]
    opened = checkpoint.open(mini / "mxfp4")
    recipe, found = checkpoint.open(tmp_path / "recipe"), checkpoint.open(tmp_path / "search")
    assert found.format == target
    for param in opened.params:
        wanted = codecs.dequantize(opened.read(param.name))
        before, after = recipe.read(param.name), found.read(param.name)
        if isinstance(before, Quantized) and before.spec == AFFINE4:
            assert relative(after, wanted) < 0.95 * relative(before, wanted), param.name
        else:
            assert np.array_equal(codecs.dequantize(after), codecs.dequantize(before)), param.name


def test_weights_that_are_4_bit_already_are_kept(mini, tmp_path):
    convert(mini / "mlx-4bit", tmp_path / "out", "mlx-4bit", search="mse")
    before, after = checkpoint.open(mini / "mlx-4bit"), checkpoint.open(tmp_path / "out")
    for param in before.params:
        assert np.array_equal(codecs.dequantize(after.read(param.name)), codecs.dequantize(before.read(param.name)))


def test_the_command_line_writes_the_same_bytes(mini, tmp_path):
    def run(*words):
        command = [sys.executable, "-m", "mlx_gptoss_cli", "convert", str(mini / "mxfp4"), *words]
        return subprocess.run(command, capture_output=True, text=True)

    assert run(str(tmp_path / "cli"), "--to", "mlx-4bit", "--search", "mse").returncode == 0
    convert(mini / "mxfp4", tmp_path / "python", "mlx-4bit", search="mse")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("cli", "python")]
    assert files[0] == files[1]
    refused = run(str(tmp_path / "no"), "--to", "bf16", "--search", "mse")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: search 'mse' is not available for bf16")
    assert refused.stderr.count("\n") == 1
    assert run(str(tmp_path / "no"), "--to", "mlx-4bit", "--search", "fast").returncode == 2


@pytest.mark.parametrize(("target", "how"), [("mlx-8bit", "mse"), ("bf16", "mse"), ("mlx-4bit", "fast")])
def test_unknown_searches_and_formats_are_refused(mini, tmp_path, target, how):
    with pytest.raises(CheckpointError, match="search 'mse' is, for mlx-4bit and mlx-mxfp4-q4"):
        convert(mini / "mxfp4", tmp_path / "out", target, search=how)
    assert list(tmp_path.iterdir()) == []
