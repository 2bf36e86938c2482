"""`mlx-gptoss show` of adapters: with a model, and alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_peft import CASES, rewrite

from mlx_gptoss.loading.plan import NANO
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights.adapters import open_adapter
from mlx_gptoss.weights.adapters.summary import summarize

ATTENTION = [f"self_attn.{part}_proj" for part in "qkvo"]
EXPERTS = [f"mlp.experts.{part}_proj" for part in ("gate", "up", "down")]
LAYERS = (0, 1, 2)


@pytest.fixture
def config(tiny):
    return checkpoints.open(tiny).config


def show(*words, status=0):
    words = [sys.executable, "-m", "mlx_gptoss_cli", "show", *map(str, words)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    return done.stderr if status else json.loads(done.stdout) if "--json" in words else done.stdout


def a_published_one(folder, tensors, **fields):
    """An adapter in PEFT's files with random factors. tensors: module -> inputs, outputs."""
    rng, found = np.random.default_rng(0), {}
    for module, (inputs, outputs) in tensors.items():
        stem = f"base_model.model.model.layers.{module}"
        found[f"{stem}.lora_A.weight"] = rng.standard_normal((2, inputs)).astype("f4")
        found[f"{stem}.lora_B.weight"] = rng.standard_normal((outputs, 2)).astype("f4")
    folder.mkdir()
    save_file(found, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "base_model_name_or_path": "unsloth/gpt-oss-20b"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | fields))
    return folder


EXPECTED = {  # ranks, scales, targets
    "both": ((4,), (1.5,), dict.fromkeys([*ATTENTION, *EXPERTS], LAYERS)),
    "rslora": ((4,), (3.0,), dict.fromkeys([*ATTENTION, *EXPERTS], LAYERS)),
    "router": ((4,), (1.5,), dict.fromkeys(["self_attn.q_proj", "mlp.router"], LAYERS)),
    "layers_to_transform": ((4,), (1.5,), dict.fromkeys(["self_attn.q_proj", "self_attn.o_proj"], (1,))),
    "layer-limited": ((4,), (1.5,), {"self_attn.v_proj": LAYERS} | dict.fromkeys(EXPERTS, (1,))),
    "rank_pattern": (
        (2, 3, 4, 7),
        tuple(sorted({6 / 7, 6 / 4, 6 / 2, 6 / 3, 11 / 4, 5 / 4})),
        dict.fromkeys([*ATTENTION, *EXPERTS], LAYERS),
    ),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_what_peft_has_saved(made_by_peft, config, case):
    folder = made_by_peft(case)[0]
    found, tensors = summarize(folder, {"it": config}), load_file(folder / "adapter_model.safetensors")
    assert (found.kind, found.base_model, found.alpha, found.rslora) == ("PEFT", "", 6, case == "rslora")
    assert (found.ranks, found.scales, found.targets) == EXPECTED[case]
    assert found.parameters == sum(values.size for values in tensors.values())
    assert found.size_bytes == 4 * found.parameters
    assert (found.unused_fields, found.unused_files, found.misfits) == ((), (), {"it": None})


@pytest.mark.parametrize("case", CASES)
def test_the_memory_is_that_of_the_factors_on_a_device(made_by_peft, config, case):
    """As the backends stack them: b of q, k and v has rows for all of them, whichever of them are trained."""
    folder, found = made_by_peft(case)[0], 0
    adapter = open_adapter(folder, config)
    for layer in LAYERS:
        for parts in (["attention.q", "attention.k", "attention.v"], ["attention.o"], ["router"],
                      ["experts.gate", "experts.up"], ["experts.down"]):  # fmt: skip
            factors = adapter.stacked([f"layers.{layer}.{part}" for part in parts])
            found += 0 if factors is None else factors.a.size + factors.b.size
    assert found == adapter.nbytes(1) == summarize(folder, {"it": config}).device_values


def test_what_is_not_used(made_by_peft, config, tmp_path):
    folder = shutil.copytree(made_by_peft("both")[0], tmp_path / "both")
    rewrite(folder, lora_dropout=0.1, loftq_config={"bits": 4}, auto_mapping={"unsloth_fixed": True})
    rewrite(folder, base_model_name_or_path="a\x1b[31m" + "b" * 300)
    (folder / "tokenizer.json").write_text("{}")
    found = summarize(folder, {"it": config})
    assert found.kind == "Unsloth"
    assert (found.unused_fields, found.unused_files) == (("loftq_config", "lora_dropout"), ("tokenizer.json",))
    assert found.base_model.startswith("a\\x1b[31mbbb") and len(found.base_model) < 210


def test_of_mlx_lm(config, tmp_path):
    """The scale is not divided by the rank; settings of the training have no effect."""
    name = "model.layers.2.self_attn.q_proj"
    tensors = {f"{name}.lora_a": np.ones((64, 3), "f4"), f"{name}.lora_b": np.ones((3, 256), "f4")}
    save_file(tensors, tmp_path / "adapters.safetensors")
    save_file(tensors, tmp_path / "0000100_adapters.safetensors")
    parameters = {"rank": 3, "scale": 20.0, "dropout": 0.5}
    settings = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters, "model": "m", "iters": 100}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    found = summarize(tmp_path, {"it": config, "other": checkpoints.open(NANO).config})
    assert (found.kind, found.base_model, found.ranks, found.alpha, found.scales) == ("mlx-lm", "m", (3,), None, (20,))
    assert found.targets == {"self_attn.q_proj": (2,)} and found.parameters == 3 * (64 + 256)
    assert found.unused_fields == ("dropout", "iters") and found.unused_files == ("0000100_adapters.safetensors",)
    assert found.misfits["it"] is None and not found.fits and "for another model" in found.misfits["other"]


def test_alone_it_is_compared_with_the_published_models(tmp_path):
    attention = a_published_one(tmp_path / "attention", {"3.self_attn.q_proj": (2880, 4096)}, lora_alpha=16)
    report = show(attention, "--json", "--backend", "mlx", "--dtype", "bfloat16")
    assert (report["kind"], report["base_model"], report["scales"]) == ("PEFT", "unsloth/gpt-oss-20b", [8])
    assert report["fits"] == {"gpt-oss-20b": True, "gpt-oss-120b": True} and not report["misfits"]
    assert report["memory_bytes"] == 2 * 2 * (2880 + 4096 + 2 * 512)
    experts = {f"1.mlp.experts.gate_up_projs.{expert}": (2880, 5760) for expert in (0, 100)}
    text = show(a_published_one(tmp_path / "experts", experts, alpha_pattern={"gate_up_projs.100": 6}))
    assert "LoRA by Unsloth, for unsloth/gpt-oss-20b" in text and "scale 3, 4" in text
    assert "mlp.experts.gate_proj, mlp.experts.up_proj in layer 1" in text
    assert "gpt-oss-20b: the adapter does not fit: " in text and "gpt-oss-120b: the adapter fits" in text


def test_with_a_model(tiny, made_by_peft):
    given = ["--adapter", f"a={made_by_peft('both')[0]}", "--adapter", made_by_peft("attention")[0], "--json"]
    report, plain = show(tiny, *given, "--ranks", 2), show(tiny, "--json")
    first, second = report["adapters"]
    assert (first["name"], second["name"]) == ("a", "attention") and first["fits"] == {str(tiny): True}
    assert report["memory"]["adapter_bytes"] == first["memory_bytes"] + second["memory_bytes"] > 0
    grown = report["memory"]["needed_bytes"] - plain["memory"]["needed_bytes"]
    assert grown == report["memory"]["adapter_bytes"] and plain["memory"]["adapter_bytes"] == 0
    held = [rank["memory"]["adapter_bytes"] for rank in report["ranks"]]
    assert all(0 < each < report["memory"]["adapter_bytes"] < 2.5 * each for each in held)


def test_one_that_does_not_fit_is_not_counted(made_by_peft):
    report = show("nano", "--adapter", made_by_peft("both")[0], "--json")
    assert report["adapters"][0]["fits"] == {"nano": False} and report["adapters"][0]["memory_bytes"] is None
    assert report["memory"]["adapter_bytes"] == 0 and "for another model" in report["adapters"][0]["misfits"]["nano"]


def test_wrong_uses_are_told(made_by_peft, tmp_path):
    assert "is for a model: show MODEL --adapter" in show(made_by_peft("both")[0], "--context", 9, status=2)
    assert "no folder '/nowhere'" in show("nano", "--adapter", "/nowhere", status=1)
    (tmp_path / "adapter_config.json").write_text("[]")
    assert "is not a JSON object" in show(tmp_path, status=1)
