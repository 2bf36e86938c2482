"""What clients send beyond the API: accepted if it has no bearing on the reply, mapped if its meaning is clear."""

from __future__ import annotations

import logging

import pytest

PATH = "/v1/chat/completions"
SUM = [{"role": "user", "content": "What is 12 + 30?"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def ask(http, **fields):
    answer = http.post(PATH, json={"messages": SUM, "max_tokens": 1, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    return answer


def ignored(answer):
    names = answer.headers.get("x-ignored-fields")
    return set(names.split(", ")) if names else set()


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, set()),
        ({"user": "me", "metadata": {"a": 1}}, {"user", "metadata"}),
        (
            {"store": True, "service_tier": "auto", "prompt_cache_key": "k"},
            {"store", "service_tier", "prompt_cache_key"},
        ),
        ({"verbosity": "low", "safety_identifier": None}, {"verbosity"}),
        ({"cache_prompt": True, "skip_special_tokens": False}, {"cache_prompt", "skip_special_tokens"}),
        ({"stream_options": {"include_usage": True}}, {"stream_options"}),
        ({"chat_template_kwargs": {"enable_thinking": True, "date": "x"}}, {"chat_template_kwargs.date"}),
        ({"messages": [{**SUM[0], "cache_control": {"type": "ephemeral"}}]}, {"messages[].cache_control"}),
        ({"tools": [ADD, {"type": "web_search"}]}, {"tools[].web_search"}),
        ({"best_of": 1, "n": 1}, {"best_of"}),
        ({"field of\r\ntomorrow": 1}, {"field_of__tomorrow"}),
    ],
)
def test_fields_without_effect_are_named_in_a_header(http, fields, names):
    assert ignored(ask(http, **fields)) == names


def test_a_stream_names_them_too(http):
    answer = ask(http, stream=True, stream_options={"include_obfuscation": True}, nonsense={"deep": [1]})
    assert ignored(answer) == {"stream_options.include_obfuscation", "nonsense"}


def test_each_name_is_logged_once(http, caplog, monkeypatch):
    monkeypatch.setattr("mlx_gptoss.server.ignored._logged", set())  # tests with random names may have filled it
    with caplog.at_level(logging.WARNING, "mlx_gptoss.server.ignored"):
        for _ in range(2):
            ask(http, a_field_that_no_other_test_sends=1)
    assert [record.args for record in caplog.records] == [("a_field_that_no_other_test_sends",)]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": -1, "seed": -1, "top_p": 0, "max_tokens": -1, "max_completion_tokens": 2},
        {"max_tokens": 5, "max_completion_tokens": 2},
        {"seed": -7, "stop": [], "repeat_penalty": 1.1},
        {"stop": ["", "x"], "parallel_tool_calls": True},
        {"logprobs": False, "top_logprobs": 0, "modalities": ["text"]},
    ],
)
def test_values_of_other_servers(http, fields):
    answer = ask(http, **fields)
    assert not ignored(answer)
    assert answer.json()["usage"]["completion_tokens"] == fields.get("max_completion_tokens", 1)


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({}, "medium"),
        ({"reasoning_effort": "minimal"}, "low"),
        ({"reasoning_effort": "none"}, "low"),
        ({"reasoning_effort": "xhigh"}, "high"),
        ({"reasoning_effort": "MAX"}, "high"),
        ({"reasoning": {"effort": "high"}}, "high"),
        ({"reasoning": {"enabled": False}}, "low"),
        ({"think": False}, "low"),
        ({"think": "high"}, "high"),
        ({"thinking": {"type": "disabled"}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 32_000}}, "high"),
        ({"thinking": {"type": "adaptive"}}, "medium"),
        ({"chat_template_kwargs": {"reasoning_effort": "high"}}, "high"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "low"),
    ],
)
def test_every_spelling_of_the_reasoning_effort(http, model, fields, effort):
    prompts = []
    original = model.stream

    def recording(prompt, **options):
        prompts.append(options["reasoning"])
        return original(prompt, **options)

    model.stream = recording
    try:
        ask(http, **fields)
    finally:
        del model.stream
    assert prompts == [effort]


def test_a_token_id_ends_the_turn(http, model):
    (stop,) = model.tokenizer.encode("=")
    answer = ask(http, max_tokens=100, stop_token_ids=[stop], min_tokens=3)
    assert ignored(answer) == {"min_tokens"}  # the model ends its turn itself
    (choice,) = answer.json()["choices"]
    assert (choice["finish_reason"], answer.json()["usage"]["completion_tokens"] < 50) == ("stop", True)
    wrong = http.post(PATH, json={"messages": SUM, "stop_token_ids": list(range(65))})
    assert wrong.json()["error"]["param"] == "stop_token_ids"


def test_reasoning_may_be_left_out(http):
    message = ask(http, max_tokens=60, include_reasoning=False).json()["choices"][0]["message"]
    assert "reasoning" not in message and message["content"]


@pytest.mark.parametrize(
    "fields",
    [
        {
            "response_format": {
                "type": "json_object",
                "schema": {"type": "object", "properties": {"sum": {"type": "integer"}}},
            }
        },
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": {"sum": 42}}}}},
        {"guided_json": {"const": {"sum": 42}}},
        {"json_schema": {"const": {"sum": 42}}},
    ],
)
def test_schemas_in_the_forms_of_other_servers(http, fields):
    content = ask(http, max_tokens=100, **fields).json()["choices"][0]["message"]["content"]
    assert content.startswith("{")


def test_a_tool_of_any_name(http):
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "get the/weather", "arguments": '{"location": "Oslo"}'},
    }
    tool = {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]}
    asked = ask(
        http,
        messages=[
            {"role": "user", "content": "What is the weather in Oslo?"},
            {"role": "assistant", "content": None, "tool_calls": [call], "provider_specific_fields": {"x": 1}},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
            {"role": "user", "content": "And what is the weather in Rome?"},
        ],
        tools=[{"type": "function", "function": {"name": "get the/weather", "parameters": tool, "strict": True}}],
        tool_choice={"type": "function", "function": {"name": "get the/weather"}},
        max_tokens=200,
    )
    (made,) = asked.json()["choices"][0]["message"]["tool_calls"]
    assert made["function"]["name"] == "get the/weather"


def test_a_thousand_tools(http):
    tools = [{"type": "function", "function": {"name": f"f{number}"}} for number in range(1025)]
    assert http.post(PATH, json={"messages": SUM, "tools": tools}).status_code == 400
    answer = http.post(PATH, json={"messages": SUM, "tools": tools[:1024], "max_tokens": 1})
    assert answer.json()["error"]["code"] == "context_length_exceeded"  # of this small context, not of the limit


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/v1/chat/completions", "/v1/chat/completions/"])
def test_paths_of_a_wrong_base_url(http, path):
    assert http.post(path, json={"messages": SUM, "max_tokens": 1}).status_code == 200


def test_head(http):
    for path in ("/", "/health", "/v1/models", "/models"):
        answer = http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_the_key_of_anthropics_clients(serve, model):
    import httpx

    with serve(model, api_key="k") as server:
        for key, status in (("k", 200), ("K", 401)):
            assert httpx.get(f"{server.url}/v1/models", headers={"X-Api-Key": key}, timeout=60).status_code == status
