"""litellm, unmodified: a tool's call and its result through each of its providers for local servers."""

from __future__ import annotations

import os

import pytest
from scripted import WEATHER, WEATHER_ANSWER, WEATHER_THOUGHT, check_weather

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch a price list when imported
litellm = pytest.importorskip("litellm", reason="litellm is not installed (240 MB)")
QUESTION = {"role": "user", "content": "What is the weather in Oslo?"}
PROVIDERS = {
    "openai/gpt-oss-20b": "/v1",
    "hosted_vllm/gpt-oss-20b": "/v1",
    "lm_studio/gpt-oss-20b": "/v1",
    "ollama_chat/gpt-oss:20b": "",
    "anthropic/claude-haiku-4-5": "",
}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    litellm.telemetry, litellm.suppress_debug_info = False, True


@pytest.fixture(params=PROVIDERS)
def ask(request, scripted_server):
    """Calls litellm.completion() on a server with the weather script."""
    server = scripted_server(WEATHER)
    base = server.url + PROVIDERS[request.param]

    def completion(**fields):
        return litellm.completion(model=request.param, api_base=base, api_key="none", num_retries=0, **fields)

    completion.prompts = server.script.prompts
    completion.model = request.param
    return completion


def test_tool_and_result(ask, weather_tool):
    message = ask(messages=[QUESTION], tools=[weather_tool]).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "get_weather" and '"Oslo"' in call.function.arguments
    assert message.reasoning_content == WEATHER_THOUGHT
    result = {"role": "tool", "tool_call_id": call.id, "content": "4 degrees"}
    answer = ask(messages=[QUESTION, message.model_dump(), result], tools=[weather_tool])
    assert answer.choices[0].message.content == WEATHER_ANSWER
    check_weather(ask.prompts)


def test_stream(ask, weather_tool):
    chunks = list(ask(messages=[QUESTION], tools=[weather_tool], stream=True))
    message = litellm.stream_chunk_builder(chunks).choices[0].message
    assert message.tool_calls[0].function.name == "get_weather"
    assert message.reasoning_content == WEATHER_THOUGHT
