"""The table of Macs in the READMEs is what examples/tools/mac_table.py computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_loading_readme_has_the_scripts_table():
    words = [sys.executable, ROOT / "examples" / "tools" / "mac_table.py"]
    table = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    assert table.count("\n") >= 7
    assert table in (ROOT / "mlx_gptoss" / "loading" / "README.md").read_text("utf-8")
