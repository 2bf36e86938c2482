"""ModelConfig: the sizes of one gpt-oss model, read from every dialect of config.json and validated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import CheckpointError

LayerKind = Literal["sliding_attention", "full_attention"]
SLIDING: LayerKind = "sliding_attention"
FULL: LayerKind = "full_attention"

SWIGLU_ALPHA = 1.702  # openai/gpt-oss, gpt_oss/torch/model.py: swiglu(alpha=1.702)
MAX_SIZE = 2**24  # far above any gpt-oss dimension; keeps hostile configs from asking for terabytes
MAX_REAL = 1e30  # fits float32


@dataclass(frozen=True)
class Yarn:
    """YaRN's parameters (Peng et al. 2023). `factor` 1 is plain RoPE. `truncate` rounds the correction range
    to whole dimensions; gpt-oss does not."""

    theta: float = 150000.0
    factor: float = 32.0
    original_context: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of one model, under the names of the published config.json.

    The defaults are gpt-oss-20b. `layer_types` has one entry per layer; `sliding_window` is in tokens: a key is
    visible to a sliding layer's query iff 0 <= q - k < sliding_window.
    """

    num_hidden_layers: int = 24
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    num_local_experts: int = 32
    num_experts_per_tok: int = 4
    vocab_size: int = 201088
    sliding_window: int = 128
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    swiglu_alpha: float = SWIGLU_ALPHA
    yarn: Yarn = field(default_factory=Yarn)
    layer_types: tuple[LayerKind, ...] = ()
    eos_token_id: tuple[int, ...] = (200002,)
    pad_token_id: int | None = 199999

    def __post_init__(self) -> None:
        if not self.layer_types:
            kinds = (SLIDING, FULL)
            object.__setattr__(self, "layer_types", tuple(kinds[i % 2] for i in range(self.num_hidden_layers)))
        _check(self)

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (or all value heads) together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def full_layers(self) -> int:
        return self.layer_types.count(FULL)

    @property
    def sliding_layers(self) -> int:
        return self.layer_types.count(SLIDING)


def read_config(data: object) -> ModelConfig:
    """ModelConfig from a parsed config.json: the published dialect, transformers 5's, or OpenAI's `original/`.

    Raises CheckpointError for another model type, a missing size, or one that is not a plausible number.
    """
    if not isinstance(data, Mapping):
        raise CheckpointError("config.json is not a JSON object; download the checkpoint again")
    model_type = data.get("model_type", "gpt_oss")
    if model_type != "gpt_oss":
        raise CheckpointError(f"config.json says model_type {model_type!r}; only gpt_oss models can be opened")
    layers = _size(data, "num_hidden_layers")
    return ModelConfig(
        num_hidden_layers=layers,
        hidden_size=_size(data, "hidden_size"),
        intermediate_size=_size(data, "intermediate_size"),
        num_attention_heads=_size(data, "num_attention_heads"),
        num_key_value_heads=_size(data, "num_key_value_heads"),
        head_dim=_size(data, "head_dim", default=64),
        num_local_experts=_size(data, "num_local_experts", "num_experts"),
        num_experts_per_tok=_size(data, "num_experts_per_tok", "experts_per_token", default=4),
        vocab_size=_size(data, "vocab_size"),
        sliding_window=_size(data, "sliding_window", default=128),
        max_position_embeddings=_max_context(data),
        rms_norm_eps=_real(data, "rms_norm_eps", 1e-5),
        swiglu_limit=_real(data, "swiglu_limit", 7.0),
        swiglu_alpha=_real(data, "swiglu_alpha", SWIGLU_ALPHA),
        yarn=_yarn(data),
        layer_types=_layer_types(data.get("layer_types"), layers),
        eos_token_id=token_ids(data.get("eos_token_id"), "eos_token_id"),
        pad_token_id=next(iter(token_ids(data.get("pad_token_id"), "pad_token_id")), None),
    )


def published(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json in the published dialect, without a quantization block."""
    yarn = config.yarn
    return {
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


def token_ids(value: object, name: str) -> tuple[int, ...]:
    """A token id, a list of them, or null, as config.json and generation_config.json write them."""
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for token in ids:
        if not _is_int(token) or not 0 <= token < MAX_SIZE:
            raise CheckpointError(f"{name} must be a token id or a list of them, not {value!r}")
    return ids


def _yarn(data: Mapping[str, Any]) -> Yarn:
    scaling = data.get("rope_parameters") or data.get("rope_scaling")
    if scaling is None and "rope_scaling_factor" in data:  # OpenAI's original/config.json
        return Yarn(
            theta=_real(data, "rope_theta", 150000.0),
            factor=_real(data, "rope_scaling_factor", 32.0),
            original_context=_size(data, "initial_context_length", default=4096),
            beta_fast=_real(data, "rope_ntk_beta", 32.0),
            beta_slow=_real(data, "rope_ntk_alpha", 1.0),
        )
    if scaling is None:
        return Yarn(theta=_real(data, "rope_theta", 150000.0), factor=1.0)
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"rope_scaling must be an object, not {scaling!r}")
    theta = _real(scaling, "rope_theta", _real(data, "rope_theta", 150000.0))
    kind = scaling.get("rope_type", scaling.get("type", "yarn"))
    if kind == "default":
        return Yarn(theta=theta, factor=1.0)
    if kind != "yarn":
        raise CheckpointError(f"rope type {kind!r} is not supported; gpt-oss uses yarn")
    return Yarn(
        theta=theta,
        factor=_real(scaling, "factor", 32.0),
        original_context=_size(
            scaling, "original_max_position_embeddings", default=_size(data, "initial_context_length", default=4096)
        ),
        beta_fast=_real(scaling, "beta_fast", 32.0),
        beta_slow=_real(scaling, "beta_slow", 1.0),
        truncate=bool(scaling.get("truncate", False)),
    )


def _max_context(data: Mapping[str, Any]) -> int:
    if "max_position_embeddings" in data:
        return _size(data, "max_position_embeddings")
    yarn = _yarn(data)
    return int(min(yarn.original_context * max(yarn.factor, 1.0), MAX_SIZE - 1))


def _layer_types(value: object, layers: int) -> tuple[LayerKind, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) != layers or any(kind not in (SLIDING, FULL) for kind in value):
        raise CheckpointError(f"layer_types must list {SLIDING} or {FULL} for each of the {layers} layers")
    return tuple(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _size(data: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        if data.get(name) is not None:
            value = data[name]
            if not _is_int(value) or not 0 < value < MAX_SIZE:
                raise CheckpointError(f"config.json: {name} must be a positive integer, not {value!r}")
            return int(value)
    if default is None:
        raise CheckpointError(f"config.json: {names[0]} is missing")
    return default


def _real(data: Mapping[str, Any], name: str, default: float) -> float:
    value = data.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < MAX_REAL:
        raise CheckpointError(f"config.json: {name} must be a positive number, not {value!r}")
    return float(value)


def _check(c: ModelConfig) -> None:
    if len(c.layer_types) != c.num_hidden_layers:
        raise CheckpointError(f"layer_types has {len(c.layer_types)} entries for {c.num_hidden_layers} layers")
    if c.num_attention_heads % c.num_key_value_heads:
        raise CheckpointError(
            f"{c.num_attention_heads} query heads cannot share {c.num_key_value_heads} key/value heads evenly"
        )
    if c.num_experts_per_tok > c.num_local_experts:
        raise CheckpointError(f"{c.num_experts_per_tok} experts per token, but only {c.num_local_experts} experts")
    if c.head_dim % 2:
        raise CheckpointError(f"head_dim {c.head_dim} is odd; rotary embeddings need an even size")


GPT_OSS_20B = ModelConfig()
GPT_OSS_120B = ModelConfig(num_hidden_layers=36, num_local_experts=128)
TINY = ModelConfig(
    num_hidden_layers=4,
    hidden_size=192,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=8,
    vocab_size=320,
    eos_token_id=(312,),
    pad_token_id=311,
)
PRESETS: Mapping[str, ModelConfig] = {"20b": GPT_OSS_20B, "120b": GPT_OSS_120B, "tiny": TINY}
