"""Every dialect of config.json gives the same sizes; implausible ones give one clear error."""

from __future__ import annotations

import pytest

from mlx_gptoss.config import GPT_OSS_20B, GPT_OSS_120B, PRESETS
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights.config_json import published, read_config


@pytest.mark.parametrize("name", PRESETS)
def test_published_dialect_round_trips(name):
    assert read_config(published(PRESETS[name])) == PRESETS[name]


def test_transformers_5_dialect():
    data = published(GPT_OSS_20B)
    scaling = data.pop("rope_scaling")
    data["rope_parameters"] = {**scaling, "rope_theta": data.pop("rope_theta")}
    data["dtype"] = data.pop("torch_dtype")
    del data["experts_per_token"], data["initial_context_length"]
    assert read_config(data) == GPT_OSS_20B


def test_original_dialect():
    data = {
        "num_hidden_layers": 36, "num_experts": 128, "experts_per_token": 4, "vocab_size": 201088, "hidden_size": 2880,
        "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64, "num_attention_heads": 64,
        "num_key_value_heads": 8, "sliding_window": 128, "initial_context_length": 4096, "rope_theta": 150000,
        "rope_scaling_factor": 32.0, "rope_ntk_alpha": 1, "rope_ntk_beta": 32,
    }  # fmt: skip
    config = read_config(data)
    assert config.yarn == GPT_OSS_120B.yarn
    assert config.max_position_embeddings == 131072
    assert (config.num_local_experts, config.layer_types) == (128, GPT_OSS_120B.layer_types)


def test_truncate_defaults_to_false_and_layers_alternate():
    data = published(GPT_OSS_20B)
    del data["rope_scaling"]["truncate"], data["layer_types"]
    config = read_config(data)
    assert not config.yarn.truncate
    assert config.layer_types[:3] == ("sliding_attention", "full_attention", "sliding_attention")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "only gpt_oss"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "2880"}, "positive integer"),
        ({"hidden_size": 2880.0}, "positive integer"),
        ({"num_local_experts": 0}, "positive integer"),
        ({"vocab_size": 2**40}, "positive integer"),
        ({"num_hidden_layers": True}, "positive integer"),
        ({"num_experts_per_tok": 64}, "but only 32"),
        ({"num_key_value_heads": 7}, "cannot share"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rms_norm_eps": float("nan")}, "positive number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rope type"),
        ({"rope_scaling": 3}, "must be an object"),
        ({"eos_token_id": "x"}, "token id"),
    ],
)
def test_implausible_configs_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        read_config({**published(GPT_OSS_20B), **change})


def test_a_config_must_be_an_object():
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_config([1])
