"""mlx-lm's `convert`, at every width, in every mode and mixed recipe, decoded by MLX in float32.

mlx-lm does not read the bfloat16 layout of Hugging Face. It takes OpenAI's MXFP4, from which it first makes dense
weights in its own layout.
"""

from __future__ import annotations

import contextlib
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import base
from .with_transformers import random_mxfp4

NAME = "mlx-lm"


def version() -> str | None:
    return base.version_of("mlx-lm")


def _convert(source: Path, folder: Path, **options: Any) -> None:
    from mlx_lm import convert

    with contextlib.redirect_stdout(io.StringIO()):
        convert(str(source), str(folder), **options)


def _mxfp4(source: Path) -> Path:
    """OpenAI's layout beside the source, with its tokenizer; made once."""
    folder = source.parent / "mlx-lm-mxfp4"
    if not folder.exists():
        random_mxfp4(source, folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((source / name).read_bytes())
    return folder


def _dense(source: Path) -> Path:
    """The same in mlx-lm's layout without any quantized weight."""
    folder = source.parent / "mlx-lm-dense"
    if not folder.exists():
        _convert(_mxfp4(source), folder, dequantize=True)
    return folder


def _make(source: Path, folder: Path, dense: bool = True, **options: Any) -> base.Weights:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    _convert((_dense if dense else _mxfp4)(source), folder, **options)
    return _decoded(folder)


def _decoded(folder: Path) -> base.Weights:
    import mlx.core as mx

    settings = json.loads((folder / "config.json").read_text()).get("quantization", {})
    stored = {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in mx.load(str(path)).items()}
    found = {}
    for name, values in stored.items():
        module, _, part = name.rpartition(".")
        if part in ("scales", "biases"):
            continue
        if part == "weight" and f"{module}.scales" in stored:
            own = settings.get(module) or settings
            scales, biases = stored[f"{module}.scales"], stored.get(f"{module}.biases")
            if biases is not None:
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            how = {"group_size": own["group_size"], "bits": own["bits"], "mode": own.get("mode", "affine")}
            values = mx.dequantize(
                values, scales, biases, **how, **({} if biases is not None else {"dtype": mx.float32})
            )
        found[_canonical(name)] = np.array(values.astype(mx.float32))
    return found


def _canonical(name: str) -> str:
    """Experts are output-major here and not fused; all else is named as in Hugging Face's layout."""
    layer, _, rest = name.partition(".mlp.experts.")
    if rest:
        which, _, part = rest.partition("_proj.")
        return f"{layer.removeprefix('model.')}.experts.{which}.{part}"
    return next(iter(base.by_parameter({name: np.empty(0)})))


def _affine(what: str, *cases: tuple[int, int]) -> base.Row:
    """cases: (bits, group)."""
    made = {f"mlx-{b}bit-g{g}": partial(_make, quantize=True, q_bits=b, q_group_size=g) for b, g in cases}
    return base.Row(f"affine, {what}", made)


def _mode(mode: str, bits: int, group: int) -> base.Row:
    options = {"quantize": True, "q_mode": mode, "q_bits": bits, "q_group_size": group}
    return base.Row(f"mode {mode}", {f"mlx-mode-{mode}": partial(_make, **options)})


def _recipes(*names: str) -> base.Row:
    made = {name: partial(_make, quantize=True, q_group_size=64, quant_predicate=name) for name in names}
    return base.Row(f"mixed recipe {' and '.join(names)}", made)


ROWS = (
    base.Row("OpenAI's MXFP4 experts as they are", {"mlx-mxfp4": partial(_make, dense=False)}),
    base.Row(
        "OpenAI's MXFP4 experts, the rest 8-bit",
        {"mlx-mxfp4-q8": partial(_make, dense=False, quantize=True, q_bits=8, q_group_size=64)},
    ),
    base.Row(
        "OpenAI's MXFP4 experts, the rest 4-bit",
        {"mlx-mxfp4-q4": partial(_make, dense=False, quantize=True, q_bits=4, q_group_size=64)},
    ),
    *(_affine(f"{bits} bits, groups of 64", (bits, 64)) for bits in (3, 4, 6, 8)),
    _affine("4 and 8 bits, groups of 32 and 128", *((bits, group) for bits in (4, 8) for group in (32, 128))),
    _affine("2 bits, and 3 in groups of 32 and 128", (2, 64), (2, 32), (2, 128), (3, 32), (3, 128)),
    _affine("5 bits, and 6 in groups of 32 and 128", (5, 64), (5, 32), (5, 128), (6, 32), (6, 128)),
    _mode("mxfp4", 4, 32),
    _mode("mxfp8", 8, 32),
    _mode("nvfp4", 4, 16),
    _recipes("mixed_2_6", "mixed_3_6"),
    _recipes("mixed_4_6"),
    _recipes("mixed_3_4"),
)
