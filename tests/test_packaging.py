"""What would be published: an sdist and a wheel that build without a warning, and types that are complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_versions_agree():
    import mlx_gptoss

    out = subprocess.run([sys.executable, "-m", "mlx_gptoss", "--version"], capture_output=True, text=True, check=True)
    assert out.stdout == f"mlx-gptoss {mlx_gptoss.__version__}\n"


@pytest.mark.slow
def test_every_public_name_has_a_complete_type(tmp_path):
    """pyright downloads its program from npm at first use; where it cannot, the test skips."""
    words = [sys.executable, "-m", "pyright", "--verifytypes", "mlx_gptoss", "--ignoreexternal", "--outputjson"]
    where = os.environ | {"PYTHONPATH": str(ROOT)}  # as if it were installed there
    out = subprocess.run(words, cwd=tmp_path, env=where, capture_output=True, text=True)
    if not out.stdout.strip().startswith("{"):
        pytest.skip(f"pyright does not run here: {out.stderr.strip()[-200:]}")
    report = json.loads(out.stdout)["typeCompleteness"]
    symbols = [symbol for symbol in report["symbols"] if symbol["isExported"]]
    assert len(symbols) > 1000
    assert not [s["name"] for s in symbols if not s["isTypeKnown"] or s["isTypeAmbiguous"]]


@pytest.mark.slow
def test_sdist_and_wheel_build_without_a_warning_and_the_sdist_runs_its_tests(tmp_path):
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a git checkout, which is where an sdist is made")
    subprocess.run(["git", "clone", "-q", ROOT, tmp_path / "clone"], check=True)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist"]
    out = subprocess.run(build, cwd=tmp_path / "clone", capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "Warning" not in out.stdout + out.stderr and "warning: no" not in out.stdout
    (wheel,), (sdist,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    needed = {"mlx_gptoss/nano/model.safetensors", "mlx_gptoss/server/page/index.html", "mlx_gptoss_cli/main.py"}
    assert needed <= {*names}
    assert not [name for name in names if name.startswith(("tests/", "examples/", "cli/"))]
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = (path for path in tmp_path.iterdir() if path.name.startswith("mlx_gptoss-"))
    words = [sys.executable, "-m", "pytest", "-m", "quick", "-p", "no:cacheprovider"]
    ran = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]
