"""ollama, unmodified: lists, questions, streams, thinking, a tool's call and its result, and structured output."""

from __future__ import annotations

import pytest
from scripted import WEATHER, WEATHER_ANSWER, WEATHER_THOUGHT, check_weather, says, thinks

ollama = pytest.importorskip("ollama", reason="ollama is not installed")
MODEL = "gpt-oss:20b"
QUESTION = {"role": "user", "content": "What is the weather in Oslo?"}


def get_weather(location: str) -> str:
    """Get the current weather.

    Args:
        location: City name
    """
    return f"4 degrees in {location}"


def client(server):
    return ollama.Client(host=server.url)


def test_models(server):
    listed = client(server).list().models
    assert len(listed) == 1 and listed[0].size > 0 and listed[0].digest
    shown = client(server).show(listed[0].model)
    assert {"completion", "tools", "thinking"} <= set(shown.capabilities)
    assert shown.modelinfo["gptoss.context_length"] > 0
    assert [model.model for model in client(server).ps().models] == [listed[0].model]


def test_question(server):
    asked = [{"role": "user", "content": "What is 12 + 30?"}]
    answer = client(server).chat(MODEL, messages=asked, options={"temperature": 0})
    assert answer.message.content == "12 + 30 = 42" and answer.done and answer.done_reason == "stop"
    assert answer.prompt_eval_count > 0 and answer.eval_count > 0


def test_generate(server):
    answer = client(server).generate(MODEL, prompt="What is 12 + 30?", options={"temperature": 0})
    assert answer.response == "12 + 30 = 42"


def test_thinking_streamed(scripted_server):
    server = scripted_server([[thinks("Two and two."), says("Four.")]])
    asked = [{"role": "user", "content": "What is 2 + 2?"}]
    chunks = list(client(server).chat(MODEL, messages=asked, think="low", stream=True))
    assert "".join(chunk.message.thinking or "" for chunk in chunks) == "Two and two."
    assert "".join(chunk.message.content or "" for chunk in chunks) == "Four."
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert "Reasoning: low" in server.script.prompts[0]


@pytest.mark.parametrize("streamed", [False, True])
def test_tool_and_result(scripted_server, streamed):
    server = scripted_server(WEATHER)
    if streamed:
        chunks = list(client(server).chat(MODEL, messages=[QUESTION], tools=[get_weather], think=True, stream=True))
        (call,) = [call for chunk in chunks for call in chunk.message.tool_calls or ()]
        thought = "".join(chunk.message.thinking or "" for chunk in chunks)
        message = {"role": "assistant", "thinking": thought, "tool_calls": [call]}
    else:
        message = client(server).chat(MODEL, messages=[QUESTION], tools=[get_weather], think=True).message
        (call,) = message.tool_calls
        thought = message.thinking
    assert thought == WEATHER_THOUGHT
    assert (call.function.name, call.function.arguments) == ("get_weather", {"location": "Oslo"})
    result = {"role": "tool", "tool_name": "get_weather", "content": get_weather(**call.function.arguments)}
    answer = client(server).chat(MODEL, messages=[QUESTION, message, result], tools=[get_weather])
    assert answer.message.content == WEATHER_ANSWER
    check_weather(server.script.prompts)


def test_structured_output(scripted_server):
    server = scripted_server([[says('{"name": "Oslo"}')]])
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    asked = [{"role": "user", "content": "What is the capital of Norway?"}]
    options = {"temperature": 0, "num_ctx": 8192, "num_predict": -1, "seed": 1}
    answer = client(server).chat(MODEL, messages=asked, format=schema, options=options, keep_alive=-1)
    assert answer.message.content == '{"name": "Oslo"}'


def test_embeddings_are_a_clear_error(server):
    with pytest.raises(ollama.ResponseError, match="embed"):
        client(server).embed(MODEL, input="Oslo")
