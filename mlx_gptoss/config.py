"""ModelConfig: the sizes of one gpt-oss model, validated once. weights/config_json.py reads and writes config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from .errors import CheckpointError

LayerKind = Literal["sliding_attention", "full_attention"]
SLIDING: LayerKind = "sliding_attention"
FULL: LayerKind = "full_attention"

SWIGLU_ALPHA = 1.702  # openai/gpt-oss, gpt_oss/torch/model.py: swiglu(alpha=1.702)


@dataclass(frozen=True)
class Yarn:
    """YaRN's parameters (Peng et al. 2023). `factor` 1 is plain RoPE.

    truncate: rounds the correction range to whole dimensions; gpt-oss does not.
    attention_factor: the factor on cos and sin; None is the paper's 0.1 ln(factor) + 1.
    """

    theta: float = 150000.0
    factor: float = 32.0
    original_context: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = False
    attention_factor: float | None = None

    @property
    def concentration(self) -> float:
        """The factor on cos and sin, and so its square on attention scores."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of one model, under the names of the published config.json.

    The defaults are gpt-oss-20b. A window is in tokens: a key is visible to a sliding layer's query iff
    0 <= q - k < window.

    num_local_experts: of every layer, or of the largest. sliding_window: of every sliding layer, unless they differ.
    layer_types: one entry per layer; () alternates, sliding first.
    layer_experts, layer_windows: where layers differ, the number of experts and the window of each (None for full
        attention); () where they do not, as in OpenAI's models. `experts` and `windows` have them in either case.
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
    layer_experts: tuple[int, ...] = ()
    layer_windows: tuple[int | None, ...] = ()
    eos_token_id: tuple[int, ...] = (200002,)
    pad_token_id: int | None = 199999

    def __post_init__(self) -> None:
        if not self.layer_types:
            kinds = (SLIDING, FULL)
            object.__setattr__(self, "layer_types", tuple(kinds[i % 2] for i in range(self.num_hidden_layers)))
        _check(self)

    @property
    def experts(self) -> tuple[int, ...]:
        """The number of experts of each layer."""
        return self.layer_experts or (self.num_local_experts,) * self.num_hidden_layers

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer in tokens, None for full attention."""
        usual = (self.sliding_window if kind == SLIDING else None for kind in self.layer_types)
        return self.layer_windows or tuple(usual)

    def first_layers(self, count: int) -> ModelConfig:
        """The config of the model with its first `count` layers only."""
        kinds, experts = self.layer_types[:count], self.layer_experts[:count]
        return replace(
            self,
            num_hidden_layers=len(kinds),
            layer_types=kinds,
            num_local_experts=max(experts) if experts else self.num_local_experts,
            layer_experts=experts,
            layer_windows=self.layer_windows[:count],
        )

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


def _check(c: ModelConfig) -> None:
    if len(c.layer_types) != c.num_hidden_layers:
        raise CheckpointError(f"layer_types has {len(c.layer_types)} entries for {c.num_hidden_layers} layers")
    if len(c.experts) != c.num_hidden_layers or len(c.windows) != c.num_hidden_layers:
        raise CheckpointError(f"experts or windows are not given for each of the {c.num_hidden_layers} layers")
    if max(c.experts) != c.num_local_experts:
        raise CheckpointError(f"the largest layer has {max(c.experts)} experts, not {c.num_local_experts}")
    if tuple(FULL if window is None else SLIDING for window in c.windows) != c.layer_types:
        raise CheckpointError("layer_types and the windows of the layers contradict each other")
    if c.num_attention_heads % c.num_key_value_heads:
        raise CheckpointError(
            f"{c.num_attention_heads} query heads cannot share {c.num_key_value_heads} key/value heads evenly"
        )
    if c.num_experts_per_tok > min(c.experts):
        raise CheckpointError(f"{c.num_experts_per_tok} experts per token, but only {min(c.experts)} experts")
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
