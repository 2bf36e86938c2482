"""The plan of a calibration: its text, and the memory and disk space that it needs, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import CheckpointError, InvalidRequest
from ..weights.checkpoint import Checkpoint, CheckpointLike
from ..weights.formats import recipe_of
from .calibrate import Progress, calibrate
from .calibrated import Calibrated
from .linear import Target
from .memory import Memory, plan_memory
from .rounding import is_rounded
from .text import CalibrationText, read_text

MAX_BITS = 4  # of formats that are calibrated: with more bits, plain rounding loses little
_VERSION = 1  # of the method: another one starts an interrupted calibration anew


@dataclass(frozen=True)
class Calibration:
    """A calibration to be run.

    target: how the result stores matrices. disk_bytes: of activations and finished weights next to the destination,
    until the end.
    """

    target: Target
    text: CalibrationText
    memory: Memory
    disk_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Upper bound of the memory."""
        return self.memory.total_bytes

    @property
    def identity(self) -> list[Any]:
        """What the result depends on beside the source and the format, as JSON."""
        return [_VERSION, self.text.digest]

    def run(self, source: CheckpointLike, folder: Path, progress: Progress) -> Calibrated:
        """As calibrate()."""
        return calibrate(source, self.target, self.text, self.memory, folder, progress)


def plan_calibration(checkpoint: Checkpoint, to: str, path: Path | None = None) -> Calibration:
    """The plan for calibrating a checkpoint for the format `to`.

    path: a text, as read_text takes it; None is the default one.
    Raises InvalidRequest for a format that is not calibrated and a text that cannot be read, CheckpointError for a
    checkpoint without a tokenizer, DoesNotFit if there is not enough memory.
    """
    _, recipe = recipe_of(to)
    if not any(spec is not None and is_rounded(spec) and spec.bits <= MAX_BITS for _, spec in recipe.values()):
        raise InvalidRequest(
            f"{to} is not calibrated: choose mlx-4bit, mlx-mxfp4-q4, mlx-3bit or int4-autoround, or leave out "
            "--calibrate (calibrate= in Python)"
        )
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise CheckpointError(
            f"{checkpoint.folder} has no tokenizer.json, which calibrating needs: copy it there from the model's "
            "repository"
        )
    text, target = read_text(path, tokenizer), Target.of(checkpoint, recipe, symmetric=to == "int4-autoround")
    _require_vocabulary(text, checkpoint.config)
    config = checkpoint.config
    memory = plan_memory(config, text.tokens, max(text.lengths))
    streams = 4 * text.tokens * (6 * config.hidden_size + 2 * config.q_size)
    sizes = {param.name: param.size for param in checkpoint.params}
    stored = sum(sizes[name] * (spec.bits + 32 / spec.group) / 8 for name, spec in target.specs.items())
    return Calibration(target, text, memory, streams + int(stored))


def _require_vocabulary(text: CalibrationText, config: ModelConfig) -> None:
    largest = max(max(window) for window in text.windows)
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has a token {largest}, and the model a vocabulary of {config.vocab_size}: "
            "tokenizer.json belongs to another model"
        )
