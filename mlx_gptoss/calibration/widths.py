"""Mixed widths: how many bits each matrix gets under a given size, by what it costs to make it narrow.

What a matrix costs in 3 bits is measured (sensitivity.py). With b bits a step is (2^3 - 1) / (2^b - 1) times as wide.
The divergence falls with a power of that: the second for small errors, less where other experts are chosen. The matrix
with the most to gain per byte gets wider, again and again, until the size is reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InvalidRequest
from ..weights.checkpoint import CheckpointLike
from ..weights.conversion_plan import plan_conversion
from ..weights.formats import recipe_of
from ..weights.params import Param
from ..weights.tensor import AFFINE, Spec
from .rounding import is_rounded

WIDTHS = (3, 4, 6, 8)
GROUP = 64
OVERHEAD = 32 / GROUP  # bits per weight of a scale and a bias
POWER = 1.4  # of the step's width; measured on the bundled model from 3 to 4 and to 6 bits: 1.2 to 1.5


@dataclass(frozen=True)
class Budget:
    """The bytes that all weights together may take. reason: the user's words for it, such as "4.5 bits per weight"."""

    max_bytes: int
    reason: str


@dataclass(frozen=True)
class Mixture:
    """Matrices that get one of several widths.

    groups: those that get the same one: gate and up of a layer, which kernels read together, or one alone; in the order
    of the network. widths: to choose from. max_bits: of all these matrices, their scales and biases included.
    """

    groups: tuple[tuple[Param, ...], ...]
    widths: tuple[int, ...]
    max_bits: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(param.size for group in self.groups for param in group)


@dataclass(frozen=True)
class Choice:
    """Matrices that get one width. cost: the KL divergence with 3 bits, in nats."""

    params: tuple[Param, ...]
    cost: float

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(param.size for param in self.params)

    def cost_at(self, bits: int) -> float:
        """The divergence with this many bits."""
        return float(self.cost * ((2**3 - 1) / (2**bits - 1)) ** POWER)


def plan_mixture(checkpoint: CheckpointLike, to: str, budget: Budget) -> Mixture:
    """What can be mixed in the format `to`: the matrices that it stores as affine codes, but for the router.

    Raises InvalidRequest for a format with one width, and for a budget that the narrowest everywhere exceed or the
    widest do not use up.
    """
    if not to.startswith("mlx-"):
        raise InvalidRequest(
            f"{to} has one width: choose mlx-4bit or mlx-mxfp4-q4 for --bits-per-weight or --memory (bits_per_weight=, "
            "memory= in Python)"
        )
    _, recipe = recipe_of(to)
    chosen = [
        param
        for param in checkpoint.params
        if param.is_matrix
        and param.role != "router"
        and is_rounded(recipe[param.role][1])
        and not param.shape[-1] % GROUP
    ]
    names = {param.name for param in chosen}
    plan = plan_conversion(checkpoint, to)
    fixed_bytes = sum(info.nbytes for unit in plan.units if unit.params[0].name not in names for info in unit.tensors)
    # Where the experts keep their codes, 3 bits elsewhere lose more than 6 or 8 can win back.
    widths = WIDTHS if any(param.role == "experts" for param in chosen) else WIDTHS[1:]
    mixture = Mixture(tuple(_groups(chosen)), widths, 8 * (budget.max_bytes - fixed_bytes))
    parameters = sum(param.size for param in checkpoint.params)
    least, most = (fixed_bytes + mixture.size * (bits + OVERHEAD) / 8 for bits in (widths[0], widths[-1]))
    if not least <= budget.max_bytes < most:
        raise InvalidRequest(
            f"{budget.reason} are {max(0, budget.max_bytes) / 1e9:.3g} GB of weights, and mixed widths of {to} take "
            f"from {least / 1e9:.3g} to {most / 1e9:.3g} GB for this model: {8 * least / parameters:.2f} to "
            f"{8 * most / parameters:.2f} bits per weight"
        )
    return mixture


def choose_widths(mixture: Mixture, choices: Sequence[Choice]) -> dict[str, Spec]:
    """The spec of each matrix by name, within the mixture's bits. choices: of its groups."""
    widths = mixture.widths
    level = [0] * len(choices)
    left = mixture.max_bits - mixture.size * (widths[0] + OVERHEAD)
    while True:
        gains = []
        for index, (choice, at) in enumerate(zip(choices, level, strict=True)):
            if at + 1 < len(widths) and (bits := choice.size * (widths[at + 1] - widths[at])) <= left:
                gains.append(((choice.cost_at(widths[at]) - choice.cost_at(widths[at + 1])) / bits, -index, bits))
        if not gains:
            break
        _, index, bits = max(gains)
        level[-index] += 1
        left -= bits
    return {
        param.name: AFFINE[widths[at], GROUP]
        for choice, at in zip(choices, level, strict=True)
        for param in choice.params
    }


def _groups(params: Sequence[Param]) -> list[tuple[Param, ...]]:
    """In the order of the network."""
    by_name = {param.name: param for param in params}
    groups: list[tuple[Param, ...]] = []
    for param in params:
        if param.kind == "experts.gate.weight":
            groups.append((param, by_name[param.name.replace(".gate.", ".up.")]))
        elif param.kind != "experts.up.weight":
            groups.append((param,))
    before_or_after = {"embed": -1.0, "lm_head": float("inf")}
    return sorted(groups, key=lambda group: before_or_after.get(group[0].role, group[0].layer or 0))
