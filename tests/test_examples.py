"""The examples run as they stand, on the bundled model, and say what they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_gptoss.weights import checkpoint, codecs
from mlx_gptoss.weights.synthetic import Synthetic, preset

EXAMPLES = Path(__file__).parents[1] / "examples"
TOOLS = EXAMPLES / "tools"


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("stream_reply.py", [], ["384", "tokens/s"]),
        ("conversation.py", [], ["123", "128", "elppa"]),
        ("weather_tool.py", [], ["get_weather", "Paris", "18", "sunny"]),
        ("structured_output.py", [], ["The sum is 42\n"]),
        ("second_turn.py", ["300"], [" 0 of them cached", "323 of them cached", "times as fast"]),
    ],
)
def test_example(name, words, expected):
    out = subprocess.run([sys.executable, EXAMPLES / name, *words], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    for text in expected:
        assert text in out.stdout


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):  # those that users read
        if "nano" not in path.name:
            assert len(path.read_text().splitlines()) <= 42, path.name


def test_every_example_and_tool_has_a_line_in_the_readme():
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.rglob("*.py"):
        assert f"`{path.name}`" in readme, path.name


@pytest.mark.parametrize(
    ("tool", "words", "package", "install"),
    [
        ("train_nano.py", ["train", "--run", "unused"], "torch", "python -m pip install -e '.[test]'"),
        ("write_gguf.py", ["tiny", "2", "unused.gguf"], "gguf", "python -m pip install -e '.[test]'"),
        ("time_llama_cpp.py", ["unused.gguf"], "llama_cpp", "python -m pip install llama-cpp-python"),
    ],
)
def test_a_tool_says_which_package_it_needs(tmp_path, tool, words, package, install):
    script = f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_path(sys.argv[0], run_name='__main__')"
    prepared = f"import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(TOOLS)!r}); {script}"
    command = [sys.executable, "-c", prepared, str(TOOLS / tool), *words]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (out.returncode, out.stdout) == (1, "")
    assert out.stderr == f"error: this program needs {package}, which is not installed; run: {install}\n"


def test_the_format_table_has_a_row_a_format():
    words = [TOOLS / "format_table.py", "--exact", "1", "mlx-mxfp4-q8"]
    out = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    rows = [line for line in out.stdout.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["bf16", "mlx-mxfp4-q8"]
    assert "100.00%" in rows[0]  # bfloat16 agrees with itself


def test_the_gguf_file_holds_the_synthetic_weights(tmp_path):
    pytest.importorskip("gguf")
    words = [TOOLS / "write_gguf.py", "tiny", "2", tmp_path / "tiny.gguf"]
    out = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    found, source = checkpoint.open(tmp_path / "tiny.gguf"), Synthetic(preset("tiny", 2), "mxfp4")
    assert found.format == "gguf" and found.config.yarn == source.config.yarn
    for param in source.params:
        ours, theirs = (codecs.dequantize(weights.read(param.name)) for weights in (source, found))
        bound = 0.05 if param.is_matrix and param.role not in ("experts", "router") else 0  # Q8_0 rounds
        assert np.abs(ours - theirs).max() <= bound * np.abs(ours).max(), param.name
