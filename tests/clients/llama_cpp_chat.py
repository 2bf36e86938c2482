"""The cases of llama.cpp's test_chat_completion.py."""

from __future__ import annotations

from llama_cpp_cases import ASKED, CODE, case
from scripted import says


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
