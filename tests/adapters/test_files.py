"""Files of adapters: the other layouts of experts give the same factors as PEFT's own, and what is no LoRA, or is for
another model, is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_peft import EXPERT_COUNT, rewrite

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights.adapters import open_adapter

PREFIX = "base_model.model.model."
EXPERT_NAMES = [f"layers.{layer}.experts.{part}" for layer in range(3) for part in ("gate", "up", "down")]


@pytest.fixture
def config(tiny):
    return checkpoints.open(tiny).config


@pytest.fixture
def copied(made_by_peft, tmp_path):
    """copied(case): a copy of an adapter that a test may change."""

    def copy(case):
        return shutil.copytree(made_by_peft(case)[0], tmp_path / case)

    return copy


def deltas(adapter):
    return {name: adapter.delta(name) for name in EXPERT_NAMES}


def same(a, b):
    return all(np.allclose(a[name], b[name], atol=1e-6) for name in EXPERT_NAMES)


def swapped(tensors):
    """Expert parameters as PEFT has them for [E, out, in]: A and B exchange their inputs and outputs."""
    found = {}
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        other = name.replace("lora_A", "lora_B")
        a, b = tensors[name], tensors[other]
        a = a.reshape(EXPERT_COUNT, -1, a.shape[1])  # [E, r, in]
        b = b.reshape(len(b), -1, EXPERT_COUNT)  # [out, r, E]
        found[name] = b.transpose(2, 1, 0).reshape(-1, len(b))
        found[other] = a.transpose(2, 1, 0).reshape(a.shape[2], -1)
    return found


def test_the_index_of_the_expert_is_the_fastest_of_b(made_by_peft, config):
    folder = made_by_peft("experts")[0]
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"{PREFIX}layers.1.mlp.experts.lora_{half}.weight"] for half in "AB")
    expected = [
        6 / 4 * sum(np.outer(b[:, r * EXPERT_COUNT + e], a[e * 4 + r]) for r in range(4)) for e in range(EXPERT_COUNT)
    ]
    assert np.allclose(open_adapter(folder, config).delta("layers.1.experts.down"), expected, atol=1e-6)


def test_both_conventions_of_peft(copied, made_by_peft, config):
    folder = copied("experts")
    rewrite(folder, swapped)
    assert same(deltas(open_adapter(folder, config)), deltas(open_adapter(made_by_peft("experts")[0], config)))


@pytest.mark.parametrize("layout", ["plain", "swapped"])
def test_square_down_projections_take_the_layout_of_gate_up_or_of_the_config(tiny, tmp_path, config, layout):
    """As in the published models, whose hidden and intermediate sizes are equal."""
    square = replace(config, intermediate_size=config.hidden_size)
    rng, (D, E) = np.random.default_rng(0), (config.hidden_size, EXPERT_COUNT)

    def pair(inputs, outputs):
        if layout == "swapped":
            inputs, outputs = outputs, inputs
        return rng.standard_normal((2 * E, inputs)).astype("f4"), rng.standard_normal((outputs, 2 * E)).astype("f4")

    gate_up, down = pair(D, 2 * D), pair(D, D)
    stem = f"{PREFIX}layers.0.mlp.experts"
    tensors = {f"{stem}.lora_A.weight": down[0], f"{stem}.lora_B.weight": down[1]}
    both = {f"{stem}.base_layer.lora_A.weight": gate_up[0], f"{stem}.base_layer.lora_B.weight": gate_up[1]}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    folder = tmp_path / "square"
    folder.mkdir()
    save_file(tensors | both, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    a, b = down[0].reshape(E, 2, D), down[1].reshape(D, 2, E)
    expected = np.einsum("ore,eri->eoi" if layout == "plain" else "ire,ero->eoi", b, a)
    assert np.allclose(open_adapter(folder, square).delta("layers.0.experts.down"), expected, atol=1e-5)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="fit both of PEFT's layouts"):
        open_adapter(folder, square)
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"expert_layout": layout}))
    assert np.allclose(open_adapter(folder, square).delta("layers.0.experts.down"), expected, atol=1e-5)


def per_expert(tensors):
    """Unsloth's form: a linear layer for every expert."""
    found = {}
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        other = name.replace("lora_A", "lora_B")
        a, b = tensors[name], tensors[other]
        a, b = a.reshape(EXPERT_COUNT, -1, a.shape[1]), b.reshape(len(b), -1, EXPERT_COUNT)
        kind = "gate_up_projs" if ".base_layer" in name else "down_projs"
        stem = name.replace(".base_layer", "").replace(".lora_A.weight", "")
        for e in range(EXPERT_COUNT):
            found[f"{stem}.{kind}.{e}.lora_A.weight"] = a[e]
            found[f"{stem}.{kind}.{e}.lora_B.weight"] = b[:, :, e]
    return found


def test_a_linear_layer_per_expert(copied, made_by_peft, config):
    folder = copied("experts")
    rewrite(folder, per_expert)
    assert same(deltas(open_adapter(folder, config)), deltas(open_adapter(made_by_peft("experts")[0], config)))


REFUSED = {
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "bias='all'": {"bias": "all"},
    "IA3": {"peft_type": "IA3"},
    "pissa": {"init_lora_weights": "pissa_niter_4"},
    "tomorrow": {"tomorrow": 3},
    "use_qalora": {"use_qalora": True},
    "trainable_token_indices": {"trainable_token_indices": [1]},
    "the key": {"rank_pattern": {"(a+)+$": 3}},
    "config says 5": {"r": 5},
    "lora_alpha must": {"lora_alpha": float("inf")},
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_its_name(copied, config, what):
    folder = copied("attention")
    rewrite(folder, **REFUSED[what])
    with pytest.raises(CheckpointError, match=re.escape(what)):
        open_adapter(folder, config)


def test_tensors_that_are_refused(copied, config):
    name = f"{PREFIX}layers.0.self_attn.q_proj.lora_A.weight"
    changes = {
        "no LoRA of a layer": lambda tensors: {**tensors, "base_model.model.lm_head.lora_A.weight": tensors[name]},
        "only one half": lambda tensors: {n: values for n, values in tensors.items() if n != name},
        "for another model": lambda tensors: {**tensors, name: tensors[name][:, 1:]},
        "has rank 0": lambda tensors: {**tensors, name: np.float32(1)},
        "not F32, F16 or BF16": lambda tensors: {**tensors, name: tensors[name].astype("i4")},
        "does not have": lambda tensors: {n.replace("layers.2", "layers.9"): values for n, values in tensors.items()},
        "neither attention": lambda tensors: {n.replace("q_proj", "norm"): values for n, values in tensors.items()},
    }
    file = (folder := copied("attention")) / "adapter_model.safetensors"
    original = load_file(file)
    for message, change in changes.items():
        file.unlink()
        save_file({n: np.asarray(values, order="C") for n, values in change(original).items()}, file)
        with pytest.raises(CheckpointError, match=message):
            open_adapter(folder, config)


@pytest.mark.parametrize("scale", ["1" + 400 * "0", "NaN", "true", '"2"', "null"])
def test_a_scale_of_mlx_lm_that_is_no_number_of_use(tmp_path, config, scale):
    save_file({"x": np.ones(1, "f4")}, tmp_path / "adapters.safetensors")
    settings = f'{{"fine_tune_type": "lora", "lora_parameters": {{"rank": 1, "scale": {scale}}}}}'
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(CheckpointError, match="needs a scale"):
        open_adapter(tmp_path, config)


def test_values_that_are_not_finite(copied, config):
    folder = copied("attention")
    name = f"{PREFIX}layers.0.self_attn.q_proj.lora_A.weight"
    rewrite(folder, lambda tensors: {**tensors, name: np.full_like(tensors[name], np.nan)})
    with pytest.raises(CheckpointError, match="not finite"):
        open_adapter(folder, config).stacked(["layers.0.attention.q"])


def test_a_pickle_is_not_opened(copied, config):
    folder = copied("attention")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="safe_serialization=True"):
        open_adapter(folder, config)


def test_an_adapter_in_place_of_a_model(made_by_peft):
    with pytest.raises(CheckpointError, match="--adapter NAME="):
        checkpoints.open(made_by_peft("attention")[0])


def test_damaged_files(copied, config):
    """Any byte changed or cut off: an error of ours, or an adapter that reads."""
    folder = copied("both")
    rng = np.random.default_rng(0)
    for file in (folder / "adapter_model.safetensors", folder / "adapter_config.json"):
        whole = file.read_bytes()
        for _ in range(150):
            at = int(rng.integers(0, min(len(whole), 9000)))
            cut = rng.random() < 0.3
            file.write_bytes(whole[:at] if cut else whole[:at] + bytes([int(rng.integers(256))]) + whole[at + 1 :])
            try:
                adapter = open_adapter(folder, config)
                for name in adapter.entries:
                    adapter.stacked([name])
            except CheckpointError:
                continue
        file.write_bytes(whole)
