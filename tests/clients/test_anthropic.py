"""anthropic, unmodified: streamed thinking, a tool's call and its result."""

from __future__ import annotations

import pytest
from scripted import WEATHER, WEATHER_ANSWER, WEATHER_THOUGHT, check_weather, says, thinks

anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed")
MODEL = "claude-haiku-4-5"
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
