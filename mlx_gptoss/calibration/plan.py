"""The plan of a calibration: its text, and the memory and disk space that it needs, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import CheckpointError, InvalidRequest
from ..weights.checkpoint import Checkpoint, CheckpointLike
from ..weights.conversion_plan import plan_conversion
from ..weights.formats import recipe_of
from ..weights.formats.base import Recipe
from ..weights.tensor import Spec
from .calibrate import Progress, calibrate
from .calibrated import Calibrated
from .linear import Target
from .memory import Memory, plan_memory
from .rounding import is_rounded
from .text import CalibrationText, read_text
from .widths import GROUP, WIDTHS, choose_widths, measure_choices

MAX_BITS = 4  # of formats that are calibrated: with more bits, plain rounding loses little
_VERSION = 1  # of the method: another one starts an interrupted calibration anew


@dataclass(frozen=True)
class Calibration:
    """A calibration to be run.

    target: how the result stores matrices. disk_bytes: of activations and finished weights next to the destination,
    until the end. widths: specs of single matrices by name, for a result of mixed widths.
    """

    target: Target
    text: CalibrationText
    memory: Memory
    disk_bytes: int
    widths: Mapping[str, Spec] = field(default_factory=dict)

    @property
    def memory_bytes(self) -> int:
        """Upper bound of the memory."""
        return self.memory.total_bytes

    @property
    def identity(self) -> list[Any]:
        """What the result depends on, apart from the source and the format, as JSON."""
        return [_VERSION, self.text.digest]

    def run(self, source: CheckpointLike, folder: Path, progress: Progress) -> Calibrated:
        """As calibrate()."""
        return calibrate(source, self.target, self.text, self.memory, folder, progress)


def plan_calibration(
    checkpoint: Checkpoint,
    to: str,
    path: Path | None = None,
    bits_per_weight: float | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """The plan for calibrating a checkpoint for the format `to`.

    path: a text, as read_text takes it; None is the default one.
    bits_per_weight: of the whole result, in which the matrices that the format stores as affine codes get 3, 4, 6 or 8
        bits each (4, 6 or 8 for mlx-mxfp4-q4). What each matrix costs is measured first, with progress(matrices done,
        in total, what is being done).
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
    text, symmetric = read_text(path, tokenizer), to == "int4-autoround"
    _require_vocabulary(text, checkpoint.config)
    widths: Mapping[str, Spec] = {}
    if bits_per_weight is not None:
        widths = _widths(checkpoint, to, recipe, bits_per_weight, text, progress or (lambda done, total, what: None))
    target = Target.of(checkpoint, recipe, symmetric=symmetric, widths=widths)
    config = checkpoint.config
    memory = plan_memory(config, text.tokens, max(text.lengths))
    streams = 4 * text.tokens * (6 * config.hidden_size + 2 * config.q_size)
    sizes = {param.name: param.size for param in checkpoint.params}
    stored = sum(sizes[name] * (spec.bits + 32 / spec.group) / 8 for name, spec in target.specs.items())
    return Calibration(target, text, memory, streams + int(stored), widths)


def _require_vocabulary(text: CalibrationText, config: ModelConfig) -> None:
    largest = max(max(window) for window in text.windows)
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has a token {largest}, and the model a vocabulary of {config.vocab_size}: "
            "tokenizer.json belongs to another model"
        )


def _widths(
    checkpoint: Checkpoint, to: str, recipe: Recipe, bits_per_weight: float, text: CalibrationText, progress: Progress
) -> dict[str, Spec]:
    """The specs of all matrices that get one of several widths: those that `to` stores as affine codes, but for the
    router, which stays as it is there."""
    if not to.startswith("mlx-"):
        raise InvalidRequest(f"{to} has one width: choose mlx-4bit or mlx-mxfp4-q4 for --bits-per-weight")
    chosen = [
        param.name
        for param in checkpoint.params
        if param.is_matrix
        and param.role != "router"
        and is_rounded(recipe[param.role][1])
        and not param.shape[-1] % GROUP
    ]
    plan = plan_conversion(checkpoint, to)
    bytes_chosen = sum(sum(t.nbytes for t in unit.tensors) for unit in plan.units if unit.params[0].name in set(chosen))
    choices = measure_choices(checkpoint, checkpoint.params, chosen, text, progress)
    parameters = sum(param.size for param in checkpoint.params)
    # Where the experts keep their codes, 3 bits elsewhere lose more than 6 or 8 can win back.
    widths = WIDTHS if any(".experts." in name for name in chosen) else WIDTHS[1:]
    return choose_widths(choices, 8 * (plan.size_bytes - bytes_chosen), bits_per_weight, parameters, widths)
