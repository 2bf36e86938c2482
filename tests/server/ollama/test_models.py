"""What Ollama's clients ask first: version, models, and what is not served."""

from __future__ import annotations

import re

import ollama
import pytest
from ollama_requests import MODEL, lines


def test_version_is_a_number_that_clients_compare(http):
    assert re.fullmatch(r"\d+\.\d+\.\d+", http.get("/api/version").json()["version"])


def test_head(http):
    for path in ("/", "/api/version", "/api/tags"):
        answer = http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_the_loaded_model_is_listed_described_and_running(client, server):
    (listed,) = client.list().models
    assert listed.model == "mlx-gptoss-nano:latest" and re.fullmatch("[0-9a-f]{64}", listed.digest)
    assert listed.size == server.service.model.plan.weights_bytes and listed.modified_at.timestamp() > 0
    (running,) = client.ps().models
    assert (running.model, running.digest, running.context_length) == (listed.model, listed.digest, 4096)
    assert running.expires_at > listed.modified_at
    assert listed.details == running.details and listed.details.quantization_level == "MXFP4"


@pytest.mark.parametrize("name", [MODEL, "mlx-gptoss-nano:latest", "anything"])
def test_show(client, name):
    shown = client.show(name)
    assert shown.capabilities == ["completion", "tools", "thinking"] and shown.details.family == "gptoss"
    info = shown.modelinfo
    assert info["gptoss.context_length"] == 4096 and info["general.architecture"] == "gptoss"
    assert info["general.basename"] == name and info["general.parameter_count"] > 3_000_000
    assert "temperature" in shown.parameters and isinstance(shown.template, str) and isinstance(shown.license, str)


def test_show_by_the_older_field(http):
    assert http.post("/api/show", json={"name": MODEL}).json()["model_info"]["general.basename"] == MODEL


def test_names_of_the_published_sizes(model, monkeypatch, http, client):
    """Codex asks for gpt-oss:20b in /api/tags."""
    config = model.config
    for layers, experts, name in ((24, 32, "gpt-oss:20b"), (36, 128, "gpt-oss:120b")):
        sizes = {"num_hidden_layers": layers, "num_local_experts": experts, "layer_types": ()}
        monkeypatch.setattr(model, "config", type(config)(**{**vars(config), **sizes}))
        assert [listed.model for listed in client.list().models] == ["mlx-gptoss-nano:latest", name]


def test_pull_succeeds_under_any_name(client, http):
    assert client.pull(MODEL).status == "success"
    assert [step.status for step in client.pull(MODEL, stream=True)][-1] == "success"
    assert lines(http.post("/api/pull", json={"name": MODEL, "insecure": True}))[-1] == {"status": "success"}


def test_a_server_that_is_strict_about_names(serve, model):
    with serve(model) as server:
        server.service.strict_model = True
        client = ollama.Client(host=server.url)
        assert client.show("mlx-gptoss-nano:latest") and client.pull("mlx-gptoss-nano").status == "success"
        for call in (client.show, client.pull, client.generate, client.chat):
            with pytest.raises(ollama.ResponseError, match="is not here: use 'mlx-gptoss-nano'") as refused:
                call(MODEL)
            assert refused.value.status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("POST", "/api/embed", "embeddings"),
        ("POST", "/api/embeddings", "embeddings"),
        ("DELETE", "/api/delete", "mlx-gptoss serve --model"),
        ("POST", "/api/create", "cannot create"),
        ("POST", "/api/copy", "cannot create"),
        ("POST", "/api/push", "cannot create"),
        ("POST", "/api/blobs/sha256:0", "cannot create"),
    ],
)
def test_what_is_not_served_says_why(http, method, path, words):
    answer = http.request(method, path, json={"model": MODEL, "input": "x"})
    assert answer.status_code == 400 and words in answer.json()["error"]
