"""checkpoint.open: every layout decoded as an independent reading of its bytes says; whatever is off is one error."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.weights import checkpoint, codecs
from mlx_gptoss.weights.convert import convert
from mlx_gptoss.weights.params import parameters
from mlx_gptoss.weights.tensor import AFFINE4, AFFINE8, MXFP4, Dense, Quantized

BF16 = np.dtype(ml_dtypes.bfloat16)
SHARD = "model-00000-of-00003.safetensors"
DTYPES = {"BF16": BF16, "U8": np.dtype("u1"), "U32": np.dtype("<u4"), "F32": np.dtype("<f4")}
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def stored(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, read without the code under test."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        for name, info in json.loads(data[8:end]).items():
            if name != "__metadata__":
                first, last = (end + offset for offset in info["data_offsets"])
                found[name] = np.frombuffer(data[first:last], DTYPES[info["dtype"]]).reshape(info["shape"])
    return found


def save(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Replace a folder's tensors by these, in one file."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    names = {dtype: name for name, dtype in DTYPES.items()} | {np.dtype("i8"): "I64"}
    header, at = {}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in tensors.values())
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit(folder: Path, name: str, change) -> None:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


@pytest.fixture
def copied(mini, tmp_path):
    """copied("mxfp4") -> a copy of the fixture that a test may damage."""

    def copy(name: str) -> Path:
        shutil.copytree(mini / name, tmp_path / name, copy_function=shutil.copyfile)
        return tmp_path / name

    return copy


def mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[..., N, K/32, 16] and [..., N, K/32] -> [..., N, K], one value at a time as the format's text reads."""
    out = np.empty((*scales.shape, 32))
    for j in range(16):
        out[..., 2 * j] = np.take(E2M1, blocks[..., j] & 15)
        out[..., 2 * j + 1] = np.take(E2M1, blocks[..., j] >> 4)
    return (out * 2.0 ** (scales.astype(int) - 127)[..., None]).reshape(*scales.shape[:-1], -1)


def affine(words: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    codes = np.stack([words >> shift & (2**bits - 1) for shift in range(0, 32, bits)], -1)
    codes = codes.reshape(*words.shape[:-1], -1)
    scales, biases = (np.repeat(x.astype(np.float32), 64, -1) for x in (scales, biases))
    return codes.astype(np.float32) * scales + biases


def hugging_face(tensors: dict[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    """Some parameters of a layer of the mxfp4 fixture, decoded independently."""
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


def test_mxfp4_reads_as_its_bytes_say(mini):
    opened, tensors = checkpoint.open(mini / "mxfp4"), stored(mini / "mxfp4")
    assert opened.format == "mxfp4"
    assert opened.params == parameters(opened.config)
    for layer in range(2):
        for name, wanted in hugging_face(tensors, layer).items():
            weight = opened.read(f"layers.{layer}.{name}")
            assert np.array_equal(codecs.dequantize(weight), wanted.astype(np.float32)), name
    assert np.array_equal(opened.read("embed.weight").values, tensors["model.embed_tokens.weight"])
    assert np.array_equal(opened.read("lm_head.weight").values, tensors["lm_head.weight"])


def test_reading_is_lazy_and_exact(mini):
    weight = checkpoint.open(str(mini / "mxfp4")).read("layers.0.experts.up.weight")
    assert isinstance(weight, Quantized) and weight.spec == MXFP4
    assert weight.codes.base is not None and not weight.codes.flags.writeable
    assert weight.codes.strides[1] == 2 * weight.codes.shape[2]  # every second row of the fused tensor, not a copy


def test_original_holds_the_same_values(mini):
    ours, original = checkpoint.open(mini / "mxfp4"), checkpoint.open(mini / "mxfp4-original")
    assert original.format == "mxfp4-original"
    for (param, weight), (_, other) in zip(ours.weights(), original.weights(), strict=True):
        assert codecs.shape(other) == param.shape
        assert np.array_equal(codecs.dequantize(weight), codecs.dequantize(other)), param.name
    norm = original.read("norm.weight")
    assert isinstance(norm, Dense) and norm.values.dtype == np.float32


def test_mlx_4bit_reads_as_its_bytes_say(mini):
    opened, tensors = checkpoint.open(mini / "mlx-4bit"), stored(mini / "mlx-4bit")
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
def test_summary(mini, name, found, experts, router, bits):
    summary = checkpoint.open(mini / name).summary()
    assert summary.format == found
    assert summary.parameters == 868_692
    assert summary.size_bytes == sum(array.nbytes for array in stored(mini / name).values())
    assert summary.bits_per_weight == pytest.approx(8 * summary.size_bytes / 868_692)
    assert summary.roles["experts"] == {"format": experts, "bits": bits}
    assert summary.roles["router"]["format"] == router
    assert set(summary.roles) == {"attention", "experts", "router", "embed", "lm_head"}
    json.dumps(summary.roles)


def test_where_generation_stops(copied):
    folder = copied("mxfp4")
    assert checkpoint.open(folder).stop_ids == (312, 311, 318)
    (folder / "generation_config.json").unlink()
    assert checkpoint.open(folder).stop_ids == (312,)
    (folder / "generation_config.json").write_text('{"eos_token_id": "never"}')
    with pytest.raises(CheckpointError, match="eos_token_id"):
        checkpoint.open(folder)


def test_original_inside_a_release(copied, tmp_path):
    release = copied("mxfp4")
    shutil.copytree(copied("mxfp4-original"), release / "original")
    assert checkpoint.open(release).format == "mxfp4"
    inner = checkpoint.open(release / "original")
    assert (inner.format, inner.tokenizer_folder, inner.stop_ids) == ("mxfp4-original", release, (312, 311, 318))
    for path in [*release.glob("*.safetensors"), *release.glob("*.index.json")]:
        path.unlink()
    assert checkpoint.open(release).folder == release / "original"


def test_a_hub_cache_of_links(mini, tmp_path):
    """huggingface-hub: snapshots/<revision>/<file> -> ../../blobs/<hash>."""
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


def remove(name):
    return lambda tensors: tensors.pop(name)


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(name, array):
    return lambda tensors: tensors.update({name: array})


LAYER = "model.layers.1."
TENSOR_DAMAGE = {
    "a missing tensor": (remove(f"{LAYER}self_attn.sinks"), r"1 missing: model\.layers\.1\.self_attn\.sinks"),
    "missing blocks": (remove(f"{LAYER}mlp.experts.down_proj_blocks"), "1 missing: .*down_proj_blocks"),
    "missing scales": (remove(f"{LAYER}mlp.experts.gate_up_proj_scales"), "1 missing: .*gate_up_proj_scales"),
    "a missing head": (remove("lm_head.weight"), r"1 missing: lm_head\.weight"),
    "an unknown tensor": (put("model.rotary", np.zeros(2, np.float32)), "1 unknown: model.rotary"),
    "a second layout": (
        put(f"{LAYER}mlp.experts.down_proj", np.zeros((6, 64, 192), BF16)),
        r"1 unknown: model\.layers\.1\.mlp\.experts\.down_proj",
    ),
    "a wrong shape": (
        put(f"{LAYER}mlp.router.weight", np.zeros((192, 6), BF16)),
        r"1 of a wrong shape: .*router\.weight \[192, 6\] instead of \[6, 192\]",
    ),
    "a wrong shape of blocks": (
        put(f"{LAYER}mlp.experts.down_proj_blocks", np.zeros((6, 192, 32), np.uint8)),
        r"1 of a wrong shape: .*down_proj_blocks",
    ),
    "a wrong dtype": (put("model.norm.weight", np.zeros(192, np.int64)), "1 of a wrong dtype: model.norm.weight I64"),
    "no scalar": (put("model.norm.weight", np.zeros((), np.float32)), "1 of a wrong shape: model.norm.weight"),
    "one layer too many": (
        lambda tensors: tensors.update({k.replace("s.1.", "s.2."): v for k, v in tensors.items() if LAYER in k}),
        r"19 unknown: model\.layers\.2\..* and 15 more",
    ),
    "transformers 5.14's names": (
        rename(f"{LAYER}mlp.experts.down_proj_blocks", f"{LAYER}mlp.experts.down_proj$"),
        r"ending in \$ come from a bug in transformers 5\.14",
    ),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_wrong_tensors_are_listed(damage, copied, monkeypatch):
    change, message = TENSOR_DAMAGE[damage]
    folder = copied("mxfp4")
    tensors = stored(folder)
    change(tensors)
    save(folder, tensors)
    monkeypatch.setattr(checkpoint.MappedFile, "get", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.open(folder)
    assert len(str(caught.value)) < 800


def test_an_undamaged_copy_opens(copied):
    folder = copied("mxfp4")
    save(folder, stored(folder))
    assert checkpoint.open(folder).format == "mxfp4"


def quantization(change):
    def apply(data):
        change(data["quantization"])

    return apply


CONFIG_DAMAGE = {
    "another model": (lambda data: data.update(model_type="llama"), "model_type 'llama'"),
    "no layers": (lambda data: data.update(num_hidden_layers=0), "num_hidden_layers"),
    "no experts": (lambda data: data.update(num_local_experts=0), "num_local_experts"),
    "layers without end": (lambda data: data.update(num_hidden_layers=2**24 - 1), "only 77 tensors"),
    "fewer layers": (lambda data: data.update(num_hidden_layers=1, layer_types=["full_attention"]), "unknown"),
    "a size that is text": (lambda data: data.update(hidden_size="192"), "hidden_size"),
    "a size that is a fraction": (lambda data: data.update(hidden_size=192.0), "hidden_size"),
    "another size": (lambda data: data.update(vocab_size=128), "wrong shape"),
    "other bits": (quantization(lambda block: block.update(bits=8)), "says .* but its tensors are"),
    "another mode": (quantization(lambda block: block.update(mode="mxfp4")), "says .* but its tensors are"),
    "another group": (quantization(lambda block: block.update(group_size=32)), "says .* but its tensors are"),
    "a router of 4 bits": (quantization(lambda block: block.pop("model.layers.0.mlp.router")), "mlp.router"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_wrong_configs_are_refused(damage, copied):
    change, message = CONFIG_DAMAGE[damage]
    folder = copied("mlx-4bit")
    edit(folder, "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(folder)


def test_a_config_that_is_silent_about_quantization_is_not_needed(copied):
    folder = copied("mlx-4bit")
    edit(folder, "config.json", lambda data: (data.pop("quantization"), data.pop("quantization_config")))
    assert checkpoint.open(folder).format == "mlx-4bit"


def write(name, data):
    def apply(folder):
        path = folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    return apply


def link(name, target):
    def apply(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return apply


def mapped_to(file, tensor="lm_head.weight"):
    return lambda folder: edit(folder, checkpoint.INDEX, lambda data: data["weight_map"].update({tensor: file}))


def config_as_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def tensor_twice(folder):
    (folder / checkpoint.INDEX).unlink()
    shutil.copyfile(folder / SHARD, folder / "a.safetensors")


def fifo(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


FILE_DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "is not a checkpoint"),
    "a config that is no object": (write("config.json", b"[]"), "not a JSON object"),
    "a config that is no JSON": (write("config.json", b"\x80pickle"), "not UTF-8"),
    "a nested config": (write("config.json", b'{"a":' * 10**5), "not valid JSON"),
    "a config that is a folder": (config_as_folder, "not a checkpoint"),
    "a config that is a pipe": (fifo, "not a checkpoint"),
    "a huge config": (write("config.json", b" " * (16 * 2**20 + 1)), "no checkpoint's config.json is that long"),
    "a key twice": (write("config.json", b'{"hidden_size": 1, "hidden_size": 2}'), "'hidden_size' twice"),
    "a config out of the folder": (link("config.json", "/etc/hostname"), "not a file of its folder"),
    "a shard out of the folder": (link(SHARD, "/etc/hostname"), "not a file of its folder"),
    "a missing shard": (lambda folder: (folder / SHARD).unlink(), f"lacks '?{SHARD}"),
    "a dangling shard": (link(SHARD, "nowhere"), f"lacks '?{SHARD}"),
    "a truncated shard": (lambda folder: os.truncate(folder / SHARD, 300_000), "is truncated"),
    "an empty index": (write(checkpoint.INDEX, b'{"weight_map": {}}'), "no weight_map"),
    "an index of numbers": (mapped_to(3), "no weight_map of names"),
    "an index to the parent": (mapped_to("../mxfp4/" + SHARD), "not a plain file name"),
    "an index to dots": (mapped_to(".."), "not a plain file name"),
    "an absolute index": (mapped_to("/etc/passwd"), "not a plain file name"),
    "an index with zeros": (mapped_to("model\0.safetensors"), "not a plain file name"),
    "an index of a long name": (mapped_to("x" * 5000), "not a plain file name"),
    "an index to the wrong shard": (mapped_to("model-00001-of-00003.safetensors"), "disagree about 1 tensors"),
    "an index of more tensors": (mapped_to(SHARD, "extra"), "disagree about 1 tensors .'extra'"),
    "a tensor in two files": (tensor_twice, "is in both"),
    "no weights": (lambda folder: [path.unlink() for path in folder.glob("*.safetensors")], "no .safetensors file"),
}


@pytest.mark.parametrize("damage", FILE_DAMAGE)
def test_wrong_files_are_refused(damage, copied):
    change, message = FILE_DAMAGE[damage]
    folder = copied("mxfp4")
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(folder)


def test_what_is_no_folder_is_refused(tmp_path, mini):
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a file"):
        checkpoint.open(mini / "mxfp4" / "config.json")


def test_a_pickle_is_never_opened(copied):
    folder = copied("mxfp4")
    (folder / "modelopt_state.pth").write_bytes(b"\x80\x04.")
    (folder / "modelopt_state.pth").chmod(0)
    assert checkpoint.open(folder).format == "mxfp4"


def test_scales_that_are_no_numbers_are_refused_when_read(copied):
    folder = copied("mxfp4")
    tensors = stored(folder)
    name = f"{LAYER}mlp.experts.down_proj_scales"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 100, 1] = 255
    save(folder, tensors)
    opened = checkpoint.open(folder)
    opened.summary()
    opened.read("layers.1.experts.gate.weight")
    with pytest.raises(CheckpointError, match=r"layers\.1\.experts\.down\.weight has a scale that is not a number"):
        opened.read("layers.1.experts.down.weight")


def test_unquantized_mlx(copied, tmp_path):
    """mlx-lm's bfloat16: de-interleaved dense experts. No contract name; it reads as plain `mlx`."""
    folder = tmp_path / "dense"
    convert(copied("mxfp4"), folder, "mlx-mxfp4")
    wanted = {param.name: codecs.dequantize(weight) for param, weight in checkpoint.open(folder).weights()}
    tensors = stored(folder)
    for name in [name for name in tensors if name.endswith(".scales")]:
        module = name.removesuffix(".scales")
        blocks = tensors.pop(f"{module}.weight").view(np.uint8)
        scales = tensors.pop(name)
        tensors[f"{module}.weight"] = mxfp4(blocks.reshape(*scales.shape, 16), scales).astype(BF16)
    save(folder, tensors)
    opened = checkpoint.open(folder)
    assert opened.format == "mlx"
    for param, weight in opened.weights():
        assert np.array_equal(codecs.dequantize(weight), wanted[param.name])


def test_mlx_with_a_global_scale(mini, tmp_path):
    """mlx-lm's nvfp4 with `.global_scale` [E]: what stands for scale 448 and code 6."""
    folder = tmp_path / "nvfp4"
    convert(mini / "mxfp4", folder, "mlx-nvfp4")
    before = codecs.dequantize(checkpoint.open(folder).read("layers.0.experts.up.weight"))
    amax = np.linspace(1, 6, 6, dtype=np.float32)
    save(folder, stored(folder) | {"model.layers.0.mlp.experts.up_proj.global_scale": amax})
    weight = checkpoint.open(folder).read("layers.0.experts.up.weight")
    assert np.allclose(codecs.dequantize(weight), before * amax[:, None, None] / 2688, rtol=1e-6)


def test_mlx_of_other_bits_is_refused_by_name(mini, tmp_path):
    mx = pytest.importorskip("mlx.core")
    folder = tmp_path / "3bit"
    convert(mini / "mxfp4", folder, "mlx-4bit")
    parts = mx.quantize(mx.random.normal((320, 192)), 64, 3)
    names = [f"lm_head.{part}" for part in ("weight", "scales", "biases")]
    save(folder, stored(folder) | {name: np.array(array) for name, array in zip(names, parts, strict=True)})
    with pytest.raises(CheckpointError, match="lm_head is quantized to 3 bits"):
        checkpoint.open(folder)
