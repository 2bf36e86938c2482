"""The examples run as they stand, on the bundled model, and say what they promise."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import mlx_gptoss
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
        (
            "tool_agent.py",
            [],
            ['get_weather({"location": "Paris"}) -> {"temp', "It is 18 degrees and sunny"],
        ),
        ("batch_scorer.py", [], ["%  What is 12 + 30?  12 + 30 = 42\n", "%  Reverse the word apple.  elppa\n"]),
        ("second_turn.py", ["300"], [" 0 of them cached", "323 of them cached", "times as fast"]),
    ],
)
def test_example(name, words, expected):
    out = subprocess.run([sys.executable, EXAMPLES / name, *words], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    for text in expected:
        assert text in out.stdout


def test_the_terminal_chat_goes_on_where_it_ended(tmp_path):
    def say(text):
        words = [sys.executable, EXAMPLES / "terminal_chat.py", tmp_path / "chat.json"]
        out = subprocess.run(words, input=text, capture_output=True, text=True, timeout=300)
        assert out.returncode == 0, out.stderr
        return out.stdout

    assert "> 12 + 30 = 42\n> " in say("What is 12 + 30?\n\n")
    assert "> 42 + 5 = 47\n> " in say("Add 5 to that.\n")
    saved = mlx_gptoss.Conversation.from_dict(json.loads((tmp_path / "chat.json").read_text()))
    assert [message.role for message in saved.messages] == ["user", "assistant"] * 2


@pytest.fixture(scope="module")
def web_app():
    """The address of the FastAPI app."""
    pytest.importorskip("fastapi")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = subprocess.Popen([sys.executable, EXAMPLES / "fastapi_app.py", str(port)], stderr=subprocess.PIPE, text=True)
    try:
        for line in app.stderr:
            if "running on" in line:
                break
        else:
            pytest.fail("the app did not start")
        threading.Thread(target=app.stderr.read, daemon=True).start()
        yield f"http://127.0.0.1:{port}"
    finally:
        app.terminate()
        app.wait(60)


def test_the_web_app_answers_many_at_once_and_outlives_clients_that_leave(web_app):
    httpx = pytest.importorskip("httpx")
    with httpx.Client(base_url=web_app, timeout=120) as client:

        def answer(number):
            return client.get("/answer", params={"question": f"What is {number} + 30?"}).json()["answer"]

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(answer, range(12, 20))) == [f"{n} + 30 = {n + 30}" for n in range(12, 20)]
        for _ in range(6):  # more than there are slots
            with client.stream("GET", "/ask", params={"question": "What is 12 + 30?"}) as response:
                assert response.headers["content-type"].startswith("text/event-stream")
                next(response.iter_bytes())
        text = client.get("/ask", params={"question": "Reverse the word apple."}).text
        pieces = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
        assert "".join(pieces) == "elppa"


def test_the_notebook_runs():
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.get("text") or output["data"].get("text/plain") for output in outputs]
    assert "context 2048" in shown[0]
    assert "The capital of France is Paris." in outputs[1]["data"]["text/markdown"]
    assert "".join(shown[2:-3]) == "128 + 256 = 384"  # a stream comes in pieces
    assert shown[-3:] == [
        "['12 + 30 = 42', 'elppa', '7 + 8 = 15']",
        "{'sum': 42}",
        "'It is 18 degrees and sunny in Paris.'",
    ]


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):  # those that users read
        if "nano" not in path.name:
            assert len(path.read_text().splitlines()) <= 42, path.name


def test_every_example_and_tool_has_a_line_in_the_readme():
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in [*EXAMPLES.rglob("*.py"), *EXAMPLES.glob("*.ipynb")]:
        assert f"`{path.name}`" in readme, path.name


@pytest.mark.parametrize(
    ("tool", "words", "package", "install"),
    [
        ("train_nano.py", ["train", "--run", "unused"], "torch", "python -m pip install -e '.[test]'"),
        ("write_gguf.py", ["tiny", "2", "unused.gguf"], "gguf", "python -m pip install -e '.[test]'"),
        (
            "autoround_table.py",
            ["--make", "unused"],
            "auto_round",
            "python -m pip install --no-deps auto-round (tests/README.md has what else it needs)",
        ),
        ("time_llama_cpp.py", ["unused.gguf", "tiny", "2"], "llama_cpp", "python -m pip install llama-cpp-python"),
    ],
)
def test_a_tool_says_which_package_it_needs(tmp_path, tool, words, package, install):
    script = f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_path(sys.argv[0], run_name='__main__')"
    prepared = f"import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(TOOLS)!r}); {script}"
    command = [sys.executable, "-c", prepared, str(TOOLS / tool), *words]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (out.returncode, out.stdout) == (1, "")
    assert out.stderr == f"error: this program needs {package}, which is not installed; run: {install}\n"


@pytest.mark.slow
def test_the_format_table_has_a_row_a_format():
    words = [TOOLS / "format_table.py", "mlx-mxfp4-q8"]
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
