"""/v1/messages and count_tokens through Anthropic's own client, and over plain HTTP for what the client cannot send."""

from __future__ import annotations

import base64
import json
import threading

import httpx
import pytest

import mlx_gptoss
from mlx_gptoss.harmony.render import render
from mlx_gptoss.server.errors import ApiError

anthropic = pytest.importorskip("anthropic", reason="/v1/messages is tested through Anthropic's own client")

MODEL = "claude-of-any-name"
SUM = {"role": "user", "content": "What is 12 + 30?"}
WEATHER = {"role": "user", "content": "What is the weather in Oslo?"}
RESULT = '{"temperature": 4, "condition": "rainy"}'
GREEDY = {"temperature": 0}  # a field that the client no longer has
THINKING = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def weather(weather_tool):
    function = weather_tool["function"]
    return {"name": function["name"], "description": function["description"], "input_schema": function["parameters"]}


def create(client, **fields):
    return client.messages.create(**{"model": MODEL, "max_tokens": 400, "messages": [SUM], **fields})


def post(http, path="/v1/messages", **fields):
    return http.post(path, json={"messages": [SUM], "max_tokens": 1, **fields})


def refused(http, **fields):
    """The message of the 400 that the request gets."""
    answer = post(http, **fields)
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
    assert body["request_id"] == answer.headers["request-id"]
    return body["error"]["message"]


def ignored(answer):
    assert answer.status_code == 200, answer.text
    names = answer.headers.get("x-ignored-fields")
    return set(names.split(", ")) if names else set()


def kinds(message):
    return [block.type for block in message.content]


def dialogue(weather, *blocks, call="toolu_1", reply=()):
    """The fields of a request: a question, a call, and a user message with these blocks."""
    use = {"type": "tool_use", "id": call, "name": "get_weather", "input": {"location": "Oslo"}}
    answer = {"role": "assistant", "content": [*reply, use]}
    return {"messages": [WEATHER, answer, {"role": "user", "content": list(blocks)}], "tools": [weather]}


# What the model sees: the messages of the conversation that a request becomes.


@pytest.fixture
def seen(model, monkeypatch, http):
    """A function that sends a request and returns the Conversation that the model was given."""
    conversations = []
    stream = type(model).stream

    def recording_stream(self, prompt, **options):
        conversations.append(prompt)
        return stream(self, prompt, **options)

    monkeypatch.setattr(type(model), "stream", recording_stream)

    def send(**fields):
        answer = post(http, **fields)
        assert answer.status_code == 200, answer.text
        return conversations[-1]

    return send


def said(conversation):
    """The messages as (role, channel, content)."""
    return [(message.role, message.channel, message.content) for message in conversation.messages]


# Replies


def test_answer(client):
    reply = create(client)
    assert (reply.type, reply.role, reply.model) == ("message", "assistant", MODEL)
    assert reply.id.startswith("msg_") and reply._request_id.startswith("req_")
    assert (kinds(reply), reply.content[0].text) == (["text"], "12 + 30 = 42")
    assert (reply.stop_reason, reply.stop_sequence) == ("end_turn", None)
    assert 0 < reply.usage.output_tokens_details.thinking_tokens < reply.usage.output_tokens


@pytest.mark.parametrize("thinking", [THINKING, {"type": "adaptive"}, {"type": "enabled", "budget_tokens": 10**9}])
def test_thinking_and_text(client, thinking):
    reply = create(client, thinking=thinking)
    thought, text = reply.content
    assert (thought.type, thought.signature, text.text) == ("thinking", "mlx-gptoss", "12 + 30 = 42")
    assert "2+0=2" in thought.thinking


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, False),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "adaptive"}}, True),
        ({"with_tools": True}, True),
        ({"with_tools": True, "thinking": {"type": "disabled"}}, False),
    ],
)
def test_thinking_is_shown_if_it_is_asked_for_or_there_are_tools(client, weather, fields, shown):
    fields = dict(fields)
    tools = {"tools": [weather]} if fields.pop("with_tools", False) else {}
    assert ("thinking" in kinds(create(client, **fields, **tools))) == shown


def test_omitted_thinking_comes_back_with_its_signature(client, seen, weather):
    thinking = {"type": "adaptive", "display": "omitted"}
    thought, use = create(client, messages=[WEATHER], tools=[weather], thinking=thinking).content
    assert (thought.thinking, use.type) == ("", "tool_use")
    reply = [thought.to_dict()]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": RESULT}
    conversation = seen(**dialogue(weather, result, call=use.id, reply=reply))
    assert said(conversation)[1] == ("assistant", "analysis", base64.b64decode(thought.signature[11:]).decode())
    assert "get_weather" in said(conversation)[1][2]


def test_tool_call_and_its_result(client, weather):
    first = create(client, messages=[WEATHER], tools=[weather])
    thought, use = first.content
    assert (thought.type, use.type, use.name, use.input) == (
        "thinking",
        "tool_use",
        "get_weather",
        {"location": "Oslo"},
    )
    assert use.id.startswith("toolu_") and first.stop_reason == "tool_use"
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": RESULT}]}
    history = [WEATHER, {"role": "assistant", "content": first.content}, result]
    second = create(client, messages=history, tools=[weather])
    assert second.content[-1].text == "It is 4 degrees and rainy in Oslo."
    assert (second.stop_reason, second.usage.cache_read_input_tokens > 0) == ("end_turn", True)


def test_stream_is_complete_and_in_order(http, weather):
    answer = post(http, messages=[WEATHER], tools=[weather], max_tokens=400, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.headers["request-id"]
    pairs = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name.removeprefix("event: ") for name, _ in pairs] == [event["type"] for event in events]
    types = [event["delta"]["type"] if "index" in event and "delta" in event else event["type"] for event in events]
    order = [kind for kind, before in zip(types, [None, *types], strict=False) if kind != before]
    assert order == [
        "message_start", "ping", "content_block_start", "thinking_delta", "signature_delta", "content_block_stop",
        "content_block_start", "input_json_delta", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    start, delta = events[0]["message"], events[-2]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    usage = delta["usage"]
    assert start["usage"]["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    parts = [event["delta"]["partial_json"] for event in events if "partial_json" in event.get("delta", {})]
    assert json.loads("".join(parts)) == {"location": "Oslo"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"thinking": THINKING},
        {"thinking": {"type": "adaptive", "display": "omitted"}},
        {"with_tools": True},
        {"with_tools": True, "max_tokens": 27},  # in the middle of a call
        {"stop_sequences": ["="]},
        {"max_tokens": 3},
    ],
)
def test_full_response_equals_the_folded_stream(client, weather, fields):
    fields = dict(fields)
    if fields.pop("with_tools", False):
        fields |= {"tools": [weather], "messages": [WEATHER]}
    full = create(client, **fields, extra_body=GREEDY).to_dict()
    with client.messages.stream(
        **{"model": MODEL, "max_tokens": 400, "messages": [SUM], **fields}, extra_body=GREEDY
    ) as stream:
        folded = stream.get_final_message().to_dict()
    for message in (full, folded):
        message.pop("id")
        message.pop("stop_details", None)
        usage = message["usage"]
        message["prompt"] = usage.pop("input_tokens") + usage.pop("cache_read_input_tokens")
        for block in message["content"]:
            block.pop("id", None)
            block.pop("parsed_output", None)
    assert full == folded


def test_stop_sequences(client):
    reply = create(client, stop_sequences=["never", "42", " = 4"])
    assert (reply.content[0].text, reply.stop_reason, reply.stop_sequence) == ("12 + 30", "stop_sequence", " = 4")
    assert create(client, stop_sequences=["never"]).stop_reason == "end_turn"
    assert create(client, stop_sequences=["never"], max_tokens=2).stop_reason == "max_tokens"


def test_prefill_is_continued(client, model, seen):
    messages = [SUM, {"role": "assistant", "content": [{"type": "text", "text": "12 + 30 ="}]}]
    conversation = seen(messages=messages)
    assert (conversation.prefill, said(conversation)) == ("12 + 30 =", [("user", None, SUM["content"])])
    reply = create(client, messages=messages, max_tokens=8, extra_body=GREEDY)
    raw = model.complete(
        render(conversation, model.tokenizer), max_tokens=8, sampling=mlx_gptoss.Sampling(temperature=0)
    )
    assert "".join(block.text for block in reply.content) == raw.text != ""
    assert reply.usage.output_tokens_details.thinking_tokens == 0


def test_prefill_obeys_the_schema(client, http):
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    output = {"format": {"type": "json_schema", "schema": {**schema, "additionalProperties": False}}}
    begun = [SUM, {"role": "assistant", "content": '{"sum":'}]
    text = create(client, messages=begun, output_config=output).content[0].text
    assert isinstance(json.loads('{"sum":' + text)["sum"], int)
    begun = [SUM, {"role": "assistant", "content": "The sum"}]
    assert "cannot be continued" in refused(http, messages=begun, output_config=output)


def test_structured_output(client):
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "integer"}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    formats = {"type": "json_schema", "schema": schema}
    for fields in ({"output_config": {"format": formats}}, {"extra_body": {"output_format": formats}}):
        assert set(json.loads(create(client, **fields).content[0].text)) == {"answer"}


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call_can_be_required(client, weather, choice):
    choice["disable_parallel_tool_use"] = True
    reply = create(client, tools=[{**weather, "strict": True}], tool_choice=choice)
    assert (kinds(reply)[-1], reply.stop_reason) == ("tool_use", "tool_use")
    assert set(reply.content[-1].input) == {"location"}


def test_a_call_can_be_forbidden(client, weather):
    reply = create(client, messages=[WEATHER], tools=[weather], tool_choice={"type": "none"})
    assert "tool_use" not in kinds(reply)


# Token counts and the prefix cache


@pytest.mark.parametrize("fields", [{}, {"system": "Be brief."}, {"thinking": THINKING}, {"with_tools": True}])
def test_count_tokens(client, weather, fields):
    fields = dict(fields)
    if fields.pop("with_tools", False):
        fields |= {"tools": [weather]}
    counted = client.messages.count_tokens(model=MODEL, messages=[SUM], **fields)
    usage = create(client, **{"max_tokens": 1100, **fields}).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert usage.cache_creation_input_tokens == 0


def test_a_billing_header_does_not_defeat_the_prefix_cache(client):
    rules = "\n".join(f"Rule {number}: be brief, and say what you mean." for number in range(40))

    def ask(cch, messages):
        header = f"x-anthropic-billing-header: cc_version=2.1.{cch}; cc_entrypoint=cli; cch={cch};"
        blocks = [{"type": "text", "text": header}, {"type": "text", "text": f"X-Anthropic-Other: {cch}\n{rules}"}]
        return create(client, system=blocks, messages=messages)

    first = ask("11111", [SUM])
    history = [SUM, {"role": "assistant", "content": first.content}, {"role": "user", "content": "Add 5 to that."}]
    second = ask("22222", history)
    prompt = first.usage.input_tokens + first.usage.cache_read_input_tokens
    assert prompt > 400 and second.usage.cache_read_input_tokens > 0.9 * prompt


def test_transport_lines_are_dropped_from_the_system_prompt_alone(seen):
    line = "x-anthropic-billing-header: a"
    conversation = seen(system=f"{line}\nBe brief.\n{line}", messages=[{"role": "user", "content": line}])
    assert (conversation.instructions, said(conversation)) == ("Be brief.\n", [("user", None, line)])
    assert seen(system=[{"type": "text", "text": line}]).instructions is None


# Blocks


def test_system_blocks_and_messages(seen):
    late = {"role": "system", "content": [{"type": "text", "text": "Be late."}]}
    early = {"role": "system", "content": "Be early."}
    system = [
        {"type": "text", "text": "One."},
        {"type": "text", "text": "Two.", "cache_control": {"type": "ephemeral"}},
    ]
    conversation = seen(system=system, messages=[early, SUM, late])
    assert conversation.instructions == "One.\n\nTwo.\n\nBe early."
    assert said(conversation)[1] == ("developer", None, "# Instructions\n\nBe late.")


def test_user_blocks_keep_their_order(seen, weather):
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": RESULT}
    blocks = [
        {"type": "text", "text": "Here:"},
        result,
        {"type": "text", "text": "And"},
        {"type": "text", "text": "now?"},
    ]
    assert said(seen(**dialogue(weather, *blocks)))[2:] == [
        ("user", None, "Here:"),
        ("tool", "commentary", RESULT),
        ("user", None, "And\n\nnow?"),
    ]


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "aGk="}}
PLAIN = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Text."}, "title": "Title"}
PARTS = {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "Part."}]}}
FOUND = {"type": "search_result", "source": "http://a", "title": "A", "content": [{"type": "text", "text": "Found."}]}


@pytest.mark.parametrize(
    ("content", "text", "names"),
    [
        ("plain", "plain", set()),
        (None, "", set()),
        ([], "", set()),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\n\nb", set()),
        ([IMAGE], "[image: left out, since the model reads only text]", {"messages[].content[].content[].image"}),
        ([PDF], "[document: left out, since the model reads only text]", {"messages[].content[].content[].document"}),
        ([PLAIN, PARTS, FOUND], "Title\n\nText.\n\nPart.\n\nA\n\nhttp://a\n\nFound.", set()),
    ],
)
def test_content_of_a_tool_result(http, seen, weather, content, text, names):
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": content}
    fields = dialogue(weather, {name: value for name, value in result.items() if value is not None})
    assert seen(**fields).messages[-1].content == text
    assert ignored(post(http, **fields)) == names


@pytest.mark.parametrize(("text", "shown"), [("no such city", "Error: no such city"), ("an error", "an error")])
def test_a_tool_result_may_be_an_error(seen, weather, text, shown):
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": text, "is_error": True}
    assert seen(**dialogue(weather, result)).messages[-1].content == shown


def test_documents_of_the_user(seen, http):
    question = {"type": "text", "text": "Why?"}
    conversation = seen(messages=[{"role": "user", "content": [PLAIN, FOUND, question]}])
    assert said(conversation) == [("user", None, "Title\n\nText.\n\nA\n\nhttp://a\n\nFound.\n\nWhy?")]
    for block in (IMAGE, PDF, {"type": "container_upload", "file_id": "file_1"}):
        message = refused(http, messages=[{"role": "user", "content": [question, block]}])
        assert message.startswith("messages[0].content[1]") and "only text" in message


def test_assistant_blocks(http, seen, weather):
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "anything"},
        {"type": "redacted_thinking", "data": "abc"},
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []},
        {"type": "text", "text": "I look.", "citations": None},
    ]
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": RESULT}
    fields = dialogue(weather, result, reply=blocks)
    names = {"messages[].content[].server_tool_use", "messages[].content[].web_search_tool_result"}
    assert ignored(post(http, **fields)) == names
    conversation = seen(**fields)
    call = ("assistant", "commentary", '{"location":"Oslo"}')
    preamble = ("assistant", "commentary", "I look.")
    assert said(conversation)[1:4] == [("assistant", "analysis", "Hm."), preamble, call]
    assert conversation.messages[3].recipient == conversation.messages[4].name == "functions.get_weather"
    done = {
        "role": "assistant",
        "content": [blocks[0], {"type": "text", "text": "It "}, {"type": "text", "text": "rains."}],
    }
    fields["messages"] += [done, SUM]
    assert said(seen(**fields))[1:] == [  # reasoning before an answer is dropped, as the model was trained
        preamble,
        call,
        ("tool", "commentary", RESULT),
        ("assistant", "final", "It rains."),
        ("user", None, SUM["content"]),
    ]


def test_a_tool_may_have_any_name(seen, http):
    tool = {"type": "custom", "name": "my tool / v2", "input_schema": {"type": "object", "properties": {}}}
    use = {"type": "tool_use", "id": "toolu_x", "name": "my tool / v2", "input": {}}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_x"}]}
    conversation = seen(messages=[SUM, {"role": "assistant", "content": [use]}, result], tools=[tool])
    assert conversation.messages[-1].name == conversation.messages[1].recipient == "functions.my_tool_v2"


# The request's other fields


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({}, "medium"),
        ({"thinking": {"type": "disabled"}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 31_999}}, "high"),
        ({"thinking": {"type": "adaptive"}}, "medium"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, "high"),
        ({"output_config": {"effort": "low"}}, "low"),
    ],
)
def test_reasoning_effort(seen, fields, effort):
    assert seen(**fields).reasoning == effort


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, set()),
        ({"max_tokens": None, "stop_sequences": ["1"]}, set()),
        (
            {"metadata": {"user_id": "a"}, "service_tier": "auto", "container": "c"},
            {"metadata", "service_tier", "container"},
        ),
        ({"context_management": {"edits": []}, "betas": ["x"]}, {"context_management", "betas"}),
        ({"mcp_servers": [{"type": "url", "url": "http://a", "name": "a"}]}, {"mcp_servers"}),
        ({"cache_control": {"type": "ephemeral"}}, {"cache_control"}),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}, "mood": "b"}]}
                ]
            },
            {"cache_control", "messages[].content[].mood"},
        ),
        ({"messages": [{**SUM, "id": "msg_1"}]}, {"messages[].id"}),
        ({"output_config": {"tone": "warm"}}, {"output_config.tone"}),
    ],
)
def test_fields_without_effect_are_named(http, fields, names):
    assert ignored(post(http, **fields)) == names


def test_tools_that_are_not_served_are_left_out_while_functions_remain(http, seen, weather):
    others = [
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
    ]
    mine = {**weather, "cache_control": {"type": "ephemeral"}, "input_examples": [{"location": "Rome"}]}
    names = {f"tools[].{tool['type']}" for tool in others} | {"cache_control", "tools[].input_examples"}
    assert ignored(post(http, tools=[*others, mine])) == names
    assert [function.name for function in seen(tools=[*others, mine]).functions] == ["get_weather"]
    assert "web_search_20250305" in refused(http, tools=others)
    assert "'bash'" in refused(http, tools=[*others, mine], tool_choice={"type": "tool", "name": "bash"})


def test_models_have_the_fields_of_both_dialects(client, server):
    (listed,) = client.models.list()
    assert (listed.id, listed.type, listed.display_name) == ("mlx-gptoss-nano", "model", "mlx-gptoss-nano")
    assert listed.created_at.timestamp() == server.service.created and listed.max_input_tokens == 4096
    page = client.models.list()
    assert (page.has_more, page.first_id, page.last_id) == (False, listed.id, listed.id)
    assert client.models.retrieve("claude-of-any-name").id == listed.id


# Errors


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": None}, "messages is missing"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].source"),
        ({"messages": [SUM] * 10_001}, "messages"),
        ({"system": 5}, "system"),
        ({"system": [IMAGE]}, "system[0]"),
        ({"max_tokens": "1"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
        ({"stop_sequences": ["a" * 1025]}, "stop_sequences"),
        ({"stop_sequences": [1]}, "stop_sequences"),
        ({"thinking": True}, "thinking"),
        ({"output_config": {"effort": "extreme"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"output_format": {"type": "json_schema"}}, "output_config.format"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "a", "input_schema": []}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "a"}] * 1025}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool", "name": "a"}, "tools": [{"name": "b"}]}, "'a'"),
        ({"tool_choice": {"type": "tool"}, "tools": [{"name": "b"}]}, "tool_choice"),
    ],
)
def test_invalid_requests(http, fields, part):
    assert part in refused(http, **fields)


def use(**fields):
    return {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {}, **fields}


def deep(levels):
    value = {}
    for _ in range(levels):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize(
    ("blocks", "part"),
    [
        ([use()], "send its tool_result"),
        ([use(name="")], "messages[1].content[0].name"),
        ([use(name=5)], "messages[1].content[0].name"),
        ([use(id=5)], "messages[1].content[0].id"),
        ([use(input="{}")], "messages[1].content[0].input"),
        ([{"type": "thinking"}], "messages[1].content[0].thinking"),
    ],
)
def test_invalid_calls(http, blocks, part):
    assert part in refused(http, messages=[WEATHER, {"role": "assistant", "content": blocks}])


@pytest.mark.parametrize("result", [{"tool_use_id": "toolu_2"}, {"tool_use_id": 5}, {}])
def test_a_result_needs_its_call(http, weather, result):
    message = refused(http, **dialogue(weather, {"type": "tool_result", **result}))
    assert message.startswith("messages[2].content[0]")


@pytest.mark.parametrize("levels", [10, 200, 450, 3000])
@pytest.mark.parametrize("place", ["input", "schema", "content", "system", "extra"])
def test_deep_nesting_is_no_server_error(server, http, idle, weather, levels, place):
    nested = "[" * levels + "]" * levels if place in ("content", "system") else '{"a":' * levels + "{}" + "}" * levels
    fields = {
        "input": {"messages": [WEATHER, {"role": "assistant", "content": [use(input="@")]}, SUM]},
        "schema": {"tools": [{"name": "a", "input_schema": "@"}]},
        "content": {"messages": [{"role": "user", "content": "@"}]},
        "system": {"system": "@"},
        "extra": {"x": "@"},
    }[place]
    body = json.dumps({"messages": [SUM], "max_tokens": 1, **fields}).replace('"@"', nested)
    answer = http.post("/v1/messages", content=body)
    assert answer.status_code in (200, 400), answer.text
    assert answer.status_code == 200 or answer.json()["type"] == "error"
    assert idle(server)


def test_many_blocks(server, http, idle):
    blocks = [{"type": "text", "text": ""}] * 100_000
    answer = post(http, messages=[{"role": "user", "content": [*blocks, {"type": "text", "text": "Hi"}]}])
    assert answer.status_code == 200
    many = [{"type": f"kind_{number}"} for number in range(20_000)]
    answer = post(http, messages=[SUM, {"role": "assistant", "content": many}, SUM])
    assert answer.status_code == 200 and len(answer.headers["x-ignored-fields"]) <= 1024
    assert idle(server)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_a_prompt_over_the_context(http, path):
    answer = post(http, path, messages=[{"role": "user", "content": "word " * 10_000}])
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("prompt is too long")  # Claude Code compacts at these words


def test_errors_raise_the_exceptions_of_the_client(client, model, serve):
    with pytest.raises(anthropic.BadRequestError) as caught:
        create(client, messages=[{"role": "user", "content": [IMAGE]}])
    assert caught.value.request_id.startswith("req_")
    with serve(model, api_key="secret") as server:
        for key, error in (("wrong", anthropic.AuthenticationError), ("secret", None)):
            with anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0) as other:
                if error is None:
                    assert create(other, max_tokens=1).stop_reason == "max_tokens"
                    continue
                with pytest.raises(error):
                    create(other)
        server.service.strict_model = True
        with (
            anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as other,
            pytest.raises(anthropic.NotFoundError),
        ):
            create(other)


def test_a_full_queue_is_overloaded(serve):
    with mlx_gptoss.load(slots=1, max_context=1024, max_waiting=0) as small, serve(small) as server:
        url, fields = f"{server.url}/v1/messages", {"messages": [SUM], "temperature": 1}
        with httpx.stream(
            "POST", url, json={**fields, "stream": True, "stop_sequences": ["~never~"]}, timeout=60
        ) as busy:
            next(busy.iter_lines())
            answer = httpx.post(url, json={**fields, "max_tokens": 1}, timeout=60)
        assert answer.status_code in (200, 503)
        if answer.status_code == 503:
            assert (answer.json()["error"]["type"], "retry-after" in answer.headers) == ("overloaded_error", True)


def test_an_error_in_a_stream_is_its_last_event(serve, model):
    with serve(model) as server:
        with httpx.stream("POST", f"{server.url}/v1/messages", json={"messages": [SUM], "stream": True}) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: message_start"
            (queue,) = server.service.open_queues
            queue.stop(ApiError(503, "stopped"))
            rest = list(lines)
        data = json.loads(rest[-2].removeprefix("data: "))
        assert rest[-3] == "event: error"
        assert (data["type"], data["error"]["type"]) == ("error", "overloaded_error")
        assert data["request_id"] == answer.headers["request-id"]


def test_requests_are_measured_and_cancelled(server, http, idle):
    def tokens():
        return float(http.get("/metrics").text.split("\nmlx_gptoss_completion_tokens_total ")[1].split()[0])

    before = tokens()
    assert post(http, max_tokens=5).json()["usage"]["output_tokens"] == 5
    assert tokens() == before + 5
    with httpx.stream("POST", f"{server.url}/v1/messages", json={"messages": [SUM], "stream": True}) as answer:
        next(answer.iter_lines())
    assert idle(server)


def test_many_at_once(client):
    texts = []

    def ask():
        texts.append(create(client).content[0].text)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["12 + 30 = 42"] * 6
