"""Structured output and tool choice over HTTP, through OpenAI's own client. tests/harmony tests the enforcement."""

from __future__ import annotations

import json
from typing import Literal

import openai
import pydantic
import pytest

MODEL = "mlx-gptoss-nano"
SUM = "What is 12 + 30?"


class Sum(pydantic.BaseModel):
    total: int
    sign: Literal["plus", "minus"]


@pytest.fixture(scope="module")
def strict_tool():
    """Its argument is one of two cities, so that the small model ends its call whatever it was asked."""
    location = {"type": "string", "enum": ["Oslo", "Paris"]}
    parameters = {"type": "object", "properties": {"location": location}, "required": ["location"]}
    parameters["additionalProperties"] = False
    return {"type": "function", "function": {"name": "get_weather", "parameters": parameters, "strict": True}}


@pytest.fixture(scope="module")
def chat(client):
    def ask(content=SUM, **fields):
        return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}], **fields)

    return ask


def test_answer_is_parsed_into_a_class(client):
    messages = [{"role": "user", "content": SUM}]
    reply = client.chat.completions.parse(
        model=MODEL, messages=messages, response_format=Sum, reasoning_effort="low", temperature=1, seed=3
    )
    assert isinstance(reply.choices[0].message.parsed, Sum) and reply.choices[0].message.reasoning
    parsed = client.responses.parse(model=MODEL, input=SUM, text_format=Sum)
    assert isinstance(parsed.output_parsed, Sum) and parsed.text.format.name == "Sum"


def test_json_object_streams(chat):
    """Checks the beginning only: the small model was not trained on free JSON and does not end it."""
    chunks = chat(response_format={"type": "json_object"}, stream=True, max_tokens=70)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.startswith('{"')


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_must_be_made(chat, strict_tool, choice):
    reply = chat(tools=[strict_tool], tool_choice=choice, max_tokens=200)
    (call,) = reply.choices[0].message.tool_calls
    assert (call.function.name, reply.choices[0].finish_reason) == ("get_weather", "tool_calls")
    assert json.loads(call.function.arguments)["location"] in ("Oslo", "Paris")


def test_a_call_that_must_be_made_in_a_response(client, strict_tool):
    tool = {"type": "function", **strict_tool["function"]}
    named = {"type": "function", "name": "get_weather"}
    reply = client.responses.create(model=MODEL, input=SUM, tools=[tool], tool_choice=named, parallel_tool_calls=False)
    assert reply.output[-1].type == "function_call" and list(json.loads(reply.output[-1].arguments)) == ["location"]
    assert reply.tool_choice.name == "get_weather" and reply.tools[0].strict and not reply.parallel_tool_calls


def test_tool_choice_none_gives_no_call(chat, weather_tool):
    reply = chat("What is the weather in Oslo?", tools=[weather_tool], tool_choice="none")
    assert reply.choices[0].message.tool_calls is None and reply.choices[0].message.content


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}}, ""),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "all"}}, "tool_choice"),
    ],
)
def test_unenforceable_requests_are_rejected(chat, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(**fields)
    assert (refused.value.param or "").startswith(param)
