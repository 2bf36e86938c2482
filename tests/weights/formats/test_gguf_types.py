"""Every block type that is read decodes to the gguf package's values and gives the logits of the decoded file.

The files are mixtures, as dynamic quantization makes them: one type for the experts, others for the rest. Blocks are
random codes with sensible scales. Q1_0 and Q2_0, which the package cannot decode, are decoded here value by value as
ggml-quants.c does; test_gguf_llama_cpp.py lets that library decode them.
"""

from __future__ import annotations

import random
import struct
from dataclasses import replace

import numpy as np
import pytest

from mlx_gptoss.backends import cuda, mlx
from mlx_gptoss.backends.base import Limits, run_as
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.loading.recommend import derived_bytes
from mlx_gptoss.weights import checkpoint, codecs, gguf, gguf_blocks
from mlx_gptoss.weights.formats.gguf import tensor_name
from mlx_gptoss.weights.gguf_blocks import BLOCK_TYPES, BY_NAME
from mlx_gptoss.weights.params import parameters

package = pytest.importorskip("gguf", reason="the gguf package is not installed")
from gguf.quants import dequantize  # noqa: E402

OLLAMAS = "MXFP4 (Ollama)"
NUMBERS = {kind.name: number for number, kind in BLOCK_TYPES.items()}
TYPES = sorted(set(NUMBERS) - {OLLAMAS})
SCALES = {  # offset of each float16 of a block
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2),
    "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,),
    "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "TQ1_0": (52,), "TQ2_0": (64,), "Q1_0": (0,),
    "Q2_0": (0,),
}  # fmt: skip
SIZE = {  # of a value over the block's scale
    "Q2_K": 60, "Q3_K": 90, "Q4_K": 400, "Q5_K": 800, "Q6_K": 2000, "IQ4_XS": 2000, "IQ4_NL": 80, "IQ2_XXS": 80,
    "IQ2_XS": 80, "IQ2_S": 80, "IQ3_XXS": 160, "IQ3_S": 120, "IQ1_S": 8, "IQ1_M": 8, "TQ1_0": 1, "TQ2_0": 1, "Q1_0": 1,
    "Q2_0": 1,
}  # fmt: skip


def blocks_of(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random blocks whose values are about 0.05 in size."""
    kind, chance = BY_NAME[name], np.random.default_rng(seed)
    blocks = chance.integers(0, 256, (*shape[:-1], shape[-1] // kind.values, kind.size), dtype=np.uint8)
    for offset in SCALES.get(name, ()):
        scale = chance.uniform(0.5, 1.5, (*blocks.shape[:-1], 1)) * 0.05 / SIZE.get(name, 16)
        blocks[..., offset : offset + 2] = scale.astype(np.float16).view(np.uint8)
    if name == "IQ1_M":  # its scale is in the top bits of four words
        scale = chance.uniform(0.5, 1.5, (*blocks.shape[:-1], 1)) * 0.05 / SIZE[name]
        spread = scale.astype(np.float16).view(np.uint16) >> np.arange(0, 16, 4, dtype=np.uint16) & 15
        blocks[..., 49:56:2] = blocks[..., 49:56:2] & 15 | (spread << 4).astype(np.uint8)
    if name.startswith("MXFP4"):
        blocks[..., 0] = chance.integers(119, 122, blocks.shape[:-1])
    if name == "NVFP4":
        blocks[..., :4] = chance.integers(4, 16, (*blocks.shape[:-1], 4))
    return blocks


def one_by_one(blocks: np.ndarray, bits: int) -> np.ndarray:
    """Q1_0 and Q2_0 by their definition: a float16 scale, then codes of `bits` bits, lowest first."""
    rows = []
    for block in blocks.reshape(-1, blocks.shape[-1]):
        d, codes = block[:2].view("<f2").astype(np.float32)[0], int.from_bytes(block[2:].tobytes(), "little")
        found = [codes >> bits * j & 2**bits - 1 for j in range(128 // bits)]
        rows.append([d * (2 * code - 1 if bits == 1 else code - 1) for code in found])
    return np.array(rows, np.float32).reshape(*blocks.shape[:-2], -1)


def values_of(name: str, blocks: np.ndarray) -> np.ndarray:
    """As the gguf package decodes them."""
    if name in ("Q1_0", "Q2_0"):
        return one_by_one(blocks, int(name[1]))
    flat = blocks.reshape(*blocks.shape[:-2], -1)
    return dequantize(flat, package.GGMLQuantizationType(NUMBERS[name]))


@pytest.mark.parametrize("name", TYPES)
def test_a_type_decodes_to_the_packages_values(name):
    blocks = blocks_of(name, (3, 5, 512), 1)
    weight = gguf_blocks.load(BY_NAME[name], blocks)
    np.testing.assert_array_equal(codecs.dequantize(weight), values_of(name, blocks))
    assert weight.nbytes == pytest.approx(3 * 5 * 512 * BY_NAME[name].bits_in_memory / 8)
    codecs.check_scales(weight, name)


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_that_is_not_a_number_is_refused(name):
    for raw in (0x7E00, 0x7C00):
        blocks = blocks_of(name, (3, 512))
        at = SCALES[name][-1]
        blocks[1, 0, at : at + 2] = np.array([raw], "<u2").view(np.uint8)
        with pytest.raises(CheckpointError, match="not a number"):
            codecs.check_scales(gguf_blocks.load(BY_NAME[name], blocks), name)


def test_a_scale_in_four_parts_that_is_not_a_number_is_refused():
    blocks = blocks_of("IQ1_M", (3, 512))
    blocks[1, 0, 49:56:2] = [0, 0, 0xC0, 0x70]
    with pytest.raises(CheckpointError, match="not a number"):
        gguf_blocks.load(BY_NAME["IQ1_M"], blocks)


def test_a_scale_whose_bias_float16_cannot_hold_is_float32():
    for name in ("Q5_0", "TQ1_0", "TQ2_0"):
        blocks = blocks_of(name, (2, 512))
        assert gguf_blocks.load(BY_NAME[name], blocks).scale.dtype == np.float16
        at = SCALES[name][0]
        blocks[1, 0, at : at + 2] = np.array([60000], "<f2").view(np.uint8)
        weight = gguf_blocks.load(BY_NAME[name], blocks)
        assert weight.scale.dtype == np.float32
        np.testing.assert_array_equal(codecs.dequantize(weight), values_of(name, blocks))


def small_config(mini):
    """The small model's, with sizes that blocks of 256 divide."""
    return replace(checkpoint.open(mini / "mxfp4").config, hidden_size=256, intermediate_size=256)


@pytest.fixture(scope="module")
def config(mini):
    return small_config(mini)


def write(path, mini, config, types, metadata=(), rename=lambda name: name):
    """A GGUF file, and one with the same values in float32. types: by tensor name's ending, else float32."""
    files = [package.GGUFWriter(path.with_suffix(end), "gpt-oss") for end in (".gguf", ".f32.gguf")]
    reader = package.GGUFReader(mini / "gguf" / "model.gguf")
    for file in files:
        for key, field in reader.fields.items():
            if key.startswith("gpt-oss."):
                value = 256 if key.endswith(("embedding_length", "feed_forward_length")) else field.contents()
                file.add_key_value(key, value, field.types[0])
    chance = np.random.default_rng(3)
    for seed, param in enumerate(parameters(config)):
        name = tensor_name(param)
        kind = next((kind for end, kind in types.items() if end in name), None) if param.is_matrix else None
        if kind is None:
            spread = 1.0 if "norm" in name else 0.05
            values = (("norm" in name) + spread * 0.3 * chance.standard_normal(param.shape)).astype(np.float32)
            for file in files:
                file.add_tensor(name, values)
        else:
            blocks = blocks_of(kind, param.shape, seed)
            flat = blocks.reshape(*blocks.shape[:-2], -1)
            files[0].add_tensor(name, flat, raw_dtype=package.GGMLQuantizationType(NUMBERS[kind]))
            files[1].add_tensor(name, values_of(kind, blocks))
    for file in files:
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
    return path.with_suffix(".gguf"), path.with_suffix(".f32.gguf")


MIXTURES = {
    "Q2_K": {"ffn_down": "Q3_K", "_exps": "Q2_K", "attn_v": "Q5_0", "attn_output": "Q3_K", "attn": "Q4_0", "": "Q6_K"},
    "Q4_K": {"ffn_down": "Q6_K", "_exps": "Q4_K", "attn_v": "Q5_1", "attn_output": "Q5_K", "attn": "Q4_1", "": "Q8_0"},
    "IQ4": {"ffn_down": "NVFP4", "_exps": "IQ4_XS", "attn_v": "Q5_K", "attn": "IQ4_NL", "": "IQ4_XS"},
    "IQ2": {"ffn_down": "IQ3_S", "_exps": "IQ2_XXS", "attn_v": "IQ2_S", "attn": "IQ3_XXS", "": "IQ2_XS"},
    "IQ1": {"ffn_down": "IQ1_M", "_exps": "IQ1_S", "attn_q": "TQ2_0", "attn": "TQ1_0", "": "Q1_0"},
    "Q5_1": {"ffn_down": "MXFP4", "_exps": "Q5_1", "attn_q": "Q5_0", "attn": "Q8_0", "": "Q5_K"},
}


@pytest.mark.parametrize("backend", [mlx, cuda], ids=["mlx", "cuda"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_gives_the_logits_of_the_decoded_file(mini, tmp_path, config, relative_error, name, backend):
    mixture, decoded = write(tmp_path / "model", mini, config, MIXTURES[name])
    limits, ids = Limits(1, 64, 32), list(range(40, 72))
    logits = [
        backend.load(checkpoint.open(path), device="cpu", dtype="float32", limits=limits).logits(ids)
        for path in (mixture, decoded)
    ]
    assert np.abs(logits[1]).max() > 0.1
    assert relative_error(logits[0], logits[1]) < 1e-4


def test_the_plan_counts_what_loading_adds(mini, tmp_path, config):
    opened = checkpoint.open(write(tmp_path / "model", mini, config, MIXTURES["Q4_K"])[0])
    for backend in ("mlx", "cuda"):
        loaded = 0
        for _, weight in opened.weights():
            loaded += sum(array.nbytes for array in weight.arrays)
            spec = getattr(weight, "spec", None)
            if spec is not None:
                loaded += weight.codes.nbytes * (run_as(backend, spec).bits - spec.bits) // spec.bits
                if backend == "mlx" and weight.scale.dtype == np.float16:  # in float32 for bfloat16 activations
                    loaded += weight.scale.nbytes + weight.bias.nbytes
        assert opened.size_bytes + derived_bytes(opened, backend) == pytest.approx(loaded, abs=1000)
    summary = opened.summary()
    assert summary.format == "gguf" and summary.roles["experts"]["format"] == "q4_k+q6_k"
    assert "the numbers of Q6_K are decoded to float32 when loaded" in summary.note


def test_ollamas_first_files_are_read(mini, tmp_path):
    """Other names, q, k and v in one tensor, gate and up row by row, MXFP4 of type 4 with neighbours in a byte."""
    source = checkpoint.open(mini / "mxfp4")
    file = package.GGUFWriter(tmp_path / "model.gguf", "gptoss")
    for key, field in package.GGUFReader(mini / "gguf" / "model.gguf").fields.items():
        if key.startswith("gpt-oss.") and "yarn" not in key and not key.endswith("scaling.type"):
            file.add_key_value(key.replace("gpt-oss", "gptoss"), field.contents(), field.types[0])

    def ollamas(weight) -> np.ndarray:
        """type 4: the scale, then the codes as OpenAI stores them"""
        scale, codes = weight.scale[..., None], weight.codes.reshape(*weight.scale.shape, 16)
        return np.concatenate([scale, codes], axis=-1).reshape(*weight.scale.shape[:-1], -1)

    tensors: dict[str, np.ndarray] = {}
    for param, weight in source.weights():
        name = tensor_name(param).replace("attn_output.", "attn_out.").replace("attn_sinks.weight", "attn_sinks")
        name = name.replace("post_attention_norm", "ffn_norm")
        tensors[name] = codecs.dequantize(weight) if param.role != "experts" or not param.is_matrix else ollamas(weight)
    for layer in range(source.config.num_hidden_layers):
        for part in ("weight", "bias"):
            own = [tensors.pop(f"blk.{layer}.attn_{x}.{part}") for x in "qkv"]
            tensors[f"blk.{layer}.attn_qkv.{part}"] = np.concatenate(own)
            both = [tensors.pop(f"blk.{layer}.ffn_{x}_exps.{part}") for x in ("gate", "up")]
            rows = np.stack(both, axis=2)
            shape = (rows.shape[0], 2 * rows.shape[1], *rows.shape[3:])
            tensors[f"blk.{layer}.ffn_gate_up_exps.{part}"] = rows.reshape(shape)
    for name, values in tensors.items():
        file.add_tensor(name, values, raw_dtype=package.GGMLQuantizationType.MXFP4 if values.dtype == "u1" else None)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    data = bytearray((tmp_path / "model.gguf").read_bytes())
    for name, values in tensors.items():
        if values.dtype == "u1":
            at = data.index(name.encode()) + len(name) + 4 + 8 * values.ndim
            assert data[at] == 39
            data[at] = 4
    (tmp_path / "model.gguf").write_bytes(data)
    opened = checkpoint.open(tmp_path / "model.gguf")
    assert opened.format == "gguf"
    assert opened.config.yarn == source.config.yarn
    for param, weight in source.weights():
        np.testing.assert_array_equal(codecs.dequantize(opened.read(param.name)), codecs.dequantize(weight), param.name)
    half = opened.read("layers.1.experts.up.weight", range(2, 4))
    np.testing.assert_array_equal(
        codecs.dequantize(half), codecs.dequantize(source.read("layers.1.experts.up.weight"))[2:4]
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", MIXTURES)
def test_random_damage_is_an_error_or_a_model(mini, tmp_path, config, name):
    """Changed bytes anywhere in the header and the blocks raise CheckpointError, and nothing else."""
    path, _ = write(tmp_path / "model", mini, config, MIXTURES[name])
    whole, chance = path.read_bytes(), random.Random(name)
    start = min(gguf.read_header(path).tensors.offsets.values())
    refused = 0
    for _ in range(20):
        data = bytearray(whole[: chance.randrange(len(whole))] if chance.random() < 0.2 else whole)
        for _ in range(4):
            at = chance.randrange(min(start if chance.random() < 0.3 else len(data), len(data)))
            data[at : at + 2] = chance.choice(
                [b"\x00\x7c", b"\xff\xff", b"\x7f\x7e", bytes([chance.randrange(256)] * 2)]
            )
        path.write_bytes(data)
        try:
            for _, weight in checkpoint.open(path).weights():
                assert weight.arrays
        except CheckpointError:
            refused += 1
    assert refused


def test_a_block_type_for_a_vector_and_rows_that_blocks_do_not_divide_are_refused(mini, tmp_path, config):
    path, _ = write(tmp_path / "model", mini, config, {"_exps": "Q4_K"})
    data = path.read_bytes()
    name = b"blk.0.attn_q.bias"
    at = data.index(name) + len(name) + 4 + 8
    path.write_bytes(data[:at] + struct.pack("<I", NUMBERS["Q5_0"]) + data[at + 4 :])
    with pytest.raises(CheckpointError, match=r"1 of a wrong shape: blk\.0\.attn_q\.bias"):
        checkpoint.open(path)
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4
    path.write_bytes(data[:at] + struct.pack("<QQI", 192, 256, NUMBERS["Q4_K"]) + data[at + 20 :])
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_q\.weight' the shape \[256, 192\]"):
        checkpoint.open(path)
