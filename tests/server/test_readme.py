"""The examples in the server's README, run as they stand against a server with the bundled model."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from serving import serving_models

from mlx_gptoss.loading.plan import NANO

README = (Path(__file__).parents[2] / "mlx_gptoss/server/README.md").read_text("utf-8")
ADDRESS = "http://127.0.0.1:8080"
EXAMPLES = [example for example in re.findall(r"^```sh\n(.*?)^```", README, re.S | re.M) if "curl" in example]
EXPECTED = (  # in each example's output
    ['"content":"12 + 30 = 42"'],
    ["data: [DONE]"],
    ['"name":"get_weather"', '"finish_reason":"tool_calls"'],
    ['"text":"12 + 30 = 42"'],
    ['"text":"42 + 5 = 47"', '"object":"list"', '"deleted":true'],
    ['"object":"text_completion"'],
    ['"type":"thinking"', '"text":"12 + 30 = 42"', '{"input_tokens":'],
    ['"id":"mlx-gptoss-nano"', '"status":"ok"', "mlx_gptoss_completion_tokens_total"],
    ['"content":"12 + 30 = 42"', '"response":"12 + 30 = 42"'],
    ['{"version":"', '"name":"mlx-gptoss-nano:latest"', '"context_length":', '"thinking"', '{"status":"success"}'],
    ['"state":"loaded"', '"trained_for_tool_use":true'],
    ['"total_slots":', '"is_processing":false', '"piece":"H"', '{"content":"Hi"}', '"prompt":"<|start|>system'],
    ['"state":"loaded"', '"state":"unloaded"'],
)
CURL = 'set -euo pipefail; curl() { command curl -sS --fail-with-body "$@"; echo; }\n'


@pytest.mark.skipif(not all(map(shutil.which, ("bash", "curl", "python3"))), reason="needs bash, curl and python3")
@pytest.mark.parametrize(("example", "expected"), list(zip(EXAMPLES, EXPECTED, strict=True)), ids=range(len(EXAMPLES)))
def test_curl_examples_run_as_they_stand(server, example, expected):
    assert ADDRESS in example
    with serving_models({"nano": NANO}) if "/unload" in example else nullcontext(server) as running:
        command = ["bash", "-c", CURL + example.replace(ADDRESS, running.url)]
        out = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stdout + out.stderr
    assert all(text in out.stdout for text in expected), out.stdout


def test_every_path_has_a_curl_example(http):
    lines = "\n".join(EXAMPLES)
    for path in http.get("/openapi.json").json()["paths"]:
        pattern = re.sub(r"\\\{.*?\\\}", r"[\\w$-]+", re.escape(path))
        assert re.search(rf"8080{pattern}(\s|$)", lines), f"{path} has no example"


def test_the_python_example_runs_as_it_stands(server):
    (example,) = [code for code in re.findall(r"^```python\n(.*?)^```", README, re.S | re.M) if "OpenAI(" in code]
    command = [sys.executable, "-c", example.replace(ADDRESS, server.url)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert out.stdout == "12 + 30 = 42\n", out.stderr


def test_the_example_endpoint_works_as_it_stands(tmp_path):
    """The file and the diff of "Adding an endpoint", applied to a copy of the package."""
    (code,) = [code for code in re.findall(r"^```python\n(.*?)^```", README, re.S | re.M) if "APIRouter" in code]
    (diff,) = re.findall(r"^```diff\n(.*?)^```", README, re.S | re.M)
    package = Path(__file__).parents[2] / "mlx_gptoss"
    shutil.copytree(package, tmp_path / "mlx_gptoss", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "mlx_gptoss/server/tokenize.py").write_text(code, "utf-8")
    app = tmp_path / "mlx_gptoss/server/app.py"
    text = app.read_text("utf-8")
    for hunk in diff.split("@@\n"):
        before, after = (
            "".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[0] in signs) for signs in (" -", " +")
        )
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    app.write_text(text, "utf-8")
    script = (
        "import mlx_gptoss; from starlette.testclient import TestClient\n"
        "from mlx_gptoss.server.app import build_app; from mlx_gptoss.server.guard import Gate\n"
        "from mlx_gptoss.server.models.named import NamedModel\n"
        "from mlx_gptoss.server.service import Service\n"
        "with mlx_gptoss.load() as model:\n"
        "    client = TestClient(build_app(Service([NamedModel(model, 'nano')], Gate())), base_url='http://localhost')\n"
        "    answer = client.post('/v1/tokenize', json={'text': 'Hi there'})\n"
        "    assert answer.json() == {'ids': model.tokenizer.encode('Hi there')}, answer.text\n"
        "    assert client.post('/v1/tokenize', json={'text': 1}).json()['error']['param'] == 'text'\n"
    )
    out = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
