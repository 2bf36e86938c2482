"""What soak.py makes of its probes and samples: gaps, and growth of memory, descriptors and threads."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_gptoss.server.run import THREADS

if TYPE_CHECKING:
    from soak import Soak

PROBES = ("health", "stream", "sleep")
STALL_S = 0.5
POOLED_THREADS = THREADS + 8  # that the server may have: its pool fills as more requests come at once
GROWTH = 0.05  # of memory from the end of the first quarter on: its slope, and its most in the second half of that


def judge_gaps(folder: Path, soak: Soak) -> dict[str, Any]:
    """The longest gap of each probe, with and without the time in which there was no CPU. Stalls are failures."""
    found = {probe: [json.loads(line) for line in (folder / probe).read_text().splitlines()] for probe in PROBES}
    report: dict[str, Any] = {}
    sleeps = found["sleep"][:-1]
    for probe in PROBES:
        *gaps, totals = found[probe]
        own = []
        for gap in gaps:
            asleep = [
                s["seconds"]
                for s in sleeps
                if s["at"] < gap["at"] + gap["seconds"] and gap["at"] < s["at"] + s["seconds"]
            ]
            own.append(gap["seconds"] - min(gap["seconds"], max([gap["waited"], *asleep])))
        report[probe] = {
            "count": totals["count"],
            "longest_s": round(totals["longest"], 3),
            "longest_without_waits_for_a_cpu_s": round(max(own, default=0.0), 3),
            "over_half_a_second": sum(gap["seconds"] >= STALL_S for gap in gaps),
        }
        if probe != "sleep":
            soak.failures += totals["failures"]
            stalls = [gap | {"own": one} for gap, one in zip(gaps, own, strict=True) if one >= STALL_S]
            soak.failures += [f"{probe} stalled: {stall}" for stall in stalls]
    return report


def judge_growth(soak: Soak) -> dict[str, Any]:
    """The samples of each process, and whether they grew after the first quarter. Growth is a failure."""
    steady = ["server", *[name for name in soak.models[:1] if all(name in sample for sample in soak.samples)]]
    later = soak.samples[len(soak.samples) // 4 :]
    report: dict[str, Any] = {"processes": [len(sample) for sample in soak.samples]}
    if len({len(sample) for sample in later}) > 1:
        soak.fail(f"the number of processes changes: {report['processes']}")
    for name in steady:
        for what in ("rss", "anonymous"):
            values = [sample[name][what] for sample in later]
            half, middle = len(values) // 2, statistics.median(values)
            by_slope = slope(values) * (len(values) - 1) / middle
            by_most = max(values[half:]) / max(values[:half]) - 1
            report[f"{name} {what}"] = {
                "MB": [round(sample[name][what] / 1e6, 1) for sample in soak.samples],
                "growth_by_slope": round(by_slope, 4),
                "growth_of_the_most": round(by_most, 4),
            }
            if max(by_slope, by_most) > GROWTH:
                soak.fail(f"{what} of {name} grows: {report[f'{name} {what}']}")
        for what in ("descriptors", "threads"):
            pooled = POOLED_THREADS if (name, what) == ("server", "threads") else 0
            values = [sample[name][what] for sample in soak.samples]
            report[f"{name} {what}"] = values
            half = len(later) // 2
            if max(values[-half:]) > max(max(values[:-half]) + 2, pooled):
                soak.fail(f"{what} of {name} grow: {values}")
    return report


def slope(values: list[int]) -> float:
    """By least squares, a step."""
    return statistics.linear_regression(range(len(values)), values).slope if len(values) > 1 else 0.0
