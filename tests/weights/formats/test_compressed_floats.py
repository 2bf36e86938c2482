"""compressed-tensors' floats with a scale per block, nvfp4- and mxfp4-pack-quantized and mxfp8-quantized, are read
and run; MXFP6 is refused.

The values that compressed-tensors itself decodes are compared by ../judge_tools.py.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mlx_gptoss.backends import mlx as backend
from mlx_gptoss.backends.base import Limits
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint, codecs
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.tensor import MXFP4, MXFP8, NVFP4

EXPERTS = 6
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Q = "model.layers.0.self_attn.q_proj"


def e4m3(codes: torch.Tensor) -> torch.Tensor:
    """Bit patterns as float32: 4 bits of exponent with bias 7, 3 of mantissa, subnormal at exponent 0."""
    exponent, mantissa = codes >> 3 & 15, (codes & 7).float()
    magnitude = torch.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    return magnitude * (1 - 2 * (codes >> 7))


def pack_at_random(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Replace every FP8 module by a random one of another scheme; returns their decoded weights by module."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        module = name.removesuffix(".weight_scale")
        rows, width = tensors.pop(f"{module}.weight").shape
        codes = torch.randint(0, 256, (rows, width if kind == "mxfp8" else width // 2), generator=generator)
        if kind == "mxfp8":
            codes[codes % 128 == 127] = 0  # not a number
            tensors[f"{module}.weight"] = codes.to(torch.uint8).view(torch.float8_e4m3fn)
            values = e4m3(codes)
        else:
            tensors[f"{module}.weight_packed"] = codes.to(torch.uint8)
            values = E2M1[torch.stack([codes & 15, codes >> 4], dim=-1).reshape(rows, width)]
        if kind == "nvfp4":
            stored_scale = (torch.rand(rows, width // 16, generator=generator) * 400 + 1).to(torch.float8_e4m3fn)
            divisor = torch.rand(1, generator=generator) * 1000 + 500
            tensors[f"{module}.weight_global_scale"] = divisor
            tensors[f"{module}.input_global_scale"] = torch.ones(1)
            scale, factor = stored_scale.float(), 1 / divisor
        else:
            stored_scale = torch.randint(115, 125, (rows, width // 32), dtype=torch.uint8, generator=generator)
            scale, factor = 2.0 ** (stored_scale.float() - 127), 1.0
        tensors[name] = stored_scale
        weights[module] = values * scale.repeat_interleave(width // scale.shape[1], dim=1) * factor
    return weights


@pytest.mark.parametrize(("kind", "spec"), [("nvfp4", NVFP4), ("mxfp4", MXFP4), ("mxfp8", MXFP8)])
def test_reads_what_the_bytes_say(kind, spec, edited):
    weights: dict[str, torch.Tensor] = {}
    folder = edited("fp8-dynamic", lambda tensors: weights.update(pack_at_random(tensors, kind)))
    opened = checkpoint.open(folder)
    assert opened.format == ("mxfp8-quantized" if kind == "mxfp8" else f"{kind}-pack-quantized")
    for name, modules in {
        "layers.0.attention.q.weight": [Q],
        "layers.1.experts.up.weight": [f"model.layers.1.mlp.experts.{expert}.up_proj" for expert in range(EXPERTS)],
    }.items():
        got = opened.read(name)
        assert got.spec == spec
        expected = torch.stack([weights[module] for module in modules]).squeeze(0)
        assert np.array_equal(codecs.dequantize(got), expected.numpy())
    ids = list(range(20))
    logits = backend.load(opened, device="cpu", dtype="float32", limits=Limits(1, 64, 64)).logits(ids)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("kind", ["mxfp4", "mxfp8"])
def test_runs_like_its_dense_weights(kind, edited, tmp_path, relative_error):
    folder = edited("fp8-dynamic", lambda tensors: pack_at_random(tensors, kind))
    convert(folder, tmp_path / "dense", "bf16")  # exact, because bfloat16 holds every MXFP4 and MXFP8 value
    ids = list(range(30))
    got, expected = (
        backend.load(checkpoint.open(path), device="cpu", dtype="float32", limits=Limits(1, 64, 64)).logits(ids)
        for path in (folder, tmp_path / "dense")
    )
    assert relative_error(got, expected) < 1e-4


def test_a_global_scale_of_zero_is_refused(edited):
    def break_one(tensors):
        pack_at_random(tensors, "nvfp4")
        tensors[f"{Q}.weight_global_scale"][0] = 0

    opened = checkpoint.open(edited("fp8-dynamic", break_one))
    with pytest.raises(CheckpointError, match="not a number"):
        opened.read("layers.0.attention.q.weight")


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4", "mxfp8"])
def test_reads_what_compressed_tensors_packs(kind, edited, decode):
    """The tool's compressor writes one attention matrix; we read the values that its decompressor returns."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

    scheme: QuantizationScheme = preset_name_to_scheme(f"{kind.upper()}A16", ["Linear"])
    stored_as = "mxfp8-quantized" if kind == "mxfp8" else f"{kind}-pack-quantized"
    compressor = BaseCompressor.load_from_registry(stored_as)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(256, 192, generator=generator).bfloat16()
    group = scheme.weights.group_size
    scale = 2.0 ** torch.randint(-3, 3, (256, 192 // group), generator=generator)
    state = {"weight": weight, "weight_scale": scale.bfloat16()}
    if kind == "nvfp4":
        state |= {"weight_scale": (scale * 8).bfloat16(), "weight_global_scale": torch.tensor([8.0])}
    state = compressor.compress(state, scheme)

    def replace(tensors):
        del tensors[f"{Q}.weight"], tensors[f"{Q}.weight_scale"]
        tensors.update({f"{Q}.{part}": tensor for part, tensor in state.items()})

    got = decode(edited("fp8-dynamic", replace), "layers.0.attention.q.weight")
    theirs = compressor.decompress(dict(state), scheme)["weight"]
    assert torch.equal(torch.from_numpy(got).to(theirs.dtype), theirs)


def test_integers_of_the_same_shapes_are_refused(edited):
    """AutoRound's MXINT4 stores what MXFP4 stores, and means other values."""
    folder = edited("fp8-dynamic", lambda tensors: pack_at_random(tensors, "mxfp4"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"quant_method": "auto-round", "data_type": "mx_int", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"mx_int.*not supported"):
        checkpoint.open(folder)


def test_mxfp6_is_refused_by_name(edited):
    def as_mxfp6(tensors):
        pack_at_random(tensors, "mxfp4")
        for name in [name for name in tensors if name.endswith("weight_packed")]:
            rows, half = tensors[name].shape
            tensors[name] = torch.zeros(rows, half * 3 // 2, dtype=torch.uint8)

    with pytest.raises(CheckpointError, match=r"MXFP6.*use a checkpoint in MXFP4 or MXFP8"):
        checkpoint.open(edited("fp8-dynamic", as_mxfp6))


@pytest.mark.parametrize("change", ["scale", "groups"])
def test_damaged_mxfp8_is_refused(change, edited):
    def damage(tensors):
        pack_at_random(tensors, "mxfp8")
        scale = tensors[f"{Q}.weight_scale"]
        if change == "scale":
            scale[3, 1] = 255
        else:
            tensors[f"{Q}.weight_scale"] = scale.repeat(1, 2)

    folder = edited("fp8-dynamic", damage)
    with pytest.raises(CheckpointError, match="not a number" if change == "scale" else "wrong shape"):
        checkpoint.open(folder).read("layers.0.attention.q.weight")
