"""The gguf package: every type that it can quantize, in one file with the experts in that type."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from . import base

NAME = "gguf"
_NAMES = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "attention_norm.weight": "attn_norm.weight",
    "mlp_norm.weight": "post_attention_norm.weight",
    "attention.sinks": "attn_sinks.weight",
    **{f"attention.{x}.{p}": f"attn_{x if x != 'o' else 'output'}.{p}" for x in "qkvo" for p in ("weight", "bias")},
    **{f"router.{p}": f"ffn_gate_inp.{p}" for p in ("weight", "bias")},
    **{f"experts.{x}.{p}": f"ffn_{x}_exps.{p}" for x in ("gate", "up", "down") for p in ("weight", "bias")},
}


def version() -> str | None:
    return base.version_of("gguf")


def tensor_name(name: str) -> str:
    """The file's name of a parameter."""
    if not name.startswith("layers."):
        return _NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{_NAMES[rest]}"


def is_matrix(name: str) -> bool:
    """Whether llama.cpp quantizes it: all matrices but the router."""
    return name.endswith(".weight") and "norm" not in name and not name.endswith("router.weight")


def write(path: Path, tensors: Mapping[str, tuple[np.ndarray, str]]) -> None:
    """A GGUF file of the small model. tensors: by canonical name, data and the name of its type."""
    import gguf

    path.parent.mkdir(exist_ok=True)
    template = gguf.GGUFReader(base.TESTS / "data/mini/gguf/model.gguf")
    c, file = base.CONFIG, gguf.GGUFWriter(path, "gpt-oss")
    sizes = {
        "context_length": c["max_position_embeddings"], "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"], "expert_feed_forward_length": c["intermediate_size"],
        "expert_count": base.EXPERTS, "expert_used_count": c["num_experts_per_tok"], "block_count": base.LAYERS,
        "attention.head_count": c["num_attention_heads"], "attention.head_count_kv": c["num_key_value_heads"],
        "attention.key_length": c["head_dim"], "attention.value_length": c["head_dim"],
        "attention.sliding_window": c["sliding_window"], "rope.freq_base": c["rope_theta"],
        "rope.dimension_count": c["head_dim"],
        "rope.scaling.factor": c["rope_scaling"]["factor"],
        "rope.scaling.original_context_length": c["rope_scaling"]["original_max_position_embeddings"],
    }  # fmt: skip
    for key, field in template.fields.items():
        value = sizes.get(key.removeprefix("gpt-oss."), field.contents())
        if not key.startswith("GGUF.") and key != "general.architecture":
            if field.types[0] == gguf.GGUFValueType.ARRAY:
                file.add_array(key, value)
            else:
                file.add_key_value(key, value, field.types[0])
    for name, (values, kind) in tensors.items():
        file.add_tensor(tensor_name(name), values, raw_dtype=gguf.GGMLQuantizationType[kind])
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def source_weights(source: Path) -> base.Weights:
    """The source's weights in float32."""
    return {name: values.astype(np.float32) for name, values in base.by_parameter(base.load(source)).items()}


def _make(source: Path, folder: Path, kind: str, rest: str) -> base.Weights:
    import gguf
    from gguf.quants import dequantize, quantize

    weights, tensors = source_weights(source), {}
    for name, values in weights.items():
        own = (kind if "experts" in name else rest) if is_matrix(name) else "F32"
        number = gguf.GGMLQuantizationType[own]
        data = quantize(np.ascontiguousarray(values), number)
        tensors[name] = data, own
        weights[name] = dequantize(data, number)
    write(folder / "model.gguf", tensors)
    return weights


def _row(rest: str | None, *kinds: str) -> base.Row:
    named = ", ".join(kinds) + (f" experts, the rest {rest}" if rest else "")
    return base.Row(named, {f"gguf-{k.lower()}": partial(_make, kind=k, rest=rest or k) for k in kinds})


ROWS = (
    _row("Q8_0", "MXFP4"),
    _row(None, "F32", "F16", "BF16"),
    _row(None, "Q8_0", "Q4_0", "Q4_1"),
    _row(None, "Q5_0", "Q5_1"),
    _row(None, "TQ2_0"),
    _row(None, "TQ1_0"),
)
