"""Content blocks: what the model is given for each."""

from __future__ import annotations

import pytest
from anthropic_requests import IMAGE, RESULT, SUM, dialogue, ignored, post, refused, said


def test_system_blocks_and_messages(seen):
    late = {"role": "system", "content": [{"type": "text", "text": "Be late."}]}
    early = {"role": "system", "content": "Be early."}
    system = [
        {"type": "text", "text": "One."},
        {"type": "text", "text": "Two.", "cache_control": {"type": "ephemeral"}},
    ]
    conversation = seen(system=system, messages=[early, SUM, late])
    assert conversation.instructions == "One.\n\nTwo.\n\nBe early."
    assert said(conversation)[1] == ("developer", None, "# Instructions\n\nBe late.")


def test_user_blocks_keep_their_order(seen, weather):
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": RESULT}
    blocks = [
        {"type": "text", "text": "Here:"},
        result,
        {"type": "text", "text": "And"},
        {"type": "text", "text": "now?"},
    ]
    assert said(seen(**dialogue(weather, *blocks)))[2:] == [
        ("user", None, "Here:"),
        ("tool", "commentary", RESULT),
        ("user", None, "And\n\nnow?"),
    ]


PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "aGk="}}
PLAIN = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Text."}, "title": "Title"}
PARTS = {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "Part."}]}}
FOUND = {"type": "search_result", "source": "http://a", "title": "A", "content": [{"type": "text", "text": "Found."}]}


@pytest.mark.parametrize(
    ("content", "text", "names"),
    [
        ("plain", "plain", set()),
        (None, "", set()),
        ([], "", set()),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\n\nb", set()),
        ([IMAGE], "[image: left out, since the model reads only text]", {"messages[].content[].content[].image"}),
        ([PDF], "[document: left out, since the model reads only text]", {"messages[].content[].content[].document"}),
        ([PLAIN, PARTS, FOUND], "Title\n\nText.\n\nPart.\n\nA\n\nhttp://a\n\nFound.", set()),
    ],
)
def test_content_of_a_tool_result(http, seen, weather, content, text, names):
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": content}
    fields = dialogue(weather, {name: value for name, value in result.items() if value is not None})
    assert seen(**fields).messages[-1].content == text
    assert ignored(post(http, **fields)) == names


@pytest.mark.parametrize(("text", "shown"), [("no such city", "Error: no such city"), ("an error", "an error")])
def test_a_tool_result_may_be_an_error(seen, weather, text, shown):
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": text, "is_error": True}
    assert seen(**dialogue(weather, result)).messages[-1].content == shown


def test_documents_of_the_user(seen, http):
    question = {"type": "text", "text": "Why?"}
    conversation = seen(messages=[{"role": "user", "content": [PLAIN, FOUND, question]}])
    assert said(conversation) == [("user", None, "Title\n\nText.\n\nA\n\nhttp://a\n\nFound.\n\nWhy?")]
    for block in (IMAGE, PDF, {"type": "container_upload", "file_id": "file_1"}):
        message = refused(http, messages=[{"role": "user", "content": [question, block]}])
        assert message.startswith("messages[0].content[1]") and "only text" in message


def test_assistant_blocks(http, seen, weather):
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "anything"},
        {"type": "redacted_thinking", "data": "abc"},
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []},
        {"type": "text", "text": "I look.", "citations": None},
    ]
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": RESULT}
    fields = dialogue(weather, result, reply=blocks)
    names = {"messages[].content[].server_tool_use", "messages[].content[].web_search_tool_result"}
    assert ignored(post(http, **fields)) == names
    conversation = seen(**fields)
    call = ("assistant", "commentary", '{"location":"Oslo"}')
    preamble = ("assistant", "commentary", "I look.")
    assert said(conversation)[1:4] == [("assistant", "analysis", "Hm."), preamble, call]
    assert conversation.messages[3].recipient == conversation.messages[4].name == "functions.get_weather"
    done = {
        "role": "assistant",
        "content": [blocks[0], {"type": "text", "text": "It "}, {"type": "text", "text": "rains."}],
    }
    fields["messages"] += [done, SUM]
    assert said(seen(**fields))[1:] == [  # reasoning before an answer is dropped, as the model was trained
        preamble,
        call,
        ("tool", "commentary", RESULT),
        ("assistant", "final", "It rains."),
        ("user", None, SUM["content"]),
    ]


def test_a_tool_may_have_any_name(seen, http):
    tool = {"type": "custom", "name": "my tool / v2", "input_schema": {"type": "object", "properties": {}}}
    use = {"type": "tool_use", "id": "toolu_x", "name": "my tool / v2", "input": {}}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_x"}]}
    conversation = seen(messages=[SUM, {"role": "assistant", "content": [use]}, result], tools=[tool])
    assert conversation.messages[-1].name == conversation.messages[1].recipient == "functions.my_tool_v2"
