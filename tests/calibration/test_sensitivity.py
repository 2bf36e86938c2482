"""What matrices cost in few bits: against passes of their own, in the stated memory, and over interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss.calibration import sensitivity
from mlx_gptoss.calibration.divergence import kl_divergence, log_softmax
from mlx_gptoss.calibration.forward import Forward
from mlx_gptoss.calibration.sensitivity import measure_choices, measuring_bytes
from mlx_gptoss.calibration.store import Store
from mlx_gptoss.calibration.text import CalibrationText, read_text
from mlx_gptoss.calibration.widths import Budget, plan_mixture
from mlx_gptoss.config import ModelConfig
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.weights import checkpoint, codecs, quantization
from mlx_gptoss.weights.synthetic import Synthetic
from mlx_gptoss.weights.tensor import AFFINE


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("<|endoftext|>".join(f"{n} and {n * n}, so what is next? " * 2 for n in range(4)))
    return path


def five_bits(source) -> Budget:
    return Budget(5 * sum(param.size for param in source.params) // 8, "5 bits per weight")


def test_costs_are_divergences_of_the_model_with_one_narrow_matrix(mini, tmp_path, text_file, monkeypatch):
    """Against a pass of its own for each. Nothing but the costs is left."""
    monkeypatch.setattr(sensitivity, "TOGETHER", 2)
    monkeypatch.setattr(sensitivity, "_CHUNK", 10_000)
    source = checkpoint.open(mini / "mxfp4")
    text = read_text(text_file, Tokenizer.from_folder(mini / "mxfp4"))
    groups = plan_mixture(source, "mlx-4bit", five_bits(source)).groups
    store = Store(tmp_path, codecs.BFLOAT16)
    found = measure_choices(source, groups, text, store, lambda *_: None)
    assert [one.params for one in found] == list(groups)
    assert [path.name for path in tmp_path.iterdir()] == ["costs"]
    ids, lengths = [id for window in text.windows for id in window], text.lengths
    *_, plain = Forward(source).streams(ids, lengths)
    wanted = log_softmax(Forward(source).logits(plain))
    chosen = [one for one in found if one.params[0].kind in ("embed.weight", "lm_head.weight") or len(one.params) == 2]
    assert len(chosen) == 2 + source.config.num_hidden_layers
    for one in chosen:
        narrow = {p.name: quantization.to_spec(source.read(p.name), AFFINE[3, 64]) for p in one.params}
        network = Forward(source, narrow)
        *_, last = network.streams(ids, lengths)
        assert one.cost == pytest.approx(kl_divergence(wanted, log_softmax(network.logits(last))).mean(), rel=1e-2)


def test_memory_stays_below_what_the_plan_says(tmp_path, monkeypatch):
    """Of arrays; the copies of the activations are files. Chunks are small, as they are in a large model."""
    monkeypatch.setattr(sensitivity, "_CHUNK", 2**16)
    config = ModelConfig(
        num_hidden_layers=3, hidden_size=128, intermediate_size=192, num_attention_heads=8, num_key_value_heads=2,
        num_local_experts=8, vocab_size=4096,
    )  # fmt: skip
    source = Synthetic(config, "mxfp4")
    rng = np.random.default_rng(0)
    text = CalibrationText(tuple(tuple(rng.integers(0, 4096, 200).tolist()) for _ in range(9)))
    groups = plan_mixture(source, "mlx-4bit", five_bits(source)).groups
    tracemalloc.start()
    measure_choices(source, groups, text, Store(tmp_path, codecs.BFLOAT16), lambda *_: None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.3 * measuring_bytes(config) < peak < measuring_bytes(config)


# ---- interruptions


def test_an_interrupted_measurement_continues_after_the_last_layer(mini, tmp_path, text_file, monkeypatch):
    how = {"to": "mlx-4bit", "calibrate": text_file, "bits_per_weight": 4.8}
    out, whole = tmp_path / "out", tmp_path / "whole"
    mlx_gptoss.convert(mini / "mxfp4", whole, **how)
    total = 2 + 5 * checkpoint.open(mini / "mxfp4").config.num_hidden_layers

    def stop(done: int, all_bytes: int, what: str) -> None:
        if what.startswith("measuring") and done >= all_bytes * (total - 2) // total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="continues after the 1 calibrated part"):
        mlx_gptoss.convert(mini / "mxfp4", out, **how, progress=stop)
    layers = []
    original = sensitivity._Measuring._layer
    monkeypatch.setattr(
        sensitivity._Measuring, "_layer", lambda self, layer: (layers.append(layer), original(self, layer))
    )
    mlx_gptoss.convert(mini / "mxfp4", out, **how)
    assert layers == [checkpoint.open(mini / "mxfp4").config.num_hidden_layers - 1]
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_a_killed_measurement_continues(mini, tmp_path, text_file):
    how = {"to": "mlx-4bit", "calibrate": str(text_file), "bits_per_weight": 4.8}
    out, whole = tmp_path / "out", tmp_path / "whole"
    mlx_gptoss.convert(mini / "mxfp4", whole, **how)
    code = (
        "import sys, time, mlx_gptoss\n"
        "def slow(done, total, what):\n"
        "    if what.startswith('measuring') and done > total // 2: time.sleep(600)\n"
        f"mlx_gptoss.convert(sys.argv[1], sys.argv[2], **{how!r}, progress=slow)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(mini / "mxfp4"), str(out)])
    kept = tmp_path / ".out.partial" / "calibration"
    while not (kept / "copies-1").is_dir() and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (kept / "copies-1").is_dir()
    steps: list[int] = []
    mlx_gptoss.convert(
        mini / "mxfp4", out, **how,
        progress=lambda done, total, what: steps.append(done) if what.startswith("measuring") else None,
    )  # fmt: skip
    assert 0 < len(steps) < 2 + 5 * checkpoint.open(mini / "mxfp4").config.num_hidden_layers
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
