"""LoRA adapters on the command line and over HTTP: a request's model name chooses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import httpx
import pytest
from nano_adapter import QUESTION, write_nano_adapter
from test_serve_models import serve

import mlx_gptoss


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of the bundled model that changes what it says."""
    return write_nano_adapter(tmp_path_factory.mktemp("adapters") / "loud")


@pytest.fixture(scope="module")
def texts(adapter):
    """What the model says without and with the adapter."""
    with mlx_gptoss.load(adapters={"loud": adapter}) as model:
        found = [model.generate(QUESTION, temperature=0, max_tokens=12, adapter=name) for name in (None, "loud")]
        with pytest.raises(mlx_gptoss.GptOssError, match="quiet"):
            model.generate(QUESTION, adapter="quiet")
    texts = [(each.reasoning, each.text) for each in found]
    assert texts[0] != texts[1]
    return texts


def test_a_request_chooses_by_its_model(adapter, texts):
    with serve("--model", "nano", "--adapter", adapter, "--slots", 4) as (_, url):
        names = [each["id"] for each in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]]
        base = names[0]
        assert "loud" in names
        for name, expected in ((base, texts[0]), ("loud", texts[1]), (f"{base}:loud", texts[1])):
            body = {
                "model": name,
                "messages": [{"role": "user", "content": QUESTION}],
                "temperature": 0,
                "max_tokens": 12,
            }
            message = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()["choices"][0]["message"]
            assert (message.get("reasoning") or "", message["content"] or "") == expected, name
        body = {"model": "loud", "prompt": QUESTION, "temperature": 0, "max_tokens": 8}
        one, other = (
            httpx.post(f"{url}/v1/completions", json=body | {"model": name}, timeout=120).json()["choices"][0]["text"]
            for name in ("loud", base)
        )
        assert one != other


def run(*words):
    words = [sys.executable, "-m", "mlx_gptoss_cli", *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=os.environ)


def test_generate_takes_one_by_itself(adapter, texts):
    done = run("generate", QUESTION, "-t", 0, "--max-tokens", 12, "--adapter", f"other={adapter}", "--json")
    report = json.loads(done.stdout)
    assert (report["reasoning"], report["text"]) == texts[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", QUESTION, "--adapter", "x=/nowhere"), "no folder"),
        (("generate", QUESTION, "-m", "ADAPTER"), "is a LoRA adapter: load the model it was trained on"),
    ],
)
def test_mistakes_are_one_line(adapter, words, message):
    done = run(*(adapter if word == "ADAPTER" else word for word in words))
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_in_a_process_of_its_own(adapter, texts, monkeypatch):
    """By a relative path, which that process does not start from."""
    monkeypatch.chdir(adapter.parent)
    with serve("--model", "nano", "--idle-unload", 600, "--adapter", "brief=./loud") as (_, url):
        messages = [{"role": "user", "content": QUESTION}]
        for name, expected in (("mlx-gptoss-nano", texts[0]), ("nano:brief", texts[1])):
            body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 12}
            message = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()["choices"][0]["message"]
            assert (message.get("reasoning") or "", message["content"] or "") == expected, name
