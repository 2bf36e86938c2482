"""Hosted tools through /v1/responses, with OpenAI's own client."""

from __future__ import annotations

import json
import time

import openai
import psutil
import pytest

from mlx_gptoss.harmony.messages import Message
from mlx_gptoss.server.hosted.settings import HostedSettings, McpServer, McpSettings, PythonSettings

NO_SANDBOX = HostedSettings(python=PythonSettings(sandbox="none"))
PYTHON = [{"type": "code_interpreter", "container": {"type": "auto"}}]
SEARCH = [{"type": "web_search"}]


def think(text):
    return Message("assistant", text, "analysis")


def say(text):
    return Message("assistant", text, "final")


def call(recipient, arguments, channel="analysis"):
    return Message("assistant", arguments, channel, recipient, "code" if recipient == "python" else "<|constrain|>json")


@pytest.fixture
def calc(mcp_url):
    """Settings with one MCP server, reached over HTTP."""
    return HostedSettings(mcp=McpSettings({"calc": McpServer("calc", url=mcp_url)}))


def test_a_web_search(scripted_server, browser_settings, web):
    replies = [
        [think("I look."), call("browser.search", '{"query": "planets"}')],
        [call("browser.open", '{"id": 0}')],
        [call("browser.find", '{"pattern": "eight"}')],
        [say("There are eight【1†L4】.")],
    ]
    client, model = scripted_server(HostedSettings(browser=browser_settings), replies)
    response = client.responses.create(model="any", input="How many planets?", tools=SEARCH)
    kinds = ["reasoning", "web_search_call", "web_search_call", "web_search_call", "message"]
    assert [item.type for item in response.output] == kinds
    search, opened, found = response.output[1:4]
    assert search.action.type == "search" and search.action.query == "planets"
    assert [source.url for source in search.action.sources] == [f"{web.url}/planets", f"{web.url}/moons"]
    assert opened.action.url == f"{web.url}/planets" and found.action.pattern == "eight"
    assert {item.status for item in response.output[1:]} == {"completed"}
    assert response.output_text == f"There are eight ([127.0.0.1]({web.url}/planets))."
    (citation,) = response.output[-1].content[0].annotations
    assert (citation.type, citation.url, citation.title) == ("url_citation", f"{web.url}/planets", "The planets")
    assert response.output_text[citation.start_index : citation.end_index].startswith("([127.0.0.1](")
    assert response.usage.input_tokens == sum(map(len, model.runner.prompts))
    assert len({item.id for item in response.output}) == 5


def test_the_events_of_a_stream(scripted_server):
    client, _ = scripted_server(NO_SANDBOX, [[call("python", "print(6 * 7)")], [say("It is 42.")]])
    events = list(client.responses.create(model="any", input="6 * 7?", tools=PYTHON, stream=True))
    names = [event.type for event in events]
    short = [name.removeprefix("response.") for index, name in enumerate(names) if name != (["", *names])[index]]
    assert short == [
        "created",
        "in_progress",
        "output_item.added",
        "code_interpreter_call.in_progress",
        "code_interpreter_call_code.delta",
        "code_interpreter_call_code.done",
        "code_interpreter_call.interpreting",
        "code_interpreter_call.completed",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.code_interpreter_call_code.delta"]
    assert "".join(deltas) == "print(6 * 7)"
    added = next(event.item for event in events if event.type == "response.output_item.added")
    done = next(event.item for event in events if event.type == "response.output_item.done")
    assert added.id == done.id and added.container_id == done.container_id and added.status == "in_progress"
    assert done.outputs[0].logs == "42" and done.code == "print(6 * 7)"
    assert events[-1].response.output[0] == done


def test_a_session_goes_on_with_the_conversation(scripted_server, browser_settings, web):
    settings = HostedSettings(browser=browser_settings, python=PythonSettings(sandbox="none"))
    replies = [
        [call("python", "x = 41")],
        [call("browser.open", json.dumps({"id": f"{web.url}/planets"}))],
        [say("Set.")],
        [call("python", "x + 1")],
        [call("browser.find", '{"pattern": "Venus", "cursor": 0}')],
        [say("42")],
        [call("python", "x + 2")],
        [say("43")],
    ]
    client, _ = scripted_server(settings, replies)
    tools = PYTHON + SEARCH
    first = client.responses.create(model="any", input="Set x.", tools=tools)
    second = client.responses.create(model="any", input="Add 1.", tools=tools, previous_response_id=first.id)
    assert second.output[0].outputs[0].logs == "42" and second.output[1].action.url == f"{web.url}/planets"
    container = second.output[0].container_id
    assert container == first.output[0].container_id
    tools = [{"type": "code_interpreter", "container": container}]
    third = client.responses.create(model="any", input="Add 2.", tools=tools, store=False)
    assert third.output[0].outputs[0].logs == "43"
    with pytest.raises(openai.BadRequestError, match="which has ended"):
        tools[0]["container"] = "cntr_unknown"
        client.responses.create(model="any", input="x", tools=tools)


def test_items_sent_back_instead_of_an_id(scripted_server):
    replies = [[call("python", "print(1)")], [say("One.")], [say("As before.")]]
    client, _model = scripted_server(NO_SANDBOX, replies)
    first = client.responses.create(model="any", input="1?", tools=PYTHON, store=False)
    items = [{"role": "user", "content": "1?"}, *(item.model_dump() for item in first.output)]
    items += [{"role": "user", "content": "Again?"}]
    assert client.responses.create(model="any", input=items, tools=PYTHON).output_text == "As before."


def test_mcp(scripted_server, calc):
    replies = [[call("functions.calc__add", '{"a": 40, "b": 2}', "commentary")], [say("42")]]
    client, _ = scripted_server(calc, replies)
    tools = [{"type": "mcp", "server_label": "calc", "require_approval": "never"}]
    events = list(client.responses.create(model="any", input="40 + 2?", tools=tools, stream=True))
    names = list(dict.fromkeys(event.type.removeprefix("response.") for event in events))
    assert names[2:10] == [
        "output_item.added",
        "mcp_list_tools.in_progress",
        "mcp_list_tools.completed",
        "output_item.done",
        "mcp_call.in_progress",
        "mcp_call_arguments.delta",
        "mcp_call_arguments.done",
        "mcp_call.completed",
    ]
    listed, called, _ = events[-1].response.output
    assert {tool.name for tool in listed.tools} >= {"add", "fail"} and called.output == "42"
    assert called.name == "add" and called.server_label == "calc"


@pytest.mark.parametrize("approve", [True, False])
@pytest.mark.parametrize("stored", [True, False])
def test_approvals(scripted_server, calc, approve, stored):
    replies = [[think("Sum."), call("functions.calc__add", '{"a": 2, "b": 3}', "commentary")], [say("Done.")]]
    client, model = scripted_server(calc, replies)
    tools = [{"type": "mcp", "server_label": "calc"}]
    first = client.responses.create(model="any", input="2 + 3?", tools=tools, store=stored)
    assert [item.type for item in first.output] == ["mcp_list_tools", "reasoning", "mcp_approval_request"]
    request = first.output[-1]
    answer = {
        "type": "mcp_approval_response",
        "approval_request_id": request.id,
        "approve": approve,
        "reason": "no way",
    }
    if stored:
        more = {"input": [answer], "previous_response_id": first.id}
    else:
        more = {"input": [{"role": "user", "content": "2 + 3?"}, *(i.model_dump() for i in first.output), answer]}
    second = client.responses.create(model="any", tools=tools, **more)
    assert second.output_text == "Done."
    assert [item.output for item in second.output if item.type == "mcp_call"] == (["5"] if approve else [])
    result = "5" if approve else "error: the user did not approve this call: no"
    prompt = model.prompt(1)
    assert f"<|start|>functions.calc__add to=assistant<|channel|>commentary<|message|>{result}<|end|>" in prompt
    assert (
        prompt.count("<|start|>assistant<|channel|>commentary to=functions.calc__add")
        + prompt.count("<|start|>assistant to=functions.calc__add<|channel|>commentary")
        == 1
    )


def test_an_answer_to_an_unknown_request(scripted_server, calc):
    client, _ = scripted_server(calc, [])
    answer = {"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": True}
    with pytest.raises(openai.BadRequestError, match="no such request is known") as caught:
        client.responses.create(
            model="any",
            tools=[{"type": "mcp", "server_label": "calc"}],
            input=[{"role": "user", "content": "x"}, answer],
        )
    assert caught.value.param == "input[1].approval_request_id"


@pytest.mark.parametrize("choice", ["required", {"type": "code_interpreter"}, "auto"])
def test_choices_of_tools(scripted_server, choice):
    client, _ = scripted_server(NO_SANDBOX, [[call("python", "1")], [say("One.")]])
    response = client.responses.create(model="any", input="x", tools=PYTHON, tool_choice=choice)
    assert response.output_text == "One."


def test_nothing_runs_that_is_not_switched_on(scripted_server):
    """Without its tool in the request, or without the tool in the settings, a call of python is not run."""
    client, model = scripted_server(NO_SANDBOX, [[call("python", "1")]])
    response = client.responses.create(model="any", input="x")
    assert [item.type for item in response.output] == ["function_call"]
    weather = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
    model.will_say([say("No.")])
    raw = client.responses.with_raw_response.create(model="any", input="x", tools=[*SEARCH, weather])
    assert raw.headers["X-Ignored-Fields"] == "tools[].web_search"
    with pytest.raises(openai.BadRequestError, match="web_search, which is not served"):
        client.responses.create(model="any", input="x", tools=SEARCH)


def test_a_client_that_leaves_ends_the_tool(scripted_server, tmp_path):
    ticks = tmp_path / "ticks"
    code = f"import time\nwhile True:\n    open({str(ticks)!r}, 'a').write('.')\n    time.sleep(0.05)"
    client, model = scripted_server(NO_SANDBOX, [[call("python", code)]])
    stream = client.responses.create(model="any", input="x", tools=PYTHON, stream=True)
    for event in stream:
        if event.type == "response.code_interpreter_call.interpreting":
            break
    while not ticks.exists():
        time.sleep(0.01)
    stream.close()
    deadline = time.monotonic() + 60
    while psutil.Process().children(recursive=True) and time.monotonic() < deadline:
        time.sleep(0.02)
    size = ticks.stat().st_size
    time.sleep(0.3)
    assert ticks.stat().st_size == size
    assert not model.service.open_queues and not model.service.running_responses


def test_in_the_background_and_cancelled(scripted_server):
    client, model = scripted_server(NO_SANDBOX, [[call("python", "while True: pass")]])
    response = client.responses.create(model="any", input="x", tools=PYTHON, background=True)
    while client.responses.retrieve(response.id).output == []:
        time.sleep(0.02)
        if any("code_interpreter_call" in str(one.response) for one in model.service.running_responses.values()):
            break
    assert client.responses.cancel(response.id).status == "cancelled"
    while model.service.running_responses:
        time.sleep(0.02)
    assert client.responses.retrieve(response.id).status == "cancelled"
