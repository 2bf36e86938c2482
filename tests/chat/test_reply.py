"""Events of a reply: what each is made of, and that reading them without waiting gives the same."""

from __future__ import annotations

import json
import threading

import pytest

import mlx_gptoss
from mlx_gptoss import Conversation, Finished, Sampling, TextDelta, ToolCall, ToolCallDelta
from mlx_gptoss.chat.reply import RawReader, ReplyReader
from mlx_gptoss.chat.stream import with_reply
from mlx_gptoss.engine import Finished as EngineFinished
from mlx_gptoss.engine import StopStrings, Token
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.harmony.names import ToolNames
from mlx_gptoss.harmony.parse import Parser
from mlx_gptoss.harmony.render import render

GREEDY = Sampling(temperature=0)
WEATHER = {
    "name": "get_weather",
    "description": "Get the current weather.",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "description": "City name"}},
        "required": ["location"],
    },
}


@pytest.fixture(scope="module")
def model():
    with mlx_gptoss.load() as loaded:
        yield loaded


def said(events):
    return [event for event in events if isinstance(event, TextDelta)]


def read_without_waiting(events):
    """All events, read on this thread only when the engine's has said that there are some."""
    arrived = threading.Event()
    events.on_arrival(arrived.set)
    read = []
    while not read or not isinstance(read[-1], Finished):
        assert arrived.wait(60)
        arrived.clear()
        while more := events.ready():
            read += more
    assert events.ready() == []
    return read


def test_a_call_streams_and_its_deltas_add_up(model):
    events = list(model.stream("What is the weather in Oslo?", sampling=GREEDY, tools=[WEATHER]))
    deltas = [event for event in events if isinstance(event, ToolCallDelta)]
    (call,) = [event for event in events if isinstance(event, ToolCall)]
    assert len(deltas) > 3 and {(d.id, d.name) for d in deltas} == {(call.id, "get_weather")}
    assert "".join(d.text for d in deltas) == call.arguments
    assert json.loads(call.arguments) == {"location": "Oslo"}


def test_half_a_call_has_deltas_and_is_no_call(model):
    whole = model.generate("What is the weather in Oslo?", sampling=GREEDY, tools=[WEATHER])
    events = list(
        model.stream("What is the weather in Oslo?", sampling=GREEDY, tools=[WEATHER], max_tokens=len(whole.ids) - 3)
    )
    assert any(isinstance(event, ToolCallDelta) and event.text for event in events)
    assert not any(isinstance(event, ToolCall) for event in events)
    assert events[-1].finish_reason == "length"


def test_a_builtin_tool_is_called_on_analysis_and_answered_there(model):
    ids = model.tokenizer.encode_with_specials(
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
        "<|channel|>analysis to=python code<|message|>1 + 1<|call|>"
    )
    turn = ReplyReader(model.tokenizer, Parser(model.tokenizer), StopStrings(()), ToolNames(()))
    events = [event for id in ids for event in turn.push(Token(id, 0.0))]
    events += turn.finish(EngineFinished("stop", 1, len(ids)))
    (call,) = [event for event in events if isinstance(event, ToolCall)]
    assert (call.name, call.arguments, events[-1].finish_reason) == ("python", "1 + 1", "tool_calls")
    asked = Conversation(builtin_tools=("python",)).with_user("1 + 1?")
    prompt = render(with_reply(asked, events[-1].messages).with_result(call.name, "2"), model.tokenizer)
    assert model.tokenizer.decode(prompt, specials=True).endswith(
        "<|message|>Hm.<|end|><|start|>assistant to=python<|channel|>analysis code<|message|>1 + 1<|call|>"
        "<|start|>python to=assistant<|channel|>analysis<|message|>2<|end|><|start|>assistant"
    )


def test_text_brings_its_tokens_and_no_others(model):
    *events, finished = model.stream("What is 12 + 30?", sampling=GREEDY)
    tokens = [token for event in said(events) for token in event.tokens]
    assert model.tokenizer.decode([t.id for t in tokens]) == "12 + 30 = 42"
    assert finished.tokens[-1 - len(tokens) : -1] == tuple(tokens)  # then <|return|>
    assert 0 < finished.reasoning_tokens < len(finished.tokens) - len(tokens)


def test_a_character_of_two_tokens_comes_with_both(model):
    reader = RawReader(model.tokenizer.decoder(), StopStrings(()))
    first, second = (Token(id, -0.5) for id in model.tokenizer.encode("ü"))
    assert list(reader.push(first)) == []
    assert list(reader.push(second)) == [TextDelta("ü", (first, second))]


def test_tokens_of_a_stop_string_are_not_shown(model):
    *events, finished = model.stream("What is 12 + 30?", sampling=Sampling(temperature=0, stop=("= 4",)))
    tokens = [token.id for event in said(events) for token in event.tokens]
    assert model.tokenizer.decode(tokens) == "12 + 30 " == "".join(event.text for event in said(events))
    assert finished.finish_reason == "stop"


@pytest.mark.parametrize("stop", [(), ("= 4",)])
def test_reading_without_waiting_gives_the_same(model, stop):
    sampling = Sampling(temperature=0, stop=stop)
    *expected, last = model.stream("What is 12 + 30?", sampling=sampling)
    *events, finished = read_without_waiting(model.stream("What is 12 + 30?", sampling=sampling))
    assert events == expected
    assert (finished.usage, finished.messages) == (last.usage, last.messages)


def test_a_closed_stream_gives_nothing_more_and_frees_its_slot(model):
    for _ in range(3):
        events = model.stream("What is 12 + 30?", sampling=GREEDY)
        next(events)
        threading.Thread(target=events.close).start()
        list(events)
        assert events.ready() == []
    assert model.generate("What is 12 + 30?", sampling=GREEDY).text == "12 + 30 = 42"


def test_what_failed_the_engine_is_raised_after_what_came_before():
    model = mlx_gptoss.load()
    events = model.stream("What is 12 + 30?", sampling=GREEDY)
    first = next(events)
    model.close()
    with pytest.raises(GptOssError, match="closed"):
        while events.ready() or first:
            pass
