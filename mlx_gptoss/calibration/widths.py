"""Mixed widths: how many bits each matrix gets under a given size, by what it costs to make it narrow.

What a matrix costs is measured: with that matrix alone in 3 bits, rounded to nearest, the KL divergence of the model's
predictions from the original's on a short text. One pass over the network does it for all: each layer adds a copy of
the activations for each of its matrices, and all copies go on. With b bits a step is (2^3 - 1) / (2^b - 1)
times as wide. The divergence falls with a power of that: the second for small errors, less where other experts are
chosen. The matrix with the most to gain per byte gets wider, again and again, until the size is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InvalidRequest
from ..weights import quantization
from ..weights.params import Param
from ..weights.tensor import AFFINE, Spec, Weight, Weights
from .divergence import kl_divergence, log_softmax
from .forward import Forward
from .network import Floats
from .text import CalibrationText

WIDTHS = (3, 4, 6, 8)
GROUP = 64
WINDOWS, WINDOW = 8, 128  # windows of the text that costs are measured on, and tokens of each
TOGETHER = 8  # copies of the activations: their weights are decoded once
POWER = 1.4  # of the step's width; measured on the bundled model from 3 to 4 and to 6 bits: 1.2 to 1.5
_ROWS = 64  # of logits in float64 at once

Progress = Callable[[int, int, str], None]  # matrices done, in total, what is being done


@dataclass(frozen=True)
class Choice:
    """Matrices that get one width: gate and up of a layer, or one alone. cost: the KL divergence with 3 bits, nats."""

    params: tuple[Param, ...]
    cost: float

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(param.size for param in self.params)

    def cost_at(self, bits: int) -> float:
        """The divergence with this many bits."""
        return float(self.cost * ((2**3 - 1) / (2**bits - 1)) ** POWER)


def choose_widths(
    choices: Sequence[Choice],
    fixed_bits: int,
    bits_per_weight: float,
    parameters: int,
    widths: Sequence[int] = WIDTHS,
) -> dict[str, Spec]:
    """The spec of each matrix by name, such that the model has at most these bits per weight.

    fixed_bits: size of everything that is not in `choices`. parameters: number of weights of the whole model. widths:
    to choose from. Raises InvalidRequest if the narrowest everywhere takes more, or the widest less.
    """
    overhead = 32 / GROUP  # of a scale and a bias
    least, most = (
        (fixed_bits + sum(choice.size * (bits + overhead) for choice in choices)) / parameters
        for bits in (widths[0], widths[-1])
    )
    if not least <= bits_per_weight < most:
        raise InvalidRequest(
            f"bits per weight can be from {least:.2f} to {most:.2f} for this model and format, not {bits_per_weight:g}"
        )
    level = [0] * len(choices)
    left = (bits_per_weight - least) * parameters
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


def measure_choices(
    source: Weights, params: Sequence[Param], names: Sequence[str], text: CalibrationText, progress: Progress
) -> list[Choice]:
    """The choices for the matrices of these names, with their costs on a sample of the text."""
    windows = _sample(text)
    ids, lengths = [id for window in windows for id in window], [len(window) for window in windows]
    groups = _groups([param for param in params if param.name in set(names)])
    network = Forward(source)
    plain = network.embed(ids)
    copies: list[tuple[tuple[Param, ...], Floats]] = []
    done = 0

    def narrow(group: tuple[Param, ...]) -> Forward:
        nonlocal done
        done += 1
        progress(done, len(groups), "measuring what each matrix costs")
        return network.with_replaced({param.name: _narrow(source.read(param.name)) for param in group})

    for group in groups:
        if group[0].role == "embed":
            copies.append((group, narrow(group).embed(ids)))
    for layer in range(source.config.num_hidden_layers):
        new = [(group, narrow(group).layer(layer, plain, lengths)) for group in groups if group[0].layer == layer]
        plain, *rest = _through(network, layer, [plain, *(x for _, x in copies)], lengths)
        copies = [(group, x) for (group, _), x in zip(copies, rest, strict=True)] + new
        source.release()
    wanted = network.logits(plain)
    found = [Choice(group, _divergence(wanted, network.logits(x))) for group, x in copies]
    for group in groups:
        if group[0].role == "lm_head":
            found.append(Choice(group, _divergence(wanted, narrow(group).logits(plain))))
    return found


def _through(network: Forward, layer: int, copies: list[Floats], lengths: list[int]) -> list[Floats]:
    """Each copy of the activations [T, D] after a layer, TOGETHER of them at a time."""
    found: list[Floats] = []
    for start in range(0, len(copies), TOGETHER):
        part = copies[start : start + TOGETHER]
        found += np.split(network.layer(layer, np.concatenate(part), lengths * len(part)), len(part))
    return found


def _groups(params: Sequence[Param]) -> list[tuple[Param, ...]]:
    """The parameters of each choice: gate and up, which kernels read together, get one width."""
    by_name = {param.name: param for param in params}
    groups: list[tuple[Param, ...]] = []
    for param in params:
        if param.kind == "experts.gate.weight":
            groups.append((param, by_name[param.name.replace(".gate.", ".up.")]))
        elif param.kind != "experts.up.weight":
            groups.append((param,))
    return groups


def _sample(text: CalibrationText) -> list[tuple[int, ...]]:
    """The beginnings of WINDOWS windows, evenly spaced in the text; of all windows if there are fewer."""
    long_enough = [window for window in text.windows if len(window) > 1]
    step = max(1, len(long_enough) // WINDOWS)
    return [window[:WINDOW] for window in long_enough[::step][:WINDOWS]]


def _narrow(weight: Weight) -> Weight:
    """The weight in 3 bits."""
    return quantization.to_spec(weight, AFFINE[WIDTHS[0], GROUP])


def _divergence(wanted: Floats, found: Floats) -> float:
    """The mean KL(wanted || found) of logits [T, V], in nats."""
    total = 0.0
    for start in range(0, len(wanted), _ROWS):
        p, q = (log_softmax(logits[start : start + _ROWS]) for logits in (wanted, found))
        total += float(kl_divergence(p, q).sum())
    return total / len(wanted)
