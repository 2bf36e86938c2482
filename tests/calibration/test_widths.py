"""Mixed widths: those that follow from costs and a size, and checkpoints that every reader opens."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss import api
from mlx_gptoss.calibration import plan as plans
from mlx_gptoss.calibration.forward import Forward
from mlx_gptoss.calibration.widths import WIDTHS, Budget, Choice, Mixture, choose_widths, plan_mixture
from mlx_gptoss.config import GPT_OSS_20B
from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.loading.memory import plan_memory
from mlx_gptoss.weights import checkpoint
from mlx_gptoss.weights.params import Param
from mlx_gptoss.weights.synthetic import Synthetic
from mlx_gptoss.weights.tensor import AFFINE


@pytest.fixture(autouse=True)
def short_text(monkeypatch):
    read = plans.read_text
    monkeypatch.setattr(plans, "read_text", lambda path, tokenizer: read(path, tokenizer, max_tokens=1000))


def choice(name: str, rows: int, cost: float) -> Choice:
    return Choice((Param(name, 0, "attention", (rows, 64)),), cost)


def mixture(choices: list[Choice], bits_per_weight: float) -> Mixture:
    size = sum(one.size for one in choices)
    return Mixture(tuple(one.params for one in choices), WIDTHS, int(bits_per_weight * size))


def test_widths_are_near_the_best_of_all():
    """Against every combination, for matrices of different sizes and costs."""
    rng = np.random.default_rng(0)
    for bits in (3.8, 4.5, 5.5, 7.0):
        choices = [choice(str(n), int(rng.integers(1, 9)), float(rng.exponential())) for n in range(6)]
        parameters = sum(one.size for one in choices)
        found = choose_widths(mixture(choices, bits), choices)
        assert sum(one.size * (found[one.params[0].name].bits + 0.5) for one in choices) <= bits * parameters
        cost = sum(one.cost_at(found[one.params[0].name].bits) for one in choices)
        best = min(
            sum(one.cost_at(width) for one, width in zip(choices, tried, strict=True))
            for tried in product(WIDTHS, repeat=6)
            if sum(o.size * (w + 0.5) for o, w in zip(choices, tried, strict=True)) <= bits * parameters
        )
        assert best <= cost <= 1.35 * best


def test_what_costs_more_gets_more():
    choices = [choice("a", 4, 1.0), choice("b", 4, 0.1), choice("c", 4, 1e-6)]
    found = choose_widths(mixture(choices, 4.2), choices)
    assert found["a"].bits >= found["b"].bits >= found["c"].bits == 3 and found["a"].bits > 3


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


def test_a_size_from_the_memory_that_a_gpu_has(mini, tmp_path):
    """The result and its context take at most this memory by the plan that loading makes, and nearly all of it."""
    config, context = checkpoint.open(mini / "mxfp4").config, 2048

    def needed(weights: int) -> int:
        return plan_memory(config, weights, 10**12, activation_bytes=2, context=context).needed_bytes

    small = mlx_gptoss.convert(mini / "mxfp4", tmp_path / "4", "mlx-4bit").bytes
    memory = needed(int(1.1 * small))
    report = mlx_gptoss.convert(
        mini / "mxfp4", tmp_path / "out", "mlx-4bit", calibrate=True, memory=memory, context=context
    )
    assert 1.0 * small < report.bytes and 0.97 * memory < needed(report.bytes) <= memory
    assert checkpoint.open(tmp_path / "out").format == "mlx"


def test_gpt_oss_20b_fits_the_gpu_of_a_mac_with_16_gb():
    """11.45 GB are what macOS 15 recommends to it, for 16,384 tokens of context."""
    source, available = Synthetic(GPT_OSS_20B, "mxfp4"), 11_453_250_000
    budget = api._budget(source, None, available, 16_384)
    found = plan_mixture(source, "mlx-4bit", budget)
    narrow = found.size * 3.5 / 8
    assert narrow < found.max_bits / 8 < budget.max_bytes
    plan = plan_memory(GPT_OSS_20B, budget.max_bytes, available, activation_bytes=2, context=16_384)
    assert plan.fits and plan.chunk == 2048 and available - plan.needed_bytes < 10
    with pytest.raises(InvalidRequest, match=r"7 GB of memory with 16384 tokens of context are 5\.\d+ GB of weights"):
        plan_mixture(source, "mlx-4bit", api._budget(source, None, 7_000_000_000, 16_384))
    with pytest.raises(
        InvalidRequest, match=r"from 9\.\d+ to 22\.2 GB for this model: 3\.5\d to 8\.5\d bits per weight"
    ):
        plan_mixture(source, "mlx-4bit", Budget(10**12, "400 bits per weight"))


def test_refusals(mini, tmp_path):
    source, out = mini / "mxfp4", tmp_path / "a"
    for mixed in ({"bits_per_weight": 4.5}, {"memory": 10**9}, {"context": 2048}):
        with pytest.raises(InvalidRequest, match="give calibrate=True or a file"):
            mlx_gptoss.convert(source, out, "mlx-4bit", **mixed)
    with pytest.raises(InvalidRequest, match="int4-autoround has one width"):
        mlx_gptoss.convert(source, out, "int4-autoround", calibrate=True, bits_per_weight=4.5)
    with pytest.raises(InvalidRequest, match="not both"):
        mlx_gptoss.convert(source, out, "mlx-4bit", calibrate=True, bits_per_weight=4.5, memory=10**9)
    with pytest.raises(InvalidRequest, match="give memory, too"):
        mlx_gptoss.convert(source, out, "mlx-4bit", calibrate=True, context=2048)
    with pytest.raises(InvalidRequest, match="context must be from 1 to 131072"):
        mlx_gptoss.convert(source, out, "mlx-4bit", calibrate=True, memory=10**9, context=10**6)
    with pytest.raises(
        InvalidRequest, match=r"3\.4 bits per weight are .* GB of weights, and mixed widths of mlx-4bit"
    ):
        mlx_gptoss.convert(source, out, "mlx-4bit", calibrate=True, bits_per_weight=3.4)
