"""ModelOpt's NVFP4 export (experts fused, attention), decoded by its own tensor class in float32."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from . import base

NAME = "ModelOpt"


def version() -> str | None:
    return base.version_of("nvidia-modelopt")


def _make(source: Path, folder: Path, config: str) -> base.Weights:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from safetensors.torch import load_file
    from transformers import GptOssForCausalLM

    model = GptOssForCausalLM.from_pretrained(source, dtype=torch.bfloat16, attn_implementation="eager")
    ids = torch.arange(2, 66)[None]
    model = mtq.quantize(model, getattr(mtq, config), lambda each: each(ids))
    with torch.no_grad():
        export_hf_checkpoint(model, export_dir=str(folder))
    return _decoded({k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()})


def _decoded(stored: dict) -> base.Weights:
    """Packed matrices are [N, K / 2] in the attention; those of the experts are input-major, [E, K / 2, N].

    Their scales are `q_proj.weight_scale` and, of experts, which have no `.weight`, `down_proj_weight_scale`.
    """
    import torch
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    tensors = {}
    for name, values in stored.items():
        fused = name.endswith(("gate_up_proj", "down_proj"))
        prefix = f"{name}_weight" if fused else name
        scale = stored.get(f"{prefix}_scale")
        if name.endswith(("_scale", "_scale_2")):
            continue
        if scale is None:
            tensors[name] = values.float().numpy()
            continue
        codes = values.transpose(1, 2).contiguous() if fused else values
        scales = scale.transpose(1, 2).contiguous() if fused else scale
        outer = stored[f"{prefix}_scale_2"].float()
        parts = []
        for matrix, own in zip(codes if fused else [codes], scales if fused else [scales], strict=True):
            tensor = NVFP4QTensor(torch.Size((matrix.shape[0], 2 * matrix.shape[1])), torch.float32, matrix)
            found = tensor.dequantize(scale=own, double_scale=outer, block_sizes={-1: 16})
            parts.append(found.float().numpy())
        tensors[name] = np.stack(parts).swapaxes(1, 2) if fused else parts[0]
    return base.by_parameter(tensors)


ROWS = (base.Row("NVFP4", {"modelopt-nvfp4": partial(_make, config="NVFP4_DEFAULT_CFG")}),)
