"""The published bandwidths, as PERFORMANCE's bounds and the sources give them."""

from __future__ import annotations

import pytest

from mlx_gptoss.measure.chips import CHIPS, published_bandwidth


@pytest.mark.parametrize(
    ("chip", "cores", "wanted"),
    [
        ("Apple M4 Max", 40, 546),
        ("Apple M4 Max", 32, 410),
        ("Apple M4 Max", None, 546),  # unknown: the upper bound
        ("Apple M4 Max", 39, 546),
        ("Apple M3 Max", 30, 300),
        ("Apple M3 Ultra", 60, 819),
        ("Apple M4", 10, 120),
        ("Apple M5 Pro", 20, 307),
        ("Apple M1 (Virtual)", None, None),
        ("Apple M9", 8, None),
        ("Intel(R) Xeon(R) Processor", None, None),
        ("", None, None),
    ],
)
def test_bandwidth_by_chip(chip, cores, wanted):
    found = published_bandwidth(chip, cores)
    assert (found and found.gb_s) == wanted


def test_every_figure_names_what_apple_published():
    for entry in CHIPS:
        assert entry.chip.startswith("Apple M") and 60 < entry.gb_s < 1000
        assert entry.source.startswith(("Apple Newsroom, ", "technical specifications of Mac"))
    names = [(entry.chip, entry.gpu_cores) for entry in CHIPS]
    assert len(set(names)) == len(names)
    by_name = {(entry.chip, entry.gpu_cores): entry.gb_s for entry in CHIPS}
    for name in ("Apple M1", "Apple M2", "Apple M3", "Apple M4", "Apple M5"):  # a larger chip is no slower
        sizes = [
            max(gb for (chip, _), gb in by_name.items() if chip == f"{name}{kind}") for kind in ("", " Pro", " Max")
        ]
        assert sizes == sorted(sizes)
