"""The scripted server: a turn with a call, its result, and a script that a mask forbids."""

from __future__ import annotations

from contextlib import ExitStack

import openai
import pytest
import scripted
from scripted import calls, says, thinks

TOOL = {
    "type": "function",
    "function": {
        "name": "shell",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
}


def ask(server, messages, **fields):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    return client.chat.completions.create(model="mlx-gptoss-nano", messages=messages, **fields).choices[0].message


def test_replies_come_in_order(scripted_server):
    server = scripted_server([[thinks("I list it."), calls("shell", '{"command": "ls"}')], [says("Two files.")]])
    asked = {"role": "user", "content": "What is here?"}
    message = ask(server, [asked], tools=[TOOL])
    assert message.tool_calls[0].function.arguments == '{"command": "ls"}' and message.reasoning == "I list it."
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "a.txt b.txt"}
    assert ask(server, [asked, message, result], tools=[TOOL]).content == "Two files."
    assert "a.txt b.txt" in server.script.prompts[1] and "I list it." in server.script.prompts[1]


def test_a_token_outside_the_mask_fails():
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    strict["function"]["parameters"] = {**TOOL["function"]["parameters"], "additionalProperties": False}
    server = None
    with pytest.raises(AssertionError, match="the mask does not allow"), ExitStack() as stack:
        server = stack.enter_context(scripted.serving_script([[calls("shell", '{"path": 1}')]]))
        with pytest.raises(openai.InternalServerError):
            ask(server, [{"role": "user", "content": "What is here?"}], tools=[strict])
    assert server is not None and "it allows 1 tokens" in server.script.failures[0]
