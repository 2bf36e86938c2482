"""The report of a benchmark that a user can send: a JSON file and a plot, without anything of the person.

Nothing is left out by a pattern. What is in the report is named here, field by field: figures, names of chips, systems
and packages, and settings with values of a known form. No path, name of a model, of a host or of a user, and no address
has a place in it.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import InvalidRequest
from ..weights.formats import WRITERS
from .benchmark import Measurement, Report
from .plot import check_plot, plot_speeds

VERSION = 1  # of the report's form
MEASURED = (
    "backend", "batch", "prompt", "context", "generate", "load_s", "prefill_tok_s", "decode_tok_s", "peak_memory_bytes",
    "bytes_per_token", "bytes_per_step", "bandwidth_gb_s", "fraction_of_bound", "prefill_runs", "decode_runs",
    "host_ms_per_step", "published_bound_tok_s", "ratio",
)  # fmt: skip
AGREED = ("layers", "tokens", "kl", "top1", "relative_error", "worst_error", "decode_error")
SETTINGS = (
    "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER", "MLX_BFS_MAX_WIDTH", "MLX_ENABLE_TF32", "MLX_METAL_FAST_SYNCH",
    "MLX_METAL_GPU_ARCH", "MLX_DISABLE_COMPILE", "MLX_SDPA_BLOCKS", "MLX_RESIDENCY_SET_MAX_PCT", "OMP_NUM_THREADS",
    "MTL_DEBUG_LAYER",
)  # fmt: skip
VALUE = re.compile(r"\d{0,6}|applegpu_g\d{2}[a-z]")  # of a setting
DEVICE = (
    "metal", "device_name", "architecture", "memory_size", "max_recommended_working_set_size", "max_buffer_length",
    "resource_limit", "command_buffers", "compute capability", "multiprocessors", "total_memory", "threads",
)  # fmt: skip
MACHINE = (
    "python", "packages", "wheels", "architecture", "chip", "gpu_cores", "cores", "memory_bytes", "backend", "dtype",
    "iogpu.wired_limit_mb", "rosetta", "matrix_kernels",
)  # fmt: skip
ENGINE = re.compile(r"[a-z][a-z-]*( \d[\w.+]*)?")  # mlx-gptoss, mlx-lm 0.32.2


def check_report(path: Path) -> None:
    """Raise the errors of write_report early, before a long benchmark. Checks the path and matplotlib."""
    if path.suffix.lower() != ".json":
        raise InvalidRequest(f"the report {path} must be named as JSON, such as {path.with_suffix('.json')}")
    check_plot(path.with_suffix(".png"))


def write_report(path: Path, report: Report, config: ModelConfig, facts: Mapping[str, Any], style: str) -> None:
    """Write the report to `path`, and its plot to the same path with the suffix .png.

    facts: from measure.facts. style: a key of plot.THEMES.

    Raises GptOssError if matplotlib is missing, and InvalidRequest if the path is not one of a JSON file in an existing
    folder."""
    check_report(path)
    path.write_text(json.dumps(content(report, config, facts), indent=1) + "\n")
    plot_speeds([_anonymous(result) for result in report.results], path.with_suffix(".png"), style)


def content(report: Report, config: ModelConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What write_report writes, as JSON values."""
    found: dict[str, Any] = {
        "report": VERSION,
        "machine": _machine(facts),
        "model": {
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "experts": max(config.experts),
            "vocabulary": config.vocab_size,
        },
        "results": [_result(result) for result in report.results],
        "agreement": [_only(asdict(agreement), AGREED) for agreement in report.agreements],
        "launches_per_token": {_engine(name): count for name, count in report.launches.items()},
        "command_buffers_per_token": report.command_buffers,
    }
    if report.chip is not None:
        found["published_bandwidth"] = asdict(report.chip)
    return found | ({"ratio": report.ratio} if report.ratio else {})


def _machine(facts: Mapping[str, Any]) -> dict[str, Any]:
    found = _only(facts, MACHINE)
    # The name of a Linux kernel may have that of the machine on which it was built.
    found["os"] = str(facts["os"]) if sys.platform == "darwin" else f"Linux {_number(platform.release())}"
    found["device"] = _only(facts["device"], DEVICE)
    variables = {name: value for name, value in facts["variables"].items() if name in SETTINGS}
    found["settings"] = {name: value for name, value in variables.items() if VALUE.fullmatch(value)}
    return found


def _result(result: Measurement) -> dict[str, Any]:
    anonymous = _anonymous(result)
    named = {"engine": anonymous.engine, "device": anonymous.device, "format": anonymous.format}
    return named | _only(asdict(anonymous), MEASURED)


def _anonymous(result: Measurement) -> Measurement:
    return replace(result, engine=_engine(result.engine), format=_format(result.format))


def _engine(name: str) -> str:
    return name if ENGINE.fullmatch(name) else "mlx-gptoss" if name.startswith("mlx-gptoss") else "another engine"


def _format(name: str) -> str:
    """A format that is written, or is read by this name; "other" for what may have been typed."""
    known = re.fullmatch(r"[a-z0-9-]+(, (computed in )?[a-z0-9-]+)?", name)
    return name if name in WRITERS or known else "other"


def _only(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _number(release: str) -> str:
    """The numbers at the beginning of a kernel's release."""
    found = re.match(r"\d+(\.\d+)*", release)
    return found[0] if found else ""
