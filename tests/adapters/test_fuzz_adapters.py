"""Random damage to adapters of PEFT, Unsloth and mlx-lm: to the config, the header and the tensors. Each gives an
adapter or one CheckpointError, in little time and memory. The damage is that of tests/weights/damage.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from damage import fuzz
from safetensors.numpy import save_file

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights.adapters import open_adapter


def factors(rng, *shapes):
    return [(0.1 * rng.standard_normal(shape)).astype(np.float32) for shape in shapes]


def peft(config, rng):
    """Attention, router, and the experts as parameters, nested as PEFT nests them."""
    D, inner, E = config.hidden_size, config.intermediate_size, config.num_local_experts
    sizes = {"self_attn.q_proj": (D, config.q_size), "self_attn.k_proj": (D, config.kv_size), "mlp.router": (D, E)}
    pairs = {f"layers.0.{module}": factors(rng, (2, k), (n, 2)) for module, (k, n) in sizes.items()}
    pairs["layers.1.mlp.experts.base_layer"] = factors(rng, (2 * E, D), (2 * inner, 2 * E))
    pairs["layers.1.mlp.experts"] = factors(rng, (2 * E, inner), (D, 2 * E))
    extra = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.k_proj": 3}, "use_rslora": True}
    return *in_peft_form(pairs), extra | {"target_modules": ["q_proj"], "lora_dropout": 0.1}


def unsloth(config, rng):
    """A linear layer for each expert, and v of the attention in 16 bits."""
    D, inner = config.hidden_size, config.intermediate_size
    pairs = {"layers.0.self_attn.v_proj": [each.astype("f2") for each in factors(rng, (2, D), (config.kv_size, 2))]}
    for expert in range(config.num_local_experts):
        pairs[f"layers.0.mlp.experts.gate_up_projs.{expert}"] = factors(rng, (2, D), (2 * inner, 2))
        pairs[f"layers.1.mlp.experts.down_projs.{expert}"] = factors(rng, (2, inner), (D, 2))
    return *in_peft_form(pairs), {"auto_mapping": {"unsloth_fixed": True}}


def in_peft_form(pairs):
    stem = "base_model.model.model."
    tensors = {
        f"{stem}{name}.lora_{half}.weight": v for name, ab in pairs.items() for half, v in zip("AB", ab, strict=True)
    }
    return "adapter_model.safetensors", tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def mlx_lm(config, rng):
    D, inner, E = config.hidden_size, config.intermediate_size, config.num_local_experts
    pairs = {
        "self_attn.o_proj": factors(rng, (config.q_size, 2), (2, D)),
        "mlp.experts.up_proj": factors(rng, (E, 2, D), (E, inner, 2)),
        "mlp.experts.down_proj": factors(rng, (E, 2, inner), (E, D, 2)),
    }
    tensors = {
        f"model.layers.1.{name}.lora_{half}": values
        for name, ab in pairs.items()
        for half, values in zip("ab", ab, strict=True)
    }
    settings = {
        "fine_tune_type": "lora", "num_layers": 1, "model": "m", "iters": 10, "seed": 0,
        "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.o_proj"]},
    }  # fmt: skip
    return "adapters.safetensors", tensors, settings, {}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("rounds", [150, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [peft, unsloth, mlx_lm], ids=lambda make: make.__name__)
def test_damage_gives_one_clear_error(mini, tmp_path, make, rounds):
    model = mini / "mxfp4"
    file, tensors, settings, extra = make(checkpoints.open(model).config, np.random.default_rng(0))
    source = tmp_path / make.__name__  # whose name seeds the damage
    source.mkdir()
    save_file(tensors, source / file)
    (source / "adapter_config.json").write_text(json.dumps(settings | extra))
    found = fuzz(source, tmp_path, rounds, model)
    assert found["escaped"] == []
    assert rounds / 3 < found["refused"] < rounds  # some damage is harmless
    assert found["slowest"] < 5
    assert found["longest"] < 2000
    assert found["peak"] < 200e6


HUGE_CONFIGS = {
    "deep": "[" * 500_000 + "]" * 500_000,
    "a long number": '{"peft_type": "LORA", "r": ' + "9" * 10**6 + "}",
    "many patterns": json.dumps({"peft_type": "LORA", "r": 2, "rank_pattern": {f"a{n}": 1 for n in range(20_000)}}),
    "a pattern that takes for ever": json.dumps({"peft_type": "LORA", "r": 2, "rank_pattern": {"(a+)+$": 1}}),
    "a long text": json.dumps({"peft_type": "LORA", "r": 2, "base_model_name_or_path": "x" * 10**7}),
    "a long field": json.dumps({"peft_type": "LORA", "r": 2, "y" * 10**6: 1}),
}


@pytest.mark.parametrize("what", HUGE_CONFIGS)
def test_huge_configs_are_one_short_error(mini, tmp_path, what):
    config = checkpoints.open(mini / "mxfp4").config
    file, tensors, _, _ = peft(config, np.random.default_rng(0))
    save_file(tensors, tmp_path / file)
    (tmp_path / "adapter_config.json").write_text(HUGE_CONFIGS[what])
    with pytest.raises(CheckpointError) as told:
        open_adapter(tmp_path, config)
    assert len(str(told.value)) < 2000


def test_files_that_claim_more_than_they_have(mini, tmp_path):
    """Shapes of terabytes in a header of a few bytes."""
    config = checkpoints.open(mini / "mxfp4").config
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    size = 4 * 2**30 * config.hidden_size
    entry = {"dtype": "F32", "shape": [2**30, config.hidden_size], "data_offsets": [0, size]}
    text = json.dumps({name.format("A"): entry}).encode()
    (tmp_path / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    with pytest.raises(CheckpointError, match="truncated"):
        open_adapter(tmp_path, config)


def test_values_that_overflow_with_the_scale(mini, tmp_path):
    config = checkpoints.open(mini / "mxfp4").config
    for make in (unsloth, mlx_lm):
        file, tensors, settings, _ = make(config, np.random.default_rng(0))
        folder = tmp_path / make.__name__
        folder.mkdir()
        last = {"unsloth": "down_projs.0.lora_B.weight", "mlx_lm": "down_proj.lora_b"}[make.__name__]
        for name in tensors:
            if name.endswith(last):
                tensors[name] = np.full_like(tensors[name], 3e38)
        save_file(tensors, folder / file)
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        adapter = open_adapter(folder, config)
        with pytest.raises(CheckpointError, match="not finite"):
            adapter.stacked(["layers.1.experts.down"])
