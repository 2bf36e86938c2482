"""Ollama's API through Ollama's own client and raw HTTP; LM Studio's lists of models, llama.cpp's small endpoints."""

from __future__ import annotations

import json
import re
import socket
import time

import httpx
import pytest

import mlx_gptoss

ollama = pytest.importorskip("ollama", reason="Ollama's API is tested through Ollama's own client")

MODEL = "gpt-oss:20b"
SUM = [{"role": "user", "content": "What is 12 + 30?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Oslo?"}]
RESULT = '{"temperature": 4, "condition": "rainy"}'
ANSWER = "It is 4 degrees and rainy in Oslo."
DURATIONS = {"total_duration", "prompt_eval_duration", "eval_duration"}


@pytest.fixture(scope="module")
def client(server):
    return ollama.Client(host=server.url)


def lines(answer):
    return [json.loads(line) for line in answer.text.splitlines()]


def chat(http, **fields):
    return http.post("/api/chat", json={"model": MODEL, "messages": SUM, **fields})


# What clients ask first


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
            with pytest.raises(ollama.ResponseError, match="is not loaded: use 'mlx-gptoss-nano'") as refused:
                call(MODEL)
            assert refused.value.status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("POST", "/api/embed", "embeddings"),
        ("POST", "/api/embeddings", "embeddings"),
        ("DELETE", "/api/delete", "mlx-gptoss serve --model"),
        ("POST", "/api/create", "one model"),
        ("POST", "/api/copy", "one model"),
        ("POST", "/api/push", "one model"),
        ("POST", "/api/blobs/sha256:0", "one model"),
    ],
)
def test_what_is_not_served_says_why(http, method, path, words):
    answer = http.request(method, path, json={"model": MODEL, "input": "x"})
    assert answer.status_code == 400 and words in answer.json()["error"]


# Chat


def test_answer(client):
    reply = client.chat(MODEL, SUM)
    assert (reply.message.role, reply.message.content) == ("assistant", "12 + 30 = 42")
    assert "The sum is 42" in reply.message.thinking and reply.message.tool_calls is None
    assert (reply.model, reply.done, reply.done_reason) == ("mlx-gptoss-nano", True, "stop")
    assert reply.prompt_eval_count > 20 and reply.eval_count > 20 and reply.load_duration == 0
    assert reply.total_duration > reply.eval_duration > 0 and reply.prompt_eval_duration >= 0


def test_stream_is_the_default_and_adds_up_to_the_full_answer(http):
    full = chat(http, stream=False)
    assert full.headers["content-type"] == "application/json"
    answer = chat(http)
    assert answer.headers["content-type"] == "application/x-ndjson"
    chunks = lines(answer)
    assert len(chunks) > 10 and [chunk["done"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    message = {
        "role": "assistant",
        "content": "".join(chunk["message"]["content"] for chunk in chunks),
        "thinking": "".join(chunk["message"].get("thinking", "") for chunk in chunks),
    }
    assert message == full.json()["message"]
    kept = full.json().keys() - {"created_at", "message", *DURATIONS}
    assert {name: chunks[-1][name] for name in kept} == {name: full.json()[name] for name in kept}
    assert chunks[-1].keys() == full.json().keys()


def test_times_are_in_rfc_3339_with_nanoseconds(http):
    times = [line["created_at"] for line in lines(chat(http))]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", time) for time in times)
    assert times == sorted(times)


@pytest.mark.parametrize("stream", [False, True])
def test_tool_call_and_its_result(client, weather_tool, stream):
    reply = client.chat(MODEL, WEATHER, tools=[weather_tool], stream=stream)
    chunks = list(reply) if stream else [reply]
    calling = [chunk.message for chunk in chunks if chunk.message.tool_calls]
    (call,) = calling[0].tool_calls
    assert len(calling) == 1 and chunks[-1].done_reason == "stop"
    assert (call.function.name, call.function.arguments) == ("get_weather", {"location": "Oslo"})
    thinking = "".join(chunk.message.thinking or "" for chunk in chunks)
    called = ollama.Message(role="assistant", thinking=thinking, tool_calls=[call])
    for named in ({"tool_name": "get_weather"}, {}):  # Home Assistant and LangChain do not say which call they answer
        result = {"role": "tool", "content": RESULT, **named}
        answer = client.chat(MODEL, [*WEATHER, called, result], tools=[weather_tool])
        assert answer.message.content == ANSWER


def test_a_call_has_an_id_and_its_arguments_are_an_object(http, weather_tool):
    message = chat(http, messages=WEATHER, tools=[weather_tool], stream=False).json()["message"]
    (call,) = message["tool_calls"]
    assert call["id"].startswith("call_") and call["function"]["index"] == 0
    assert call["function"]["arguments"] == {"location": "Oslo"} and message["content"] == ""
    result = {"role": "tool", "content": RESULT, "tool_call_id": call["id"]}
    answer = chat(http, messages=[*WEATHER, message, result], tools=[weather_tool], stream=False)
    assert answer.json()["message"]["content"] == ANSWER


def test_a_python_function_as_a_tool(client):
    def get_weather(location: str) -> str:
        """Get the current weather.

        Args:
            location: City name
        """
        return location

    (call,) = client.chat(MODEL, WEATHER, tools=[get_weather]).message.tool_calls
    assert get_weather(**call.function.arguments) == "Oslo"


def test_think(client):
    shown = {think: client.chat(MODEL, SUM, think=think) for think in (None, True, "low", "medium", "high", False)}
    counts = {think: reply.eval_count for think, reply in shown.items()}
    assert counts[None] == counts[True] == counts["medium"]
    assert counts["low"] == counts[False] < counts["medium"] < counts["high"]
    assert shown[False].message.thinking is None and shown[False].message.content == "12 + 30 = 42"
    assert all(reply.message.thinking for think, reply in shown.items() if think is not False)
    assert not any(chunk.message.thinking for chunk in client.chat(MODEL, SUM, think=False, stream=True))


def test_an_unknown_level_of_thinking(http):
    answer = chat(http, think="hardest")
    assert answer.status_code == 400 and "use one of low, medium, high" in answer.json()["error"]


def test_format_is_enforced(client):
    city = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Paris"]}}, "required": ["city"]}
    reply = client.chat(MODEL, SUM, format=city, think="low", options={"temperature": 1, "seed": 3})
    assert json.loads(reply.message.content)["city"] in ("Oslo", "Paris") and reply.message.thinking
    reply = client.generate(MODEL, "What is 12 + 30?", format=city, think=False)
    assert json.loads(reply.response)["city"] in ("Oslo", "Paris")
    assert client.chat(MODEL, SUM, format="json", options={"num_predict": 70}).message.content.startswith("{")
    assert client.chat(MODEL, SUM, format="").message.content == "12 + 30 = 42"


def test_options(client, http):
    long = {"options": {"num_predict": 5}}
    reply = client.chat(MODEL, SUM, **long)
    assert (reply.eval_count, reply.done_reason) == (5, "length")
    assert client.generate(MODEL, "Hi", **long).done_reason == "length"
    for unlimited in (-1, -2, 0):
        assert client.chat(MODEL, SUM, options={"num_predict": unlimited}).done_reason == "stop"
    assert client.chat(MODEL, SUM, options={"stop": ["="]}).message.content == "12 + 30 "
    warm = {"temperature": 2, "seed": 1, "num_predict": 20}
    assert client.chat(MODEL, SUM, options=warm).message == client.chat(MODEL, SUM, options=warm).message
    floats = {"top_k": 40.0, "seed": 7.0, "num_predict": 5.0, "repeat_penalty": 1.1, "min_p": 0.05, "top_p": 0}
    assert chat(http, options=floats).status_code == 200
    assert chat(http, options={"top_k": 1.5}).json()["error"].startswith("options.top_k")


def test_what_has_no_effect_is_named(http):
    answer = chat(http, options={"num_ctx": 8192, "mirostat": 0}, keep_alive="5m", shift=True, mood="happy")
    assert answer.status_code == 200
    names = ["keep_alive", "mood", "options.mirostat", "options.num_ctx", "shift"]
    assert answer.headers["X-Ignored-Fields"].split(", ") == names
    assert "X-Ignored-Fields" not in chat(http, think="low", options={"seed": 1}).headers


def test_logprobs(http):
    full = chat(http, logprobs=True, top_logprobs=3, stream=False).json()
    streamed = [
        entry for line in lines(chat(http, logprobs=True, top_logprobs=3)) for entry in line.get("logprobs", ())
    ]
    assert streamed == full["logprobs"]
    assert b"".join(bytes(entry["bytes"]) for entry in streamed) == b"12 + 30 = 42"
    assert all(len(entry["top_logprobs"]) == 3 and entry["logprob"] <= 0 for entry in streamed)
    assert "logprobs" not in chat(http, stream=False).json()


@pytest.mark.parametrize(
    ("keep_alive", "reason"),
    [
        (None, "load"),
        (-1.0, "load"),
        ("5m", "load"),
        (0, "unload"),
        (0.0, "unload"),
        ("0", "unload"),
        ("0m0s", "unload"),
    ],
)
def test_a_request_with_nothing_to_generate_loads_or_unloads(client, http, keep_alive, reason):
    for reply in (client.chat(MODEL, [], keep_alive=keep_alive), client.generate(MODEL, "", keep_alive=keep_alive)):
        assert (reply.done, reply.done_reason) == (True, reason)
    assert client.chat(MODEL, keep_alive=keep_alive).message.content == ""


def test_a_system_message_and_empty_extras(client, http):
    messages = [{"role": "SYSTEM", "content": "You are a helpful assistant.", "images": []}, *SUM]
    reply = chat(http, messages=messages, tools=[], options={}, stream=False, format=None)
    assert reply.json()["message"]["content"] == "12 + 30 = 42"


def test_the_prompt_is_that_of_chat_completions(http, weather_tool):
    called = {"name": "get_weather", "arguments": {"location": "Oslo"}}
    history = [
        {"role": "system", "content": "Be brief."},
        *WEATHER,
        {"role": "assistant", "thinking": "I look.", "tool_calls": [{"function": called}]},
        {"role": "tool", "content": RESULT, "tool_name": "get_weather"},
    ]
    own = chat(http, messages=history, tools=[weather_tool], stream=False).json()
    other = http.post("/v1/chat/completions", json={"messages": history, "tools": [weather_tool]}).json()
    assert own["prompt_eval_count"] == other["usage"]["prompt_tokens"]
    assert own["message"]["content"] == other["choices"][0]["message"]["content"] == ANSWER


# Generate


def test_generate_streamed_or_not(client):
    reply = client.generate(MODEL, "What is 12 + 30?")
    assert (reply.response, reply.done_reason) == ("12 + 30 = 42", "stop") and "The sum is 42" in reply.thinking
    chunks = list(client.generate(MODEL, "What is 12 + 30?", stream=True))
    assert "".join(chunk.response for chunk in chunks) == reply.response
    assert "".join(chunk.thinking or "" for chunk in chunks) == reply.thinking
    assert chunks[-1].eval_count == reply.eval_count and chunks[-1].done
    assert client.generate(MODEL, "What is 12 + 30?", think=False).thinking is None


def test_generate_with_instructions_equals_chat(client):
    asked = [{"role": "system", "content": "Be brief."}, *SUM]
    reply = client.generate(MODEL, "What is 12 + 30?", system="Be brief.")
    assert reply.prompt_eval_count == client.chat(MODEL, asked).prompt_eval_count


def test_raw_continues_the_text(client, model):
    prompt = "<|start|>user<|message|>What is 12 + 30?<|end|><|start|>assistant<|channel|>final<|message|>"
    ids = model.tokenizer.encode_with_specials(prompt)
    expected = model.complete(ids, max_tokens=20)
    reply = client.generate(MODEL, prompt, raw=True, options={"num_predict": 20})
    assert (reply.response, reply.prompt_eval_count) == (expected.text, len(ids))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"images": ["aGk="]}, "images cannot be read"),
        ({"raw": True, "system": "x"}, "system has no place"),
        ({"raw": True, "format": "json"}, "format"),
        ({"format": "xml"}, 'use "json" or a JSON schema'),
    ],
)
def test_generate_refuses(http, fields, words):
    answer = http.post("/api/generate", json={"model": MODEL, "prompt": "Hi", **fields})
    assert answer.status_code == 400 and words in answer.json()["error"]


# Errors


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("null", "JSON object"),
        ("", "body is empty"),
        ("{", "not JSON"),
        ("[" * 100_000, "parsing the body"),
        ('{"messages": {}}', "messages"),
        ('{"messages": [1]}', "messages[0] must be a dict"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "messages[0] has the role"),
        ('{"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}', "messages[0].images cannot be read"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "messages[0] needs"),
        ('{"messages": [{"role": "assistant", "tool_calls": [1]}]}', "tool_calls[0]"),
        ('{"messages": [{"role": "user", "content": "x"}], "options": {"temperature": "hot"}}', "options.temperature"),
        ('{"messages": [{"role": "user", "content": "x"}], "options": {"temperature": 1e999}}', "options.temperature"),
        ('{"messages": [{"role": "user", "content": "x"}], "options": []}', "options"),
        ('{"messages": [{"role": "user", "content": "x"}], "format": "xml"}', "format is 'xml'"),
        ('{"messages": [{"role": "user", "content": "x"}], "format": {"type": "robot"}}', "robot"),
        ('{"messages": [{"role": "user", "content": "x"}], "stream": "no"}', "stream"),
        ('{"messages": [{"role": "user", "content": "x"}], "top_logprobs": 21}', "top_logprobs"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "browser"}]}', "tools has only browser"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": [{"function": {}}]}', "tools[0].function.name"),
    ],
)
def test_malformed_requests(http, body, words):
    answer = http.post("/api/chat", content=body)
    assert answer.status_code == 400 and words in answer.json()["error"]
    assert answer.json().keys() == {"error"}


@pytest.mark.parametrize("field", ["format", "tools"])
def test_schemas_over_the_limits(http, field):
    schema = {"type": "object"}
    for _ in range(100):
        schema = {"type": "object", "properties": {"a": schema}}
    value = schema if field == "format" else [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    answer = chat(http, **{field: value})
    assert answer.status_code == 400 and "levels deep" in answer.json()["error"]


def test_a_prompt_that_is_too_long(client):
    with pytest.raises(ollama.ResponseError, match="context holds") as refused:
        client.chat(MODEL, [{"role": "user", "content": "12 " * 4096}])
    assert refused.value.status_code == 400


def test_truncate_drops_the_oldest_turns(http):
    old = [{"role": "user", "content": "12 " * 4096}, {"role": "assistant", "content": "So?"}]
    cut = chat(http, messages=[*old, *SUM], truncate=True, stream=False).json()
    short = chat(http, stream=False).json()
    assert (cut["message"], cut["prompt_eval_count"]) == (short["message"], short["prompt_eval_count"])


def test_errors_of_the_guard_and_of_routing_have_the_same_form(http, serve, model):
    assert http.get("/api/nothing").json() == {"error": "GET /api/nothing: Not Found"}
    assert http.get("/api/chat").status_code == 405 and http.get("/api/chat").json().keys() == {"error"}
    foreign = http.get("/api/tags", headers={"Origin": "https://foe.example"})
    assert foreign.status_code == 403 and "origin" in foreign.json()["error"]
    with serve(model, api_key="sesame", max_body_bytes=1000) as server:
        assert "API key" in httpx.get(f"{server.url}/api/tags").json()["error"]
        keyed = ollama.Client(host=server.url, headers={"Authorization": "Bearer sesame"})
        assert keyed.list().models
        with pytest.raises(ollama.ResponseError, match="larger than 1000 bytes") as refused:
            keyed.generate(MODEL, "x" * 1001)
        assert refused.value.status_code == 413
        server.service.gate.draining = True
        with pytest.raises(ollama.ResponseError, match="shutting down"):
            keyed.chat(MODEL, SUM)


def test_an_error_in_the_middle_of_a_stream_is_its_last_line(serve):
    """The model's memory is freed while it generates."""
    with mlx_gptoss.load(max_context=4096) as model, serve(model) as server, httpx.Client(timeout=60) as http:
        body = {"prompt": "abc", "raw": True, "options": {"temperature": 2, "seed": 1, "stop": ["never said"]}}
        with http.stream("POST", f"{server.url}/api/generate", json=body) as answer:
            arriving = answer.iter_lines()
            first = json.loads(next(arriving))
            model.close()
            last = [json.loads(line) for line in arriving][-1]
    assert first["done"] is False and last.keys() == {"error"}


def test_arguments_that_are_no_object_are_an_error(http, weather_tool, monkeypatch):
    from mlx_gptoss.chat.reply import ToolCall
    from mlx_gptoss.errors import GptOssError
    from mlx_gptoss.server.ollama.reply import Reply

    reply = Reply(None, None, lambda piece: {})
    for arguments in ("[1]", "{", '{"a": NaN}', '{"a": 1e999}', "[" * 100_000):
        with pytest.raises(GptOssError, match="arguments that are not a JSON object"):
            reply._call(ToolCall("call_1", "f", arguments))
    assert reply._call(ToolCall("call_1", "f", '{"a": 1.5}'))["function"]["arguments"] == {"a": 1.5}


# Life of a request


@pytest.fixture(scope="module")
def endless(model):
    """Options of a reply that runs until it is stopped: all special tokens, which could end it, are forbidden."""
    return {"num_predict": 4000, "logit_bias": {str(id): -100 for id in model.tokenizer.specials.values()}}


@pytest.mark.parametrize(("stream", "received"), [(True, 2000), (True, 0), (False, 0)])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_disconnect_frees_the_slot(server, idle, endless, path, stream, received):
    body = json.dumps({"messages": SUM, "prompt": "12", "stream": stream, "options": endless}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head + body)
        got = 0
        while got < received:
            got += len(connection.recv(65536))
        deadline = time.monotonic() + 60
        while not server.service.open_queues and time.monotonic() < deadline:
            time.sleep(0.002)
        assert server.service.open_queues
    assert idle(server)


def test_metrics_count_tokens(http):
    def generated():
        (line,) = re.findall(r"^mlx_gptoss_completion_tokens_total (\S+)", http.get("/metrics").text, re.M)
        return float(line)

    before = generated()
    count = chat(http, stream=False).json()["eval_count"]
    assert generated() == before + count
    assert 'mlx_gptoss_requests_total{path="/api/chat",status="200"}' in http.get("/metrics").text


# LM Studio


def test_lm_studio_lists_the_model(http):
    (listed,) = http.get("/api/v0/models").json()["data"]
    assert listed == http.get("/api/v0/models/mlx-gptoss-nano").json() == http.get("/api/v0/models/gpt-4o").json()
    assert (listed["id"], listed["state"], listed["arch"]) == ("mlx-gptoss-nano", "loaded", "gpt-oss")
    assert listed["loaded_context_length"] == 4096 <= listed["max_context_length"]
    assert listed["type"] == "llm" and listed["capabilities"] == ["tool_use"] and listed["quantization"] == "MXFP4"
    (newer,) = http.get("/api/v1/models").json()["models"]
    assert newer["key"] == "mlx-gptoss-nano" and newer["loaded_instances"][0]["config"] == {"context_length": 4096}
    assert newer["capabilities"] == {"vision": False, "trained_for_tool_use": True} and newer["format"] == "mlx"


def test_lm_studio_has_openais_endpoints_and_errors(http):
    reply = http.post("/api/v0/chat/completions", json={"messages": SUM, "max_tokens": -1})
    assert reply.json()["choices"][0]["message"]["content"] == "12 + 30 = 42"
    assert http.post("/api/v0/completions", json={"prompt": "12 + 30 = "}).json()["object"] == "text_completion"
    for path in ("/api/v0/nothing", "/api/v1/nothing"):
        assert http.get(path).status_code == 404 and http.get(path).json()["error"]["message"]
    assert http.post("/api/v0/chat/completions", json={"messages": []}).json()["error"]["param"] == "messages"


# llama.cpp


def test_llama_cpp_props_and_slots(http):
    props = http.get("/props").json()
    assert props["total_slots"] == 4 and props["default_generation_settings"]["n_ctx"] == 4096
    slots = http.get("/slots").json()
    assert [slot["id"] for slot in slots] == [0, 1, 2, 3] and not any(slot["is_processing"] for slot in slots)


def test_llama_cpp_tokenize_and_back(http, model):
    text = "Hello <|start|> á"
    ids = http.post("/tokenize", json={"content": text}).json()["tokens"]
    assert ids == model.tokenizer.encode_with_specials(text)
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"content": text}
    plain = http.post("/tokenize", json={"content": text, "parse_special": False, "add_special": True})
    assert plain.json()["tokens"] == model.tokenizer.encode(text) and "add_special" in plain.headers["X-Ignored-Fields"]
    pieces = http.post("/tokenize", json={"content": text, "with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    assert (
        b"".join(p.encode() if isinstance(p := piece["piece"], str) else bytes(p) for piece in pieces).decode() == text
    )
    for tokens in ([-1], [10**9], ["a"]):
        assert http.post("/detokenize", json={"tokens": tokens}).json()["error"]["param"].startswith("tokens")


def test_llama_cpp_apply_template_shows_the_prompt_of_a_chat(http, weather_tool):
    fields = {"messages": WEATHER, "tools": [weather_tool], "reasoning_effort": "high"}
    prompt = http.post("/apply-template", json=fields).json()["prompt"]
    assert "Reasoning: high" in prompt and "type get_weather" in prompt and prompt.endswith("<|start|>assistant")
    usage = http.post("/v1/chat/completions", json={**fields, "max_tokens": 1}).json()["usage"]
    assert len(http.post("/tokenize", json={"content": prompt}).json()["tokens"]) == usage["prompt_tokens"]
    assert http.post("/apply-template", json={"messages": []}).json()["error"]["param"] == "messages"
