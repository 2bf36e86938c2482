"""nvfp4 is written with the bytes of ModelOpt's export, and codes of NVFP4 and MXFP4 are kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mlx_gptoss.weights.convert import convert

EXPERTS = "model.layers.{}.mlp.experts.{}_proj"


@pytest.mark.parametrize("source", ["nvfp4-bf16", "nvfp4"])
def test_writes_the_bytes_of_modelopts_export(mini, tmp_path, source, load_tensors, tensor_bytes):
    convert(mini / source, tmp_path / "new", "nvfp4")
    exported, written = map(load_tensors, (mini / "nvfp4", tmp_path / "new"))
    assert tensor_bytes(written) == tensor_bytes(exported)
    for name in ("config.json", "hf_quant_config.json"):
        theirs, ours = (json.loads((folder / name).read_text()) for folder in (mini / "nvfp4", tmp_path / "new"))
        changed = {key for key in theirs | ours if theirs.get(key) != ours.get(key)}
        assert changed <= {"transformers_version", "dtype", "torch_dtype"}, name


def test_writes_the_bytes_of_modelopts_export_from_bf16(mini, edited, tmp_path, load_tensors, tensor_bytes):
    """Without calibration nothing is known about activations: input scales are 1, and all else is as exported."""
    plain = edited("nvfp4-bf16", lambda t: [t.pop(name) for name in list(t) if name.endswith("_amax")])
    convert(plain, tmp_path / "new", "nvfp4")
    exported, written = map(load_tensors, (mini / "nvfp4", tmp_path / "new"))
    for name in exported:
        if name.endswith("input_scale"):
            assert written[name].dtype == torch.float32 and written[name].shape == ()
            assert written[name] == 1
            written[name] = exported[name]
    assert tensor_bytes(written) == tensor_bytes(exported)


def test_mxfp4_keeps_its_codes(mini, tmp_path, load_tensors, decode_matrices):
    convert(mini / "mxfp4", tmp_path / "new", "nvfp4")
    before, after = load_tensors(mini / "mxfp4"), load_tensors(tmp_path / "new")
    for layer in (0, 1):
        for part in ("gate_up", "down"):
            name = EXPERTS.format(layer, part)
            assert torch.equal(before[f"{name}_blocks"].flatten(-2), after[name].transpose(1, 2))
            mantissa, _ = torch.frexp(after[f"{name}_weight_scale_2"])
            assert mantissa == 0.5
    old, new = decode_matrices(mini / "mxfp4"), decode_matrices(tmp_path / "new")
    for name in new:
        if "experts" in name:
            np.testing.assert_array_equal(new[name], old[name], err_msg=name)


def test_the_codes_of_mlx_nvfp4_are_kept(mini, tmp_path, decode_matrices):
    convert(mini / "nvfp4-bf16", tmp_path / "mlx", "mlx-nvfp4")
    convert(tmp_path / "mlx", tmp_path / "new", "nvfp4")
    old, new = decode_matrices(tmp_path / "mlx"), decode_matrices(tmp_path / "new")
    for name in new:
        np.testing.assert_array_equal(new[name], old[name], err_msg=name)
