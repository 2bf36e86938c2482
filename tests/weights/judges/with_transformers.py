"""transformers: what it saves in bfloat16, and OpenAI's published layout of MXFP4 as it decodes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from . import base

NAME = "transformers"


def version() -> str | None:
    return base.version_of("transformers")


def _weights(model: Any) -> base.Weights:
    return base.by_parameter({name: values.float().numpy() for name, values in model.state_dict().items()})


def _bf16(source: Path, folder: Path) -> base.Weights:
    import torch
    from transformers import GptOssForCausalLM

    model = GptOssForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return _weights(model)


def random_mxfp4(source: Path, folder: Path) -> None:
    """The published layout with random codes, and scales that give values of the source's size."""
    tensors, chance = base.load(source), np.random.default_rng(7)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = chance.integers(0, 256, (experts, rows, width // 32, 16), dtype=np.uint8)
        tensors[f"{name}_scales"] = chance.integers(119, 123, (experts, rows, width // 32), dtype=np.uint8)
    base.write(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})


def _mxfp4(source: Path, folder: Path) -> base.Weights:
    import torch
    from transformers import GptOssForCausalLM, Mxfp4Config

    random_mxfp4(source, folder)
    config = Mxfp4Config(dequantize=True)
    return _weights(GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config))


ROWS = (
    base.Row("bfloat16, experts fused", {"bf16": _bf16}),
    base.Row("MXFP4 experts, as published (decoded by the tool)", {"mxfp4": _mxfp4}),
)
