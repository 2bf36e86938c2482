"""Synthetic weights: reproducible, of plausible size, and a normal checkpoint once written."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_gptoss.backends.base import Limits
from mlx_gptoss.config import TINY
from mlx_gptoss.errors import CheckpointError, GptOssError, InvalidRequest
from mlx_gptoss.weights import checkpoint, codecs
from mlx_gptoss.weights.formats import WRITERS
from mlx_gptoss.weights.synthetic import GAINS, Synthetic, preset
from mlx_gptoss.weights.tensor import Dense


def bits(weight) -> list[np.ndarray]:
    arrays = [weight.values] if isinstance(weight, Dense) else [weight.codes, weight.scale, weight.bias, weight.outer]
    return [np.asarray(a).astype(np.float32) for a in arrays if a is not None]


def same(a, b) -> bool:
    return all(np.array_equal(x, np.broadcast_to(y, x.shape)) for x, y in zip(bits(a), bits(b), strict=True))


@pytest.mark.parametrize("name", WRITERS)
def test_written_and_read_back_they_are_the_same(name, tmp_path):
    source = Synthetic(TINY, name)
    source.write(tmp_path / "written")
    found = checkpoint.open(tmp_path / "written")
    assert (found.format, found.size_bytes, found.stop_ids) == (name, source.size_bytes, source.stop_ids)
    assert found.config == source.config
    for param in source.params:
        assert same(source.read(param.name), found.read(param.name)), param.name
        assert source.stored_as(param.name) == found.stored_as(param.name)


@pytest.mark.parametrize("name", WRITERS)
def test_matrices_keep_the_size_of_activations(name):
    source = Synthetic(TINY, name)
    for param in source.params:
        values = codecs.dequantize(source.read(param.name))
        assert np.isfinite(values).all()
        if param.is_matrix:
            wanted = GAINS.get(param.kind, 1.0) * (1 if param.role == "embed" else param.shape[-1] ** -0.5)
            assert 0.75 < np.sqrt(np.mean(values**2)) / wanted < 1.35, param.name
            assert abs(values.mean()) < 0.1 * wanted, param.name


def test_values_depend_on_seed_and_name_alone():
    one, again, other = (Synthetic(TINY, "mlx-4bit", seed) for seed in (1, 1, 2))
    name = "layers.0.experts.gate.weight"
    assert same(one.read(name), again.read(name))
    assert not same(one.read(name), other.read(name))
    assert not same(one.read(name), one.read("layers.0.experts.up.weight"))
    longer = Synthetic(preset("tiny", layers=5), "mlx-4bit", 1)
    assert longer.config.num_hidden_layers == 5 and same(one.read(name), longer.read(name))


def test_activations_keep_their_size_and_every_expert_is_used(backend_module):
    """After 24 layers the logits have the size that lm_head gives to activations of unit size."""
    source = Synthetic(preset("tiny", layers=24), "mxfp4")
    runner = backend_module("mlx").load(source, device="cpu", dtype="float32", limits=Limits(1, 64, 64))
    logits = runner.logits(list(range(64)))
    assert 0.5 < logits.std() / GAINS["lm_head.weight"] < 2
    assert len(set(logits.argmax(axis=-1).tolist())) > 16
    x = codecs.dequantize(source.read("embed.weight"))
    for layer in range(24):
        router = x @ codecs.dequantize(source.read(f"layers.{layer}.router.weight")).T
        chosen = np.bincount(np.argsort(router, axis=-1)[:, -TINY.num_experts_per_tok :].ravel(), minlength=8)
        assert chosen.min() > 0.2 * chosen.mean()


def test_unknown_presets_and_formats_and_existing_folders_are_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="20b, 120b, tiny"):
        preset("7b")
    with pytest.raises(CheckpointError, match="choose one of"):
        Synthetic(TINY, "gguf")
    with pytest.raises(GptOssError, match="exists already"):
        Synthetic(TINY, "bf16").write(tmp_path)
