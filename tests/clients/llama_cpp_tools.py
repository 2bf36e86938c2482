"""The cases of llama.cpp's test_tool_call.py."""

from __future__ import annotations

import json

from llama_cpp_cases import ASKED, CODE, PYTHON_TOOL, STREAMS, TEST_TOOL, WEATHER_TOOL, case, function
from scripted import calls, says, thinks


@case(*((f"{tool} {label}", {"tool": tool, **stream}) for tool in ("test", "python") for label, stream in STREAMS))
def case_completion_with_required_tool(server, tool, stream):
    arguments = {"test": '{"success": true}', "python": '{"code": "1"}'}[tool]
    server.reply(calls(tool, arguments))
    tools = [{"test": TEST_TOOL, "python": PYTHON_TOOL}[tool]]
    sampling = {"temperature": 0.0, "top_k": 1, "top_p": 1.0, "max_tokens": 512}
    choice = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "stream": stream}
    message = server.message({"messages": CODE, **choice, **sampling})
    (call,) = message["tool_calls"]
    assert message.get("content") in (None, "") and call["function"]["name"] == tool
    assert json.loads(call["function"]["arguments"]) == json.loads(arguments)


@case(
    *(
        (f"{label} {kind}", {"tools": tools, "choice": choice, **stream})
        for label, tools, choice in (
            ("no tools", None, None),
            ("auto", [TEST_TOOL], None),
            ("none", [PYTHON_TOOL], "none"),
        )
        for kind, stream in STREAMS
    )
)
def case_completion_without_tool_call(server, tools, choice, stream):
    message = server.message({"messages": CODE, "tools": tools, "tool_choice": choice, "stream": stream})
    assert message.get("tool_calls") is None and message["content"] == "A very long book."


@case(*STREAMS)
def case_weather(server, stream):
    server.reply(thinks("Well."), calls("get_current_weather", '{"location": "Istanbul"}'))
    asked = [{"role": "system", "content": "Use tools."}, {"role": "user", "content": "Weather in Istanbul?"}]
    (call,) = server.message({"messages": asked, "tools": [WEATHER_TOOL], "stream": stream})["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"location": "Istanbul"}


@case(*STREAMS)
def case_calc_result(server, stream):
    server.reply(says("It is 0.56."))
    tool = function("calculate", expression={"type": "string"})
    called = {"name": "calculate", "arguments": '{"expression":"sin(0.59)"}'}
    history = [
        {"role": "system", "content": "Round to two digits."},
        {"role": "user", "content": "What is the sine of 0.59?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": called}],
        },
        {"role": "tool", "name": "calculate", "content": "0.55636", "tool_call_id": "call_1"},
    ]
    message = server.message({"messages": history, "tools": [tool], "stream": stream})
    assert message.get("tool_calls") is None and message["content"] == "It is 0.56."


@case(*STREAMS)
def case_thoughts(server, stream):
    message = server.message({"messages": ASKED, "stream": stream})
    assert message["reasoning_content"] == "Well." and message["content"] == "A very long book."


@case(*STREAMS)
def case_hello_world(server, stream):
    server.reply(calls("python", '{"code": "print(\\"Hello, world!\\")"}'))
    (call,) = server.message({"messages": CODE, "tools": [PYTHON_TOOL], "stream": stream})["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"code": 'print("Hello, world!")'}


@case()
def case_malformed_tool_call_args_rejected(server):
    call = {"id": "call_1", "type": "function", "function": {"name": "test", "arguments": "{"}}
    history = [ASKED[1], {"role": "assistant", "content": None, "tool_calls": [call]}, ASKED[1]]
    assert server.post("/v1/chat/completions", {"max_tokens": 8, "messages": history}).status_code == 400
