"""config.json in every dialect: the published one, transformers 5's, OpenAI's `original/`, and gpt-oss-puzzle's.

A field that would change the numbers and is not honoured is an error. The README of this folder lists every field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import FULL, SLIDING, SWIGLU_ALPHA, LayerKind, ModelConfig, Yarn
from ..errors import CheckpointError
from .config_fields import refuse_what_changes_numbers, unknown_fields

MAX_SIZE = 2**24  # far above any gpt-oss dimension; keeps hostile configs from asking for terabytes
MAX_REAL = 1e30  # fits float32
MODEL_TYPES = ("gpt_oss", "gpt_oss_puzzle")
_SCALING = {  # the entries of rope_scaling that are read, and finetuned, which is a remark
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("truncate", "attention_factor", "mscale", "mscale_all_dim", "partial_rotary_factor", "finetuned"),
}


def read_config(data: object) -> ModelConfig:
    """ModelConfig from a parsed config.json.

    Raises CheckpointError for another model type, a missing size, one that is not a plausible number, or a field that
    would change the numbers and is not honoured.
    """
    if not isinstance(data, Mapping):
        raise CheckpointError("config.json is not a JSON object; download the checkpoint again")
    model_type = data.get("model_type", "gpt_oss")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"config.json says model_type {model_type!r}; only gpt_oss models can be opened")
    layers = _size(data, "num_hidden_layers")
    experts, windows = _experts(data, layers), _windows(data, layers)
    heads = _size(data, "num_attention_heads")
    config = ModelConfig(
        num_hidden_layers=layers,
        hidden_size=_size(data, "hidden_size"),
        intermediate_size=_size(data, "intermediate_size", "moe_intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=_size(data, "num_key_value_heads", default=heads),
        head_dim=_size(data, "head_dim", default=64),
        num_local_experts=max(experts),
        num_experts_per_tok=_size(data, "num_experts_per_tok", "experts_per_token", default=4),
        vocab_size=_size(data, "vocab_size"),
        sliding_window=min((window for window in windows if window is not None), default=128),
        max_position_embeddings=_max_context(data),
        rms_norm_eps=_real(data, "rms_norm_eps", 1e-5),
        swiglu_limit=_real(data, "swiglu_limit", 7.0),
        swiglu_alpha=_real(data, "swiglu_alpha", SWIGLU_ALPHA),
        yarn=_yarn(data),
        layer_types=tuple(FULL if window is None else SLIDING for window in windows),
        layer_experts=experts if len(set(experts)) > 1 else (),
        layer_windows=windows if len(set(windows) - {None}) > 1 else (),
        eos_token_id=token_ids(data.get("eos_token_id"), "eos_token_id"),
        pad_token_id=next(iter(token_ids(data.get("pad_token_id"), "pad_token_id")), None),
    )
    refuse_what_changes_numbers(data, config)
    return config


def remarks(data: Mapping[str, Any]) -> list[str]:
    """What the user should know about how a config.json was read, one line each; [] for the published ones."""
    found = []
    scaling = _rope_entries(data)
    if scaling is None and "rope_scaling_factor" not in data:
        found.append("config.json has no rope_scaling: YaRN with factor 32, as transformers takes it")
    elif scaling is not None and _rope_type(scaling) == "yarn" and "truncate" not in scaling:
        found.append("rope_scaling does not say truncate: taken as false, as OpenAI's models have it")
    if unknown := unknown_fields(data):
        more = f" and {len(unknown) - 6} more" if len(unknown) > 6 else ""
        names = ", ".join(name[:60] for name in unknown[:6])
        found.append(f"config.json has fields that are not known here and were not used: {names}{more}")
    return found


def published(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json in the published dialect, without a quantization block.

    A model whose layers differ gets gpt-oss-puzzle's `block_configs`.
    """
    yarn = config.yarn
    factor = {} if yarn.attention_factor is None else {"attention_factor": yarn.attention_factor}
    content = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": config.eos_token_id[0] if len(config.eos_token_id) == 1 else list(config.eos_token_id),
        "experts_per_token": config.num_experts_per_tok,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initial_context_length": yarn.original_context,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_types": list(config.layer_types),
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "gpt_oss",
        "num_attention_heads": config.num_attention_heads,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "num_local_experts": config.num_local_experts,
        "output_router_logits": False,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": {
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_context,
            "rope_type": "yarn",
            "truncate": yarn.truncate,
            **factor,
        },
        "rope_theta": yarn.theta,
        "router_aux_loss_coef": 0.9,
        "sliding_window": config.sliding_window,
        "swiglu_limit": config.swiglu_limit,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if config.swiglu_alpha != SWIGLU_ALPHA:
        content["swiglu_alpha"] = config.swiglu_alpha
    if config.layer_experts or config.layer_windows:
        layers = zip(config.experts, config.windows, strict=True)
        blocks = [{"num_local_experts": experts, "sliding_window": window} for experts, window in layers]
        content |= {"architectures": ["GptOssPuzzleForCausalLM"], "model_type": "gpt_oss_puzzle"}
        content["block_configs"] = blocks
    return content


def token_ids(value: object, name: str) -> tuple[int, ...]:
    """A token id, a list of them, or null, as config.json and generation_config.json write them."""
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for token in ids:
        if not _is_int(token) or not 0 <= token < MAX_SIZE:
            raise CheckpointError(f"{name} must be a token id or a list of them, not {value!r}")
    return ids


def _experts(data: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """The number of experts of each layer."""
    blocks = _blocks(data, layers)
    if blocks is not None:
        return tuple(_size(block, "num_local_experts", "num_experts") for block in blocks)
    for name in ("num_local_experts", "num_experts"):
        if isinstance(data.get(name), list):
            return tuple(_size({name: count}, name) for count in _per_layer(data, name, layers))
    return (_size(data, "num_local_experts", "num_experts"),) * layers


def _windows(data: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """The window of each layer, None for full attention. null is full attention only where a layer says it."""
    kinds = data.get("layer_types")
    if kinds is None:
        kinds = [(SLIDING, FULL)[layer % 2] for layer in range(layers)]
    elif not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise CheckpointError(f"layer_types must list {SLIDING} or {FULL} for each of the {layers} layers")
    blocks = _blocks(data, layers)
    given: list[Any] | None = None
    if blocks is not None and all("sliding_window" in block for block in blocks):
        given = [block["sliding_window"] for block in blocks]
    elif isinstance(data.get("sliding_window"), list):
        given = _per_layer(data, "sliding_window", layers)
    if given is None:
        return _usual_windows(data, kinds)
    windows = tuple(None if w in (None, 0) and w is not False else _size({"w": w}, "w") for w in given)
    said: list[LayerKind] = [FULL if window is None else SLIDING for window in windows]
    if data.get("layer_types") is not None and said != kinds:
        raise CheckpointError("config.json: layer_types and the sliding_window of each layer contradict each other")
    return windows


def _usual_windows(data: Mapping[str, Any], kinds: list[LayerKind]) -> tuple[int | None, ...]:
    """The same window for all sliding layers."""
    if "sliding_window" in data and data["sliding_window"] is None and SLIDING in kinds:
        raise CheckpointError("config.json: sliding_window is null, but layer_types has sliding layers")
    window = _size(data, "sliding_window", default=128)
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _blocks(data: Mapping[str, Any], layers: int) -> list[Mapping[str, Any]] | None:
    """gpt-oss-puzzle's `block_configs`, one object per layer."""
    if data.get("block_configs") is None:
        return None
    blocks = _per_layer(data, "block_configs", layers)
    if not all(isinstance(block, Mapping) for block in blocks):
        raise CheckpointError("config.json: block_configs must be a list of objects")
    unknown = {key for block in blocks for key in block} - {"num_local_experts", "num_experts", "sliding_window"}
    if unknown:
        raise CheckpointError(f"config.json: block_configs has {_short(sorted(unknown))}, which is not supported")
    return blocks


def _per_layer(data: Mapping[str, Any], name: str, layers: int) -> list[Any]:
    value = data[name]
    if not isinstance(value, list) or len(value) != layers:
        raise CheckpointError(f"config.json: {name} must have an entry for each of the {layers} layers")
    return value


def _rope_entries(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`rope_parameters`, `rope_scaling`, or the name under which converters of gpt-oss-puzzle keep the latter."""
    for name in ("rope_parameters", "rope_scaling", "yarn_rope_scaling"):
        value = data.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise CheckpointError(f"config.json: {name} must be an object, not {_short(value)}")
        if value:
            return value
    return None


def _rope_type(scaling: Mapping[str, Any]) -> object:
    return scaling.get("rope_type", scaling.get("type", "yarn"))


def _yarn(data: Mapping[str, Any]) -> Yarn:
    scaling = _rope_entries(data)
    if scaling is None and "rope_scaling_factor" in data:  # OpenAI's original/config.json
        return Yarn(
            theta=_real(data, "rope_theta", 150000.0),
            factor=_real(data, "rope_scaling_factor", 32.0),
            original_context=_size(data, "initial_context_length", default=4096),
            beta_fast=_real(data, "rope_ntk_beta", 32.0),
            beta_slow=_real(data, "rope_ntk_alpha", 1.0),
        )
    if scaling is None:  # transformers' GptOssConfig: YaRN with OpenAI's parameters
        return Yarn(theta=_real(data, "rope_theta", 150000.0))
    unknown = sorted(set(scaling) - _SCALING)
    if unknown:
        raise CheckpointError(f"config.json: {_short(unknown)} of rope_scaling is not supported; gpt-oss uses yarn")
    if scaling.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise CheckpointError("config.json: partial_rotary_factor is not supported; gpt-oss rotates whole heads")
    theta = _real(scaling, "rope_theta", _real(data, "rope_theta", 150000.0))
    kind = _rope_type(scaling)
    if kind == "default":
        return Yarn(theta=theta, factor=1.0)
    if kind != "yarn":
        raise CheckpointError(f"rope type {_short(kind)} is not supported; gpt-oss uses yarn")
    context = _size(
        scaling, "original_max_position_embeddings", default=_size(data, "initial_context_length", default=4096)
    )
    factor = 32.0
    if scaling.get("factor") is not None:
        factor = _real(scaling, "factor", factor)
    elif "factor" in scaling:  # transformers: null means the ratio of the contexts
        factor = _size(data, "max_position_embeddings") / context
    truncate = scaling.get("truncate", False)
    if not isinstance(truncate, bool):
        raise CheckpointError(f"config.json: truncate must be true or false, not {_short(truncate)}")
    return Yarn(
        theta=theta,
        factor=factor,
        original_context=context,
        beta_fast=_real(scaling, "beta_fast", 32.0),
        beta_slow=_real(scaling, "beta_slow", 1.0),
        truncate=truncate,
        attention_factor=_attention_factor(scaling, factor),
    )


def _attention_factor(scaling: Mapping[str, Any], factor: float) -> float | None:
    """The factor on cos and sin where it is not the paper's, as transformers' _compute_yarn_parameters has it:
    attention_factor itself, or the ratio of 0.1 mscale ln(factor) + 1 and the same with mscale_all_dim."""
    if scaling.get("attention_factor") is not None:
        return _real(scaling, "attention_factor", 1.0)
    if not (scaling.get("mscale") and scaling.get("mscale_all_dim")):
        return None
    if factor <= 1.0:
        return 1.0
    above, below = (0.1 * _real(scaling, name, 1.0) * math.log(factor) + 1.0 for name in ("mscale", "mscale_all_dim"))
    return above / below


def _max_context(data: Mapping[str, Any]) -> int:
    if data.get("max_position_embeddings") is not None:
        return _size(data, "max_position_embeddings")
    yarn = _yarn(data)
    return int(min(yarn.original_context * max(yarn.factor, 1.0), MAX_SIZE - 1))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _size(data: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        if data.get(name) is not None:
            value = data[name]
            if not _is_int(value) or not 0 < value < MAX_SIZE:
                raise CheckpointError(f"config.json: {name} must be a positive integer, not {_short(value)}")
            return int(value)
    if default is None:
        raise CheckpointError(f"config.json: {names[0]} is missing")
    return default


def _real(data: Mapping[str, Any], name: str, default: float) -> float:
    value = data.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < MAX_REAL:
        raise CheckpointError(f"config.json: {name} must be a positive number, not {_short(value)}")
    return float(value)
