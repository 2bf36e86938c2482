"""`mlx-gptoss serve --tools`: what it refuses, and one request to the bundled model."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import httpx
import pytest

SERVE = [sys.executable, "-m", "mlx_gptoss_cli", "serve", "--port", "0"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--tools", "browser,pyhton"], "error: --tools: there is no tool 'pyhton'; choose from browser, python, mcp"),
        (["--tools", "browser"], "error: the tool browser needs a search engine"),
        (["--tools", "python", "--tools-config", "missing.toml"], "error: --tools-config: cannot read missing.toml"),
    ],
)
def test_wrong_options_end_in_one_line(words, error, tmp_path):
    out = subprocess.run([*SERVE, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert out.returncode == 1 and not out.stdout
    assert out.stderr.startswith(error) and out.stderr.count("\n") == 1


def test_a_server_with_tools_answers_and_ends(tmp_path):
    config = tmp_path / "tools.toml"
    config.write_text('[python]\nsandbox = "none"\n[browser]\nsearch = "searxng"\nurl = "http://127.0.0.1:9"\n')
    words = [*SERVE, "--tools", "python, browser", "--tools-config", str(config)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found is not None, line + process.stderr.read()
        body = {
            "input": "What is 12 + 30?",
            "tools": [{"type": "code_interpreter", "container": {"type": "auto"}}, {"type": "web_search"}],
            "max_output_tokens": 200,
        }
        response = httpx.post(f"{found[0]}/v1/responses", json=body, timeout=300)
        assert response.status_code == 200, response.text
        assert "X-Ignored-Fields" not in response.headers
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
    assert process.returncode == 0
