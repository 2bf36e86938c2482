"""Several models behind one server: which one answers, what the lists say, and what a crash of one does."""

from __future__ import annotations

import json
import os
import signal
import threading

import httpx
import pytest
from serving import serving_models

SUM = [{"role": "user", "content": "What is 12 + 30?"}]
ANSWER = "12 + 30 = 42"
ENDPOINTS = {
    "/v1/chat/completions": {"messages": SUM},
    "/v1/responses": {"input": SUM[0]["content"]},
    "/v1/completions": {"prompt": "12 + 30 = "},
    "/v1/messages": {"messages": SUM, "max_tokens": 200},
    "/api/chat": {"messages": SUM, "stream": False},
    "/api/generate": {"prompt": SUM[0]["content"], "stream": False},
}


def pid_of(server, name):
    (model,) = [model for model in httpx.get(f"{server.url}/health").json()["models"] if model["id"] == name]
    return model["pid"]


def kill(server, name):
    os.kill(pid_of(server, name), signal.SIGKILL)


def chat(server, name, **fields):
    body = {"model": name, "messages": SUM, "temperature": 0, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)


@pytest.fixture(scope="module")
def endless(pair):
    """Fields of a reply that runs until it is stopped: all special tokens, which could end it, are forbidden."""
    specials = pair.service.models[0].model.tokenizer.specials.values()
    return {"max_tokens": 4000, "logit_bias": {str(id): -100 for id in specials}}


@pytest.mark.parametrize("name", ["beta", "alpha"])
@pytest.mark.parametrize("path", list(ENDPOINTS))
def test_a_request_chooses_by_name(pair, http, path, name):
    answer = http.post(path, json={"model": name, "temperature": 0, **ENDPOINTS[path]})
    assert answer.status_code == 200 and answer.json()["model"] == name
    if path != "/v1/completions":
        assert ANSWER in answer.text


def test_an_unknown_name_means_the_first_model(http, pair):
    assert http.post("/v1/chat/completions", json={"model": "gpt-4o", "messages": SUM}).json()["model"] == "alpha"
    assert http.post("/v1/chat/completions", json={"messages": SUM}).json()["model"] == "alpha"
    assert http.post("/api/chat", json={"model": "beta:latest", "messages": SUM, "stream": False}).status_code == 200
    assert chat(pair, "beta:latest").json()["model"] == "beta"


def test_streams_schemas_and_tools_work_as_in_one_process(http):
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    with http.stream(
        "POST",
        "/v1/chat/completions",
        json={"model": "beta", "messages": SUM, "stream": True, "response_format": form, "logprobs": True},
    ) as answer:
        chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert isinstance(json.loads(text)["sum"], int) and len(chunks) > 5
    assert any(chunk["choices"][0]["logprobs"] for chunk in chunks)


def test_the_lists_know_all_models(http, pair):
    chat(pair, "alpha")
    chat(pair, "beta")
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["alpha", "beta"]
    assert http.get("/v1/models/beta").json()["status"] == {"value": "loaded"}
    assert [model["name"] for model in http.get("/api/tags").json()["models"]] == ["alpha:latest", "beta:latest"]
    assert [model["name"] for model in http.get("/api/ps").json()["models"]] == ["alpha:latest", "beta:latest"]
    assert [model["state"] for model in http.get("/api/v0/models").json()["data"]] == ["loaded", "loaded"]
    assert http.post("/api/show", json={"model": "beta"}).json()["model_info"]["general.basename"] == "beta"
    metrics = http.get("/metrics").text
    assert 'mlx_gptoss_model_loaded{model="beta"} 1.0' in metrics and "mlx_gptoss_up 1.0" in metrics


def test_unload_gives_the_process_up_and_the_next_request_loads_again(http, pair, states):
    chat(pair, "beta")
    before = pid_of(pair, "beta")
    assert http.post("/models/unload", json={"model": "beta"}).json() == {
        "success": True,
        "model": "beta",
        "state": "unloaded",
    }
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    assert states(pair)["beta"] == "unloaded" and pid_of(pair, "beta") is None
    assert [model["name"] for model in http.get("/api/ps").json()["models"]] == ["alpha:latest"]
    (_, listed) = http.get("/api/v1/models").json()["models"]
    assert listed["key"] == "beta" and listed["loaded_instances"] == [] and listed["size_bytes"] > 0
    assert http.post("/v1/models/load", json={"model": "beta"}).json()["state"] == "loaded"
    assert pid_of(pair, "beta") not in (None, before)
    assert http.post("/models/load", json={"model": "gamma"}).status_code == 404
    assert http.post("/models/unload", json={"model": "gamma"}).json()["error"]["code"] == "model_not_found"


def test_ollamas_clients_load_and_unload(http, pair, states):
    for body, state, reason in (({"keep_alive": 0}, "unloaded", "unload"), ({}, "loaded", "load")):
        answer = http.post("/api/generate", json={"model": "beta", **body}).json()
        assert answer["done_reason"] == reason and states(pair)["beta"] == state


def test_unloading_waits_for_the_requests(http, pair, endless):
    with http.stream(
        "POST", "/v1/completions", json={"model": "beta", "prompt": "a", **endless, "max_tokens": 300, "stream": True}
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        unloading = threading.Thread(
            target=httpx.post,
            args=(f"{pair.url}/models/unload",),
            kwargs={"json": {"model": "beta"}, "timeout": 120},
        )
        unloading.start()
        rest = list(lines)
    unloading.join()
    assert rest[-2] == "data: [DONE]" or "data: [DONE]" in rest
    assert pair.service.models[1].state == "unloaded"


def test_a_crash_in_a_stream_is_an_event_and_touches_no_other_model(http, pair, endless, until):
    chat(pair, "alpha")
    chat(pair, "beta")
    crashes = pair.service.models[1].model.crashes
    others = []
    steady = threading.Thread(target=lambda: others.append(chat(pair, "alpha", **endless | {"max_tokens": 400})))
    steady.start()
    body = {"model": "beta", "messages": SUM, "stream": True, **endless}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        kill(pair, "beta")
        *_, last = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert last["error"]["code"] == "model_unavailable" and "signal 9" in last["error"]["message"]
    steady.join()
    assert others[0].status_code == 200 and others[0].json()["usage"]["completion_tokens"] == 400
    assert chat(pair, "beta").json()["choices"][0]["message"]["content"] == ANSWER
    assert pair.service.models[1].model.crashes == crashes + 1
    assert f'mlx_gptoss_model_crashes_total{{model="beta"}} {crashes + 1}.0' in http.get("/metrics").text


def test_a_crash_without_a_stream_is_a_503(pair, endless, until):
    answers = []
    model = pair.service.models[1].model
    waiting = threading.Thread(target=lambda: answers.append(chat(pair, "beta", **endless)))
    waiting.start()
    until(lambda: pair.service.open_queues)
    kill(pair, "beta")
    waiting.join()
    assert answers[0].status_code == 503 and answers[0].headers["Retry-After"]
    assert answers[0].json()["error"]["code"] == "model_unavailable"
    until(lambda: model.in_use == 0)
    assert chat(pair, "beta").status_code == 200


def test_requests_that_find_a_dead_process_wait_for_a_new_one(pair):
    for _ in range(3):
        chat(pair, "beta")
        kill(pair, "beta")
        assert chat(pair, "beta").status_code == 200


def test_errors_of_requests_pass_the_process(pair, http, endless):
    long = http.post(
        "/v1/chat/completions", json={"model": "beta", "messages": [{"role": "user", "content": "a " * 9000}]}
    )
    assert long.status_code == 400 and long.json()["error"]["code"] == "context_length_exceeded"
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}
    answer = chat(pair, "beta", response_format=schema)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "response_format"
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(chat(pair, "beta", **endless | {"max_tokens": 200})))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = {answer.status_code for answer in answers}
    assert codes == {200, 503} and all(a.headers["Retry-After"] for a in answers if a.status_code == 503)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_model(pair, endless, until, stream):
    model = pair.service.models[1].model
    chat(pair, "beta")
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream(
            "POST",
            f"{pair.url}/v1/chat/completions",
            json={"model": "beta", "messages": SUM, "stream": stream, **endless},
            timeout=httpx.Timeout(0.5, connect=60),
        ) as answer,
    ):
        if stream:
            next(answer.iter_lines())
        raise httpx.ReadTimeout("enough")
    until(lambda: model.in_use == 0 and not pair.service.open_queues)
    assert chat(pair, "beta").status_code == 200  # both slots are free again, or it would have to wait for 4,000 tokens
    assert not model.process._replies and not model.process._starting


def test_a_model_that_cannot_be_loaded_is_named_and_tried_again(two_models, tmp_path, states):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in two_models["beta"].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    with serving_models({"alpha": two_models["alpha"], "broken": broken}, max_context=1024) as server:
        (weights,) = broken.glob("*.safetensors")
        content = weights.read_bytes()
        weights.unlink()
        for _ in range(2):
            answer = chat(server, "broken")
            assert answer.status_code == 503 and "could not be loaded" in answer.json()["error"]["message"]
        assert states(server)["broken"] == "failed" and chat(server, "alpha").status_code == 200
        weights.write_bytes(content)
        server.service.pool._failed_at.clear()
        server.service.models[1].model.state = "unloaded"
        assert chat(server, "broken").json()["model"] == "broken"


def test_a_strict_server_refuses_unknown_names(two_models):
    with serving_models(two_models, strict_model=True, max_context=1024) as server:
        answer = chat(server, "gpt-4o")
        assert answer.status_code == 404 and "'alpha', 'beta'" in answer.json()["error"]["message"]
        assert chat(server, "beta").status_code == 200


def test_idle_models_are_unloaded(two_models, states, until):
    with serving_models({"alpha": two_models["alpha"]}, idle_unload=1.0, max_context=1024) as server:
        assert chat(server, "alpha").status_code == 200
        (running,) = httpx.get(f"{server.url}/api/ps").json()["models"] or [None]
        assert running is None or not running["expires_at"].startswith("2262")
        until(lambda: states(server)["alpha"] == "unloaded")
        assert httpx.get(f"{server.url}/api/ps").json() == {"models": []}
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert chat(server, "alpha").status_code == 200
        assert server.service.models[0].model.loads >= 2


def test_one_model_in_the_servers_process_stays_loaded(serve, model):
    with serve(model) as server:
        answer = httpx.post(f"{server.url}/models/unload", json={"model": "nano"})
        assert answer.status_code == 400 and "--idle-unload" in answer.json()["error"]["message"]
        assert httpx.post(f"{server.url}/models/load", json={"model": "nano"}).json()["state"] == "loaded"
