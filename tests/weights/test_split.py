"""Splitting over ranks: in every format, each value is on exactly one rank or on all of them."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from mlx_gptoss.api import open_checkpoint
from mlx_gptoss.config import PRESETS
from mlx_gptoss.errors import CheckpointError, InvalidRequest
from mlx_gptoss.weights import codecs
from mlx_gptoss.weights.requantize import Requantized
from mlx_gptoss.weights.split import RankShard, RankWeights
from mlx_gptoss.weights.synthetic import Synthetic
from mlx_gptoss.weights.tensor import Dense

FORMATS = [
    "mxfp4",
    "mxfp4-original",
    "fp8-dynamic",
    "int4-autoround",
    "mlx-4bit",
    "mlx-mxfp4-all",
    "nvfp4",
    "gguf/model-q8_0.gguf",
]
AXES = {"attention.o.weight": -1}


def values(weight):
    return weight.values.astype(np.float32) if isinstance(weight, Dense) else codecs.dequantize(weight)


def shards(config, ranks):
    return [RankShard.of(config, rank, ranks) for rank in range(ranks)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranges_of_the_ranks_cover_everything_in_order(preset, ranks):
    config = PRESETS[preset]
    found = shards(config, ranks)
    for field, count in [("query_heads", config.num_attention_heads), ("experts", config.num_local_experts),
                         ("vocabulary", config.vocab_size)]:  # fmt: skip
        assert [i for shard in found for i in getattr(shard, field)] == list(range(count))
    each = config.num_attention_heads // config.num_key_value_heads
    assert all({query // each for query in shard.query_heads} == set(shard.kv_heads) for shard in found)


def test_eight_kv_heads_over_three_ranks():
    found = shards(PRESETS["20b"], 3)
    assert [len(shard.kv_heads) for shard in found] == [2, 3, 3]
    assert [len(shard.experts) for shard in found] == [10, 11, 11]
    assert [len(shard.vocabulary) for shard in found] == [67030, 67030, 67028]


@pytest.mark.parametrize("ranks", [0, 5])
def test_more_ranks_than_query_heads_are_refused(ranks):
    with pytest.raises(InvalidRequest, match="1 to 4 ranks"):
        RankShard.of(PRESETS["tiny"], 0, ranks)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", FORMATS)
def test_the_parts_of_all_ranks_make_the_checkpoint(mini, name, ranks):
    checkpoint = open_checkpoint(mini / name)
    parts = [RankWeights(checkpoint, shard) for shard in shards(checkpoint.config, ranks)]
    for i, param in enumerate(checkpoint.params):
        whole = values(checkpoint.read(param.name))
        held = [values(part.read(param.name)) for part in parts]
        assert [part.params[i].shape for part in parts] == [array.shape for array in held]
        if held[0].shape == whole.shape:
            assert all(np.array_equal(array, whole) for array in held)
            assert param.role in ("embed", "norm", "router") or param.kind == "attention.o.bias"
        elif ranks > 2 and param.kind.startswith(("attention.k", "attention.v")):  # two KV heads, each on several ranks
            assert np.array_equal(np.concatenate([held[0], held[-1]]), whole)
        else:
            assert np.array_equal(np.concatenate(held, AXES.get(param.kind, 0)), whole)


@pytest.mark.parametrize("name", ["fp8-dynamic", "int4-autoround", "mxfp4", "mlx-4bit", "mlx-mxfp4-all"])
def test_a_rank_does_not_read_the_other_parts(mini, tmp_path, name):
    """A rank without the last expert does not notice that its scales are NaN."""
    folder = shutil.copytree(mini / name, tmp_path / name)
    damaged = open_checkpoint(folder)
    parameter = "layers.0.experts.down.weight"
    stored = [tensor for tensor in damaged._binding.sources[parameter].expected if "scale" in tensor.name][-1].name
    file, _ = damaged._file_of[stored]
    info, start = file.header.tensors[stored], file.header.offsets[stored]
    with file.path.open("r+b") as opened:
        opened.seek(start + info.nbytes - 2)
        opened.write(b"\xff\xff")  # NaN in every scale format
    first, last = (RankWeights(open_checkpoint(folder), shard) for shard in shards(damaged.config, 2))
    assert np.isfinite(values(first.read(parameter))).all()
    with pytest.raises(CheckpointError, match="not a number"):
        last.read(parameter)


def test_a_part_is_a_view_of_the_file(mini):
    """Nothing is copied if the format stores a parameter in one tensor."""
    checkpoint = open_checkpoint(mini / "mxfp4")
    held = RankWeights(checkpoint, RankShard.of(checkpoint.config, 1, 2))
    for name in ("layers.1.experts.gate.weight", "layers.0.experts.down.weight"):
        assert np.may_share_memory(held.read(name).codes, checkpoint.read(name).codes)
    for name in ("layers.0.attention.o.weight", "layers.0.attention.q.weight", "lm_head.weight"):
        assert np.may_share_memory(held.read(name).values, checkpoint.read(name).values)


@pytest.mark.parametrize("ranks", [2, 3])
def test_sizes_of_the_parts_add_up(ranks):
    """To the size of the checkpoint, plus one more copy per additional rank of what every rank holds."""
    checkpoint = Synthetic(PRESETS["20b"], "mxfp4")
    parts = [RankWeights(checkpoint, shard) for shard in shards(checkpoint.config, ranks)]
    again = checkpoint.size_bytes - sum(checkpoint.matrix_bytes(role) for role in ("attention", "experts", "lm_head"))
    assert abs(sum(part.size_bytes for part in parts) - checkpoint.size_bytes - (ranks - 1) * again) < 1000
    tiny = Synthetic(PRESETS["tiny"], "mlx-4bit")
    held = RankWeights(tiny, RankShard.of(tiny.config, 1, ranks))
    read = sum(held.read(param.name).nbytes for param in held.params)
    assert 0.9 < read / held.size_bytes <= 1


def test_a_part_is_quantized_like_the_whole(mini):
    """Because no group crosses a row or a head."""
    checkpoint = open_checkpoint(mini / "mxfp4")
    shard = RankShard.of(checkpoint.config, 1, 2)
    quantized, whole = Requantized(RankWeights(checkpoint, shard), "mlx-4bit"), Requantized(checkpoint, "mlx-4bit")
    gate = quantized.read("layers.0.experts.gate.weight")
    assert np.array_equal(gate.codes, whole.read("layers.0.experts.gate.weight").codes[3:])
    o = quantized.read("layers.0.attention.o.weight")
    assert np.array_equal(values(o), values(whole.read("layers.0.attention.o.weight"))[:, 128:])


def test_a_split_through_a_group_is_refused():
    checkpoint = Synthetic(replace(PRESETS["tiny"], head_dim=32, num_attention_heads=6), "mlx-4bit")
    with pytest.raises(CheckpointError, match=r"attention\.o\.weight cannot be split"):
        RankWeights(checkpoint, RankShard.of(checkpoint.config, 0, 2)).read("layers.0.attention.o.weight")
