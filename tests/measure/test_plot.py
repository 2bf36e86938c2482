"""What can be held of plots: every repetition is drawn, no text covers another, and both styles have their colors.

Somebody has to look at them as well.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from mlx_gptoss.measure import plot
from mlx_gptoss.measure.benchmark import Measurement
from mlx_gptoss.measure.evaluation import Divergence, Evaluation

MEANS = {
    "mlx-2bit": (2.5, 1.4), "mlx-3bit": (3.5, 0.11), "mlx-4bit": (4.5, 0.02), "mlx-nvfp4": (4.5, 0.021),
    "int4-autoround": (4.5, 0.018), "fp8-dynamic": (8.1, 4e-3), "mlx-mxfp8": (8.25, 4.3e-3), "mlx-8bit": (8.5, 5e-4),
    "mxfp4": (4.25, 0.0),
}  # fmt: skip
SIZES = [plot.WIDE, (9.0, 4.2)]
RUNS = (90.0, 100.0, 120.0)


def evaluations(count: int) -> list[Evaluation]:
    rng = np.random.default_rng(0)
    kl = rng.lognormal(sigma=2, size=1000)
    reference = Evaluation("bf16", "bf16", 1000, 16.0, 64, np.ones(1000))
    return [
        Evaluation(name, name, 1000, bits, 64, np.ones(1000), (Divergence(reference, mean * kl / kl.mean(), kl > 0),))
        for name, (bits, mean) in list(MEANS.items())[-count:]
    ]


def speeds(batches, contexts, engines=("mlx-gptoss",)) -> list[Measurement]:
    return [
        Measurement(
            engine, "mlx", "Apple M4 Max", "mxfp4", batch, 64, context, 64, 1.0, 10 * RUNS[1] * batch, RUNS[1] * batch,
            9, prefill_runs=tuple(10 * run * batch for run in RUNS), decode_runs=tuple(run * batch for run in RUNS),
        )
        for engine in engines for batch in batches for context in contexts
    ]  # fmt: skip


def figures(style: str, size: tuple[float, float]):
    theme = plot.THEMES[style]
    yield "one format", plot.draw_divergences(plot.comparisons(evaluations(2)[:1]), theme, size)
    yield "no difference", plot.draw_divergences(plot.comparisons(evaluations(1)), theme, size)
    yield "many formats", plot.draw_divergences(plot.comparisons(evaluations(9)), theme, size)
    yield "a grid of speeds", plot.draw_speeds(speeds((1, 4), (64, 1024), ("mlx-gptoss", "mlx-lm 0.32.2")), theme, size)
    yield "two engines", plot.draw_speeds(speeds((1,), (64,), ("mlx-gptoss", "transformers 5.1.0")), theme, size)
    yield "contexts", plot.draw_speeds(speeds((1,), (64, 1024, 131072)), theme, (size[0] / 2, size[1]))


def drawn_texts(figure, monkeypatch) -> dict[int, tuple[str, Bbox]]:
    """What each text that is drawn says, and where. Ticks beyond an axis exist and are not drawn."""
    found = {}
    draw = Text.draw

    def record(self, renderer, *rest, **options):
        if self.get_visible() and self.get_text().strip():
            found[id(self)] = (self.get_text(), Text.get_window_extent(self, renderer))
        return draw(self, renderer, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", record)
        FigureCanvasAgg(figure).draw()
    return found


@pytest.mark.parametrize("style", plot.THEMES)
@pytest.mark.parametrize("size", SIZES, ids=["wide", "small"])
def test_no_text_covers_another_or_leaves_the_page(style, size, monkeypatch):
    with rc_context(plot.THEMES[style].settings):
        for name, figure in figures(style, size):
            texts = drawn_texts(figure, monkeypatch).values()
            assert len(texts) > 10
            page = figure.bbox.padded(1)
            for text, box in texts:
                assert page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1), f"{name}: {text!r} leaves it"
            for (text, box), (other, its) in combinations(texts, 2):
                assert not box.padded(-1).overlaps(its.padded(-1)), f"{name}: {text!r} and {other!r}"


def test_every_repetition_is_drawn():
    results = speeds((1, 4), (64, 1024))
    figure = plot.draw_speeds(results, plot.THEMES["light"])
    for axes, factor in zip(figure.axes, (1, None), strict=True):
        drawn = sorted(y for line in axes.lines if line.get_gid() == "run" for y in line.get_ydata())
        wanted = sorted(run / (result.batch if factor else 1) for result in results for run in result.decode_runs)
        assert drawn == pytest.approx(wanted)
    single = plot.draw_speeds(speeds((2,), (64,)), plot.THEMES["light"])
    prefill, decode = (
        [y for line in a.lines if line.get_gid() == "run" for y in line.get_ydata()] for a in single.axes
    )
    assert prefill == [20 * run for run in RUNS] and decode == [2 * run for run in RUNS]


def test_only_what_was_varied_gets_a_panel():
    cases = {"both": speeds((1, 4), (64, 128)), "batch": speeds((1, 4), (64,)), "none": speeds((1,), (64,))}
    panels = {key: len(plot.draw_speeds(results, plot.THEMES["light"]).axes) for key, results in cases.items()}
    assert panels == {"both": 2, "batch": 1, "none": 2}


def test_one_comparison_fills_the_axes():
    """Its panels share an axis of the values that there are, and the second one has the distribution."""
    (line,) = plot.comparisons(evaluations(2)[:1])
    left, right = plot.draw_divergences([line], plot.THEMES["light"]).axes
    low, high = left.get_ylim()
    seen = np.sort(line.divergence.kl)
    assert low > seen[2] / 4 and high < seen[-1] * 4
    assert right.get_ylim() == (low, high)
    assert {text.get_text().split()[0] for text in right.texts} == {"median", "mean", "p99"}


def test_a_plot_tells_the_model_from_the_model_with_an_adapter():
    first = evaluations(1)[0]
    base = first.against[0].reference
    with_adapter = replace(first, model=base.model, format=base.format, adapter="loud")
    assert [line.label for line in plot.comparisons([with_adapter])] == ["bf16 + loud against bf16"]
    assert {line.label for line in plot.comparisons([with_adapter, first])} == {"bf16 + loud", "mxfp4"}
    figure = plot.draw_speeds([replace(each, adapter="loud") for each in speeds((1,), (64,))], plot.THEMES["light"])
    assert "mxfp4, adapter loud" in figure.get_suptitle()


@pytest.mark.parametrize(("style", "dark"), [("light", False), ("dark", True)])
def test_the_page_and_its_text_have_the_colors_of_the_style(style, dark, tmp_path):
    plot.plot_divergences(evaluations(4), tmp_path / "kl.png", style)
    plot.plot_speeds(speeds((1, 4), (64,)), tmp_path / "speed.png", style)
    theme = plot.THEMES[style]
    for name in ("kl.png", "speed.png"):
        pixels = imread(tmp_path / name)[..., :3]
        assert np.allclose(pixels[0, 0], to_rgb(theme.page), atol=0.01)
        near_ink = np.abs(pixels - np.array(to_rgb(theme.ink))).max(-1) < 0.05
        assert near_ink.sum() > 500  # its letters
        assert (pixels.mean() < 0.3) == dark


def test_colors_stand_out_from_their_page():
    """3 to 1 for lines, as WCAG 2.1 wants of graphics, and 7 to 1 for text."""

    def luminance(color: str) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for theme in plot.THEMES.values():
        assert contrast(theme.ink, theme.page) > 7
        for color in theme.colors:
            assert contrast(color, theme.page) > 3, (color, contrast(color, theme.page))
