"""LoRA adapters in every dialect: a request chooses one by its model, NAME or MODEL:NAME, and the answer is what the
adapter says in Python. Listed, described, and refused where there is none of that name."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from nano_adapter import QUESTION, write_nano_adapter
from serving import serving

import mlx_gptoss

NANO = "mlx-gptoss-nano"
MESSAGES = [{"role": "user", "content": QUESTION}]
TOKENS = 60
NAMES = {NANO: None, "loud": "loud", f"{NANO}:loud": "loud", "wild:latest": "wild"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The bundled model with two adapters, which answer differently, each with its own reasoning and text."""
    folder = tmp_path_factory.mktemp("adapters")
    adapters = {name: write_nano_adapter(folder / name, seed, 0.08) for name, seed in (("loud", 1), ("wild", 3))}
    with mlx_gptoss.load(slots=4, max_context=2048, adapters=adapters) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as running:
        yield running


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def said(model):
    """Reasoning and text of each adapter, in Python."""
    replies = {
        name: model.generate(QUESTION, temperature=0, max_tokens=TOKENS, adapter=name)
        for name in (None, *model.adapters)
    }
    found = {name: (reply.reasoning, reply.text) for name, reply in replies.items()}
    assert len({text for _, text in found.values()}) == 3 and all(text for _, text in found.values())
    return found


@pytest.fixture(scope="module")
def continued(model):
    """How each adapter continues the question as a raw text, in Python."""
    ids = model.tokenizer.encode(QUESTION)
    options = {"temperature": 0, "max_tokens": 12}
    found = {name: model.complete(ids, adapter=name, **options).text for name in (None, *model.adapters)}
    assert len(set(found.values())) == 3
    return found


def lines(http, path, body) -> list[dict[str, Any]]:
    """The objects of a streamed answer: events' data, or lines."""
    with http.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200, answer.read()
        found = [line.removeprefix("data: ") for line in answer.iter_lines()]
    return [json.loads(line) for line in found if line.startswith("{")]


def post(http, path, body) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat_completions(http, name, stream):
    body = {"model": name, "messages": MESSAGES, "temperature": 0, "max_tokens": TOKENS, "stream": stream}
    if stream:
        chunks = lines(http, "/v1/chat/completions", body)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    else:
        chunks = [post(http, "/v1/chat/completions", body)]
        deltas = [chunks[0]["choices"][0]["message"]]
    joined = ("".join(delta.get(part) or "" for delta in deltas) for part in ("reasoning", "content"))
    return tuple(joined), {chunk["model"] for chunk in chunks}


def responses(http, name, stream):
    body = {
        "model": name, "input": QUESTION, "temperature": 0, "max_output_tokens": TOKENS, "stream": stream,
        "reasoning": {"summary": "auto"},
    }  # fmt: skip
    events = lines(http, "/v1/responses", body) if stream else []
    response = events[-1]["response"] if stream else post(http, "/v1/responses", body)
    parts = {"reasoning": "", "message": ""}
    for item in response["output"]:
        parts[item["type"]] += "".join(part["text"] for part in item["content"] or item["summary"])
    if stream:
        deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
        assert "".join(deltas) == parts["message"]
    return (parts["reasoning"], parts["message"]), {response["model"]}


def anthropic(http, name, stream):
    body = {
        "model": name, "messages": MESSAGES, "temperature": 0, "max_tokens": TOKENS, "stream": stream,
        "thinking": {"type": "adaptive"},
    }  # fmt: skip
    if not stream:
        message = post(http, "/v1/messages", body)
        parts = {block["type"]: block.get("thinking", block.get("text")) for block in message["content"]}
        return (parts.get("thinking", ""), parts.get("text", "")), {message["model"]}
    events = lines(http, "/v1/messages", body)
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    joined = ("".join(delta.get(part, "") for delta in deltas) for part in ("thinking", "text"))
    return tuple(joined), {event["message"]["model"] for event in events if event["type"] == "message_start"}


def ollama_chat(http, name, stream):
    options = {"temperature": 0, "num_predict": TOKENS}
    body = {"model": name, "messages": MESSAGES, "options": options, "stream": stream}
    found = lines(http, "/api/chat", body) if stream else [post(http, "/api/chat", body)]
    joined = ("".join(each["message"].get(part, "") for each in found) for part in ("thinking", "content"))
    return tuple(joined), {each["model"] for each in found}


def ollama_generate(http, name, stream):
    options = {"temperature": 0, "num_predict": TOKENS}
    body = {"model": name, "prompt": QUESTION, "options": options, "stream": stream}
    found = lines(http, "/api/generate", body) if stream else [post(http, "/api/generate", body)]
    joined = ("".join(each.get(part, "") for each in found) for part in ("thinking", "response"))
    return tuple(joined), {each["model"] for each in found}


DIALECTS = [chat_completions, responses, anthropic, ollama_chat, ollama_generate]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("ask", DIALECTS, ids=lambda ask: ask.__name__)
def test_the_answer_is_the_adapter_s(http, said, ask, stream):
    for name, adapter in NAMES.items():
        found, models = ask(http, name, stream)
        assert found == said[adapter], name
        assert models == {adapter or NANO} or models == {name}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_raw_continuations_are_the_adapter_s(http, continued, stream):
    for name, adapter in NAMES.items():
        body = {"model": name, "prompt": QUESTION, "stream": stream}
        raw = body | {"raw": True, "options": {"temperature": 0, "num_predict": 12}}
        found = lines(http, "/api/generate", raw) if stream else [post(http, "/api/generate", raw)]
        assert "".join(each["response"] for each in found) == continued[adapter], name
        body |= {"temperature": 0, "max_tokens": 12}
        found = lines(http, "/v1/completions", body) if stream else [post(http, "/v1/completions", body)]
        assert "".join(each["choices"][0]["text"] for each in found) == continued[adapter], name


def test_a_stored_response_goes_on_with_the_adapter_of_each_request(http, model):
    body = {"model": "loud", "input": QUESTION, "temperature": 0, "max_output_tokens": TOKENS}
    first = post(http, "/v1/responses", body)
    follow = {"previous_response_id": first["id"], "input": "Why?", "temperature": 0, "max_output_tokens": 12}
    found = {name: post(http, "/v1/responses", follow | {"model": name}) for name in (NANO, "loud")}
    assert [each["model"] for each in found.values()] == [NANO, "loud"]
    text = {name: "".join(json.dumps(item.get("content")) for item in each["output"]) for name, each in found.items()}
    assert text[NANO] != text["loud"]


def test_prompts_of_adapters_share_no_cache(http):
    """Usage tells what came from the cache: nothing of another adapter's."""
    messages = [{"role": "user", "content": "Add 12 and 30. " * 60}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 2}

    def cached(name):
        usage = post(http, "/v1/chat/completions", body | {"model": name})["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert [cached(name) for name in (NANO, "loud", "wild")] == [0, 0, 0]
    assert all(cached(name) >= 256 for name in ("nano:wild", "loud", NANO))


def test_lists_and_descriptions(http, model):
    listed = http.get("/v1/models").json()["data"]
    assert [(each["id"], each.get("parent")) for each in listed] == [(NANO, None), ("loud", NANO), ("wild", NANO)]
    assert http.get("/v1/models/loud").json()["id"] == "loud"
    assert http.get(f"/v1/models/{NANO}:wild").json()["id"] == "wild"
    tags, running = (http.get(f"/api/{path}").json()["models"] for path in ("tags", "ps"))
    names = [f"{NANO}:latest", "loud:latest", "wild:latest"]
    assert [each["name"] for each in tags] == [each["name"] for each in running] == names
    assert [each["details"]["parent_model"] for each in tags] == ["", f"{NANO}:latest", f"{NANO}:latest"]
    assert len({each["digest"] for each in tags}) == 3
    assert {each["size_vram"] for each in running} == {model.plan.needed_bytes}
    for name in ("loud", "loud:latest", f"{NANO}:loud"):
        shown = post(http, "/api/show", {"model": name})
        assert shown["details"]["parent_model"] == f"{NANO}:latest"
        assert shown["model_info"]["general.basename"] == name
    assert [each["id"] for each in http.get("/api/v0/models").json()["data"]] == [NANO, "loud", "wild"]


def test_the_name_in_ollamas_library_is_the_model_without_an_adapter(http, model, monkeypatch):
    sizes = {"num_hidden_layers": 24, "num_local_experts": 32, "layer_types": ()}
    monkeypatch.setattr(model, "config", type(model.config)(**{**vars(model.config), **sizes}))
    names = [each["name"] for each in http.get("/api/tags").json()["models"]]
    assert names == [f"{NANO}:latest", "gpt-oss:20b", "loud:latest", "wild:latest"]


MESSAGE = "nano has no adapter 'nobody': use 'loud', 'wild'"
BODIES = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "a"},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 1},
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": "a"},
    "/api/show": {},
}


def check_refused(answer, path, message):
    assert answer.status_code == 404
    error = answer.json()["error"]
    if path.startswith("/api"):
        assert error == message
    elif path == "/v1/messages":
        assert (answer.json()["type"], error) == ("error", {"type": "not_found_error", "message": message})
    else:
        assert (error["message"], error["code"], error["param"]) == (message, "model_not_found", "model")


@pytest.mark.parametrize("path", BODIES)
def test_an_unknown_adapter_is_the_dialect_s_error(http, path):
    for stream in (False, True):
        body = {"model": "nano:nobody", **BODIES[path]} | ({} if path == "/api/show" else {"stream": stream})
        check_refused(http.post(path, json=body), path, MESSAGE)
    assert http.get("/v1/models/nano:nobody").status_code == 404
    body = BODIES[path] | {"model": "gpt-4o:nobody"}  # no model of this server: any other name means the first one
    assert http.post(path, json=body | ({} if path == "/api/show" else {"stream": False})).status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_a_strict_server_refuses_an_unknown_name(server, http, monkeypatch, path):
    monkeypatch.setattr(server.service, "strict_model", True)
    known = f"the model 'nobody' is not here: use '{NANO}', 'loud', 'wild'"
    check_refused(http.post(path, json=BODIES[path] | {"model": "nobody"}), path, known)
    check_refused(http.post(path, json=BODIES[path] | {"model": "nano:nobody"}), path, MESSAGE)
    fields = {} if path == "/api/show" else {"stream": False}
    assert http.post(path, json=BODIES[path] | fields | {"model": f"{NANO}:loud"}).status_code == 200
