"""Mixed widths: what matrices cost, the widths that follow, and checkpoints that every reader opens."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss.calibration import plan as plans
from mlx_gptoss.calibration import widths
from mlx_gptoss.calibration.forward import Forward
from mlx_gptoss.calibration.text import read_text
from mlx_gptoss.calibration.widths import WIDTHS, Choice, choose_widths, measure_choices
from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.measure.evaluation import kl_divergence, log_softmax
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.weights import checkpoint, quantization
from mlx_gptoss.weights.params import Param
from mlx_gptoss.weights.tensor import AFFINE


@pytest.fixture(autouse=True)
def short_text(monkeypatch):
    read = plans.read_text
    monkeypatch.setattr(plans, "read_text", lambda path, tokenizer: read(path, tokenizer, max_tokens=1000))


def choice(name: str, rows: int, cost: float) -> Choice:
    return Choice((Param(name, 0, "attention", (rows, 64)),), cost)


def test_widths_are_near_the_best_of_all():
    """Against every combination, for matrices of different sizes and costs."""
    rng = np.random.default_rng(0)
    for bits in (3.8, 4.5, 5.5, 7.0):
        choices = [choice(str(n), int(rng.integers(1, 9)), float(rng.exponential())) for n in range(6)]
        parameters = sum(one.size for one in choices)
        found = choose_widths(choices, 0, bits, parameters)
        assert sum(one.size * (found[one.params[0].name].bits + 0.5) for one in choices) <= bits * parameters
        cost = sum(one.cost_at(found[one.params[0].name].bits) for one in choices)
        best = min(
            sum(one.cost_at(width) for one, width in zip(choices, tried, strict=True))
            for tried in product(WIDTHS, repeat=6)
            if sum(o.size * (w + 0.5) for o, w in zip(choices, tried, strict=True)) <= bits * parameters
        )
        assert best <= cost <= 1.35 * best


def test_what_costs_more_gets_more():
    found = choose_widths([choice("a", 4, 1.0), choice("b", 4, 0.1), choice("c", 4, 1e-6)], 640, 5.0, 12 * 64)
    assert found["a"].bits >= found["b"].bits >= found["c"].bits == 3 and found["a"].bits > 3
    with pytest.raises(InvalidRequest, match=r"from 3\.50 to 8\.50"):
        choose_widths([choice("a", 4, 1.0)], 0, 3.4, 256)
    with pytest.raises(InvalidRequest, match=r"from 3\.50 to 8\.50"):
        choose_widths([choice("a", 4, 1.0)], 0, 8.5, 256)


def test_costs_are_divergences_of_the_model_with_one_narrow_matrix(mini, tmp_path, monkeypatch):
    """Against a pass of its own for each."""
    monkeypatch.setattr(widths, "TOGETHER", 2)
    source = checkpoint.open(mini / "mxfp4")
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>".join(f"{n} and {n * n}, so what is next? " * 2 for n in range(4)))
    text = read_text(path, Tokenizer.from_folder(mini / "mxfp4"))
    names = ["embed.weight", "layers.0.attention.v.weight", "layers.1.experts.gate.weight", "lm_head.weight"]
    names.append("layers.1.experts.up.weight")
    found = measure_choices(source, source.params, names, text, lambda *_: None)
    assert {one.params[0].name for one in found} == set(names[:4])
    ids, lengths = [id for window in text.windows for id in window], text.lengths
    *_, plain = Forward(source).streams(ids, lengths)
    wanted = log_softmax(Forward(source).logits(plain))
    for one in found:
        narrow = {p.name: quantization.to_spec(source.read(p.name), AFFINE[3, 64]) for p in one.params}
        network = Forward(source, narrow)
        *_, last = network.streams(ids, lengths)
        assert one.cost == pytest.approx(kl_divergence(wanted, log_softmax(network.logits(last))).mean(), rel=1e-2)


@pytest.mark.parametrize(("to", "bits"), [("mlx-4bit", 4.8), ("mlx-mxfp4-q4", 5.2)])
def test_checkpoints_of_mixed_widths(mini, tmp_path, to, bits):
    """They have at most the size that was asked for, list every module, keep MXFP4 experts, and run."""
    out = tmp_path / "out"
    report = mlx_gptoss.convert(mini / "mxfp4", out, to, calibrate=True, bits_per_weight=bits)
    found = checkpoint.open(out)
    assert bits - 0.4 < 8 * report.bytes / report.parameters <= bits
    assert found.format == "mlx"
    modules = json.loads((out / "config.json").read_text())["quantization"]
    stored = {entry["bits"] for entry in modules.values() if isinstance(entry, dict)}
    assert len(stored) > 1 and stored <= {3, 4, 6, 8}
    assert found.stored_as("layers.0.router.weight")[0] == AFFINE[8, 64]
    gate, up = (found.stored_as(f"layers.0.experts.{name}.weight")[0] for name in ("gate", "up"))
    assert gate == up
    before = checkpoint.open(mini / "mxfp4")
    if to == "mlx-mxfp4-q4":
        assert np.array_equal(
            found.read("layers.0.experts.up.weight").codes, before.read("layers.0.experts.up.weight").codes
        )
    ids = list(range(40, 70))
    with mlx_gptoss.load(out) as model, mlx_gptoss.load(out, backend="cuda", device="cpu") as other:
        assert np.allclose(model.logits(ids), other.logits(ids), atol=1e-2)
    with mlx_gptoss.load(out) as model:
        network = Forward(found)
        *_, last = network.streams(ids, [len(ids)])
        assert np.allclose(model.logits(ids), network.logits(last), atol=1e-2)


def test_refusals(mini, tmp_path):
    with pytest.raises(InvalidRequest, match="give calibrate=True or a file"):
        mlx_gptoss.convert(mini / "mxfp4", tmp_path / "a", "mlx-4bit", bits_per_weight=4.5)
    with pytest.raises(InvalidRequest, match="int4-autoround has one width"):
        mlx_gptoss.convert(mini / "mxfp4", tmp_path / "a", "int4-autoround", calibrate=True, bits_per_weight=4.5)
