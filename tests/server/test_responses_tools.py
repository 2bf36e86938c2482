"""Tools of /v1/responses: namespaces, custom tools, kinds that are not served, and every form of tool_choice."""

from __future__ import annotations

import json
import re

import pytest

from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.server.errors import ApiError
from mlx_gptoss.server.openai.response_tools import ClientTool, ResponseTools

MODEL = "mlx-gptoss-nano"
WEATHER = "What is the weather in Oslo?"
LARK = {"type": "grammar", "syntax": "lark", "definition": 'start: "a" | "b"'}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": LARK}
SEARCH = {"type": "web_search", "external_web_access": False}


def function(name, **fields):
    return {"type": "function", "name": name, "parameters": {"type": "object", "properties": {}}, **fields}


def namespace(name, *tools, **fields):
    return {"type": "namespace", "name": name, "tools": list(tools), **fields}


def test_namespaces_are_flattened():
    tools = ResponseTools(
        [
            namespace("crm", function("find", description="Finds."), function("add"), PATCH, description="Customers."),
            namespace("mcp__wiki__", function("find")),
            function("crm__find"),
            function("find"),
        ]
    )
    names = {tool.name: tool.description for tool in tools.functions}
    assert list(names) == ["crm__find", "find", "crm__find_", "crm__add", "crm__apply_patch", "mcp__wiki__find"]
    assert names["crm__find_"] == "Customers.\n\nFinds." and names["crm__add"] == ""
    assert tools.client_tool("crm__find_") == ClientTool("find", "crm")
    assert tools.client_tool("crm__find") == ClientTool("crm__find")
    assert tools.client_tool("crm__apply_patch") == ClientTool("apply_patch", "crm", custom=True)
    assert tools.recipient("find", "crm") == "functions.crm__find_"
    assert tools.recipient("find", None) == "functions.find"
    assert tools.recipient("gone", "crm") == "functions.crm__gone"


def test_other_kinds_are_left_out_while_functions_remain():
    kinds = [SEARCH, {"type": "local_shell"}, {"type": "image_generation", "output_format": "png"}]
    assert ResponseTools([*kinds, PATCH]).left_out == {"web_search", "local_shell", "image_generation"}
    assert ResponseTools([namespace("a", function("b"), {"type": "mcp"})]).left_out == {"mcp"}
    with pytest.raises(ApiError, match="image_generation, local_shell, web_search, which is not served"):
        ResponseTools(kinds)


def test_a_tool_given_twice_counts_once():
    assert len(ResponseTools([function("a"), function("a"), namespace("n", PATCH, PATCH)]).functions) == 2
    for other in (function("a", description="x"), {"type": "custom", "name": "a"}):
        with pytest.raises(InvalidRequest, match=r"tools\[1\]: two tools are named 'a'"):
            ResponseTools([function("a"), other])


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ("required", "required"),
        ({"type": "function", "name": "a"}, {"type": "function", "name": "a"}),
        ({"type": "function", "function": {"name": "a"}}, {"type": "function", "name": "a"}),
        ({"type": "custom", "name": "apply_patch"}, {"type": "function", "name": "apply_patch"}),
        ({"type": "function", "name": "b", "namespace": "n"}, {"type": "function", "name": "n__b"}),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "apply_patch"}, SEARCH]},
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "apply_patch"}]},
        ),
        (
            {"type": "allowed_tools", "tools": [{"type": "namespace", "name": "n"}, {"type": "function", "name": "a"}]},
            {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": name} for name in ("n__b", "n__c", "a")],
            },
        ),
    ],
)
def test_choices(choice, wanted):
    tools = ResponseTools([function("a"), PATCH, namespace("n", function("b"), function("c"))])
    assert tools.choice(choice) == wanted


def create(client, **fields):
    return client.responses.create(**{"model": MODEL, "input": WEATHER, "max_output_tokens": 60, **fields})


def test_call_of_a_tool_in_a_namespace(client, weather_tool):
    """The call has the tool's own name, and is found again when the client sends it back."""
    tools = [SEARCH, namespace("weather", {"type": "function", **weather_tool["function"], "strict": True})]
    chosen = {"type": "function", "name": "get_weather", "namespace": "weather"}
    events = list(create(client, tools=tools, tool_choice=chosen, stream=True))
    added = [event.item for event in events if event.type == "response.output_item.added"][-1]
    call = events[-1].response.output[-1]
    assert (added.name, added.namespace, added.arguments) == ("get_weather", "weather", "")
    assert (call.type, call.name, call.namespace) == ("function_call", "get_weather", "weather")
    assert set(json.loads(call.arguments)) == {"location"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "4 degrees"}
    asked = [{"role": "user", "content": WEATHER}, *events[-1].response.output, result]
    items = [item if isinstance(item, dict) else item.model_dump() for item in asked]
    returned = client.responses.input_tokens.count(input=items, tools=tools).input_tokens
    previous = events[-1].response.id
    stored = client.responses.input_tokens.count(input=[result], tools=tools, previous_response_id=previous)
    assert returned == stored.input_tokens


GRAMMARS = [
    None,
    {"type": "text"},
    {"type": "grammar", "syntax": "regex", "definition": "HELLO!{2,5}"},
    {"type": "grammar", "syntax": "lark", "definition": 'start: "HELLO" MARK MARK MARK? MARK? MARK?\nMARK: "!"'},
]


@pytest.mark.parametrize("form", GRAMMARS, ids=["none", "text", "regex", "lark"])
def test_call_of_a_custom_tool(client, form):
    tool = {"type": "custom", "name": "shout", **({} if form is None else {"format": form})}
    chosen = {"type": "custom", "name": "shout"}
    events = list(create(client, tools=[tool], tool_choice=chosen, stream=True))
    call = events[-1].response.output[-1]
    assert (call.type, call.name) == ("custom_tool_call", "shout")
    assert form in GRAMMARS[:2] or re.fullmatch("HELLO!{2,5}", call.input)
    deltas = [event.delta for event in events if event.type == "response.custom_tool_call_input.delta"]
    (done,) = [event for event in events if event.type == "response.custom_tool_call_input.done"]
    assert "".join(deltas) == done.input == call.input
    result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "HELLO"}
    continued = create(client, input=[result], tools=[tool], previous_response_id=events[-1].response.id)
    assert continued.status in ("completed", "incomplete")


def test_tools_in_an_item(client, weather_tool):
    tools = [{"type": "function", **weather_tool["function"]}]
    item = {"type": "additional_tools", "role": "developer", "tools": tools}
    reply = create(client, input=[item, {"role": "user", "content": WEATHER}])
    assert reply.output[-1].name == "get_weather"
    assert reply.usage.input_tokens == create(client, tools=tools).usage.input_tokens
