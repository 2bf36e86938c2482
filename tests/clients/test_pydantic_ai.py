"""pydantic-ai, unmodified: an agent with a tool, and typed output, through three of the server's dialects."""

from __future__ import annotations

import pydantic
import pytest
from scripted import WEATHER, WEATHER_ANSWER, calls, check_weather

pydantic_ai = pytest.importorskip("pydantic_ai", reason="pydantic-ai-slim is not installed")
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel  # noqa: E402
from pydantic_ai.providers.openai import OpenAIProvider  # noqa: E402

NAME = "gpt-oss-20b"


class City(pydantic.BaseModel):
    name: str


def get_weather(location: str) -> str:
    """Get the current weather."""
    return f"4 degrees in {location}"


def agent(kind, server, **fields):
    """An agent that talks to the server in one of its dialects."""
    if kind == "messages":
        pytest.importorskip("anthropic", reason="anthropic is not installed")
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.providers.anthropic import AnthropicProvider

        model = AnthropicModel(NAME, provider=AnthropicProvider(base_url=server.url, api_key="none"))
    else:
        model_class = OpenAIResponsesModel if kind == "responses" else OpenAIChatModel
        model = model_class(NAME, provider=OpenAIProvider(base_url=f"{server.url}/v1", api_key="none"))
    return pydantic_ai.Agent(model, **fields)


@pytest.mark.parametrize("kind", ["chat completions", "responses", "messages"])
def test_tool_and_result(scripted_server, kind):
    server = scripted_server(WEATHER)
    result = agent(kind, server, tools=[get_weather]).run_sync("What is the weather in Oslo?")
    assert result.output == WEATHER_ANSWER
    check_weather(server.script.prompts)


@pytest.mark.parametrize("kind", ["chat completions", "responses", "messages"])
def test_typed_output(scripted_server, kind):
    server = scripted_server([[calls("final_result", '{"name": "Oslo"}')]])
    assert agent(kind, server, output_type=City).run_sync("What is the capital of Norway?").output == City(name="Oslo")
