"""The plan of a calibration: its text, and the memory and disk space that it needs, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backends.base import NUMPY_PRODUCTS, Products
from ..config import ModelConfig
from ..errors import CheckpointError, InvalidRequest
from ..weights import codecs
from ..weights.checkpoint import Checkpoint, CheckpointLike
from ..weights.formats import recipe_of
from ..weights.formats.base import Recipe
from ..weights.tensor import Spec
from .calibrate import Progress, calibrate
from .calibrated import Calibrated
from .linear import Target
from .memory import Memory, plan_memory
from .rounding import is_rounded
from .sensitivity import copies_bytes, measure_choices, measuring_bytes
from .store import Store
from .text import CalibrationText, read_text
from .widths import Budget, Mixture, choose_widths, plan_mixture

MAX_BITS = 4  # of formats that are calibrated: with more bits, plain rounding loses little
_VERSION = 1  # of the method: another one starts an interrupted calibration anew


@dataclass(frozen=True)
class Calibration:
    """A calibration to be run.

    recipe, symmetric: of the format, as Target.of takes them. disk_bytes: of activations and finished weights next to
    the destination, until the end. mixture: the matrices whose widths are chosen, for a result of mixed widths.
    products: what computes the large products.
    """

    recipe: Recipe
    symmetric: bool
    text: CalibrationText
    memory: Memory
    disk_bytes: int
    mixture: Mixture | None
    products: Products

    @property
    def memory_bytes(self) -> int:
        """Upper bound of the memory."""
        return self.memory.total_bytes

    @property
    def is_mixed(self) -> bool:
        """Whether matrices get one of several widths."""
        return self.mixture is not None

    @property
    def identity(self) -> list[Any]:
        """What the result depends on, apart from the source and the format, as JSON."""
        return [_VERSION, self.text.digest, self.mixture and self.mixture.max_bits, self.products.name]

    def widths(self, source: CheckpointLike, folder: Path, progress: Progress) -> dict[str, Spec]:
        """The specs of single matrices by name, from what each costs; none without a mixture. progress(matrices
        measured, in total, what is being done)."""
        if self.mixture is None:
            return {}
        store = Store(folder, codecs.BFLOAT16)
        return choose_widths(self.mixture, measure_choices(source, self.mixture.groups, self.text, store, progress))

    def run(self, source: CheckpointLike, widths: Mapping[str, Spec], folder: Path, progress: Progress) -> Calibrated:
        """As calibrate()."""
        target = Target.of(source, self.recipe, symmetric=self.symmetric, widths=widths, matmul=self.products.matmul)
        return calibrate(source, target, self.text, self.memory, folder, progress)


def plan_calibration(
    checkpoint: Checkpoint,
    to: str,
    path: Path | None = None,
    budget: Budget | None = None,
    products: Products = NUMPY_PRODUCTS,
) -> Calibration:
    """The plan for calibrating a checkpoint for the format `to`.

    path: a text, as read_text takes it; None is the default one.
    budget: of the whole result, in which the matrices that the format stores as affine codes get 3, 4, 6 or 8 bits each
        (4, 6 or 8 for mlx-mxfp4-q4).
    Raises InvalidRequest for a format that is not calibrated, a text that cannot be read, and a budget that mixed
    widths cannot keep; CheckpointError for a checkpoint without a tokenizer, DoesNotFit if there is not enough memory.
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
    text, symmetric, config = read_text(path, tokenizer), to == "int4-autoround", checkpoint.config
    _require_vocabulary(text, config)
    mixture = None if budget is None else plan_mixture(checkpoint, to, budget)
    memory = plan_memory(
        config, text.tokens, max(text.lengths), measuring_bytes(config) if mixture else 0, products.on_device
    )
    streams = 4 * text.tokens * (6 * config.hidden_size + 2 * config.q_size)
    if mixture is not None:
        stored = mixture.max_bits / 8
        streams = max(streams, copies_bytes(config, len(mixture.groups)))
    else:
        specs = Target.of(checkpoint, recipe, symmetric=symmetric).specs
        sizes = {param.name: param.size for param in checkpoint.params}
        stored = sum(sizes[name] * (spec.bits + 32 / spec.group) / 8 for name, spec in specs.items())
    return Calibration(recipe, symmetric, text, memory, streams + int(stored), mixture, products)


def _require_vocabulary(text: CalibrationText, config: ModelConfig) -> None:
    largest = max(max(window) for window in text.windows)
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has a token {largest}, and the model a vocabulary of {config.vocab_size}: "
            "tokenizer.json belongs to another model"
        )
