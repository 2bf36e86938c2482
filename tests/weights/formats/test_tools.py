"""Tools whose files are not read: one error that names the tool and says what to do."""

from __future__ import annotations

import family
import numpy as np
import pytest

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint as checkpoints
from mlx_gptoss.weights.formats.tools import NOT_READ

CONFIG = family.CONFIG | {"num_hidden_layers": 2, "num_local_experts": 4, "sliding_window": 8}
READ = {  # quant_method of transformers that formats/ reads, in the variants of README's table
    *(
        "auto-round",
        "awq",
        "bitsandbytes_4bit",
        "bitsandbytes_8bit",
        "compressed-tensors",
        "gguf",
        "gptq",
        "mxfp4",
        "quark",
    ),
    "torchao",
}
Q = "self_attn.q_proj"
U8, I32, F16 = (np.zeros((8, 8), dtype) for dtype in (np.uint8, np.int32, np.float16))
# What the tool stores for q_proj in place of its weight, by the tool's own names.
STORED = {
    "aqlm": {"codes": U8, "codebooks": F16, "scales": F16},
    "bitnet": {"weight": U8, "weight_scale": F16},
    "eetq": {"weight": np.zeros((64, 64), np.int8), "weight_scales": F16},
    "exl2": {"q_weight": I32, "q_scale": I32, "q_invperm": I32, "q_group_size": I32},
    "exl3": {"trellis": I32, "suh": F16, "svh": F16},
    "fbgemm_fp8": {"weight": U8, "weight_scale": F16},
    "fp8": {"weight": U8, "weight_scale_inv": F16},
    "higgs": {"weight": np.zeros((8, 8), np.int16), "scales": F16, "tables": F16, "tables2": F16},
    "hqq": {"W_q": U8, "scale": F16, "zero": F16},
    "metal": {"weight": np.zeros((64, 8), np.uint32), "scales": F16, "qbiases": F16},
    "quanto": {"weight._data": U8, "weight._scale": F16},
    "spqr": {"dense_weights": I32, "row_offsets": I32},
    "vptq": {"indices": I32, "centroids.weight": F16},
}
BY_NAME = {"aqlm", "eetq", "exl2", "exl3", "fp8", "higgs", "hqq", "metal", "quanto", "spqr", "vptq"}


def stored_by(parts):
    tensors = family.random_tensors([4, 4])
    for layer in range(2):
        del tensors[f"model.layers.{layer}.{Q}.weight"]
        tensors |= {f"model.layers.{layer}.{Q}.{part}": array for part, array in parts.items()}
    return tensors


@pytest.mark.parametrize("method", sorted(NOT_READ))
def test_a_tool_is_named_by_config_json(tmp_path, method):
    parts = STORED.get(method, {"qweight": U8, "qscale": F16})
    config = CONFIG | {"quantization_config": {"quant_method": method}}
    with pytest.raises(CheckpointError) as caught:
        checkpoints.open(family.write_checkpoint(tmp_path / method, config, stored_by(parts)))
    text = str(caught.value)
    assert NOT_READ[method] in text and f"{method!r}" in text and "use the model's MXFP4" in text and len(text) < 800


@pytest.mark.parametrize("method", sorted(BY_NAME))
def test_a_tool_is_named_by_its_tensors(tmp_path, method):
    with pytest.raises(CheckpointError) as caught:
        checkpoints.open(family.write_checkpoint(tmp_path / method, CONFIG, stored_by(STORED[method])))
    assert NOT_READ[method] in str(caught.value) and "use the model's MXFP4" in str(caught.value)


def test_every_method_of_transformers_is_read_or_named():
    auto = pytest.importorskip("transformers.quantizers.auto")
    assert not set(auto.AUTO_QUANTIZATION_CONFIG_MAPPING) - set(NOT_READ) - READ


def test_modelopt_names_its_algorithm(tmp_path):
    config = CONFIG | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}}
    with pytest.raises(CheckpointError, match="ModelOpt's W4A8_AWQ, whose files are not read"):
        checkpoints.open(family.write_checkpoint(tmp_path / "m", config, stored_by({"weight_q": U8})))


def test_a_tool_in_config_json_does_not_refuse_tensors_that_are_read(tmp_path):
    config = CONFIG | {"quantization_config": {"quant_method": "hqq"}}
    assert checkpoints.open(family.write_checkpoint(tmp_path / "m", config, family.random_tensors([4, 4])))


@pytest.mark.parametrize("method", [None, 7, ["x"], "a tool of tomorrow"])
def test_an_unknown_method_gives_the_list_of_tensors(tmp_path, method):
    config = CONFIG | {"quantization_config": {"quant_method": method}}
    with pytest.raises(CheckpointError, match=r"the tensors do not match.*unknown"):
        checkpoints.open(family.write_checkpoint(tmp_path / "m", config, stored_by({"strange": U8})))


def test_a_pickle_is_never_opened(tmp_path):
    folder = family.write_checkpoint(tmp_path / "m", CONFIG, family.random_tensors([4, 4]))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickle \(pytorch_model.bin\).*save the model as safetensors"):
        checkpoints.open(folder)
