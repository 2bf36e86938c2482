"""langchain-openai and langchain-ollama, unmodified: tools, streams, structured output."""

from __future__ import annotations

import pydantic
import pytest
from scripted import WEATHER, WEATHER_ANSWER, WEATHER_THOUGHT, calls, check_weather, says, thinks

langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
from langchain_core.messages import HumanMessage, ToolMessage  # noqa: E402

QUESTION = HumanMessage("What is the weather in Oslo?")


class City(pydantic.BaseModel):
    """A city."""

    name: str


def get_weather(location: str) -> str:
    """Get the current weather."""
    return f"4 degrees in {location}"


def chat_model(kind, server):
    """The model of one of LangChain's classes for this server."""
    if kind == "ollama":
        package = pytest.importorskip("langchain_ollama", reason="langchain-ollama is not installed")
        return package.ChatOllama(model="gpt-oss:20b", base_url=server.url, reasoning="low")
    fields = {"use_responses_api": True, "reasoning": {"effort": "low", "summary": "auto"}}
    return langchain_openai.ChatOpenAI(
        model="gpt-oss-20b",
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        **(fields if kind == "responses" else {}),
    )


def reasoning_of(message):
    """The reasoning that LangChain shows of a message, which it does not for chat completions."""
    blocks = message.content if isinstance(message.content, list) else []
    summaries = [part["text"] for block in blocks for part in block.get("summary", ()) if block["type"] == "reasoning"]
    return "".join(summaries) or message.additional_kwargs.get("reasoning_content", "")


@pytest.mark.parametrize("kind", ["chat completions", "responses", "ollama"])
def test_tool_and_result(scripted_server, kind):
    server = scripted_server(WEATHER)
    model = chat_model(kind, server).bind_tools([get_weather])
    message = model.invoke([QUESTION])
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"location": "Oslo"})
    result = ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"])
    assert model.invoke([QUESTION, message, result]).text == WEATHER_ANSWER
    if kind == "chat completions":  # LangChain drops the reasoning of chat completions
        assert "<|start|>functions.get_weather to=assistant" in server.script.prompts[1]
    else:
        assert reasoning_of(message) == WEATHER_THOUGHT
        check_weather(server.script.prompts)


@pytest.mark.parametrize("kind", ["chat completions", "responses", "ollama"])
def test_stream(scripted_server, kind):
    server = scripted_server([[thinks("Two and two."), says("Four.")]])
    message = None
    for chunk in chat_model(kind, server).stream("What is 2 + 2?"):
        message = chunk if message is None else message + chunk
    assert message.text == "Four."
    assert kind == "chat completions" or reasoning_of(message) == "Two and two."


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("kind", ["chat completions", "responses", "ollama"])
def test_structured_output(scripted_server, kind, method):
    reply = calls("City", '{"name": "Oslo"}') if method == "function_calling" else says('{"name": "Oslo"}')
    model = chat_model(kind, scripted_server([[reply]])).with_structured_output(City, method=method)
    assert model.invoke("What is the capital of Norway? Answer in JSON.") == City(name="Oslo")
