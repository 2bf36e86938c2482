"""A model split over several ranks has the logits and tokens of one process, in every format."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FORMATS = ["mxfp4", "mxfp4-original", "fp8-dynamic", "int4-autoround", "mlx-4bit", "mlx-mxfp4-all", "nvfp4"]
FORMATS += ["nvfp4-bf16", "gguf/model-q8_0.gguf"]
LOGITS = str(Path(__file__).parent / "logits.py")


def check(ranks, folders, seconds=120):
    (code, out, err), *others = ranks.end(seconds)
    assert code == 0, err
    for code, printed, err in others:
        assert (code, printed) == (0, ""), err
    results = [json.loads(line) for line in out.splitlines()]
    assert [result["folder"] for result in results] == folders
    for result in results:
        assert result["error"] < 1e-4 and result["same"], result


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_through_torch(torchrun, mini, count):
    folders = [str(mini / name) for name in FORMATS]
    check(torchrun(count, LOGITS, "cuda", *folders), folders)


@pytest.mark.slow
def test_through_kernels(torchrun, mini):
    """Interpreted: prefill, and the steps of decode.py, where a rank skips what other ranks hold."""
    folders = [str(mini / "mxfp4")]
    check(torchrun(2, LOGITS, "kernels", *folders), folders, seconds=900)


@pytest.mark.parametrize("count", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_through_mlx(ring, mini, count):
    """With 3 and 4 ranks, several ranks share each of these checkpoints' two KV heads."""
    folders = [str(mini / name) for name in (FORMATS[1:3] if count == 3 else FORMATS)]
    check(ring(count, LOGITS, "mlx", *folders), folders)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_sent_per_token_follow_the_formula(count):
    """Counted in a network namespace of its own. It is exact on an idle machine; on a busy one TCP adds up to 2%."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("a network namespace needs root on Linux")
    script = Path(__file__).parent / "count_bytes.py"
    command = ["unshare", "-n", sys.executable, script, str(count)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    assert found["counted"] == pytest.approx(found["formula"], rel=0.05)
