"""The plot of divergences: what it shows in which order, and what it refuses."""

from __future__ import annotations

import builtins

import numpy as np
import pytest

from mlx_gptoss.errors import GptOssError, InvalidRequest
from mlx_gptoss.measure import plot
from mlx_gptoss.measure.evaluation import Divergence, Evaluation


def made_up(name, bits, kl, reference=None):
    against = () if reference is None else (Divergence(reference, np.asarray(kl), np.ones(len(kl), bool)),)
    return Evaluation(name, name, 1000, bits, 64, np.ones(len(kl)), against)


@pytest.fixture
def comparisons():
    kl = np.random.default_rng(0).exponential(size=300)
    reference = made_up("bf16", 16.0, np.zeros(300))
    means = {"mlx-4bit": (4.5, 0.02), "mlx-nvfp4": (4.5, 0.021), "mlx-8bit": (8.5, 5e-4), "same": (4.25, 0.0)}
    return [made_up(name, bits, mean * kl, reference) for name, (bits, mean) in means.items()]


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(0, 4), slice(3, 4)], ids=["one", "four", "no difference"])
def test_plots_are_drawn(comparisons, tmp_path, chosen):
    from matplotlib.image import imread

    plot.plot_divergences(comparisons[chosen], tmp_path / "kl.png")
    pixels = imread(tmp_path / "kl.png")[..., :3]
    assert pixels.shape[0] > 600 and pixels.shape[1] > 1000
    assert 0.5 < (pixels == 1).all(-1).mean() < 0.99  # mostly white, but not empty


def test_the_most_divergent_comes_first_under_the_name_of_its_format(comparisons):
    assert [line.label for line in plot.comparisons(comparisons)] == ["mlx-nvfp4", "mlx-4bit", "mlx-8bit", "same"]
    assert [line.differs for line in plot.comparisons(comparisons)] == [True, True, True, False]
    assert plot.comparisons(comparisons[:1])[0].label == "mlx-4bit against bf16"


def test_folders_name_checkpoints_of_one_format():
    ones = np.ones(3)
    reference = Evaluation("runs/a", "bf16", 1, 16.0, 64, ones)
    model = Evaluation("runs/b", "bf16", 1, 16.0, 64, ones, (Divergence(reference, ones, ones > 0),))
    assert plot.comparisons([model])[0].label == "b against a"


def test_smoothing_keeps_the_mean():
    assert plot.rolling_mean(np.array([1.0, 2.0, 6.0, 0.0]), 2).tolist() == [1.5, 4.0, 3.0]
    assert plot.rolling_mean(np.array([1.0, 2.0]), 1).tolist() == [1.0, 2.0]


def test_labels_of_points_in_one_place_do_not_overlap():
    points = np.array([[10.0, 10.0], [10.0, 10.0], [12.0, 11.0], [200.0, 10.0]])
    shifts = plot._shifts(["one", "two", "three", "four"], points)
    assert shifts[0] == shifts[3] == 0
    heights = sorted(y + shift for (_, y), shift in zip(points[:3], shifts[:3], strict=True))
    assert min(np.diff(heights)) >= plot.FONT


def test_plots_that_cannot_be_written_are_refused_beforehand(comparisons, tmp_path, monkeypatch):
    with pytest.raises(InvalidRequest, match="PNG"):
        plot.check_plot(tmp_path / "kl.pdf")
    with pytest.raises(InvalidRequest, match="does not exist"):
        plot.check_plot(tmp_path / "nowhere" / "kl.png")
    with pytest.raises(InvalidRequest, match="nothing was compared"):
        plot.plot_divergences([made_up("a", 4.0, np.ones(3))], tmp_path / "kl.png")
    importing = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(GptOssError, match=r"mlx-gptoss\[bench\]"):
        plot.check_plot(tmp_path / "kl.png")
