"""The cases of llama.cpp's test_compat_anthropic.py."""

from __future__ import annotations

from llama_cpp_cases import ANTHROPIC_TOOL, ASKED, STREAMS, case
from scripted import calls, says, thinks


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
