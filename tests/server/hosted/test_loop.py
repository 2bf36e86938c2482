"""The loop of replies and calls, with a model whose replies are scripted and the real engine, parser and tools."""

from __future__ import annotations

import time

import pytest

from mlx_gptoss.chat.reply import Finished, ReasoningDelta, TextDelta, ToolCall, ToolCallDelta
from mlx_gptoss.harmony.messages import Function, Message
from mlx_gptoss.server.errors import ApiError
from mlx_gptoss.server.hosted.events import Citation, HostedCall, HostedCallDelta, HostedResult
from mlx_gptoss.server.hosted.settings import BrowserSettings, HostedSettings, PythonSettings

SEARCH = [{"type": "web_search"}]
PYTHON = [{"type": "code_interpreter", "container": {"type": "auto"}}]
NO_SANDBOX = HostedSettings(python=PythonSettings(sandbox="none"))


def think(text):
    return Message("assistant", text, "analysis")


def say(text):
    return Message("assistant", text, "final")


def call(recipient, arguments, channel="analysis"):
    return Message("assistant", arguments, channel, recipient, "code" if recipient == "python" else "<|constrain|>json")


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def test_search_open_and_a_cited_answer(answer, browser_settings, web):
    events, model = answer(
        HostedSettings(browser=browser_settings),
        SEARCH,
        [
            [think("I look."), call("browser.search", '{"query": "planets"}')],
            [call("browser.open", '{"id": 0, "cursor": 0}')],
            [think("Eight."), say("There are eight【1†L4-L5】. Really.")],
        ],
    )
    calls, results = of(HostedCall, events), of(HostedResult, events)
    assert [(one.name, dict(one.action)) for one in calls] == [
        ("browser.search", {"type": "search", "query": "planets"}),
        ("browser.open", {"type": "open_page", "url": f"{web.url}/planets"}),
    ]
    assert not of((ToolCall, ToolCallDelta), events)
    assert "".join(one.text for one in of(HostedCallDelta, events) if one.id == calls[0].id) == calls[0].arguments
    assert results[0].sources == [f"{web.url}/planets", f"{web.url}/moons"] and results[0].error is None
    assert results[1].text.startswith(f"[1] The planets ({web.url}/planets)\n**viewing lines [0 - ")
    text = "".join(event.text for event in of(TextDelta, events))
    assert text == f"There are eight ([127.0.0.1]({web.url}/planets)). Really."
    (citation,) = of(Citation, events)
    assert (citation.url, citation.title) == (f"{web.url}/planets", "The planets")
    assert text[citation.start_index : citation.end_index] == f"([127.0.0.1]({web.url}/planets))"
    assert "".join(event.text for event in of(ReasoningDelta, events)) == "I look.Eight."
    assert "namespace browser" in model.prompt(0)
    assert model.prompt(1).endswith(results[0].text + "<|end|><|start|>assistant")
    assert "<|start|>browser.search to=assistant<|channel|>analysis<|message|>[0] planets" in model.prompt(1)
    assert "<|start|>browser.open to=assistant<|channel|>analysis<|message|>[1] The planets" in model.prompt(2)


def test_python_and_the_sum_of_the_counts(answer):
    events, model = answer(
        NO_SANDBOX,
        PYTHON,
        [[call("python", "x = 6")], [call("python", "print(x * 7)")], [say("It is 42.")]],
    )
    calls, results = of(HostedCall, events), of(HostedResult, events)
    assert [one.arguments for one in calls] == ["x = 6", "print(x * 7)"]
    assert calls[0].container_id == calls[1].container_id and calls[0].container_id.startswith("cntr_")
    assert [one.text for one in results][1] == "42"
    (end,) = of(Finished, events)
    assert end is events[-1] and end.finish_reason == "stop"
    assert end.usage.prompt_tokens == sum(map(len, model.runner.prompts))
    assert end.usage.completion_tokens == len(end.tokens)
    assert [message.name or message.recipient or message.content for message in end.messages] == [
        "python",
        "python",
        "python",
        "python",
        "It is 42.",
    ]
    assert "Internet access for this session is UNKNOWN" in model.prompt(0)
    assert model.prompt(2).endswith(
        "<|start|>python to=assistant<|channel|>analysis<|message|>42<|end|><|start|>assistant"
    )


def test_a_function_of_the_client_ends_the_turn(answer):
    weather = Function("get_weather", "", {"type": "object", "properties": {"place": {"type": "string"}}})
    events, _ = answer(
        NO_SANDBOX,
        PYTHON,
        [[call("python", "1")], [call("functions.get_weather", '{"place": "Oslo"}', "commentary")]],
        functions=[weather],
    )
    (ours,) = of(ToolCall, events)
    assert (ours.name, ours.arguments) == ("get_weather", '{"place": "Oslo"}')
    assert events[-1].finish_reason == "tool_calls"
    assert {event.id for event in of(ToolCallDelta, events)} == {ours.id}


def test_the_limit_on_calls(answer):
    replies = [[call("python", "1")], [say("Well.")]]
    events, _ = answer(NO_SANDBOX, PYTHON, replies, max_tool_calls=1)
    assert len(of(HostedResult, events)) == 1 and events[-1].finish_reason == "stop"  # the guide forbids a second call


def test_the_limit_on_calls_leaves_the_client_its_functions(answer):
    replies = [[call("python", "1")], [call("python", "2")], [say("Well.")]]
    events, model = answer(NO_SANDBOX, PYTHON, replies, max_tool_calls=1, functions=[Function("f")])
    assert [one.error for one in of(HostedResult, events)] == [None, "the limit on tool calls is reached"]
    assert "the limit on tool calls is reached" in model.prompt(2)


def test_the_limit_on_tokens_counts_all_replies(answer):
    events, _model = answer(NO_SANDBOX, PYTHON, [[call("python", "1")], [say("a b c d e f g h")]], max_tokens=15)
    end = events[-1]
    assert end.finish_reason == "length" and end.usage.completion_tokens == 15


def test_no_tokens_left_for_another_reply(answer):
    reply = [call("python", "1")]
    _, model = answer(NO_SANDBOX, PYTHON, [reply, [say("one")]])
    used = len(model.runner.replies)
    assert not used
    length = len(answer(NO_SANDBOX, PYTHON, [reply, [say("one")]])[0][-1].tokens)
    only_call = length - len(model.model.tokenizer.encode("one")) - 4
    events, _ = answer(NO_SANDBOX, PYTHON, [reply], max_tokens=only_call)
    assert events[-1].finish_reason == "length" and len(of(HostedResult, events)) == 1


def test_a_full_context_ends_the_response(answer, scripted_model):
    replies = [[call("python", "print('word ' * 2000)")]]
    events, _ = answer(NO_SANDBOX, PYTHON, replies, scripted=scripted_model(max_context=1000))
    assert events[-1].finish_reason == "length" and len(of(HostedResult, events)) == 1


def test_a_tool_that_is_off_is_the_models_mistake(answer):
    events, model = answer(NO_SANDBOX, PYTHON, [[call("browser.search", '{"query": "x"}')], [say("No.")]])
    assert not of((HostedCall, HostedResult, HostedCallDelta, ToolCall, ToolCallDelta), events)
    assert "error: there is no tool browser.search" in model.prompt(1)


def test_errors_of_tools_reach_the_model(answer, browser_settings):
    replies = [
        [call("browser.open", "not JSON")],
        [call("browser.click", "{}")],
        [call("browser.open", '{"id": "http://10.0.0.1/"}')],
        [say("Sorry.")],
    ]
    events, model = answer(HostedSettings(browser=browser_settings), SEARCH, replies)
    errors = [one.error for one in of(HostedResult, events)]
    assert errors[0].startswith("Invalid function arguments") and errors[1] == "Unknown function: click"
    assert "not on the public internet" in errors[2]
    assert errors[2] in model.prompt(3)


@pytest.mark.parametrize("how", ["stop", "close"])
def test_a_stopped_response_ends_the_running_tool(answer, scripted_model, tmp_path, how):
    """The code writes a file each tenth of a second; it must be silent once the response has been stopped."""
    ticks = tmp_path / "ticks"
    code = f"import time\nwhile True:\n    open({str(ticks)!r}, 'a').write('.')\n    time.sleep(0.05)"

    def stop_later(queue, event):
        if isinstance(event, HostedCall):
            import asyncio

            loop = asyncio.get_running_loop()

            def when_it_runs():
                if not ticks.exists():
                    loop.call_later(0.05, when_it_runs)
                elif how == "stop":
                    queue.stop(ApiError(409, "the response was cancelled", code="cancelled"))
                else:
                    queue.close()

            loop.call_later(0.05, when_it_runs)

    scripted = scripted_model()
    with pytest.raises(ApiError) as caught:
        answer(NO_SANDBOX, PYTHON, [[call("python", code)]], scripted=scripted, watch=stop_later)
    assert caught.value.status == (409 if how == "stop" else 499)
    size = ticks.stat().st_size
    time.sleep(0.3)
    assert ticks.stat().st_size == size
    assert not scripted.service.open_queues


def test_a_browser_that_is_slow_to_answer(answer, browser_settings, web):
    settings = BrowserSettings("searxng", url=web.url, allow_addresses=("127.0.0.0/8",), timeout_s=0.3)
    replies = [[call("browser.open", f'{{"id": "{web.url}/slow"}}')], [say("Late.")]]
    events, _ = answer(HostedSettings(browser=settings), SEARCH, replies)
    (result,) = of(HostedResult, events)
    assert "within 0.3 seconds" in result.error
