"""Adapters of a model that has a process of its own: the same answers as in Python, after unloading and after kill -9
as well, and a prompt cache that no two adapters share."""

from __future__ import annotations

import os
import signal

import httpx
import pytest
from nano_adapter import QUESTION, write_nano_adapter
from serving import serving_models

import mlx_gptoss
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.options import LoadOptions
from mlx_gptoss.server.models.remote import RemoteModel

LONG = "Add 12 and 30. " * 60
TOKENS = 40


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_nano_adapter(folder / name, seed, 0.08) for name, seed in (("loud", 1), ("wild", 3))}


@pytest.fixture(scope="module")
def said(adapters):
    """Reasoning and text of each adapter, in Python."""
    with mlx_gptoss.load(adapters=adapters, max_context=2048) as model:
        replies = {
            name: model.generate(QUESTION, temperature=0, max_tokens=TOKENS, adapter=name) for name in (None, *adapters)
        }
    found = {name: (reply.reasoning, reply.text) for name, reply in replies.items()}
    assert len(set(found.values())) == 3
    return found


@pytest.fixture(scope="module")
def server(two_models, adapters, tmp_path_factory):
    """alpha with two adapters and files of computed prompts, and beta without."""
    options = {"max_context": 2048, "slots": 2, "prefix_cache": 1 << 28}
    cache = tmp_path_factory.mktemp("prompts")
    with serving_models(two_models, adapters=adapters, prompt_cache=cache, **options) as running:
        yield running


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


def chat(http, name, content=QUESTION, tokens=TOKENS):
    messages = [{"role": "user", "content": content}]
    body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": tokens}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def check(http, said):
    for name, adapter in (("alpha", None), ("loud", "loud"), ("alpha:wild", "wild"), ("beta", None)):
        message = chat(http, name)["choices"][0]["message"]
        assert (message.get("reasoning") or "", message["content"] or "") == said[adapter], name


def cached(http, name):
    return chat(http, name, LONG, 1)["usage"]["prompt_tokens_details"]["cached_tokens"]


def end(server, http, how):
    """End alpha's process: unloaded, or by kill -9."""
    model = server.service.models[0].model
    before = model.process.pid
    if how == "unload":
        assert http.post("/models/unload", json={"model": "loud"}).json()["state"] == "unloaded"
    else:
        os.kill(before, signal.SIGKILL)
    return lambda: model.process.pid != before


@pytest.mark.parametrize("how", ["unload", "kill"])
def test_the_answers_survive_the_process(server, http, said, how):
    check(http, said)
    is_new = end(server, http, how)
    check(http, said)
    assert is_new()


def test_the_prompt_cache_is_each_adapter_s_in_memory_and_in_files(server, http, until):
    assert [cached(http, name) for name in ("loud", "alpha")] == [0, 0]
    assert all(cached(http, name) >= 256 for name in ("alpha:loud", "alpha"))
    end(server, http, "unload")  # writes what is computed
    until(lambda: server.service.models[0].state == "unloaded")
    assert cached(http, "wild") == 0
    assert all(cached(http, name) >= 256 for name in ("loud", "alpha"))


def test_lists(http):
    chat(http, "loud")
    found = {each["id"]: each.get("parent") for each in http.get("/v1/models").json()["data"]}
    assert found == {"alpha": None, "loud": "alpha", "wild": "alpha", "beta": None}
    running = [each["name"] for each in http.get("/api/ps").json()["models"]]
    assert running[:3] == ["alpha:latest", "loud:latest", "wild:latest"]
    assert http.post("/api/show", json={"model": "beta:loud"}).status_code == 200  # beta has no adapters: a tag
    assert http.post("/api/show", json={"model": "alpha:nobody"}).status_code == 404
    for each in http.get("/metrics").text.splitlines():
        assert 'model="loud"' not in each or "mlx_gptoss_model_" not in each  # one process, counted once


def test_an_adapter_that_does_not_fit_is_told_before_anything_is_loaded(two_models, adapters, tmp_path):
    folder = write_nano_adapter(tmp_path / "broken")
    (folder / "adapters.safetensors").write_bytes((adapters["loud"] / "adapters.safetensors").read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        RemoteModel("alpha", two_models["alpha"], LoadOptions(adapters={"broken": folder}))


def test_paths_are_absolute_for_the_process(two_models, adapters, monkeypatch):
    monkeypatch.chdir(adapters["loud"].parent)
    remote = RemoteModel("alpha", two_models["alpha"], LoadOptions(adapters={"loud": "./loud"}))
    assert remote.request.adapters == {"loud": str(adapters["loud"].resolve())}
