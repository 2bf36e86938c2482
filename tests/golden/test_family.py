"""Models whose layers differ in experts and windows (gpt-oss-puzzle, pruned models), on both backends."""

from __future__ import annotations

import family
import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights.config_json import read_config

GREEDY = Sampling(temperature=0)
EXPERTS, WINDOWS = [8, 4, 6, 8, 4], [8, None, 48, None, 8]
IDS = np.random.default_rng(1).integers(0, family.VOCAB - 1, 150).tolist()
BLOCKS = [{"num_local_experts": e, "sliding_window": w} for e, w in zip(EXPERTS, WINDOWS, strict=True)]
DIALECTS = {
    "block_configs": {
        "model_type": "gpt_oss_puzzle",
        "block_configs": BLOCKS,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in WINDOWS],
    },
    "lists": {"num_local_experts": EXPERTS, "sliding_window": WINDOWS},
}


@pytest.fixture(params=BACKENDS)
def backend(request, backend_module):
    backend_module(request.param)
    return request.param


@pytest.fixture(scope="module")
def tensors():
    return family.random_tensors(EXPERTS)


@pytest.fixture(scope="module")
def expected(tensors):
    return family.logits(tensors, WINDOWS, IDS)


@pytest.fixture
def folder(tmp_path, tensors):
    config = family.CONFIG | {"num_hidden_layers": len(EXPERTS)} | DIALECTS["block_configs"]
    return family.write_checkpoint(tmp_path / "puzzle", config, tensors)


@pytest.fixture
def load(backend, device_of):
    def load(folder, **options):
        return mlx_gptoss.load(folder, backend=backend, device=device_of(backend), dtype="float32", **options)

    return load


@pytest.mark.parametrize("dialect", DIALECTS)
def test_logits(tmp_path, tensors, expected, load, relative_error, dialect):
    config = family.CONFIG | {"num_hidden_layers": len(EXPERTS)} | DIALECTS[dialect]
    with load(family.write_checkpoint(tmp_path / dialect, config, tensors)) as model:
        assert model.config.experts == tuple(EXPERTS) and model.config.windows == tuple(WINDOWS)
        assert relative_error(model.logits(IDS), expected) < 1e-5


@pytest.mark.parametrize("length", [5, 40, 100])
@pytest.mark.parametrize("options", [{}, {"speculate": True}, {"slots": 3}], ids=str)
def test_greedy_text_and_its_logprobs(folder, tensors, load, length, options):
    """Windows of 8 and of 48 fill and turn while the text grows, in one slot and in several."""
    with load(folder, **options) as model:
        found = model.complete(IDS[:length], max_tokens=30, sampling=GREEDY)
    scores = family.logits(tensors, WINDOWS, [*IDS[:length], *found.ids])[length - 1 : -1]
    shifted = scores - scores.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    assert list(found.ids) == scores.argmax(-1).tolist()
    assert np.allclose(found.logprobs, logprobs[np.arange(len(found.ids)), found.ids], atol=1e-4)


@pytest.mark.parametrize("to", ["bf16", "mxfp4", "mlx-8bit"])
def test_conversion_keeps_the_layers(folder, tmp_path, to):
    source = checkpoints.open(folder)
    mlx_gptoss.convert(folder, tmp_path / to, to=to)
    written = checkpoints.open(tmp_path / to)
    assert written.config == source.config
    assert [p.shape for p in written.params] == [p.shape for p in source.params]


def test_the_memory_plan_counts_each_window(folder):
    from mlx_gptoss.loading.memory import plan_memory

    config = checkpoints.open(folder).config
    plan = plan_memory(config, 1000, 10**9, activation_bytes=4)
    assert plan.ring_bytes == 2 * config.kv_size * 4 * (8 + 48 + 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_configs": BLOCKS[:-1]}, "for each of the 5 layers"),
        ({"block_configs": [*BLOCKS[:-1], 3]}, "list of objects"),
        ({"block_configs": [{**BLOCKS[0], "ffn": {"no_op": True}}, *BLOCKS[1:]]}, "not supported"),
        ({"block_configs": [{**BLOCKS[0], "num_local_experts": 1}, *BLOCKS[1:]]}, "but only 1"),
        ({"block_configs": [{**BLOCKS[0], "sliding_window": None}, *BLOCKS[1:]]}, "contradict each other"),
        ({"block_configs": [{**BLOCKS[0], "sliding_window": -1}, *BLOCKS[1:]]}, "positive integer"),
    ],
)
def test_block_configs_that_contradict_themselves(change, message):
    config = family.CONFIG | {"num_hidden_layers": len(EXPERTS)} | DIALECTS["block_configs"]
    with pytest.raises(CheckpointError, match=message):
        read_config(config | change)


def test_experts_of_another_number_than_the_config_says(tmp_path, tensors):
    config = family.CONFIG | {"num_hidden_layers": len(EXPERTS), "num_local_experts": 8}
    with pytest.raises(CheckpointError, match=r"layers\.1.*instead of"):
        checkpoints.open(family.write_checkpoint(tmp_path / "m", config, tensors))
