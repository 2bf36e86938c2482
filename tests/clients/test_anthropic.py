"""anthropic, unmodified: questions, streams, thinking, a tool's call and its result, and counted tokens."""

from __future__ import annotations

import pytest
from scripted import WEATHER, WEATHER_ANSWER, WEATHER_THOUGHT, calls, check_weather, says, thinks

anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed")
MODEL = "claude-sonnet-4-5"
TOOL = {
    "name": "get_weather",
    "description": "Get the current weather.",
    "input_schema": {
        "type": "object",
        "properties": {"location": {"type": "string", "description": "City name"}},
        "required": ["location"],
    },
}
QUESTION = {"role": "user", "content": "What is the weather in Oslo?"}


def client(server):
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def test_question(server):
    asked = [{"role": "user", "content": "What is 12 + 30?"}]
    message = client(server).messages.create(model=MODEL, max_tokens=200, messages=asked, extra_body={"temperature": 0})
    assert message.content[-1].text == "12 + 30 = 42"
    assert message.stop_reason == "end_turn" and message.role == "assistant"
    assert message.model == MODEL  # Claude Code sends thinking back only with messages of the model that it asked for
    assert message.usage.input_tokens > 0 and message.usage.output_tokens > 0


def test_thinking_and_text_streamed(scripted_server):
    server = scripted_server([[thinks("Two and two."), says("Four.")]])
    asked = [{"role": "user", "content": "What is 2 + 2?"}]
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with client(server).messages.stream(model=MODEL, max_tokens=2048, messages=asked, thinking=thinking) as stream:
        deltas = [event.delta for event in stream if event.type == "content_block_delta"]
        message = stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "Two and two." and message.content[0].signature
    assert message.content[1].text == "Four."
    assert "".join(delta.text for delta in deltas if delta.type == "text_delta") == "Four."


@pytest.mark.parametrize("streamed", [False, True])
def test_tool_and_result(scripted_server, streamed):
    server = scripted_server(WEATHER)
    asked = {
        "model": MODEL,
        "max_tokens": 1024,
        "tools": [TOOL],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    if streamed:
        with client(server).messages.stream(messages=[QUESTION], **asked) as stream:
            message = stream.get_final_message()
    else:
        message = client(server).messages.create(messages=[QUESTION], **asked)
    assert message.stop_reason == "tool_use"
    thinking, call = message.content
    assert thinking.thinking == WEATHER_THOUGHT
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"location": "Oslo"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "4 degrees"}]}
    history = [QUESTION, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = client(server).messages.create(messages=history, **asked)
    assert answer.content[-1].text == WEATHER_ANSWER and answer.stop_reason == "end_turn"
    check_weather(server.script.prompts)


def test_forced_call(scripted_server):
    server = scripted_server([[calls("get_weather", '{"location": "Oslo"}')]])
    choice = {"type": "tool", "name": "get_weather"}
    message = client(server).messages.create(
        model=MODEL, max_tokens=100, messages=[QUESTION], tools=[TOOL], tool_choice=choice
    )
    assert message.content[-1].input == {"location": "Oslo"}


def test_tokens_are_counted(server):
    counted = client(server).messages.count_tokens(model=MODEL, messages=[QUESTION], tools=[TOOL], system="Be brief.")
    message = client(server).messages.create(
        model=MODEL, max_tokens=4, messages=[QUESTION], tools=[TOOL], system="Be brief."
    )
    used = message.usage
    assert counted.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)


def test_errors_are_anthropic_errors(server):
    with pytest.raises(anthropic.BadRequestError) as raised:
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
        client(server).messages.create(model=MODEL, max_tokens=4, messages=[{"role": "user", "content": [image]}])
    assert raised.value.body["type"] == "error"
    assert raised.value.body["error"]["type"] == "invalid_request_error"
    assert "image" in raised.value.body["error"]["message"]
