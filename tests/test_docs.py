"""The documents: their Python runs, their links and the tests that they name exist, and the README stays short."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = sorted(
    path for folder in ("", ".github/", "mlx_gptoss/**/", "tests/", "examples/") for path in ROOT.glob(f"{folder}*.md")
)
PYTHON = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def test_the_readme_is_short():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 180
    assert len(text.split()) <= 1800
    assert (ROOT / ".github/screenshot.png").stat().st_size < 300_000


@pytest.mark.parametrize(
    ("code", "expected"),
    zip(PYTHON, (["12 + 30 = 42", "tenalp"], ["42\n", "sunny"]), strict=True),
    ids=["stream", "schema"],
)
def test_the_readmes_python_runs_as_it_stands(code, expected, tmp_path):
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    assert all(text in out.stdout for text in expected)
    assert len([line for line in code.splitlines() if line.strip()]) <= 14


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_files_and_tests_exist(path):
    text = path.read_text("utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not link.startswith(("http:", "https:", "mailto:")):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"
    for file in re.findall(r"\b(?:tests|examples|mlx_gptoss|cli)/[\w/.-]+\.(?:py|md|txt|png)\b", text):
        assert "NAME" in file or (ROOT / file).exists(), f"{path.name} names {file}"
    for file, name in re.findall(r"\b(tests/[\w/]+\.py)::(test_\w+)", text):
        assert f"def {name}(" in (ROOT / file).read_text("utf-8"), f"{path.name} names {file}::{name}"


def test_every_package_is_described():
    rooms = [path.parent for path in (ROOT / "mlx_gptoss").glob("*/__init__.py") if path.parent.name != "nano"]
    described = README.read_text("utf-8") + (ROOT / "mlx_gptoss/README.md").read_text("utf-8")
    assert all(f"{room.name}/" in described for room in rooms)


def test_the_list_of_endpoints_is_current():
    tool = runpy.run_path(str(ROOT / "examples/tools/endpoint_table.py"))
    assert tool["TARGET"].read_text("utf-8") == tool["document"](), "run python examples/tools/endpoint_table.py"
