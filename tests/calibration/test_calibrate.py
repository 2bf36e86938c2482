"""Calibrated conversions: the layout of plain ones, outputs that change less, and runs that continue after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss import api
from mlx_gptoss.api import NANO
from mlx_gptoss.calibration import calibrate as calibrating
from mlx_gptoss.calibration import layer as layers
from mlx_gptoss.calibration import memory
from mlx_gptoss.calibration import plan as plans
from mlx_gptoss.calibration.layer import _with_fill
from mlx_gptoss.calibration.linear import Target
from mlx_gptoss.calibration.memory import plan_memory
from mlx_gptoss.calibration.text import CalibrationText
from mlx_gptoss.config import GPT_OSS_20B, GPT_OSS_120B, ModelConfig
from mlx_gptoss.errors import CheckpointError, DoesNotFit, GptOssError, InvalidRequest
from mlx_gptoss.measure.evaluation import evaluate
from mlx_gptoss.weights import checkpoint, codecs
from mlx_gptoss.weights.formats import recipe_of
from mlx_gptoss.weights.params import parameters
from mlx_gptoss.weights.synthetic import Synthetic

TOKENS = 3000
EVAL_TEXT = (NANO / "eval.txt").read_text("utf-8")


@pytest.fixture(autouse=True)
def short_text(monkeypatch):
    read = plans.read_text
    monkeypatch.setattr(plans, "read_text", lambda path, tokenizer: read(path, tokenizer, max_tokens=TOKENS))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    """A short text in the alphabet of the small checkpoints."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("<|endoftext|>".join(f"{n} + {n * 7} = {n * 8}, and so on. " * 3 for n in range(12)))
    return path


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (info.dtype, info.shape) for name, info in checkpoint.open(folder).tensors.items()}


def weights(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    for param, weight in checkpoint.open(folder).weights():
        yield param.name, codecs.dequantize(weight)


def test_the_bundled_model_loses_less_than_half(tmp_path):
    """On text that calibration did not see, and in the same files as without."""
    plain, calibrated = tmp_path / "plain", tmp_path / "calibrated"
    mlx_gptoss.convert(NANO, plain, "mlx-4bit")
    report = mlx_gptoss.convert(NANO, calibrated, "mlx-4bit", calibrate=True)
    assert tensors(calibrated) == tensors(plain)
    assert (calibrated / "config.json").read_text() == (plain / "config.json").read_text()
    assert report.bytes == checkpoint.open(plain).size_bytes
    documents = EVAL_TEXT.split("<|endoftext|>\n")
    text = "<|endoftext|>\n".join(documents[2::40])
    before, after = evaluate(plain, calibrated, against=NANO, text=text)
    assert after.against[0].kl_mean < 0.5 * before.against[0].kl_mean


@pytest.mark.parametrize("to", ["mlx-3bit", "mlx-mxfp4-q4", "int4-autoround"])
def test_formats(mini, tmp_path, text_file, to):
    """Same tensors, every matrix near its source, and what the source stores so already untouched."""
    source = mini / "mxfp4"
    mlx_gptoss.convert(source, tmp_path / "plain", to)
    mlx_gptoss.convert(source, tmp_path / "out", to, calibrate=text_file)
    assert tensors(tmp_path / "out") == tensors(tmp_path / "plain")
    params = {param.name: param for param in checkpoint.open(source).params}
    before, plain, after = (dict(weights(folder)) for folder in (source, tmp_path / "plain", tmp_path / "out"))
    for name, param in params.items():
        changed = np.linalg.norm(after[name] - before[name])
        if param.role in ("norm", "sinks") or (to == "mlx-mxfp4-q4" and param.role == "experts"):
            assert changed == 0
        elif to == "int4-autoround" and param.role != "experts":
            assert np.array_equal(after[name], plain[name])
        elif param.is_matrix:
            assert changed < 0.6 * np.linalg.norm(before[name])
            assert param.role == "embed" or not np.array_equal(after[name], plain[name])


@pytest.mark.parametrize("source", ["fp8-dynamic", "nvfp4"])
def test_other_sources(mini, tmp_path, text_file, source):
    """Experts that the target does not calibrate are quantized as in a plain conversion."""
    mlx_gptoss.convert(mini / source, tmp_path / "plain", "mlx-mxfp4-q4")
    mlx_gptoss.convert(mini / source, tmp_path / "out", "mlx-mxfp4-q4", calibrate=text_file)
    assert tensors(tmp_path / "out") == tensors(tmp_path / "plain")
    plain, after = dict(weights(tmp_path / "plain")), dict(weights(tmp_path / "out"))
    assert all(np.array_equal(plain[name], after[name]) for name in plain if ".experts." in name)
    assert not np.array_equal(plain["layers.0.attention.q.weight"], after["layers.0.attention.q.weight"])


def test_codes_that_the_target_stores_so_are_kept(mini, tmp_path, text_file):
    mlx_gptoss.convert(mini / "int4-autoround", tmp_path / "out", "mlx-4bit", calibrate=text_file)
    before, after = dict(weights(mini / "int4-autoround")), dict(weights(tmp_path / "out"))
    assert all(np.array_equal(before[name], after[name]) for name in before if ".experts." in name)
    assert not np.array_equal(before["layers.0.attention.q.weight"], after["layers.0.attention.q.weight"])


def test_results_do_not_depend_on_threads(mini, tmp_path, text_file, monkeypatch):
    for workers in (1, 3):
        monkeypatch.setattr(memory, "cores", lambda count=workers: count)
        mlx_gptoss.convert(mini / "mxfp4", tmp_path / str(workers), "mlx-4bit", calibrate=text_file)
    one, three = ((tmp_path / str(n) / "model.safetensors").read_bytes() for n in (1, 3))
    assert one == three


# ---- interruptions


def test_an_interrupted_run_continues_after_the_last_layer(mini, tmp_path, text_file, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    mlx_gptoss.convert(mini / "mxfp4", whole, "mlx-4bit", calibrate=text_file)

    def stop(done: int, total: int, what: str) -> None:
        if what == "calibrating layer 1" and done > 0.6 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="continues after the 2 calibrated parts kept in"):
        mlx_gptoss.convert(mini / "mxfp4", out, "mlx-4bit", calibrate=text_file, progress=stop)
    run = []
    original = layers.Layer.run
    monkeypatch.setattr(layers.Layer, "run", lambda self, *streams: (run.append(self._index), original(self, *streams)))
    mlx_gptoss.convert(mini / "mxfp4", out, "mlx-4bit", calibrate=text_file)
    assert run == [1]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_another_text_starts_anew(mini, tmp_path, text_file, monkeypatch):
    def stop(done: int, total: int, what: str) -> None:
        if what == "calibrating layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="calibrated parts"):
        mlx_gptoss.convert(mini / "mxfp4", tmp_path / "out", calibrate=text_file, progress=stop)
    other = tmp_path / "other.txt"
    other.write_text("something else to read " * 20)
    first: list[str] = []
    mlx_gptoss.convert(
        mini / "mxfp4", tmp_path / "out", calibrate=other, progress=lambda done, total, what: first.append(what)
    )
    assert first[:2] == ["calibrating embed", "calibrating layer 0"]


@pytest.mark.slow
def test_a_killed_process_continues(mini, tmp_path, text_file):
    out, whole = tmp_path / "out", tmp_path / "whole"
    mlx_gptoss.convert(mini / "mxfp4", whole, "mlx-4bit", calibrate=text_file)
    code = (
        "import sys, time, mlx_gptoss\n"
        "def slow(done, total, what):\n"
        "    if what == 'calibrating layer 1': time.sleep(600)\n"
        "mlx_gptoss.convert(sys.argv[1], sys.argv[2], 'mlx-4bit', calibrate=sys.argv[3], progress=slow)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(mini / "mxfp4"), str(out), str(text_file)])
    kept = tmp_path / ".out.partial" / "calibration"
    while not (kept / "layer-0").is_dir() and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (kept / "layer-0").is_dir()
    parts: list[str] = []
    mlx_gptoss.convert(
        mini / "mxfp4", out, "mlx-4bit", calibrate=text_file, progress=lambda done, total, what: parts.append(what)
    )
    assert parts.count("calibrating layer 0") == 1 < parts.count("calibrating layer 1")
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


# ---- memory, few tokens, refusals


def test_memory_stays_below_what_the_plan_says(tmp_path):
    """Of arrays; the activations are files."""
    config = ModelConfig(
        num_hidden_layers=1, hidden_size=128, intermediate_size=192, num_attention_heads=8, num_key_value_heads=2,
        num_local_experts=8, vocab_size=512,
    )  # fmt: skip
    source = Synthetic(config, "mxfp4")
    rng = np.random.default_rng(0)
    text = CalibrationText(tuple(tuple(rng.integers(0, 512, 250).tolist()) for _ in range(4)))
    plan = plan_memory(config, text.tokens, 250)
    target = Target.of(source, recipe_of("mlx-4bit")[1], symmetric=False)
    tracemalloc.start()
    calibrating.calibrate(source, target, text, plan, tmp_path / "parts", lambda *_: None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < plan.total_bytes - memory._PROGRAM


@pytest.mark.parametrize("config", [GPT_OSS_20B, GPT_OSS_120B])
def test_memory_of_large_models(config, monkeypatch):
    """One layer in float32 and the activations before it."""
    monkeypatch.setattr(memory, "system_available", lambda: 10**12)
    monkeypatch.setattr(memory, "cores", lambda: 16)
    layer = 4 * sum(param.size for param in parameters(config) if param.layer == 0)
    activations = 2 * 4 * 65_536 * config.hidden_size
    assert plan_memory(config, 65_536, 2048).total_bytes < layer + activations + memory._PROGRAM


def test_experts_that_few_tokens_reach_see_others():
    own, share = np.array([3, 40]), np.array([0.5, 0.3], np.float32)
    tokens, given = _with_fill(own, share, 100, 10)
    assert tokens[:2].tolist() == [3, 40] and len(set(tokens.tolist())) == len(tokens) >= 9
    assert np.allclose(given[2:], 0.05 * 0.4)
    alone, one = _with_fill(np.array([], int), np.array([], np.float32), 100, 10)
    assert len(alone) == 10 and (one > 0).all()
    assert _with_fill(own, share, 100, 2)[0] is own
    assert sorted(_with_fill(np.arange(5), np.ones(5, np.float32), 5, 10)[0].tolist()) == [0, 1, 2, 3, 4]


def test_refusals(mini, tmp_path, text_file, monkeypatch):
    with pytest.raises(InvalidRequest, match="nvfp4 is not calibrated: choose mlx-4bit"):
        mlx_gptoss.convert(NANO, tmp_path / "a", "nvfp4", calibrate=True)
    with pytest.raises(InvalidRequest, match="mlx-8bit is not calibrated"):
        mlx_gptoss.convert(NANO, tmp_path / "a", "mlx-8bit", calibrate=True)
    with pytest.raises(InvalidRequest, match="leave out --search"):
        mlx_gptoss.convert(NANO, tmp_path / "a", "mlx-4bit", search="mse", calibrate=text_file)
    monkeypatch.setattr(memory, "system_available", lambda: 10**7)
    with pytest.raises(DoesNotFit, match=r"calibrating needs 0\.\d GB of memory, and 0\.0 GB are available"):
        mlx_gptoss.convert(NANO, tmp_path / "a", "mlx-4bit", calibrate=True)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_a_tokenizer(mini, tmp_path, text_file):
    for path in (mini / "mxfp4").iterdir():
        if path.name != "tokenizer.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json, which calibrating needs"):
        api.plan_calibration(tmp_path, "mlx-4bit", text_file)


def test_too_little_disk_space(tmp_path, text_file, monkeypatch):
    from mlx_gptoss.weights import convert as conversion

    class Usage:
        free = 3_000_000

    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(GptOssError, match="GB are free in"):
        mlx_gptoss.convert(NANO, tmp_path / "out", "mlx-4bit", calibrate=text_file)
