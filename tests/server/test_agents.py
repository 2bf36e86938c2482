"""openai-agents, unmodified: an agent with a tool, through chat completions and through responses."""

from __future__ import annotations

import asyncio
from typing import Literal

import openai
import pydantic
import pytest

agents = pytest.importorskip("agents", reason="openai-agents is not installed")
MODEL = "mlx-gptoss-nano"
QUESTION = "What is the weather in Oslo?"
ANSWER = "It is 4 degrees and rainy in Oslo."


@pytest.fixture(scope="module", autouse=True)
def no_tracing():
    agents.set_tracing_disabled(True)


@agents.function_tool
def get_weather(location: str) -> str:
    """Get the current weather.

    Args:
        location: City name
    """
    return '{"temperature": 4, "condition": "rainy"}' if location == "Oslo" else "unknown"


@pytest.fixture(params=["chat completions", "responses"])
def agent(request, server):
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    model_class = agents.OpenAIResponsesModel if request.param == "responses" else agents.OpenAIChatCompletionsModel
    settings = agents.ModelSettings(parallel_tool_calls=False, temperature=0)
    return agents.Agent(
        "Weather", model=model_class(model=MODEL, openai_client=client), model_settings=settings, tools=[get_weather]
    )


def item_types(items):
    return [item.type for item in items if item.type != "reasoning_item"]


def test_run_calls_the_tool_and_answers(agent):
    result = asyncio.run(agents.Runner.run(agent, QUESTION))
    assert result.final_output == ANSWER
    assert item_types(result.new_items) == ["tool_call_item", "tool_call_output_item", "message_output_item"]
    usage = result.context_wrapper.usage
    assert usage.requests == 2 and usage.total_tokens == usage.input_tokens + usage.output_tokens > 0


def test_streamed_run(agent):
    async def run():
        result = agents.Runner.run_streamed(agent, QUESTION)
        deltas = [
            event.data.delta
            async for event in result.stream_events()
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
        ]
        return result, "".join(deltas)

    result, text = asyncio.run(run())
    assert result.final_output == text == ANSWER
    assert item_types(result.new_items) == ["tool_call_item", "tool_call_output_item", "message_output_item"]


def test_second_turn_sends_the_first_one_back(agent):
    async def run():
        first = await agents.Runner.run(agent, QUESTION)
        asked = {"role": "user", "content": "What is 12 + 30?"}
        return await agents.Runner.run(agent, [*first.to_input_list(), asked])

    assert asyncio.run(run()).final_output == "12 + 30 = 42"


def test_typed_output(agent):
    class City(pydantic.BaseModel):
        name: Literal["Oslo", "Paris"]

    reasoning = openai.types.Reasoning(effort="low", summary="auto")
    settings = agents.ModelSettings(reasoning=reasoning, response_include=["reasoning.encrypted_content"])
    typed = agents.Agent("Cities", model=agent.model, model_settings=settings, output_type=City)
    result = asyncio.run(agents.Runner.run(typed, "What is the capital of Norway?"))
    assert isinstance(result.final_output, City)


def test_previous_response_is_continued(server):
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    agent = agents.Agent("Sums", model=agents.OpenAIResponsesModel(model=MODEL, openai_client=client))

    async def run():
        first = await agents.Runner.run(agent, "What is 12 + 30?")
        return await agents.Runner.run(agent, "Add 5 to that.", previous_response_id=first.last_response_id)

    assert asyncio.run(run()).final_output == "42 + 5 = 47"
