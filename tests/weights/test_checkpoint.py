"""Reading: every layout decodes to the values that an independent reading of its bytes gives."""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint, codecs
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.params import parameters
from mlx_gptoss.weights.tensor import AFFINE4, AFFINE8, MXFP4, Dense, Quantized

BF16 = np.dtype(ml_dtypes.bfloat16)
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks [..., N, K/32, 16] and scales [..., N, K/32] -> values [..., N, K], one by one, by the specification."""
    out = np.empty((*scales.shape, 32))
    for j in range(16):
        out[..., 2 * j] = np.take(E2M1, blocks[..., j] & 15)
        out[..., 2 * j + 1] = np.take(E2M1, blocks[..., j] >> 4)
    return (out * 2.0 ** (scales.astype(int) - 127)[..., None]).reshape(*scales.shape[:-1], -1)


def affine(words: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """MLX's words [..., N, K * bits / 32] and scales and biases [..., N, K/64] -> values [..., N, K]."""
    codes = np.stack([words >> shift & (2**bits - 1) for shift in range(0, 32, bits)], -1)
    codes = codes.reshape(*words.shape[:-1], -1)
    scales, biases = (np.repeat(x.astype(np.float32), 64, -1) for x in (scales, biases))
    return codes.astype(np.float32) * scales + biases


def hugging_face_layer(tensors: dict[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    """Some parameters of a layer of the small mxfp4 checkpoint, decoded without the code under test."""
    prefix = f"model.layers.{layer}."
    fused = mxfp4(*(tensors[f"{prefix}mlp.experts.gate_up_proj_{part}"] for part in ("blocks", "scales")))
    return {
        "experts.gate.weight": fused[:, 0::2],
        "experts.up.weight": fused[:, 1::2],
        "experts.down.weight": mxfp4(*(tensors[f"{prefix}mlp.experts.down_proj_{x}"] for x in ("blocks", "scales"))),
        "experts.gate.bias": tensors[f"{prefix}mlp.experts.gate_up_proj_bias"][:, 0::2],
        "experts.up.bias": tensors[f"{prefix}mlp.experts.gate_up_proj_bias"][:, 1::2],
        "experts.down.bias": tensors[f"{prefix}mlp.experts.down_proj_bias"],
        "attention.k.weight": tensors[f"{prefix}self_attn.k_proj.weight"],
        "attention.sinks": tensors[f"{prefix}self_attn.sinks"],
        "mlp_norm.weight": tensors[f"{prefix}post_attention_layernorm.weight"],
        "router.bias": tensors[f"{prefix}mlp.router.bias"],
    }


def test_mxfp4_is_decoded_exactly(mini, read_tensors):
    opened, tensors = checkpoint.open(mini / "mxfp4"), read_tensors(mini / "mxfp4")
    assert opened.format == "mxfp4"
    assert opened.params == parameters(opened.config)
    for layer in range(2):
        for name, wanted in hugging_face_layer(tensors, layer).items():
            weight = opened.read(f"layers.{layer}.{name}")
            assert np.array_equal(codecs.dequantize(weight), wanted.astype(np.float32)), name
    assert np.array_equal(opened.read("embed.weight").values, tensors["model.embed_tokens.weight"])
    assert np.array_equal(opened.read("lm_head.weight").values, tensors["lm_head.weight"])


def test_reading_is_lazy_and_exact(mini):
    weight = checkpoint.open(str(mini / "mxfp4")).read("layers.0.experts.up.weight")
    assert isinstance(weight, Quantized) and weight.spec == MXFP4
    assert weight.codes.base is not None and not weight.codes.flags.writeable
    assert weight.codes.strides[1] == 2 * weight.codes.shape[2]  # every second row of the fused tensor, not a copy


def test_the_original_layout_has_the_same_values(mini):
    ours, original = checkpoint.open(mini / "mxfp4"), checkpoint.open(mini / "mxfp4-original")
    assert original.format == "mxfp4-original"
    for (param, weight), (_, other) in zip(ours.weights(), original.weights(), strict=True):
        assert other.shape == param.shape
        assert np.array_equal(codecs.dequantize(weight), codecs.dequantize(other)), param.name
    norm = original.read("norm.weight")
    assert isinstance(norm, Dense) and norm.values.dtype == np.float32


def test_mlx_4bit_is_decoded_exactly(mini, read_tensors):
    opened, tensors = checkpoint.open(mini / "mlx-4bit"), read_tensors(mini / "mlx-4bit")
    for name, module, bits in (
        ("layers.1.experts.up.weight", "model.layers.1.mlp.experts.up_proj", 4),
        ("layers.0.attention.o.weight", "model.layers.0.self_attn.o_proj", 4),
        ("layers.0.router.weight", "model.layers.0.mlp.router", 8),
        ("lm_head.weight", "lm_head", 4),
    ):
        weight = opened.read(name)
        assert isinstance(weight, Quantized) and weight.spec == (AFFINE4 if bits == 4 else AFFINE8)
        wanted = affine(*(tensors[f"{module}.{part}"] for part in ("weight", "scales", "biases")), bits)
        assert np.array_equal(codecs.dequantize(weight), wanted)


@pytest.mark.parametrize(
    ("name", "found", "experts", "router", "bits"),
    [
        ("mxfp4", "mxfp4", "mxfp4", "bf16", 4.25),
        ("mxfp4-original", "mxfp4-original", "mxfp4", "bf16", 4.25),
        ("mlx-4bit", "mlx-4bit", "affine4-g64", "affine8-g64", 4.5),
        ("mlx-mxfp4-all", "mlx", "mxfp4", "affine8-g64", 4.25),
    ],
)
def test_summary_lists_format_sizes_and_roles(mini, name, found, experts, router, bits, read_tensors):
    summary = checkpoint.open(mini / name).summary()
    assert summary.format == found
    assert summary.parameters == 868_692
    assert summary.size_bytes == sum(array.nbytes for array in read_tensors(mini / name).values())
    assert summary.bits_per_weight == pytest.approx(8 * summary.size_bytes / 868_692)
    assert summary.roles["experts"] == {"format": experts, "bits": bits}
    assert summary.roles["router"]["format"] == router
    assert set(summary.roles) == {"attention", "experts", "router", "embed", "lm_head"}
    json.dumps(summary.roles)


def test_stop_ids_come_from_generation_config_or_else_config(copied):
    folder = copied("mxfp4")
    assert checkpoint.open(folder).stop_ids == (312, 311, 318)
    (folder / "generation_config.json").unlink()
    assert checkpoint.open(folder).stop_ids == (312,)
    (folder / "generation_config.json").write_text('{"eos_token_id": "never"}')
    with pytest.raises(CheckpointError, match="eos_token_id"):
        checkpoint.open(folder)


def test_the_original_folder_is_opened_if_there_is_nothing_else(copied, tmp_path):
    release = copied("mxfp4")
    shutil.copytree(copied("mxfp4-original"), release / "original")
    assert checkpoint.open(release).format == "mxfp4"
    inner = checkpoint.open(release / "original")
    assert (inner.format, inner.tokenizer_folder, inner.stop_ids) == ("mxfp4-original", release, (312, 311, 318))
    for path in [*release.glob("*.safetensors"), *release.glob("*.index.json")]:
        path.unlink()
    assert checkpoint.open(release).folder == release / "original"


def test_a_hub_cache_of_links_opens(mini, tmp_path):
    """In huggingface-hub's layout: snapshots/<revision>/<file> -> ../../blobs/<hash>."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    (snapshot / "original").mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((mini / "mlx-4bit").iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    for path in (mini / "mxfp4-original").iterdir():
        shutil.copyfile(path, blobs / path.name)
        (snapshot / "original" / path.name).symlink_to(f"../../../blobs/{path.name}")
    assert checkpoint.open(snapshot).format == "mlx-4bit"
    assert checkpoint.open(snapshot / "original").format == "mxfp4-original"
    (tmp_path / "linked").symlink_to(snapshot)
    assert checkpoint.open(tmp_path / "linked").format == "mlx-4bit"


def test_a_config_without_a_quantization_block_is_enough(copied):
    folder = copied("mlx-4bit")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization"], config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert checkpoint.open(folder).format == "mlx-4bit"


def test_rewritten_tensors_open(copied, read_tensors, write_tensors):
    folder = copied("mxfp4")
    write_tensors(folder, read_tensors(folder))
    assert checkpoint.open(folder).format == "mxfp4"


def test_a_pickle_is_never_opened(copied):
    folder = copied("mxfp4")
    (folder / "modelopt_state.pth").write_bytes(b"\x80\x04.")
    (folder / "modelopt_state.pth").chmod(0)
    assert checkpoint.open(folder).format == "mxfp4"


def test_unquantized_mlx_is_read(copied, tmp_path, read_tensors, write_tensors):
    """mlx-lm's bfloat16: de-interleaved dense experts. The layout has no format name of its own; it is called `mlx`."""
    folder = tmp_path / "dense"
    convert(copied("mxfp4"), folder, "mlx-mxfp4")
    wanted = {param.name: codecs.dequantize(weight) for param, weight in checkpoint.open(folder).weights()}
    tensors = read_tensors(folder)
    for name in [name for name in tensors if name.endswith(".scales")]:
        module = name.removesuffix(".scales")
        blocks = tensors.pop(f"{module}.weight").view(np.uint8)
        scales = tensors.pop(name)
        tensors[f"{module}.weight"] = mxfp4(blocks.reshape(*scales.shape, 16), scales).astype(BF16)
    write_tensors(folder, tensors)
    opened = checkpoint.open(folder)
    assert opened.format == "mlx"
    for param, weight in opened.weights():
        assert np.array_equal(codecs.dequantize(weight), wanted[param.name])


def test_mlx_with_a_global_scale_is_read(mini, tmp_path, read_tensors, write_tensors):
    """mlx-lm's nvfp4 with `.global_scale` [E]: the value of the largest scale, 448, with the largest code, 6."""
    folder = tmp_path / "nvfp4"
    convert(mini / "mxfp4", folder, "mlx-nvfp4")
    before = codecs.dequantize(checkpoint.open(folder).read("layers.0.experts.up.weight"))
    amax = np.linspace(1, 6, 6, dtype=np.float32)
    write_tensors(folder, read_tensors(folder) | {"model.layers.0.mlp.experts.up_proj.global_scale": amax})
    weight = checkpoint.open(folder).read("layers.0.experts.up.weight")
    assert np.allclose(codecs.dequantize(weight), before * amax[:, None, None] / 2688, rtol=1e-6)
