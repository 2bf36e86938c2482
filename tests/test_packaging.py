"""What would be published: an sdist and a wheel that build without a warning, and types that are complete."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORMULA = ROOT / ".github/homebrew/mlx-gptoss.rb"
# What stands in a formula's class, in the order of Homebrew's FormulaAudit/ComponentsOrder.
STANZAS = [
    "include",
    "desc",
    "homepage",
    "url",
    "mirror",
    "version",
    "sha256",
    "license",
    "revision",
    "head",
    "livecheck",
    "bottle",
    "depends_on",
    "uses_from_macos",
    "pypi_packages",
    "resource",
    "install",
    "caveats",
    "service",
    "test",
]


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
    assert needed | {"mlx_gptoss/backends/mlx/kernels/router.metal"} <= {*names}
    assert not [name for name in names if name.startswith(("tests/", "examples/", "cli/"))]
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = (path for path in tmp_path.iterdir() if path.name.startswith("mlx_gptoss-"))
    words = [sys.executable, "-m", "pytest", "-m", "quick", "-p", "no:cacheprovider"]
    ran = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]


def stanzas() -> list[tuple[str, str]]:
    """Name and text of each thing in the formula's class, comments left out."""
    code = "\n".join(line for line in FORMULA.read_text().splitlines() if not line.lstrip().startswith("#"))
    body = re.fullmatch(r"class MlxGptoss < Formula\n(.*)\nend", code, re.DOTALL)
    assert body is not None
    found = re.split(r"^  (?=[a-z])(?!end$)", body[1], flags=re.MULTILINE)[1:]
    return [(text.removeprefix("def ").split()[0], text) for text in found]


def test_the_homebrew_formula_obeys_homebrews_rules():
    """The rules of brew style and brew audit that a file shows: Homebrew's rubocops, and its .rubocop.yml."""
    names = [name for name, _ in stanzas()]
    assert names == sorted(names, key=STANZAS.index)
    assert {"desc", "homepage", "url", "sha256", "license", "depends_on", "install", "service", "test"} <= {*names}
    text = dict(stanzas())
    desc, url = (re.findall('"(.*)"', text[name])[0] for name in ("desc", "url"))
    assert len(desc) <= 80 and desc[0].isupper() and not desc.endswith(".")
    assert not re.match(r"(the|an?)\s|mlx[\s-]?gptoss", desc, re.IGNORECASE)
    assert re.fullmatch(
        r"https://files\.pythonhosted\.org/packages/\w\w/\w\w/\w{58,60}/mlx_gptoss-[\d.]+\.tar\.gz", url
    )
    assert re.fullmatch(r'sha256 "[0-9a-f]{64}"', text["sha256"].strip())
    assert all(found.startswith("https://") for found in re.findall(r'(?<=")http[^"]*', text["homepage"] + url))
    depends = [one.split("#")[0].strip() for name, one in stanzas() if name == "depends_on"]
    by_kind = sorted(depends, key=lambda one: (":build" not in one, re.sub(r"depends_on [:\"]?", "", one).lower()))
    assert depends == by_kind
    assert not re.search(r"\b(bin|libexec|prefix)\b", re.sub(r"opt_\w+", "", text["service"])), (
        "opt_ paths in a service"
    )
    lines = FORMULA.read_text().splitlines()
    assert not [line for line in lines if (len(line) > 118 and ' url "' not in line) or line != line.rstrip()]


def test_the_homebrew_formula_agrees_with_the_package():
    import mlx_gptoss

    text = dict(stanzas())
    assert f"mlx_gptoss-{mlx_gptoss.__version__}.tar.gz" in text["url"]
    project = (ROOT / "pyproject.toml").read_text()
    (license,) = re.findall('^license = "(.*)"', project, re.MULTILINE)
    assert text["license"].strip() == f'license "{license}"'
    (command,) = re.findall(r'run \[opt_bin/"([\w-]+)", "serve"\]', text["service"])
    assert f"{command} = " in project.partition("[project.scripts]")[2]
    unfilled = set(re.findall('"(0+)"', text["sha256"]))
    assert not unfilled or "Until then `brew install` refuses it" in FORMULA.read_text()


def test_ruby_parses_the_homebrew_formula():
    if shutil.which("ruby") is None:
        pytest.skip("needs ruby")
    out = subprocess.run(["ruby", "-wc", FORMULA], capture_output=True, text=True)
    assert (out.returncode, out.stdout, out.stderr) == (0, "Syntax OK\n", "")


def test_a_mac_gets_an_mlx_that_computes_right_on_every_chip():
    """0.32.0 to 0.32.3 have a wrong sorted gather on M5 and an NVFP4 fault."""
    requirements = pytest.importorskip("packaging.requirements")
    wanted = [
        requirements.Requirement(text)
        for text in re.findall(r'^    "(mlx\W.*)",', (ROOT / "pyproject.toml").read_text(), re.M)
    ]
    for platform, old_enough in (("darwin", False), ("linux", True)):
        (mlx,) = [r for r in wanted if r.name == "mlx" and r.marker.evaluate({"sys_platform": platform})]
        assert mlx.specifier.contains("0.32.4") and mlx.specifier.contains("0.32.3") == old_enough


def test_ci_runs_the_self_test_on_macos_as_on_larger_chips():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    runs = [
        step.get("env", {})
        for job in jobs.values()
        if job["runs-on"].startswith("macos")
        for step in job["steps"]
        if step.get("run", "").endswith("mlx-gptoss selftest")
    ]
    assert {} in runs and {"MTL_DEBUG_LAYER": "1"} in runs
    for architecture in ("applegpu_g16s", "applegpu_g15d"):
        assert {"MLX_METAL_GPU_ARCH": architecture} in runs
