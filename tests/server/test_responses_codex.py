"""A conversation in the shape of Codex's requests: every field and kind of tool that it sends, stateless, streamed."""

from __future__ import annotations

import json

import pytest

LARK = """\
start: begin hunk+ end
begin: "*** Begin Patch" LF
hunk: "*** Delete File: " /(.+)/ LF
end: "*** End Patch" LF?
LF: "\\n"
"""
SCHEMA = {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]}
TOOLS = [
    {"type": "function", "name": "exec_command", "description": "Runs.", "strict": False, "parameters": SCHEMA},
    {"type": "namespace", "name": "mcp__weather__", "description": "Weather.", "tools": [
        {"type": "function", "name": "get_weather", "description": "Get the current weather.", "strict": False,
         "parameters": SCHEMA},
    ]},
    {"type": "custom", "name": "apply_patch", "description": "Edits files. Do not wrap the patch in JSON.",
     "format": {"type": "grammar", "syntax": "lark", "definition": LARK}},
    {"type": "local_shell"},
    {"type": "web_search", "external_web_access": False, "search_context_size": "low"},
    {"type": "image_generation", "output_format": "png"},
    {"type": "tool_search", "execution": "client", "description": "Finds tools.", "parameters": SCHEMA},
]  # fmt: skip
INPUT = [
    {
        "type": "message",
        "role": "developer",
        "content": [{"type": "input_text", "text": "<permissions instructions>Ask first.</permissions instructions>"}],
    },
    {
        "type": "message",
        "role": "user",
        "content": [{"type": "input_text", "text": "<environment_context><cwd>/tmp</cwd></environment_context>"}],
    },
    {
        "type": "message",
        "role": "user",
        "content": [{"type": "input_text", "text": "What is the weather in Oslo?"}],
    },
]


def request(items, **fields):
    return {
        "model": "gpt-5.2-codex",
        "instructions": "You are Codex, a coding agent.",
        "input": items,
        "tools": TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "xhigh", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199a213-81a0-7e50",
        "client_metadata": {"x-codex-installation-id": "1"},
        "text": {"verbosity": "low"},
        "service_tier": "priority",
        **fields,
    }


def items_of(http, body):
    """The completed items of a streamed response, as Codex reads them."""
    with http.stream("POST", "/v1/responses", json=body, headers={"accept": "text/event-stream"}) as reply:
        assert reply.status_code == 200, reply.read()
        lines = [line for line in reply.iter_lines() if line.startswith("data: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    assert {"id", "usage"} <= events[-1]["response"].keys()
    return [event["item"] for event in events if event["type"] == "response.output_item.done"]


def replayed(items):
    """The items as Codex sends them back: without ids and without the text of reasoning."""
    return [{key: value for key, value in item.items() if key not in ("id", "status", "content")} for item in items]


@pytest.mark.parametrize("tool", [*TOOLS[:1], *TOOLS[1]["tools"]], ids=lambda tool: tool["name"])
def test_call_and_second_turn(http, tool):
    namespace = {} if tool in TOOLS else {"namespace": TOOLS[1]["name"]}
    choice = {"type": "function", "name": tool["name"], **namespace}
    items = items_of(http, request(INPUT, tool_choice=choice, max_output_tokens=200))
    call = items[-1]
    assert (call["type"], call["name"], call.get("namespace")) == (
        "function_call",
        tool["name"],
        namespace.get("namespace"),
    )
    assert all(item["summary"] and item["encrypted_content"] for item in items if item["type"] == "reasoning")
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "4 degrees"}
    image = {"type": "function_call_output", "call_id": call["call_id"], "output": [
        {"type": "input_text", "text": "4 degrees"}, {"type": "input_image", "image_url": "data:image/png;base64,"},
    ]}  # fmt: skip
    for result in (output, image):
        again = items_of(http, request([*INPUT, *replayed(items), result], max_output_tokens=20))
        assert again and again[0]["type"] in ("reasoning", "message", "function_call", "custom_tool_call")


def test_custom_call_and_second_turn(http):
    body = request(INPUT, tool_choice={"type": "custom", "name": "apply_patch"}, max_output_tokens=200)
    call = items_of(http, body)[-1]
    assert (call["type"], call["name"]) == ("custom_tool_call", "apply_patch")
    assert call["input"].startswith("*** Begin Patch\n*** Delete File: ")
    result = {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": '{"output": "Done!"}'}
    assert items_of(http, request([*INPUT, *replayed([call]), result], max_output_tokens=20))


def test_history_of_another_provider(http):
    """A session that began elsewhere: encrypted reasoning, hosted searches, local shell calls."""
    history = [
        {
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": "**Looking**"}],
            "encrypted_content": "gAAA",
        },
        {
            "type": "local_shell_call",
            "call_id": "1",
            "status": "completed",
            "action": {"type": "exec", "command": ["ls"]},
        },
        {"type": "local_shell_call_output", "call_id": "1", "output": "README"},
        {"type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "Oslo"}},
        {"type": "tool_search_call", "call_id": "2", "execution": "client", "arguments": {"query": "x"}},
        {"type": "tool_search_output", "call_id": "2", "status": "completed", "execution": "client", "tools": []},
        {"type": "ghost_snapshot", "ghost_commit": {"id": "abc"}},
    ]
    reply = http.post("/v1/responses", json=request([*INPUT, *history], stream=False, max_output_tokens=20))
    assert reply.status_code == 200, reply.text
    ignored = set(reply.headers["X-Ignored-Fields"].split(", "))
    assert {"client_metadata", "input[].web_search_call", "input[].ghost_snapshot", "tools[].local_shell"} <= ignored
    assert "input[].local_shell_call" not in ignored


def test_compaction(http):
    body = {"model": "gpt-5.2-codex", "input": INPUT, "instructions": "You are Codex.", "tools": TOOLS}
    reply = http.post(
        "/v1/responses/compact", json={**body, "parallel_tool_calls": True, "reasoning": {"effort": "low"}}
    )
    assert reply.status_code == 200, reply.text
    assert [item["type"] for item in reply.json()["output"]] == ["message"] * 3 + ["compaction"]
    again = http.post("/v1/responses", json=request(reply.json()["output"], stream=False, max_output_tokens=20))
    assert again.status_code == 200, again.text
