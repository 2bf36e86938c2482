"""MCP servers made with the mcp package, over stdio and over HTTP, called by the loop."""

from __future__ import annotations

import asyncio
import json
import sys

import psutil
import pytest

from mlx_gptoss.chat.reply import ToolCall
from mlx_gptoss.harmony.messages import Function, Message
from mlx_gptoss.server.hosted.errors import ToolError
from mlx_gptoss.server.hosted.events import ApprovalRequest, HostedCall, HostedCallDelta, HostedResult, ToolList
from mlx_gptoss.server.hosted.mcp_servers import McpServers
from mlx_gptoss.server.hosted.settings import HostedSettings, McpServer, McpSettings

NEVER = {"require_approval": "never"}


@pytest.fixture
def server(mcp_program, monkeypatch):
    monkeypatch.setenv("NOT_PASSED", "leaked")
    return McpServer("calc", sys.executable, (mcp_program, "stdio"), {"SECRET": "hunter2"}, timeout_s=30)


@pytest.fixture
def settings(server):
    return HostedSettings(mcp=McpSettings({"calc": server}))


def call(name, arguments):
    return Message("assistant", json.dumps(arguments), "commentary", f"functions.{name}", "<|constrain|>json")


def say(text):
    return Message("assistant", text, "final")


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def children():
    return {one.pid for one in psutil.Process().children(recursive=True)}


def test_a_call_over_stdio(answer, settings):
    before = children()
    tools = [{"type": "mcp", "server_label": "calc", **NEVER}]
    replies = [[call("calc__add", {"a": 40, "b": 2})], [call("calc__secret", {})], [say("It is 42.")]]
    events, model = answer(settings, tools, replies)
    assert isinstance(events[0], ToolList) and events[0].error is None
    assert {tool["name"] for tool in events[0].tools} == {"add", "fail", "secret", "sleep", "die"}
    one, _other = of(HostedCall, events)
    assert (one.tool, one.server_label, one.name, json.loads(one.arguments)) == (
        "mcp",
        "calc",
        "add",
        {"a": 40, "b": 2},
    )
    assert [result.text for result in of(HostedResult, events)] == ["42", "hunter2"]
    assert not of(ToolCall, events) and {delta.name for delta in of(HostedCallDelta, events)} == {"add", "secret"}
    assert "// Add two numbers.\ntype calc__add = (_: {\na: number,\nb: number,\n}) => any;" in model.prompt(0)
    assert "<|start|>functions.calc__add to=assistant<|channel|>commentary<|message|>42<|end|>" in model.prompt(1)
    assert children() == before  # the server has ended


def test_a_call_over_http_to_a_url_of_the_request(answer, mcp_url):
    settings = HostedSettings(mcp=McpSettings(allow_urls=(mcp_url.rpartition("/")[0] + "/",)))
    tools = [{"type": "mcp", "server_label": "web", "server_url": mcp_url, "headers": {"X-Key": "1"}, **NEVER}]
    events, _ = answer(settings, tools, [[call("web__add", {"a": 1, "b": 2})], [say("3")]])
    (result,) = of(HostedResult, events)
    assert (result.text, result.error, result.call.server_label) == ("3", None, "web")


def test_a_server_of_the_configuration_over_http(answer, mcp_url):
    settings = HostedSettings(mcp=McpSettings({"web": McpServer("web", url=mcp_url)}))
    tools = [{"type": "mcp", "server_label": "web", "allowed_tools": ["add"], **NEVER}]
    events, model = answer(settings, tools, [[call("web__add", {"a": 1, "b": 2})], [say("3")]])
    assert [tool["name"] for tool in events[0].tools] == ["add"]
    assert "web__fail" not in model.prompt(0)
    assert [one.text for one in of(HostedResult, events)] == ["3"]


def test_errors_are_results(answer, settings):
    tools = [{"type": "mcp", "server_label": "calc", **NEVER}]
    replies = [
        [call("calc__fail", {"why": "broken"})],
        [call("calc__add", {"a": "x"})],
        [call("calc__die", {})],
        [call("calc__add", {"a": 1, "b": 1})],
        [say("Done.")],
    ]
    events, model = answer(settings, tools, replies)
    results = of(HostedResult, events)
    assert "broken" in results[0].error and "broken" in model.prompt(1)
    assert results[1].error is not None and results[2].error is not None
    assert results[3].text == "2"  # a new connection


def test_a_server_that_cannot_be_reached_leaves_its_tools_out(answer):
    settings = HostedSettings(mcp=McpSettings({"gone": McpServer("gone", "/nonexistent/server")}))
    events, model = answer(settings, [{"type": "mcp", "server_label": "gone"}], [[say("Without.")]])
    assert "nonexistent" in events[0].error and not events[0].tools
    assert "gone__" not in model.prompt(0)


def test_a_call_that_needs_approval_waits_for_the_next_request(answer, settings, scripted_model):
    tools = [{"type": "mcp", "server_label": "calc", "require_approval": {"never": {"tool_names": ["secret"]}}}]
    replies = [[call("calc__secret", {})], [call("calc__add", {"a": 2, "b": 3})]]
    events, _ = answer(settings, tools, replies)
    (request,) = of(ApprovalRequest, events)
    assert (request.call.name, json.loads(request.call.arguments)) == ("add", {"a": 2, "b": 3})
    assert [one.call.name for one in of(HostedResult, events)] == ["secret"]
    assert events[-1].finish_reason == "stop"
    assert events[-1].messages[-1].recipient == "functions.calc__add"
    approved = ToolCall("call_1", "calc__add", '{"a": 2, "b": 3}')
    events, model = answer(settings, tools, [[say("5")]], approved=(approved,))
    assert [one.text for one in of(HostedResult, events)] == ["5"]
    assert "<|start|>functions.calc__add to=assistant<|channel|>commentary<|message|>5<|end|>" in model.prompt(0)


def test_names_of_the_clients_functions_come_first(answer, settings):
    tools = [{"type": "mcp", "server_label": "calc", **NEVER}]
    replies = [[call("calc__add_", {"a": 1, "b": 1})], [call("calc__add", {})]]
    events, _ = answer(settings, tools, replies, functions=[Function("calc__add")])
    assert [one.text for one in of(HostedResult, events)] == ["2"]
    assert [one.name for one in of(ToolCall, events)] == ["calc__add"]


def test_a_slow_call_is_given_up(server):
    async def work():
        slow = McpServer("calc", server.command, server.args, timeout_s=0.5)
        servers = McpServers(McpSettings({"calc": slow}))
        (tools,) = await servers.tools_of([slow])
        try:
            with pytest.raises(ToolError, match=r"no result within 0\.5 seconds"):
                await tools.call("sleep", {"seconds": 30})
        finally:
            await servers.close()

    asyncio.run(work())
    assert not [one for one in psutil.Process().children(recursive=True) if "stdio" in one.cmdline()]


def test_long_results_are_cut(mcp_program, answer):
    server = McpServer("calc", sys.executable, (mcp_program, "stdio"), {"SECRET": "s" * 5000})
    settings = HostedSettings(mcp=McpSettings({"calc": server}, max_result_chars=100))
    events, _ = answer(
        settings, [{"type": "mcp", "server_label": "calc", **NEVER}], [[call("calc__secret", {})], [say("x")]]
    )
    (result,) = of(HostedResult, events)
    assert result.text.startswith("s" * 100 + "\n[... 5000 characters in all") and len(result.text) < 200
