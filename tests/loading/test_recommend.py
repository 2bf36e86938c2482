"""Which format is recommended: the rule's order, on every kind of experts, as memory shrinks."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from mlx_gptoss import api
from mlx_gptoss.backends import mlx
from mlx_gptoss.errors import DoesNotFit
from mlx_gptoss.loading.memory import plan_memory
from mlx_gptoss.loading.recommend import derived_bytes, recommend
from mlx_gptoss.weights import checkpoint
from mlx_gptoss.weights.convert import convert

PLENTY = 10**12


def advice(folder, available: int = PLENTY, sizes=None, context=None):
    opened = checkpoint.open(folder)
    plan = plan_memory(opened.config, opened.size_bytes + derived_bytes(opened), available, activation_bytes=2)
    return recommend(opened, plan, sizes or api.sizes_in_other_formats(opened), context)


def room_for(folder, weights: int, context: int) -> int:
    """The memory in which exactly these weights fit with this context."""
    opened = checkpoint.open(folder)
    return plan_memory(opened.config, weights, 0, activation_bytes=2, context=context).needed_bytes


@pytest.mark.parametrize("source", ["mxfp4", "mxfp4-original", "gguf/model.gguf", "nvfp4-bf16"])
def test_experts_from_mxfp4_are_kept(mini, source):
    """Also if they were decoded to bfloat16, as in nvfp4-bf16."""
    best = advice(mini / source)
    assert (best.format, best.as_is) == ("mlx-mxfp4-q8", False)


def test_experts_trained_in_bfloat16_are_not_taken_for_mxfp4(mini, tmp_path):
    convert(mini / "fp8-dynamic", tmp_path / "bf16", "bf16")
    best = advice(tmp_path / "bf16")
    assert (best.format, best.as_is) == ("mlx-8bit", False)
    room = room_for(tmp_path / "bf16", best.size_bytes, 2048) - 1
    assert advice(tmp_path / "bf16", room).format == "mlx-4bit"


@pytest.mark.parametrize("source", ["fp8-dynamic", "int4-autoround", "nvfp4", "mlx-4bit"])
def test_other_quantized_checkpoints_run_as_they_are(mini, source):
    best = advice(mini / source)
    assert best.as_is and best.size_bytes == checkpoint.open(mini / source).size_bytes


def test_derived_biases_must_fit_as_well(mini):
    """AutoRound's biases: if only the file itself fits, a format without derived biases is recommended."""
    opened = checkpoint.open(mini / "int4-autoround")
    assert derived_bytes(opened) > 1000
    enough = room_for(mini / "int4-autoround", opened.size_bytes + derived_bytes(opened), 2048)
    assert advice(mini / "int4-autoround", enough, context=2048).as_is
    assert advice(mini / "int4-autoround", enough - 1, context=2048).format == "mlx-4bit"


@pytest.mark.parametrize("target", ["mlx-mxfp4-q8", "mlx-mxfp4-q4"])
def test_small_checkpoints_run_as_they_are(mini, tmp_path, target):
    convert(mini / "mxfp4", tmp_path / "out", target)
    assert advice(tmp_path / "out").as_is


def test_with_less_memory_a_format_with_fewer_bits_is_recommended(mini):
    sizes = {"mlx-mxfp4-q8": 700_000, "mlx-mxfp4-q4": 500_000, "mlx-4bit": 100}
    assert checkpoint.open(mini / "mxfp4").config.max_position_embeddings > 8192
    rooms = [
        (room_for(mini / "mxfp4", 700_000, 8192), "mlx-mxfp4-q8", 8192),
        (room_for(mini / "mxfp4", 700_000, 8192) - 1, "mlx-mxfp4-q4", 8192),
        (room_for(mini / "mxfp4", 500_000, 8192) - 1, "mlx-mxfp4-q8", 2048),
        (room_for(mini / "mxfp4", 700_000, 2048) - 1, "mlx-mxfp4-q4", 2048),
    ]
    for room, wanted, context in rooms:
        best = advice(mini / "mxfp4", room, sizes)
        assert (best.format, best.context) == (wanted, context)
    assert advice(mini / "mxfp4", room_for(mini / "mxfp4", 500_000, 2048) - 1, sizes) is None


def test_an_explicit_context_must_fit(mini):
    sizes = {"mlx-mxfp4-q8": 700_000, "mlx-mxfp4-q4": 500_000}
    room = room_for(mini / "mxfp4", 600_000, 20_000)
    assert advice(mini / "mxfp4", room, sizes, 20_000).format == "mlx-mxfp4-q4"
    assert advice(mini / "mxfp4", room, sizes, 40_000) is None


def show(*words) -> str:
    command = [sys.executable, "-m", "mlx_gptoss_cli", "show", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_show_prints_the_recommendation(mini):
    assert "Recommended here: mlx-mxfp4-q8 (" in show(mini / "mxfp4")
    assert f"mlx-gptoss convert {mini / 'mxfp4'} DEST --to mlx-mxfp4-q8" in show(mini / "mxfp4")
    assert "run it as it is" in show(mini / "mlx-4bit")
    assert json.loads(show(mini / "mxfp4", "--json"))["recommended"] == "mlx-mxfp4-q8"
    assert json.loads(show(mini / "nvfp4", "--json"))["recommended"] == "nvfp4"
    assert "fake-quantized" in json.loads(show(mini / "nvfp4-bf16", "--json"))["note"]


def test_formats_that_cannot_hold_the_model_are_skipped(mini, monkeypatch):
    """With rows that groups of 64 do not divide, int4-autoround cannot be written; other formats can."""
    opened = checkpoint.open(mini / "mxfp4")
    assert "int4-autoround" in api.sizes_in_other_formats(opened)
    params = tuple(
        replace(param, shape=(*param.shape[:-1], 96)) if param.kind == "experts.down.weight" else param
        for param in opened.params
    )
    monkeypatch.setattr(opened, "params", params)
    sizes = api.sizes_in_other_formats(opened)
    assert "int4-autoround" not in sizes and "mlx-4bit" in sizes


def test_a_refusal_to_load_names_the_same_format(mini, monkeypatch):
    opened = checkpoint.open(mini / "mxfp4")
    size = api.sizes_in_other_formats(opened)["mlx-mxfp4-q8"]
    monkeypatch.setattr(mlx, "available_memory", lambda device=None: 0)  # plan for the least
    room = api.memory_plan(opened, mlx, size, device="cpu", max_context=2048).needed_bytes
    monkeypatch.setattr(mlx, "available_memory", lambda device=None: room)
    with pytest.raises(DoesNotFit, match=r"convert it with --to mlx-mxfp4-q8 \("):
        api.load(mini / "mxfp4", backend="mlx", device="cpu", max_context=2048)
