"""What the judges share: the small model that the tools quantize, and its weights by our names of the parameters.

A judge is a module with a NAME, a `version()` and ROWS. It imports its tool inside functions only, because the program
lists the rows of tools that are not installed.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

TESTS = Path(__file__).parents[2]
sys.path.insert(0, str(TESTS / "golden"))  # also when this runs as a program, without pytest

import family  # noqa: E402

LAYERS, EXPERTS = 2, 4
CONFIG = family.CONFIG | {
    "architectures": ["GptOssForCausalLM"], "num_hidden_layers": LAYERS, "num_local_experts": EXPERTS,
    "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 320, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
    "experts_per_token": 2, "eos_token_id": 1, "pad_token_id": 0, "torch_dtype": "bfloat16", "hidden_act": "silu",
    "swiglu_limit": 7.0, "initial_context_length": 128, "tie_word_embeddings": False, "attention_bias": True,
}  # fmt: skip
PARTS = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}  # of the fused tensor's last axis
_NAMES = {
    "model.embed_tokens": "embed",
    "model.norm": "norm",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.router": "router",
    **{f"self_attn.{part}_proj": f"attention.{part}" for part in "qkvo"},
}

Weights = dict[str, np.ndarray]  # by canonical name, matrices [N, K] or [E, N, K], in the dtype of the tool's decoding
Make = Callable[[Path, Path], Weights]


@dataclass(frozen=True)
class Row:
    """One row of the table.

    kind: what the tool makes, as the table says it.
    cases: by name, what makes a checkpoint: (folder of the bfloat16 source, new folder to write) -> the tool's own
        decoding of what it wrote. All cases must give the same row.
    """

    kind: str
    cases: Mapping[str, Make]


def version_of(distribution: str) -> str | None:
    """The version of an installed package; None without it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_source(folder: Path) -> Path:
    """The small model in bfloat16, in the layout of Hugging Face, with a tokenizer."""
    tensors = family.random_tensors([EXPERTS] * LAYERS, config=CONFIG)
    family.write_checkpoint(folder, CONFIG, {name: to_bfloat16(values) for name, values in tensors.items()})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TESTS / "data/mini/mxfp4" / name, folder / name)
    return folder


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16)


def load(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder's safetensors files, by name. For dtypes that numpy has."""
    return {name: values for path in sorted(folder.glob("*.safetensors")) for name, values in load_file(path).items()}


def write(folder: Path, tensors: Mapping[str, np.ndarray], quantization: Mapping[str, object]) -> None:
    """A checkpoint of the source's sizes. quantization: config.json's `quantization_config`."""
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, folder / "model.safetensors")
    write_config(folder, quantization)


def write_config(folder: Path, quantization: Mapping[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))


def by_parameter(tensors: Mapping[str, np.ndarray]) -> Weights:
    """Tensors of Hugging Face's bf16 layout by canonical name, output-major."""
    found: Weights = {}
    for name, values in tensors.items():
        layer, rest = _split(name)
        if rest.startswith("mlp.experts."):
            matrix = not rest.endswith("_bias")
            fused, part = rest.removeprefix("mlp.experts.").removesuffix("_bias"), "weight" if matrix else "bias"
            for which, at in PARTS.items() if fused == "gate_up_proj" else {"down": slice(None)}.items():
                piece = values[..., at]
                found[f"{layer}experts.{which}.{part}"] = piece.swapaxes(1, 2) if matrix else piece
        else:
            module, _, part = rest.rpartition(".")
            name = rest.replace("self_attn", "attention") if module == "self_attn" else None
            found[f"{layer}{name or f'{_NAMES.get(module, module)}.{part}'}"] = values
    return found


def as_tensors(weights: Weights) -> dict[str, np.ndarray]:
    """The inverse of by_parameter, in float32."""
    found: dict[str, np.ndarray] = {}
    inverse = {ours: theirs for theirs, ours in _NAMES.items()}
    for name, stored in weights.items():
        layer, rest = re.fullmatch(r"(?:layers\.(\d+)\.)?(.*)", name).groups()
        values, prefix = stored.astype(np.float32), "" if layer is None else f"model.layers.{layer}."
        module, _, part = rest.rpartition(".")
        if module.startswith("experts."):
            which, ending = module.removeprefix("experts."), "" if part == "weight" else "_bias"
            values = values.swapaxes(1, 2) if part == "weight" else values
            if which == "down":
                found[f"{prefix}mlp.experts.down_proj{ending}"] = values
            else:
                shape = (*values.shape[:-1], 2 * values.shape[-1])
                fused = found.setdefault(f"{prefix}mlp.experts.gate_up_proj{ending}", np.empty(shape, np.float32))
                fused[..., PARTS[which]] = values
        elif module == "attention":
            found[f"{prefix}self_attn.{part}"] = values
        else:
            found[f"{prefix}{inverse.get(module, module)}.{part}"] = values
    return found


def of_modules(modules: Mapping[str, np.ndarray]) -> Weights:
    """The weights [N, K] of modules such as `model.layers.0.mlp.experts.3.up_proj` by canonical name."""
    found, experts = {}, defaultdict(dict)
    for module, values in modules.items():
        layer, rest = _split(module)
        expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)_proj", rest)
        if expert:
            experts[f"{layer}experts.{expert[2]}.weight"][int(expert[1])] = values
        else:
            found[f"{layer}{_NAMES.get(rest, rest)}.weight"] = values
    return found | {name: np.stack([parts[e] for e in range(EXPERTS)]) for name, parts in experts.items()}


def modules_of(source: Path, experts: bool = True) -> dict[str, np.ndarray]:
    """The weights [N, K] of the attention's modules and (if `experts`) of each expert's, by module, in bfloat16."""
    found = {}
    for name, values in by_parameter(load(source)).items():
        layer, _, rest = name.removeprefix("layers.").partition(".")
        if rest.startswith("attention.") and rest.endswith(".weight"):
            found[f"model.layers.{layer}.self_attn.{rest[10]}_proj"] = values
        if rest.startswith("experts.") and rest.endswith(".weight") and experts:
            for expert, matrix in enumerate(values):
                found[f"model.layers.{layer}.mlp.experts.{expert}.{rest.split('.')[1]}_proj"] = matrix
    return found


def per_expert(source: Path) -> dict[str, np.ndarray]:
    """The source's tensors but for the weights of modules_of, with a bias for each expert."""
    left = {}
    for name, values in load(source).items():
        if name.endswith(("gate_up_proj_bias", "down_proj_bias")):
            prefix, fused = name.rsplit(".", 1)
            for which, at in PARTS.items() if fused.startswith("gate") else {"down": slice(None)}.items():
                left |= {f"{prefix}.{e}.{which}_proj.bias": values[e, at].copy() for e in range(EXPERTS)}
        elif not name.endswith(("gate_up_proj", "down_proj", *(f"{x}_proj.weight" for x in "qkvo"))):
            left[name] = values
    return left


def _split(name: str) -> tuple[str, str]:
    """("layers.N." or "", the rest) of a name of Hugging Face's."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    return (f"layers.{found[1]}.", found[2]) if found else ("", name)


def logits(tensors: Mapping[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """The logits of tensors as as_tensors makes them, computed in float64 numpy: [L, V]."""
    windows = [CONFIG["sliding_window"] if kind.startswith("sliding") else None for kind in CONFIG["layer_types"]]
    return family.logits(dict(tensors), windows, ids, CONFIG["num_experts_per_tok"], CONFIG)


def plain_text(count: int) -> list[str]:
    """Prompts for tools that calibrate, the same in every run."""
    chance = np.random.default_rng(0)
    return [" ".join("abcdefghij"[letter] for letter in chance.integers(0, 10, 150)) for _ in range(count)]


def with_biases(weights: Weights, stored: Mapping[str, np.ndarray]) -> Weights:
    """The weights with the biases of the experts' modules as a file has them: some tools round those to float16."""
    biases = {name.removesuffix(".bias"): values for name, values in stored.items() if name.endswith("_proj.bias")}
    found = of_modules({module: values for module, values in biases.items() if ".experts." in module})
    return weights | {name.replace(".weight", ".bias"): values for name, values in found.items()}
