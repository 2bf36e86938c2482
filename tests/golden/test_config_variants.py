"""Every variation of config.json changes our logits as it changes transformers', in float32."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mlx_gptoss
from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.loading.recommend import derived_bytes
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights.config_json import read_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_local_experts": 6, "num_experts_per_tok": 4, "vocab_size": 96, "num_hidden_layers": 2, "sliding_window": 8,
    "max_position_embeddings": 4096, "eos_token_id": 95,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 128, "beta_fast": 32.0, "beta_slow": 1.0,
    "truncate": False, "rope_theta": 150000.0,
}  # fmt: skip
VARIANTS = {
    "published": {"rope_parameters": YARN},
    "attention_factor": {"rope_parameters": {**YARN, "attention_factor": 0.7}},
    "mscale": {"rope_parameters": {**YARN, "mscale": 0.6, "mscale_all_dim": 1.4}},
    "mscale alone": {"rope_parameters": {**YARN, "mscale": 0.6}},
    "truncate": {"rope_parameters": {**YARN, "truncate": True}},
    "another factor": {"rope_parameters": {**YARN, "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0}},
    "plain RoPE": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "no rope_scaling": {"rope_parameters": None},
    "tied embeddings": {"rope_parameters": YARN, "tie_word_embeddings": True},
    "no attention bias": {"rope_parameters": YARN, "attention_bias": False},
    "swiglu": {"rope_parameters": YARN, "swiglu_alpha": 1.2, "swiglu_limit": 1.5},
    "layer_types": {"rope_parameters": YARN, "layer_types": ["full_attention", "sliding_attention"]},
    "eps": {"rope_parameters": YARN, "rms_norm_eps": 1e-2},
}
IDS = np.random.default_rng(0).integers(0, 95, 60).tolist()


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, tmp_path_factory):
    """(folder written by transformers, its float32 logits)"""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**SIZES | VARIANTS[request.param])
    config._attn_implementation = "eager"
    model = transformers.GptOssForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                spread = 0.5 if weight.ndim == 1 else 2.0 / weight.shape[-1] ** 0.5
                weight.copy_(torch.randn_like(weight) * spread)
        logits = model(torch.tensor([IDS])).logits[0].numpy()
    folder = tmp_path_factory.mktemp("variant")
    model.save_pretrained(folder)
    return folder, logits


@pytest.fixture(params=BACKENDS)
def backend(request, backend_module):
    backend_module(request.param)
    return request.param


def logits_of(folder, backend, device_of):
    with mlx_gptoss.load(folder, backend=backend, device=device_of(backend), dtype="float32") as model:
        return model.logits(IDS)


def test_logits_are_those_of_transformers(case, backend, device_of, relative_error):
    folder, expected = case
    assert relative_error(logits_of(folder, backend, device_of), expected) < 1e-5


@pytest.mark.parametrize("to", ["bf16", "mlx-8bit"])
def test_conversion_writes_the_same_network(case, tmp_path, to):
    """Also where the source leaves something out: what is written has it."""
    folder, _ = case
    mlx_gptoss.convert(folder, tmp_path / to, to=to)
    source, written = checkpoints.open(folder), checkpoints.open(tmp_path / to)
    assert written.config == source.config
    assert {p.name for p in written.params} == {p.name for p in source.params}


def test_the_memory_plan_counts_a_tied_matrix_twice(tmp_path):
    """Both backends load it as embedding and as lm_head."""
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES | VARIANTS["tied embeddings"]))
    model.save_pretrained(tmp_path)
    source = checkpoints.open(tmp_path)
    assert derived_bytes(source) == source.tensors["model.embed_tokens.weight"].nbytes > 0


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    torch.manual_seed(1)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES | VARIANTS["published"])).float()
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def edited(published, tmp_path):
    """edited(rename=..., extra=..., **fields): a copy with other tensor names, more tensors, or other fields."""

    def edit(rename=lambda name: name, extra=(), **fields):
        folder = shutil.copytree(published, tmp_path / "edited")
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file({**tensors, **{name: np.ones(4, np.float32) for name in extra}}, folder / "model.safetensors")
        return folder

    return edit


@pytest.mark.parametrize("prefix", ["language_model.", "base_model.model.", "module."])
def test_a_prefix_of_all_names(edited, published, device_of, prefix):
    folder = edited(rename=lambda name: prefix + name)
    assert np.array_equal(logits_of(folder, "mlx", device_of), logits_of(published, "mlx", device_of))


def test_tensors_that_no_engine_uses(edited, published, device_of):
    extra = ["model.layers.0.self_attn.rotary_emb.inv_freq", "v_head.summary.weight", "v_head.summary.bias"]
    extra += ["model.layers.1.self_attn.k_scale", "model.layers.1.self_attn.v_scale"]
    folder = edited(extra=extra)
    assert np.array_equal(logits_of(folder, "mlx", device_of), logits_of(published, "mlx", device_of))
    note = checkpoints.open(folder).summary().note
    assert "v_head.summary.bias, v_head.summary.weight" in note and "inv_freq" not in note


def test_an_unknown_tensor_is_an_error(edited):
    with pytest.raises(CheckpointError, match=r"1 unknown: model\.layers\.0\.mlp\.shared_expert\.weight"):
        checkpoints.open(edited(extra=["model.layers.0.mlp.shared_expert.weight"]))


def test_biases_that_the_config_denies_are_an_error(edited):
    """transformers would leave them out."""
    with pytest.raises(CheckpointError, match="attention_bias is false"):
        checkpoints.open(edited(attention_bias=False))


def test_missing_biases_are_an_error_if_the_config_has_them(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: model\.layers\.0\.self_attn\.q_proj\.bias"):
        checkpoints.open(folder)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rope_parameters": None}, "no rope_scaling: YaRN with factor 32"),
        ({"rope_parameters": {k: v for k, v in YARN.items() if k != "truncate"}}, "does not say truncate"),
        ({"my_new_field": 0.5}, "not known here and were not used: my_new_field"),
    ],
    ids=["no rope_scaling", "no truncate", "unknown"],
)
def test_show_says_what_was_taken(edited, fields, said):
    assert said in checkpoints.open(edited(**fields)).summary().note


def test_show_has_nothing_to_say_about_a_published_config(mini):
    assert checkpoints.open(mini / "mxfp4").summary().note == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"partial_rotary_factor": 0.5}, {"final_logit_softcapping": 30.0}, {"num_shared_experts": 1},
        {"routed_scaling_factor": 2.5}, {"scoring_func": "sigmoid"}, {"hidden_act": "gelu"}, {"norm_topk_prob": False},
        {"use_qk_norm": True}, {"attention_multiplier": 1.0}, {"moe_intermediate_size": 16}, {"logits_scaling": 8},
        {"use_sliding_window": False}, {"sliding_window": None}, {"rope_parameters": {**YARN, "low_freq_factor": 1}},
        {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}, {"rope_parameters": {**YARN, "truncate": "no"}},
        {"rope_parameters": {"full_attention": YARN, "sliding_attention": YARN}},
        {"rope_parameters": {**YARN, "attention_factor": -1}},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_that_changes_numbers_is_honoured_or_refused(published, fields):
    config = json.loads((published / "config.json").read_text())
    read_config(config)
    with pytest.raises(CheckpointError, match=r"config\.json|rope"):
        read_config(config | fields)
