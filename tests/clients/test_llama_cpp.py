"""llama.cpp's server tests for chat, tools, messages and responses, as a list of which hold here: LLAMA_CPP.md.

Each case sends what the test of that name sends, in our words, and checks what it checks of the protocol. Words of a
certain model and llama.cpp's build number are not checked. A row of the list that says "no" has to fail: when it no
longer does, the list is out of date.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import openai
import pytest
from scripted import NextReply, calls, says, serving_script, thinks

ROW = re.compile(r"^\| `(?P<case>[\w\[\], .-]+)` \| (?P<holds>yes|no) \|")
LIST = [ROW.match(line) for line in Path(__file__).with_name("LLAMA_CPP.md").read_text().splitlines()]
HOLDS = {row["case"]: row["holds"] == "yes" for row in LIST if row}
CASES = {}

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a good book."}]
CODE = [{"role": "system", "content": "You write code."}, {"role": "user", "content": "Write an example."}]


def function(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


TEST_TOOL = function("test", success={"type": "boolean", "const": True})
PYTHON_TOOL = function("python", code={"type": "string", "description": "The code to run."})
WEATHER_TOOL = function("get_current_weather", location={"type": "string", "description": "City and country"})
ANTHROPIC_TOOL = {
    "name": "get_weather",
    "description": "Get the current weather in a place.",
    "input_schema": WEATHER_TOOL["function"]["parameters"],
}


def case(*variants):
    """Register a function as the case of its name without "case_", or one case for each keyword argument's set."""

    def register(check):
        name = check.__name__.removeprefix("case_")
        for label, arguments in variants or (("", {}),):
            CASES[f"{name}[{label}]" if label else name] = lambda server, a=arguments: check(server, **a)
        return check

    return register


class Asker:
    """Sends requests to the server; the model answers with `reply`."""

    def __init__(self, running, next_reply):
        self.url, self.script, self._next = running.url, running.script, next_reply
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def reply(self, *messages):
        self._next.reply = messages

    def post(self, path, body):
        return self.http.post(path, json=body)

    def ok(self, path, body):
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, path, body):
        answer = self.post(path, {**body, "stream": True})
        assert answer.status_code == 200, answer.text
        data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in data if line != "[DONE]"]

    def message(self, body):
        """The message of a chat completion, streamed or not, as llama.cpp's make_any_request() has it."""
        if not body.get("stream"):
            return self.ok("/v1/chat/completions", body)["choices"][0]["message"]
        message = {}
        for event in self.events("/v1/chat/completions", body):
            for key, value in event["choices"][0]["delta"].items() if event["choices"] else ():
                if key == "tool_calls":
                    for part in value:
                        made = message.setdefault("tool_calls", [])
                        if len(made) == part["index"]:
                            made.append({"function": {"name": part["function"]["name"], "arguments": ""}})
                        made[part["index"]]["function"]["arguments"] += part["function"].get("arguments", "")
                elif isinstance(value, str):
                    message[key] = message.get(key, "") + value
        return message

    @property
    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def server():
    next_reply = NextReply()
    with serving_script(next_reply) as running:
        yield Asker(running, next_reply)


def test_the_list_has_every_case():
    assert list(HOLDS) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_case(server, name):
    server.reply(thinks("Well."), says("A very long book."))
    if HOLDS[name]:
        CASES[name](server)
    else:
        with pytest.raises((AssertionError, KeyError, openai.APIError)):
            CASES[name](server)


# test_chat_completion.py


@case(("text", {"content": "Name a good book."}), ("parts", {"content": [{"type": "text", "text": "Name a book."}]}))
def case_chat_completion(server, content):
    messages = [ASKED[0], {"role": "user", "content": content}]
    body = server.ok("/chat/completions", {"model": None, "max_tokens": 8, "messages": messages})
    assert "cmpl" in body["id"] and body["usage"]["completion_tokens"] == 8
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert body["choices"][0]["finish_reason"] == "length"


@case()
def case_chat_completion_stream(server):
    events = server.events("/chat/completions", {"max_tokens": 8, "messages": ASKED})
    first, *rest = [event["choices"][0] for event in events if event["choices"]]
    assert first["delta"]["content"] is None and first["delta"]["role"] == "assistant"
    assert not any("role" in choice["delta"] for choice in rest)
    assert len({event["id"] for event in events}) == 1
    assert rest[-1]["finish_reason"] == "length" and "content" not in rest[-1]["delta"]


@case()
def case_chat_completion_with_openai_library(server):
    asked = {"model": "gpt-3.5-turbo-instruct", "messages": ASKED, "max_tokens": 8, "seed": 42, "temperature": 0.8}
    answer = server.client.chat.completions.create(**asked)
    assert answer.choices[0].finish_reason == "length"


@case()
def case_chat_template(server):
    assert "__verbose" in server.ok("/chat/completions", {"max_tokens": 8, "messages": ASKED})


@case()
def case_chat_template_assistant_prefill(server):
    messages = [*ASKED, {"role": "assistant", "content": "A ve"}]
    body = server.ok("/chat/completions", {"max_tokens": 8, "messages": messages})
    assert body["__verbose"]["prompt"].endswith("A ve")


@case()
def case_apply_chat_template(server):
    assert "prompt" in server.ok("/apply-template", {"messages": ASKED})


@case(
    ("object with a constant", {"format": {"type": "json_object", "schema": {"const": "42"}}, "text": '"42"'}),
    (
        "object with a list",
        {"format": {"type": "json_object", "schema": {"items": [{"type": "integer"}]}}, "text": "[ -3000 ]"},
    ),
    (
        "schema without a name",
        {"format": {"type": "json_schema", "json_schema": {"schema": {"const": "foo"}}}, "text": '"foo"'},
    ),
    ("object", {"format": {"type": "json_object"}, "text": '{"a": 1}'}),
)
def case_completion_with_response_format(server, format, text):
    server.reply(says(text))
    body = server.ok("/chat/completions", {"max_tokens": 40, "messages": CODE, "response_format": format})
    assert body["choices"][0]["message"]["content"] == text


@case(
    ("sound", {"format": {"type": "sound"}}),
    ("schema 123", {"format": {"type": "json_object", "schema": 123}}),
    ("type 123", {"format": {"type": "json_object", "schema": {"type": 123}}}),
    ("type hiccup", {"format": {"type": "json_object", "schema": {"type": "hiccup"}}}),
)
def case_completion_with_invalid_response_format(server, format):
    answer = server.post("/chat/completions", {"messages": CODE, "response_format": format})
    assert answer.status_code == 400 and "error" in answer.json()


@case()
def case_completion_with_json_schema(server):
    server.reply(says('"42"'))
    body = {"max_tokens": 40, "messages": CODE, "json_schema": {"const": "42"}}
    assert server.ok("/chat/completions", body)["choices"][0]["message"]["content"] == '"42"'
    assert server.script.masked[-1]


@case()
def case_completion_with_grammar(server):
    server.reply(says("aaaaa"))
    server.ok("/chat/completions", {"max_tokens": 40, "messages": CODE, "grammar": 'root ::= "a"{5,5}'})


@case(
    ("null", {"messages": None}),
    ("string", {"messages": "string"}),
    ("number", {"messages": [123]}),
    ("empty", {"messages": [{}]}),
    ("role 123", {"messages": [{"role": 123}]}),
    ("content 123", {"messages": [{"role": "system", "content": 123}]}),
    ("second empty", {"messages": [{"role": "system", "content": "a"}, {}]}),
    (
        "assistant twice",
        {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant", "assistant")]},
    ),
)
def case_invalid_chat_completion_req(server, messages):
    answer = server.post("/chat/completions", {"messages": messages})
    assert answer.status_code == 400 and "error" in answer.json()


@case()
def case_chat_completion_with_timings_per_token(server):
    asked = {"max_tokens": 10, "messages": ASKED, "timings_per_token": True, "stream_options": {"include_usage": True}}
    assert "timings" in server.events("/chat/completions", asked)[-1]


@case()
def case_logprobs(server):
    server.reply(says("A very long book."))
    asked = {"model": "gpt-3.5-turbo-instruct", "messages": ASKED, "logprobs": True, "top_logprobs": 10}
    choice = server.client.chat.completions.create(**asked).choices[0]
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    assert all(token.logprob <= 0 and token.bytes is not None for token in choice.logprobs.content)
    assert all(token.top_logprobs for token in choice.logprobs.content)


@case()
def case_logprobs_stream(server):
    server.reply(says("A very long book."))
    asked = {"model": "gpt-3.5-turbo-instruct", "messages": ASKED, "logprobs": True, "top_logprobs": 10, "stream": True}
    text = tokens = ""
    for chunk in server.client.chat.completions.create(**asked):
        text += chunk.choices[0].delta.content or ""
        if chunk.choices[0].logprobs:
            tokens += "".join(token.token for token in chunk.choices[0].logprobs.content)
    assert text == tokens == "A very long book."


@case()
def case_logit_bias(server):
    tokens = server.ok("/tokenize", {"content": " the book"})["tokens"]
    server.ok("/chat/completions", {"messages": ASKED, "logit_bias": {str(token): -100 for token in tokens}})


@case(("whole", {"stream": False}), ("streamed", {"stream": True}))
def case_context_size_exceeded(server, stream):
    answer = server.post("/chat/completions", {"messages": [*ASKED] * 4000, "stream": stream})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "exceed_context_size_error" and error["n_prompt_tokens"] > error["n_ctx"] > 0


@case()
def case_return_progress(server):
    events = server.events("/chat/completions", {"max_tokens": 10, "messages": ASKED, "return_progress": True})
    assert any("prompt_progress" in event for event in events)


@case()
def case_chat_completions_multiple_choices(server):
    body = server.ok("/chat/completions", {"max_tokens": 8, "n": 2, "messages": ASKED})
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length", "length"]


# test_tool_call.py


STREAMS = (("whole", {"stream": False}), ("streamed", {"stream": True}))


@case(*((f"{tool} {label}", {"tool": tool, **stream}) for tool in ("test", "python") for label, stream in STREAMS))
def case_completion_with_required_tool(server, tool, stream):
    arguments = {"test": '{"success": true}', "python": '{"code": "1"}'}[tool]
    server.reply(calls(tool, arguments))
    tools = [{"test": TEST_TOOL, "python": PYTHON_TOOL}[tool]]
    sampling = {"temperature": 0.0, "top_k": 1, "top_p": 1.0, "max_tokens": 512}
    choice = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "stream": stream}
    message = server.message({"messages": CODE, **choice, **sampling})
    (call,) = message["tool_calls"]
    assert message.get("content") in (None, "") and call["function"]["name"] == tool
    assert json.loads(call["function"]["arguments"]) == json.loads(arguments)


@case(
    *(
        (f"{label} {kind}", {"tools": tools, "choice": choice, **stream})
        for label, tools, choice in (
            ("no tools", None, None),
            ("auto", [TEST_TOOL], None),
            ("none", [PYTHON_TOOL], "none"),
        )
        for kind, stream in STREAMS
    )
)
def case_completion_without_tool_call(server, tools, choice, stream):
    message = server.message({"messages": CODE, "tools": tools, "tool_choice": choice, "stream": stream})
    assert message.get("tool_calls") is None and message["content"] == "A very long book."


@case(*STREAMS)
def case_weather(server, stream):
    server.reply(thinks("Well."), calls("get_current_weather", '{"location": "Istanbul"}'))
    asked = [{"role": "system", "content": "Use tools."}, {"role": "user", "content": "Weather in Istanbul?"}]
    (call,) = server.message({"messages": asked, "tools": [WEATHER_TOOL], "stream": stream})["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"location": "Istanbul"}


@case(*STREAMS)
def case_calc_result(server, stream):
    server.reply(says("It is 0.56."))
    tool = function("calculate", expression={"type": "string"})
    called = {"name": "calculate", "arguments": '{"expression":"sin(0.59)"}'}
    history = [
        {"role": "system", "content": "Round to two digits."},
        {"role": "user", "content": "What is the sine of 0.59?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": called}],
        },
        {"role": "tool", "name": "calculate", "content": "0.55636", "tool_call_id": "call_1"},
    ]
    message = server.message({"messages": history, "tools": [tool], "stream": stream})
    assert message.get("tool_calls") is None and message["content"] == "It is 0.56."


@case(*STREAMS)
def case_thoughts(server, stream):
    message = server.message({"messages": ASKED, "stream": stream})
    assert message["reasoning_content"] == "Well." and message["content"] == "A very long book."


@case(*STREAMS)
def case_hello_world(server, stream):
    server.reply(calls("python", '{"code": "print(\\"Hello, world!\\")"}'))
    (call,) = server.message({"messages": CODE, "tools": [PYTHON_TOOL], "stream": stream})["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"code": 'print("Hello, world!")'}


@case()
def case_malformed_tool_call_args_rejected(server):
    call = {"id": "call_1", "type": "function", "function": {"name": "test", "arguments": "{"}}
    history = [ASKED[1], {"role": "assistant", "content": None, "tool_calls": [call]}, ASKED[1]]
    assert server.post("/v1/chat/completions", {"max_tokens": 8, "messages": history}).status_code == 400


# test_compat_anthropic.py


def messages(server, *turns, **fields):
    asked = turns or ({"role": "user", "content": "Say hello."},)
    body = server.ok("/v1/messages", {"model": "test", "max_tokens": 200, "messages": asked, **fields})
    assert body["type"] == "message" and body["content"]
    return body


def tool_turns(*blocks):
    call = {"type": "tool_use", "id": "id1", "name": "get_weather", "input": {"location": "Paris"}}
    return (
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": list(blocks)},
    )


RESULT = {"type": "tool_result", "tool_use_id": "id1", "content": "Sunny"}


@case()
def case_anthropic_messages_basic(server):
    server.reply(says("Hello."))
    body = messages(server)
    assert body["role"] == "assistant" and body["content"] == [{"type": "text", "text": "Hello."}]
    assert body["stop_reason"] == "end_turn" and "timings" not in body
    assert all(type(body["usage"][key]) is int for key in ("cache_read_input_tokens", "input_tokens", "output_tokens"))


@case()
def case_anthropic_messages_with_system(server):
    messages(server, system="Be brief.")


@case()
def case_anthropic_messages_multipart_content(server):
    messages(server, {"role": "user", "content": [{"type": "text", "text": "Say"}, {"type": "text", "text": " hi"}]})


@case()
def case_anthropic_messages_conversation(server):
    messages(server, *({"role": role, "content": "Hi."} for role in ("user", "assistant", "user")))


@case()
def case_anthropic_messages_streaming(server):
    server.reply(says("Hello there."))
    asked = {"model": "test", "max_tokens": 30, "messages": ASKED[1:]}
    events = {event["type"]: event for event in server.events("/v1/messages", asked)}
    start = events["message_start"]["message"]
    assert start["type"] == "message" and start["content"] == [] and start["usage"]["input_tokens"] > 0
    assert events["content_block_start"]["index"] == 0
    assert events["content_block_start"]["content_block"]["type"] == "text"
    assert events["content_block_delta"]["delta"]["type"] == "text_delta"
    assert events["content_block_stop"]["index"] == 0
    assert events["message_delta"]["delta"]["stop_reason"] == "end_turn"
    assert events["message_delta"]["usage"]["output_tokens"] > 0 and "message_stop" in events


@case(("plain", {"fields": {}}), ("system", {"fields": {"system": "Be brief."}}))
def case_anthropic_count_tokens(server, fields):
    body = server.ok("/v1/messages/count_tokens", {"model": "test", "messages": ASKED[1:], **fields})
    assert body["input_tokens"] > 0 and "output_tokens" not in body


@case()
def case_anthropic_tool_use_basic(server):
    server.reply(calls("get_weather", '{"location": "Paris"}'))
    body = messages(server, {"role": "user", "content": "Weather in Paris?"}, tools=[ANTHROPIC_TOOL])
    block = body["content"][-1]
    assert body["stop_reason"] == "tool_use" and block["name"] == "get_weather" and block["id"]
    assert block["input"] == {"location": "Paris"}


@case(
    ("plain", {"blocks": [RESULT]}),
    ("with text", {"blocks": [{"type": "text", "text": "Here:"}, RESULT]}),
    ("error", {"blocks": [{**RESULT, "is_error": True}]}),
)
def case_anthropic_tool_result(server, blocks):
    server.reply(says("Sunny."))
    assert messages(server, *tool_turns(*blocks))["content"][0]["type"] == "text"


@case()
def case_anthropic_tool_streaming(server):
    server.reply(thinks("Well."), calls("get_weather", '{"location": "Paris"}'))
    asked = {"model": "test", "max_tokens": 200, "messages": ASKED[1:], "tools": [ANTHROPIC_TOOL]}
    events = server.events("/v1/messages", asked)
    starts = [event for event in events if event["type"] == "content_block_start"]
    assert starts[-1]["content_block"]["type"] == "tool_use" and starts[-1]["content_block"]["name"] == "get_weather"
    stops = [event["index"] for event in events if event["type"] == "content_block_stop"]
    assert [event["index"] for event in starts] == stops == list(range(len(starts)))


@case()
def case_anthropic_vision_format_accepted(server):
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    asked = {"model": "test", "max_tokens": 8, "messages": [{"role": "user", "content": [image]}]}
    answer = server.post("/v1/messages", asked)
    assert answer.status_code == 500


@case(
    ("stop_sequences", {"fields": {"stop_sequences": ["\n", "END"]}}),
    ("temperature", {"fields": {"temperature": 0.5}}),
    ("top_p", {"fields": {"top_p": 0.9}}),
    ("top_k", {"fields": {"top_k": 40}}),
    ("metadata", {"fields": {"metadata": {"user_id": "me"}}}),
    ("thinking", {"fields": {"thinking": {"type": "enabled", "budget_tokens": 50}}}),
)
def case_anthropic_parameter(server, fields):
    messages(server, **fields)


@case()
def case_anthropic_missing_messages(server):
    assert server.post("/v1/messages", {"model": "test", "max_tokens": 50}).status_code >= 400


@case()
def case_anthropic_empty_messages(server):
    messages_body = {"model": "test", "max_tokens": 50, "messages": []}
    assert server.post("/v1/messages", messages_body).status_code == 200


@case()
def case_anthropic_vs_openai_different_response_format(server):
    asked = {"model": "test", "max_tokens": 50, "messages": ASKED[1:]}
    chat = server.ok("/v1/chat/completions", asked)
    assert chat["object"] == "chat.completion" and "prompt_tokens" in chat["usage"]
    assert "input_tokens" in messages(server)["usage"]


@case(*STREAMS)
def case_anthropic_thinking_with_reasoning_model(server, stream):
    thinking = {"type": "enabled", "budget_tokens": 500}
    if stream:
        asked = {"model": "test", "max_tokens": 1024, "thinking": thinking, "messages": ASKED[1:]}
        events = server.events("/v1/messages", asked)
        starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
        deltas = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
        assert starts == ["thinking", "text"]
        assert deltas.index("thinking_delta") < deltas.index("signature_delta") < deltas.index("text_delta")
    else:
        thought, text = messages(server, thinking=thinking)["content"]
        assert thought["thinking"] == "Well." and "signature" in thought and text["type"] == "text"


# test_compat_oai_responses.py


@case(
    ("schema", {"format": {"type": "json_schema", "name": "test", "schema": {"const": "foo"}}, "text": '"foo"'}),
    ("object", {"format": {"type": "json_object"}, "text": "{}"}),
    ("text", {"format": {"type": "text"}, "text": "Hi."}),
    ("no schema", {"format": {"type": "json_schema", "name": "test"}, "text": None}),
)
def case_responses_with_text_format(server, format, text):
    server.reply(says(text or ""))
    body = {"input": "Write an example", "max_output_tokens": 40, "text": {"format": format}}
    answer = server.post("/responses", body)
    assert answer.status_code == (200 if text else 400)
    assert text is None or answer.json()["output"][-1]["content"][0]["text"] == text


@case()
def case_responses_with_openai_library(server):
    server.reply(says("A very long book."))
    answer = server.client.responses.create(model="gpt-4.1", input=ASKED, max_output_tokens=40, temperature=0.8)
    assert answer.id.startswith("resp_") and answer.output[0].id.startswith("msg_")
    assert answer.output_text == "A very long book."


@case()
def case_responses_stream_with_openai_library(server):
    server.reply(says("A very long book."))
    stream = server.client.responses.create(model="gpt-4.1", input=ASKED, max_output_tokens=40, stream=True)
    events = list(stream)
    created, completed = events[0].response, events[-1].response
    assert created.id == completed.id and completed.output[0].id.startswith("msg_")
    ids = {event.item_id for event in events if event.type == "response.output_text.delta"}
    assert ids == {completed.output[0].id}
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == completed.output_text == "A very long book."


@case()
def case_responses_stream_with_llama_telemetry(server):
    asked = {"input": "Say hello", "max_output_tokens": 8, "timings_per_token": True, "return_progress": True}
    assert any("timings" in event for event in server.events("/responses", asked))
