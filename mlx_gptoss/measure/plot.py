"""PNG plots. Of evaluations: KL divergence by position in the text and, for several comparisons, by bits per weight.
Of benchmarks: speed by context and by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import GptOssError, InvalidRequest
from .benchmark import Measurement
from .evaluation import Divergence, Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KL_FLOOR = 1e-9  # nats; smaller values are only rounding and are not drawn on the logarithmic axis
SMOOTHING_WINDOW = 1 / 15  # of the text
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c564b")
STYLES = ("-", (0, (4, 1.5)), (0, (1, 1)))  # the next one each time the colors repeat
FONT, GAP = 8.0, 7.0  # font size of labels and distance of a label from its point, in points


@dataclass(frozen=True)
class Line:
    """One model compared with one reference. bits: bits per weight of the model, or of the reference if one model is
    compared with several references."""

    label: str
    bits: float
    divergence: Divergence

    @property
    def differs(self) -> bool:
        return self.divergence.kl_mean >= KL_FLOOR


def check_plot(path: Path) -> None:
    """Raise the errors of plot_divergences early, before a long evaluation. Checks matplotlib and the path."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise GptOssError("plots need matplotlib: pip install 'mlx-gptoss[bench]'") from None
    if path.suffix.lower() != ".png":
        raise InvalidRequest(f"the plot {path} must be named as a PNG, such as {path.with_suffix('.png')}")
    if not path.parent.is_dir():
        raise InvalidRequest(f"the folder {path.parent} for the plot does not exist; make it first")


def plot_divergences(results: Sequence[Evaluation], path: Path) -> None:
    """Write the comparisons in `results` to a PNG.

    Raises GptOssError if matplotlib is missing, and InvalidRequest if the path is not a PNG in an existing folder or
    `results` has no comparison.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    drawn = comparisons(results)
    if not drawn:
        raise InvalidRequest("nothing was compared with a reference, so there is nothing to plot")
    several = len(drawn) > 1
    figure = Figure(figsize=(13.5, 5.6) if several else (8, 5), dpi=150, layout="constrained")
    columns = figure.subplots(1, 1 + several, squeeze=False)[0]
    _by_position(columns[0], drawn)
    figure.legend(
        loc="outside lower center", ncols=min(6, len(drawn)), title="mean over the text", fontsize=FONT,
        title_fontsize=FONT, frameon=False,
    )  # fmt: skip
    if several:
        points = _by_bits(columns[1], drawn)
        figure.draw_without_rendering()  # computes the layout, which the positions of labels need
        _label(columns[1], drawn, points, figure.dpi)
    figure.savefig(path, format="png")


def comparisons(results: Sequence[Evaluation]) -> list[Line]:
    """All comparisons, the most divergent first. Checkpoints are labelled with their formats, or with their folders'
    names if two have the same format."""
    references = [divergence.reference for divergence in results[0].against] if results else []
    name_of = _names([*results, *references])
    out = []
    for result in results:
        for divergence in result.against:
            varying = divergence.reference if len(results) == 1 and len(references) > 1 else result
            label = name_of[result.model]
            if len(references) > 1 or len(results) == 1:
                label += f" against {name_of[divergence.reference.model]}"
            out.append(Line(label, varying.bits_per_weight, divergence))
    return sorted(out, key=lambda line: line.divergence.kl_mean, reverse=True)


def rolling_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """The mean of each `width` consecutive values, [N - width + 1]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means: NDArray[np.float64] = (sums[width:] - sums[:-width]) / width
    return means


def _names(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    formats = {evaluation.model: evaluation.format for evaluation in evaluations}
    return formats if len(set(formats.values())) == len(formats) else {model: Path(model).name for model in formats}


def _color_and_style(index: int) -> tuple[str, Any]:
    """Color and line style of the comparison with this index."""
    return COLORS[index % len(COLORS)], STYLES[index // len(COLORS) % len(STYLES)]


def _by_position(axes: Axes, drawn: Sequence[Line]) -> None:
    count = len(drawn[0].divergence.kl)
    width = max(1, round(count * SMOOTHING_WINDOW / 2))
    for index, line in enumerate(drawn):
        color, style = _color_and_style(index)
        if len(drawn) == 1 and line.differs:
            kl = line.divergence.kl
            axes.plot(np.arange(1, count + 1), np.where(kl > KL_FLOOR, kl, np.nan), ".", color="#c3d5e2", ms=2)
        means = rolling_mean(rolling_mean(line.divergence.kl, width), width)
        means[means < KL_FLOOR] = np.nan
        mean = f"{line.divergence.kl_mean:.2g}" if line.differs else "no difference"
        axes.plot(np.arange(len(means)) + width, means, ls=style, color=color, lw=1.4, label=f"{line.label}: {mean}")
    axes.set_xlim(1, max(2, count))
    if not any(line.differs for line in drawn):
        axes.set_ylim(KL_FLOOR, 1)
    smoothed = f", smoothed over {2 * width - 1} tokens" if width > 1 else ""
    _style_axes(axes, f"KL by position{smoothed}", "predicted token, in the order of the text")


def _by_bits(axes: Axes, drawn: Sequence[Line]) -> list[tuple[float, float]]:
    """Draw mean and 99th percentile of each comparison by bits per weight. Comparisons without a difference are drawn
    at the bottom. Returns the points to label."""
    bottom = min((line.divergence.kl_mean for line in drawn if line.differs), default=1e-3) / 6
    points = []
    for index, line in enumerate(drawn):
        color, kl = _color_and_style(index)[0], line.divergence
        if line.differs:
            axes.plot([line.bits] * 2, [kl.kl_mean, kl.kl_p99], color=color, lw=1, alpha=0.5)
            axes.plot(line.bits, kl.kl_p99, "o", color="white", mec=color, ms=4.5, zorder=3)
            axes.plot(line.bits, kl.kl_mean, "o", color=color, ms=6, zorder=3)
        else:
            axes.plot(line.bits, bottom, "D", color="white", mec=color, ms=5, zorder=3)
        points.append((line.bits, kl.kl_mean if line.differs else bottom))
    _style_axes(axes, "KL by size: mean (full) to 99th percentile (open)", "bits per weight")
    if not all(line.differs for line in drawn):
        axes.axhline(bottom, color="#999999", lw=0.8, ls=":", zorder=0)
        top = axes.get_ylim()[1]
        for minor in (False, True):  # `bottom` represents 0, so no tick is drawn near it
            axes.set_yticks([tick for tick in axes.get_yticks(minor=minor) if tick > 2 * bottom], minor=minor)
        axes.set_ylim(bottom / 3, top)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.2 * (right - left))  # space for labels to the right of their points
    return points


def _label(axes: Axes, drawn: Sequence[Line], points: Sequence[tuple[float, float]], dpi: float) -> None:
    labels = [line.label if line.differs else f"{line.label} (no difference)" for line in drawn]
    in_points = axes.transData.transform(points) * 72 / dpi  # 1/72 inch
    for index, (label, point, shift) in enumerate(zip(labels, points, _shifts(labels, in_points), strict=True)):
        color = _color_and_style(index)[0]
        leader: dict[str, Any] | None = {"arrowstyle": "-", "color": color, "lw": 0.5} if shift else None
        axes.annotate(
            label, point, (GAP, shift), textcoords="offset points", fontsize=FONT, color=color, va="center",
            arrowprops=leader, bbox={"fc": "white", "ec": "none", "pad": 0.5}, zorder=2,
        )  # fmt: skip


def _shifts(labels: Sequence[str], points: NDArray[np.float64]) -> list[float]:
    """The vertical offset of each label from its point, in points (1/72 inch), so that labels do not overlap.
    points: [n, 2] in the same unit."""
    line, letter = 1.4 * FONT, 0.6 * FONT
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    shifts = []
    for label, (x, y) in zip(labels, points, strict=True):
        steps = sorted(range(-len(labels), len(labels) + 1), key=abs)
        boxes = {
            step * line: (x + GAP, y + (step - 0.5) * line, x + GAP + letter * len(label), y + (step + 0.5) * line)
            for step in steps
        }
        shift = next((s for s, box in boxes.items() if not any(_overlap(box, other) for other in taken)), 0.0)
        taken.append(boxes[shift])
        shifts.append(shift)
    return shifts


Box = tuple[float, float, float, float]  # left, bottom, right, top


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _style_axes(axes: Axes, title: str, x: str) -> None:
    axes.set_yscale("log")
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel("KL(reference || model), nats")
    axes.grid(axis="y", color="#e4e4e4", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plot_speeds(results: Sequence[Measurement], path: Path) -> None:
    """Write measured speeds to a PNG: decode speed of one sequence by context, and decode throughput by batch. Raises
    the errors of plot_divergences."""
    check_plot(path)
    from matplotlib.figure import Figure

    if not results:
        raise InvalidRequest("nothing was measured, so there is nothing to plot")
    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    _speeds(left, results, "context", "batch", "decode speed of one sequence", lambda r: r.decode_tok_s / r.batch)
    _speeds(right, results, "batch", "context", "decode throughput", lambda r: r.decode_tok_s)
    figure.suptitle(f"{results[0].device}, {results[0].format}", fontsize=11)
    figure.savefig(path, format="png")


def _speeds(
    axes: Axes, results: Sequence[Measurement], x: str, other: str, title: str, speed: Callable[[Measurement], float]
) -> None:
    """Draw one line for each engine and each value of `other`."""
    lines: dict[str, list[Measurement]] = {}
    for result in results:
        lines.setdefault(f"{result.engine}, {other} {getattr(result, other)}", []).append(result)
    for index, (label, line) in enumerate(lines.items()):
        color, style = _color_and_style(index)
        values = [getattr(result, x) for result in line]
        axes.plot(values, [speed(result) for result in line], "o", ls=style, color=color, lw=1.4, ms=4, label=label)
    axes.set_xscale("log")
    measured = sorted({getattr(result, x) for result in results})
    axes.set_xticks(measured, [str(value) for value in measured])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(f"{x}, tokens" if x == "context" else "batch, sequences")
    axes.set_ylabel("tokens per second")
    axes.legend(fontsize=FONT, frameon=False)
    axes.grid(axis="y", color="#e4e4e4", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
