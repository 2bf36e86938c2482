"""Converting takes no more memory than the report says, however large the checkpoint is."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_gptoss.config import ModelConfig

MEASURE = """
import sys
from mlx_gptoss.weights.convert import convert
def peak():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
report = convert(*sys.argv[1:4], search=sys.argv[4] or None)
print(peak() - before, report.working_bytes, report.source_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("source", "target", "search"),
    [
        ("bf16", "mlx-4bit", ""),
        ("mxfp4", "bf16", ""),
        ("bf16", "mxfp4", ""),
        ("mxfp4", "nvfp4", ""),
        ("bf16", "fp8-dynamic", ""),
        ("mxfp4", "int4-autoround", ""),
        ("mxfp4", "mlx-4bit", "mse"),
    ],
)
def test_memory_stays_below_the_reported_bound(source, target, search, tmp_path, random_checkpoint):
    """Peak memory is at most the reported working memory plus the source's pages of a few chunks."""
    config = replace(
        ModelConfig(),
        num_hidden_layers=2,
        layer_types=(),
        hidden_size=1024,
        intermediate_size=1024,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=4096,
    )
    random_checkpoint(tmp_path / source, config, source)
    arguments = [str(tmp_path / source), str(tmp_path / "out"), target, search]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], check=True, capture_output=True, text=True)
    peak, working, size = (int(number) for number in done.stdout.split())
    assert size > 120e6
    assert peak < working + 40e6
    if source == "bf16":
        assert peak < size  # so the bound is not trivial
