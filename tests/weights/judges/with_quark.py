"""AMD Quark's export for gpt-oss, decoded by Quark's own layers after it has imported the file again."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from . import base

NAME = "Quark"


def version() -> str | None:
    return base.version_of("amd-quark")


def _model(source: Path):
    import torch
    from quark.torch.utils.llm.model_preparation import preprocess_for_quantization
    from transformers import GptOssForCausalLM

    model = GptOssForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    preprocess_for_quantization(model)
    return model


def _make(source: Path, folder: Path, scheme: str, attention: bool) -> base.Weights:
    import torch
    from quark.torch import LLMTemplate, ModelQuantizer, export_safetensors

    excluded = ["lm_head", "*router*", *([] if attention else ["*self_attn*"])]
    config = LLMTemplate.get("gpt_oss").get_config(scheme=scheme, exclude_layers=excluded)
    quantizer = ModelQuantizer(config)
    data = [{"input_ids": torch.arange(2, 42)[None]}]
    model = quantizer.freeze(quantizer.quantize_model(_model(source), data))
    with torch.no_grad():
        export_safetensors(model, str(folder), custom_mode="quark")
    return _decoded(source, folder)


def _decoded(source: Path, folder: Path) -> base.Weights:
    import torch
    from quark.torch import import_model_from_safetensors
    from quark.torch.export.nn.modules.qparamslinear import QParamsLinear
    from transformers import GptOssForCausalLM

    model = GptOssForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model = import_model_from_safetensors(model, str(folder))
    modules = {}
    for name, module in model.named_modules():
        if not isinstance(module, QParamsLinear):
            continue
        for part in module.weight_quantizer.modules():
            if isinstance(getattr(part, "scale", None), torch.Tensor) and part.scale.dtype == torch.bfloat16:
                part.scale = part.scale.float()
        values = module._get_qweight(module.weight).float().detach().numpy()
        if name.endswith("gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            modules |= {f"{prefix}{which}_proj": values[at] for which, at in base.PARTS.items()}
        else:
            modules[name] = values
    return base.by_parameter(base.load(source)) | base.of_modules(modules)


ROWS = (
    base.Row(
        "schemes mxfp4 and mxfp4_fp8, experts",
        {
            "quark-mxfp4": partial(_make, scheme="mxfp4", attention=False),
            "quark-mxfp4-fp8": partial(_make, scheme="mxfp4_fp8", attention=False),
        },
    ),
    base.Row(
        "schemes fp8 and ptpc_fp8",
        {
            "quark-fp8": partial(_make, scheme="fp8", attention=True),
            "quark-ptpc-fp8": partial(_make, scheme="ptpc_fp8", attention=True),
        },
    ),
    base.Row("scheme int8", {"quark-int8": partial(_make, scheme="int8", attention=True)}),
)
