"""PEFT's adapter_config.json: which fields have no bearing on the numbers, which do, and the scale of each module.

A field that is not known here is refused unless it is off: it may change the numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError

MERGE = "merge it into the model with PEFT's merge_and_unload() and use that"
# Names, training and what the tensors themselves show: no bearing on the numbers.
TRAINING = {
    "lora_dropout", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "runtime_config", "velora_config",
}  # fmt: skip
TRAINING_DEFAULTS = {"megatron_core": "megatron.core", "qalora_group_size": 16}  # that PEFT writes; else empty or 0
IGNORED = TRAINING | {
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
    "ensure_weight_tying", "unsloth_fixed", "trainable_parameters",
}  # fmt: skip
USED = {
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "expert_layout",
}
REFUSED = {
    "use_dora": f"uses DoRA, whose magnitudes need the whole weight: {MERGE}",
    "lora_bias": f"has biases of lora_B (lora_bias): train without, or {MERGE}",
    "modules_to_save": f"replaces whole modules (modules_to_save): {MERGE}",
    "trainable_token_indices": f"trains rows of the embeddings (trainable_token_indices): {MERGE}",
    "fan_in_fan_out": f"has transposed weights (fan_in_fan_out), which gpt-oss does not: {MERGE}",
    "layer_replication": f"repeats layers (layer_replication): {MERGE}",
}
# These change the base weights before training, so the factors are no addition to the published ones.
CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.ASCII)
PATTERN = re.compile(r"[\w.\\^$*+-]{1,200}", re.ASCII)  # no groups: a pattern from a file must not take for ever
MAX_PATTERN_STARS = 3


class Scales:
    """The scale of each module: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""

    def __init__(self, config: Mapping[str, Any], folder: Path) -> None:
        """Raises CheckpointError for a config whose adapter is not plain LoRA."""
        self._folder = folder
        _check(config, folder)
        self._rank = self._integer("r", config.get("r"))
        self._alpha = self._number("lora_alpha", config.get("lora_alpha", 8))
        self._root = config.get("use_rslora", False) is True
        self._ranks = self._patterns(config, "rank_pattern")
        self._alphas = self._patterns(config, "alpha_pattern")

    def of(self, module: str, rank: int, tensor: str) -> float:
        """The scale of a module by its name in transformers, such as model.layers.0.self_attn.q_proj. rank: of its
        tensors, which the config must agree with."""
        wanted = self._match(self._ranks, module)
        wanted = self._rank if wanted is None else self._integer("rank_pattern", wanted)
        if wanted != rank:
            raise CheckpointError(f"{tensor!r:.200} has rank {rank}, and {self._folder}'s config says {wanted}")
        alpha = self._match(self._alphas, module)
        alpha = self._alpha if alpha is None else self._number("alpha_pattern", alpha)
        return alpha / (math.sqrt(rank) if self._root else rank)

    def _patterns(self, config: Mapping[str, Any], name: str) -> list[tuple[re.Pattern[str], Any]]:
        """Each key as PEFT matches it: a regular expression for the end of a module's name."""
        given = config.get(name) or {}
        if not isinstance(given, Mapping) or len(given) > 10_000:
            raise CheckpointError(f"{self._folder}: {name} must be an object of at most 10000 entries")
        found = []
        for key, value in given.items():
            if not PATTERN.fullmatch(key) or key.count("*") + key.count("+") > MAX_PATTERN_STARS:
                raise CheckpointError(
                    f"{self._folder}: {name} has the key {key!r:.100}; it must be a module's name, such as q_proj or "
                    "layers.3.self_attn.q_proj"
                )
            try:
                found.append((re.compile(rf"(.*\.)?({key})$"), value))
            except re.error as error:
                raise CheckpointError(f"{self._folder}: {name} has the key {key!r:.100} ({error})") from error
        return found

    def _match(self, patterns: list[tuple[re.Pattern[str], Any]], module: str) -> Any:
        return next((value for pattern, value in patterns if pattern.match(module)), None)

    def _integer(self, name: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= 1 << 20:
            raise CheckpointError(f"{self._folder}: {name} must be a positive integer, not {value!r:.60}")
        return value

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e6:
            raise CheckpointError(f"{self._folder}: {name} must be a number, not {value!r:.60}")
        return float(value)


def _check(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder} is a {config.get('peft_type')!r:.60} adapter; only LORA can be used: {MERGE}")
    for name, why in REFUSED.items():
        if config.get(name):
            raise CheckpointError(f"{folder} {why}")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{folder} trains biases (bias={config['bias']!r:.40}): {MERGE}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and CHANGES_BASE.match(start):
        raise CheckpointError(
            f"{folder} was initialized by {start!r:.40}, which changes the model's own weights: save it with "
            f"path_initial_model_for_weight_conversion, or {MERGE}"
        )
    for name, value in config.items():
        if name not in IGNORED | USED | set(REFUSED) and value not in (None, False, 0, "", [], {}):
            if name == "megatron_config" or not name.isidentifier():
                raise CheckpointError(f"{folder}: the field {name!r:.60} is not supported; {MERGE}")
            raise CheckpointError(f"{folder} sets {name}={value!r:.60}, whose meaning is not known here: {MERGE}")
