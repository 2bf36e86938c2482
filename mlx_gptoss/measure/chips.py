"""The memory bandwidth of Apple's chips as Apple publishes it, which bounds decoding: a token reads each active weight.

A copy measured on the machine reaches less; `bench` reports both.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChipBandwidth:
    """gb_s: 10^9 bytes per second. gpu_cores: of the variant that has it; None if all have it, or if the variants are
    not told apart and this is the fastest one's. source: where Apple says so."""

    chip: str
    gb_s: float
    source: str
    gpu_cores: int | None = None


_M1, _M1_ULTRA = "Apple Newsroom, 18 October 2021", "Apple Newsroom, 8 March 2022"
_M2, _M2_PRO, _M2_ULTRA = (f"Apple Newsroom, {day}" for day in ("6 June 2022", "17 January 2023", "5 June 2023"))
_M3 = "technical specifications of MacBook Pro (14-inch, Nov 2023)"
_M4_MAX = "technical specifications of MacBook Pro (14-inch, 2024)"
_M5 = "Apple Newsroom, 3 March 2026"

CHIPS = (
    ChipBandwidth("Apple M1", 66.7, f"{_M2}: the M2's 100 GB/s are 50 percent more"),
    ChipBandwidth("Apple M1 Pro", 200, _M1),
    ChipBandwidth("Apple M1 Max", 400, _M1),
    ChipBandwidth("Apple M1 Ultra", 800, _M1_ULTRA),
    ChipBandwidth("Apple M2", 100, _M2),
    ChipBandwidth("Apple M2 Pro", 200, _M2_PRO),
    ChipBandwidth("Apple M2 Max", 400, _M2_PRO),
    ChipBandwidth("Apple M2 Ultra", 800, _M2_ULTRA),
    ChipBandwidth("Apple M3", 100, _M3),
    ChipBandwidth("Apple M3 Pro", 150, _M3),
    ChipBandwidth("Apple M3 Max", 300, _M3, gpu_cores=30),
    ChipBandwidth("Apple M3 Max", 400, _M3, gpu_cores=40),
    ChipBandwidth("Apple M3 Ultra", 819, "technical specifications of Mac Studio (2025)"),
    ChipBandwidth("Apple M4", 120, "Apple Newsroom, 7 May 2024"),
    ChipBandwidth("Apple M4 Pro", 273, "Apple Newsroom, 30 October 2024"),
    ChipBandwidth("Apple M4 Max", 410, _M4_MAX, gpu_cores=32),
    ChipBandwidth("Apple M4 Max", 546, _M4_MAX, gpu_cores=40),
    ChipBandwidth("Apple M5", 153, "Apple Newsroom, 15 October 2025"),
    ChipBandwidth("Apple M5 Pro", 307, f"{_M5}: up to"),
    ChipBandwidth("Apple M5 Max", 614, f"{_M5}: up to"),
)


def published_bandwidth(chip: str, gpu_cores: int | None) -> ChipBandwidth | None:
    """Of a chip by machine.chip()'s name and the cores of its GPU. Without the latter, or with another number of cores
    than the table has, the fastest variant's: an upper bound. None for a chip that is not in the table."""
    variants = [entry for entry in CHIPS if entry.chip == chip]
    exact = [entry for entry in variants if entry.gpu_cores == gpu_cores]
    return max(exact or variants, key=lambda entry: entry.gb_s, default=None)
