"""PNG plots. Of evaluations: KL divergence by position in the text, and its distribution over the tokens or, for
several comparisons, by bits per weight. Of benchmarks: speed by context and by batch, every repetition and the
median."""

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
    from matplotlib.figure import Figure

KL_FLOOR = 1e-9  # nats; smaller values are only rounding and are not drawn on the logarithmic axis
SMOOTHING_WINDOW = 1 / 15  # of the text
STYLES = ("-", (0, (4, 1.5)), (0, (1, 1)))  # the next one each time the colors repeat
FONT, GAP = 8.0, 7.0  # font size of labels and distance of a label from its point, in points
WIDE, NARROW = (13.0, 5.4), (7.0, 5.0)  # inches, of two panels and of one


@dataclass(frozen=True)
class Theme:
    """Colors: of the page, its text, what is less important, its lines, and of the comparisons."""

    page: str
    ink: str
    faint: str
    grid: str
    colors: tuple[str, ...]

    @property
    def settings(self) -> Any:
        """For matplotlib's rc_context."""
        text = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
        page = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
        return dict.fromkeys(text, self.ink) | dict.fromkeys(page, self.page) | {"legend.labelcolor": self.ink}


# Okabe and Ito's colors, which color-blind people tell apart; on dark, lighter ones in the same order.
THEMES = {
    "light": Theme(
        "#ffffff", "#1f2328", "#8c959f", "#e4e4e4",
        ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#3a9bd1", "#7a5195", "#8c564b"),
    ),
    "dark": Theme(
        "#16181d", "#e6e8eb", "#7d8590", "#31353d",
        ("#56b4e9", "#ff8c42", "#2fc79a", "#e39ac4", "#f0c04c", "#9bd3f5", "#b79ad6", "#c79b8b"),
    ),
}  # fmt: skip


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


def plot_divergences(results: Sequence[Evaluation], path: Path, style: str = "light") -> None:
    """Write the comparisons in `results` to a PNG. style: of THEMES.

    Raises GptOssError if matplotlib is missing, and InvalidRequest if the path is not a PNG in an existing folder or
    `results` has no comparison.
    """
    check_plot(path)
    drawn = comparisons(results)
    if not drawn:
        raise InvalidRequest("nothing was compared with a reference, so there is nothing to plot")
    from matplotlib import rc_context

    theme = THEMES[style]
    with rc_context(theme.settings):
        draw_divergences(drawn, theme).savefig(path, format="png")


def draw_divergences(drawn: Sequence[Line], theme: Theme, size: tuple[float, float] = WIDE) -> Figure:
    """One comparison: KL by position, and its distribution. Several: KL by position, and by bits per weight."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=size, dpi=150, layout=ConstrainedLayoutEngine(wspace=0.05))
    several = len(drawn) > 1
    left, right = figure.subplots(1, 2, sharey=not several, width_ratios=(1, 1) if several else (2, 1))
    _by_position(left, drawn, theme)
    if several:
        columns = max(1, min(len(drawn), int(size[0] / 2.6)))
        figure.legend(
            loc="outside lower center", ncols=columns, title="mean over the text", fontsize=FONT, title_fontsize=FONT,
            frameon=False,
        )  # fmt: skip
        points = _by_bits(right, drawn, theme)
        figure.draw_without_rendering()  # computes the layout, which the positions of labels need
        _label(right, drawn, points, figure.dpi, theme)
    else:
        _distribution(right, drawn[0], theme)
    return figure


def comparisons(results: Sequence[Evaluation]) -> list[Line]:
    """All comparisons, the most divergent first. Checkpoints are labelled with their formats, or with their folders'
    names if two have the same format."""
    references = [divergence.reference for divergence in results[0].against] if results else []
    name_of = _names([*results, *references])
    out = []
    for result in results:
        for divergence in result.against:
            varying = divergence.reference if len(results) == 1 and len(references) > 1 else result
            label = name_of[result.label]
            if len(references) > 1 or len(results) == 1:
                label += f" against {name_of[divergence.reference.label]}"
            out.append(Line(label, varying.bits_per_weight, divergence))
    return sorted(out, key=lambda line: line.divergence.kl_mean, reverse=True)


def rolling_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """The mean of each `width` consecutive values, [N - width + 1]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means: NDArray[np.float64] = (sums[width:] - sums[:-width]) / width
    return means


def _names(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """Short names by label: the formats, with the adapter, or the folders' names where two would be alike."""

    def named(part: Callable[[Evaluation], str]) -> dict[str, str]:
        return {each.label: part(each) + (f" + {each.adapter}" if each.adapter else "") for each in evaluations}

    formats = named(lambda each: each.format)
    return formats if len(set(formats.values())) == len(formats) else named(lambda each: Path(each.model).name)


def _color_and_style(index: int, theme: Theme) -> tuple[str, Any]:
    """Color and line style of the comparison with this index."""
    count = len(theme.colors)
    return theme.colors[index % count], STYLES[index // count % len(STYLES)]


def _by_position(axes: Axes, drawn: Sequence[Line], theme: Theme) -> None:
    """A smoothed line for each comparison; of a single one, also every token."""
    count = len(drawn[0].divergence.kl)
    width = max(1, round(count * SMOOTHING_WINDOW / 2))
    for index, line in enumerate(drawn):
        color, style = _color_and_style(index, theme)
        kl = line.divergence.kl
        if len(drawn) == 1 and line.differs:
            seen = np.where(kl > KL_FLOOR, kl, np.nan)
            axes.plot(np.arange(1, count + 1), seen, ".", color=color, alpha=0.45, ms=3, mew=0, label="each token")
        means = rolling_mean(rolling_mean(kl, width), width)
        means[means < KL_FLOOR] = np.nan
        mean = f"{line.divergence.kl_mean:.2g}" if line.differs else "no difference"
        label = f"{line.label}: {mean}" if len(drawn) > 1 else "smoothed"
        axes.plot(np.arange(len(means)) + width, means, ls=style, color=color, lw=1.6, label=label)
    axes.set_xlim(1, max(2, count))
    if not any(line.differs for line in drawn):
        axes.set_ylim(KL_FLOOR, 1)
    elif len(drawn) == 1:
        kl = drawn[0].divergence.kl
        axes.set_ylim(max(KL_FLOOR, float(np.quantile(kl[kl > KL_FLOOR], 0.005))) / 2, float(kl.max()) * 2)
    smoothed = f", smoothed over {2 * width - 1} tokens" if width > 1 else ""
    title = f"KL by position{smoothed}" if len(drawn) > 1 else f"{drawn[0].label}: KL by position"
    _style_axes(axes, title, "predicted token, in the order of the text", theme)
    axes.set_yscale("log")
    axes.set_ylabel("KL(reference || model), nats")
    if len(drawn) == 1 and drawn[0].differs:
        axes.legend(fontsize=FONT, framealpha=0.85, edgecolor=theme.page, loc="lower left", ncols=2, markerscale=2)


def _distribution(axes: Axes, line: Line, theme: Theme) -> None:
    """How many tokens have at most this divergence, with the median, the mean and the 99th percentile."""
    divergence, color = line.divergence, theme.colors[0]
    values = np.sort(divergence.kl)
    axes.set_xlim(0, 100)
    _style_axes(axes, "Share of the tokens up to this KL", "% of the tokens", theme)
    if not line.differs:
        axes.text(50, 1e-4, "no difference", ha="center", color=theme.ink)
        return
    share = np.arange(1, len(values) + 1) * 100 / len(values)
    seen = values > KL_FLOOR
    axes.plot(share[seen], values[seen], color=color, lw=1.6)
    for name, value in (("median", divergence.kl_median), ("mean", divergence.kl_mean), ("p99", divergence.kl_p99)):
        if value <= KL_FLOOR:
            continue
        at = 100 * float(np.mean(values <= value))
        axes.plot(at, value, "o", color=theme.page, mec=color, mew=1.4, ms=5.5, zorder=3, clip_on=False)
        axes.annotate(
            f"{name} {value:.2g}", (at, value), (-GAP, GAP), textcoords="offset points", fontsize=FONT + 1,
            ha="right", va="bottom", color=theme.ink,
        )  # fmt: skip


def _by_bits(axes: Axes, drawn: Sequence[Line], theme: Theme) -> list[tuple[float, float]]:
    """Draw mean and 99th percentile of each comparison by bits per weight. Comparisons without a difference are drawn
    at the bottom. Returns the points to label."""
    bottom = min((line.divergence.kl_mean for line in drawn if line.differs), default=1e-3) / 6
    points = []
    for index, line in enumerate(drawn):
        color, kl = _color_and_style(index, theme)[0], line.divergence
        if line.differs:
            axes.plot([line.bits] * 2, [kl.kl_mean, kl.kl_p99], color=color, lw=1, alpha=0.5)
            axes.plot(line.bits, kl.kl_p99, "o", color=theme.page, mec=color, ms=4.5, zorder=3)
            axes.plot(line.bits, kl.kl_mean, "o", color=color, ms=6, zorder=3)
        else:
            axes.plot(line.bits, bottom, "D", color=theme.page, mec=color, ms=5, zorder=3)
        points.append((line.bits, kl.kl_mean if line.differs else bottom))
    _style_axes(axes, "KL by size: mean (full) to 99th percentile (open)", "bits per weight", theme)
    axes.set_yscale("log")
    if not all(line.differs for line in drawn):
        axes.axhline(bottom, color=theme.faint, lw=0.8, ls=":", zorder=0)
        top = axes.get_ylim()[1]
        for minor in (False, True):  # `bottom` represents 0, so no tick is drawn near it
            axes.set_yticks([tick for tick in axes.get_yticks(minor=minor) if tick > 2 * bottom], minor=minor)
        axes.set_ylim(bottom / 3, top)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.2 * (right - left))  # space for labels to the right of their points
    return points


def _label(axes: Axes, drawn: Sequence[Line], points: Sequence[tuple[float, float]], dpi: float, theme: Theme) -> None:
    labels = [line.label if line.differs else f"{line.label} (no difference)" for line in drawn]
    ends = [(line.bits, line.divergence.kl_p99) for line in drawn if line.differs]
    in_points, others = (axes.transData.transform(a or [(0, 0)]) * 72 / dpi for a in (points, ends))  # 1/72 inch
    for index, (label, point, shift) in enumerate(zip(labels, points, _shifts(labels, in_points, others), strict=True)):
        color = _color_and_style(index, theme)[0]
        leader: dict[str, Any] | None = {"arrowstyle": "-", "color": color, "lw": 0.5} if shift else None
        axes.annotate(
            label, point, (GAP, shift), textcoords="offset points", fontsize=FONT, color=color, va="center",
            arrowprops=leader, bbox={"fc": theme.page, "ec": "none", "pad": 0.5}, zorder=2,
        )  # fmt: skip


def _shifts(
    labels: Sequence[str], points: NDArray[np.float64], others: NDArray[np.float64] | None = None
) -> list[float]:
    """The vertical offset of each label from its point, in points (1/72 inch), so that labels cover neither each other
    nor a point. points: [n, 2] in the same unit. others: further points, [m, 2]."""
    line, letter = 1.4 * FONT, 0.6 * FONT
    every = points if others is None else np.concatenate([points, others])
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in every]
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


def _style_axes(axes: Axes, title: str, x: str, theme: Theme) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.grid(axis="y", color=theme.grid, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plot_speeds(results: Sequence[Measurement], path: Path, style: str = "light") -> None:
    """Write measured speeds to a PNG: decode speed of one sequence by context, and decode throughput by batch; of a
    single case, prefill and decode speed. style: of THEMES. Raises the errors of plot_divergences."""
    check_plot(path)
    if not results:
        raise InvalidRequest("nothing was measured, so there is nothing to plot")
    from matplotlib import rc_context

    theme = THEMES[style]
    with rc_context(theme.settings):
        draw_speeds(results, theme).savefig(path, format="png")


def draw_speeds(results: Sequence[Measurement], theme: Theme, size: tuple[float, float] | None = None) -> Figure:
    """A panel for what was varied, context, batch or both; every repetition is a point, and lines join medians."""
    from matplotlib.figure import Figure

    varied = [x for x in ("context", "batch") if len({getattr(result, x) for result in results}) > 1]
    panels = len(varied) or 2
    size = size or (WIDE if panels == 2 else NARROW)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    columns = figure.subplots(1, panels, squeeze=False)[0]
    for axes, x in zip(columns, varied, strict=False):
        _by_case(axes, results, x, theme)
    if not varied:
        _by_engine(columns[0], results, "prefill", theme)
        _by_engine(columns[1], results, "decode", theme)
    repeats = max(len(result.decode_runs) for result in results)
    first, case = results[0], "" if varied else f", batch {results[0].batch}, context {results[0].context}"
    spread = f"; lines join the medians of {repeats} runs" if varied and repeats > 1 else ""
    spread = f"; a bar is the median of {repeats} runs" if not varied and repeats > 1 else spread
    adapter = f", adapter {first.adapter}" if first.adapter else ""
    figure.suptitle(f"{first.device}, {first.format}{adapter}{case}{spread}", fontsize=11)
    return figure


def _by_case(axes: Axes, results: Sequence[Measurement], x: str, theme: Theme) -> None:
    """Draw one line for each engine and each value of what `x` is not."""
    other = "batch" if x == "context" else "context"
    one = x == "context"  # the speed of one sequence, or of all together
    engines, others = {r.engine for r in results}, {getattr(r, other) for r in results}
    lines: dict[tuple[str, int], list[Measurement]] = {}
    for result in sorted(results, key=lambda result: getattr(result, x)):
        lines.setdefault((result.engine, getattr(result, other)), []).append(result)
    for index, ((engine, value), line) in enumerate(lines.items()):
        color, style = _color_and_style(index, theme)
        names = [engine] * (len(engines) > 1 or len(others) == 1) + [f"{other} {value}"] * (len(others) > 1)
        places = [getattr(r, x) for r in line]
        medians = [r.decode_tok_s / (r.batch if one else 1) for r in line]
        axes.plot(places, medians, ls=style, marker="o", color=color, lw=1.6, ms=4.5, label=", ".join(names))
        for r in line:
            runs = [speed / (r.batch if one else 1) for speed in r.decode_runs]
            _spread(axes, getattr(r, x), runs, color)
    axes.set_xscale("log")
    measured = sorted({getattr(result, x) for result in results})
    axes.set_xticks(measured, [f"{value:,}" for value in measured])
    axes.minorticks_off()
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    title = "Decode speed of one sequence" if one else "Decode throughput of all sequences"
    _style_axes(axes, title, "context, tokens" if one else "batch, sequences", theme)
    axes.set_ylabel("tokens per second")
    if len(lines) > 1:
        axes.legend(
            fontsize=FONT, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=min(3, len(engines)),
        )  # fmt: skip


def _by_engine(axes: Axes, results: Sequence[Measurement], what: str, theme: Theme) -> None:
    """A bar of each engine's median, labelled, and a point for each repetition."""
    names = [f"{result.engine}\n({result.backend})" for result in results]
    for place, result in enumerate(results):
        color = theme.colors[place % len(theme.colors)]
        speed, runs = getattr(result, f"{what}_tok_s"), getattr(result, f"{what}_runs")
        axes.bar(place, speed, width=0.5, color=color, alpha=0.35)
        _spread(axes, place, runs, color)
        axes.annotate(
            f"{speed:.4g}", (place, max((speed, *runs))), (0, GAP), textcoords="offset points", ha="center",
            fontsize=FONT + 2, color=theme.ink,
        )  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.8, len(names) - 0.2)
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    _style_axes(axes, f"{what.capitalize()} speed", "", theme)
    axes.set_ylabel("tokens per second")


def _spread(axes: Axes, place: float, runs: Sequence[float], color: str) -> None:
    """A point for each repetition, and a line from the slowest to the fastest."""
    if len(runs) > 1:
        axes.plot([place, place], [min(runs), max(runs)], color=color, lw=1, alpha=0.6, zorder=3)
        axes.plot([place] * len(runs), runs, "_", color=color, ms=9, mew=1.2, zorder=3, gid="run")
