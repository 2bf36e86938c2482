"""Citations in streamed text, and items of the Responses API."""

from __future__ import annotations

import itertools

import pytest

from mlx_gptoss.chat.reply import TextDelta
from mlx_gptoss.server.hosted.citations import CitationReader
from mlx_gptoss.server.hosted.events import (
    ApprovalRequest,
    Citation,
    HostedCall,
    HostedCallDelta,
    HostedResult,
    ToolList,
)
from mlx_gptoss.server.hosted.items import annotation, hosted_item

PAGES = {6: ("https://a.example/x(1)", "A page"), 7: ("https://b.example/", "B")}
TEXT = "It is so【6†L9-L11】, and so 【7†L3】. Not 【9†L1】, nor 【x】 or 【6†"
SHOWN = (
    "It is so ([a.example](https://a.example/x%281%29)), and so ([b.example](https://b.example/)). "
    "Not 【9†L1】, nor 【x】 or 【6†"
)


def read(pieces):
    reader = CitationReader(lambda cursor, line: PAGES.get(cursor))
    events = [event for piece in pieces for event in reader.push(TextDelta(piece))] + list(reader.flush(False))
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    return text, [event for event in events if isinstance(event, Citation)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_citations_in_pieces_of_any_size(size):
    text, citations = read([TEXT[start : start + size] for start in range(0, len(TEXT), size)])
    assert text == SHOWN
    assert [(one.url, one.title) for one in citations] == [PAGES[6], PAGES[7]]
    assert [text[one.start_index : one.end_index] for one in citations] == [
        "([a.example](https://a.example/x%281%29))",
        "([b.example](https://b.example/))",
    ]
    assert annotation(citations[1])["type"] == "url_citation"


def test_text_is_held_back_no_longer_than_needed():
    reader = CitationReader(lambda cursor, line: None)
    assert [one.text for one in reader.push(TextDelta("plain "))] == ["plain "]
    assert list(reader.push(TextDelta("【12†"))) == []
    assert "".join(one.text for one in reader.push(TextDelta("x" * 300))) == "【12†" + "x" * 300


def test_all_splits_of_one_citation():
    text = "a【7†L3】b"
    for cut in itertools.combinations(range(len(text)), 2):
        pieces = [text[: cut[0]], text[cut[0] : cut[1]], text[cut[1] :]]
        assert read(pieces)[0] == "a ([b.example](https://b.example/))b"


def test_items():
    search = HostedCall("c", "browser", "browser.search", "{}", action={"type": "search", "query": "q"})
    assert hosted_item(HostedResult(search, "text", sources=("https://x/",))) == {
        "type": "web_search_call",
        "status": "completed",
        "action": {"type": "search", "query": "q", "sources": [{"type": "url", "url": "https://x/"}]},
    }
    assert hosted_item(HostedResult(search, "e", "e"))["status"] == "failed"
    code = HostedCall("c", "python", "python", "1 / 0", container_id="cntr_1")
    assert hosted_item(code)["outputs"] is None and hosted_item(code)["status"] == "in_progress"
    assert hosted_item(HostedResult(code, "Traceback", "ZeroDivisionError")) == {
        "type": "code_interpreter_call",
        "status": "completed",
        "code": "1 / 0",
        "container_id": "cntr_1",
        "outputs": [{"type": "logs", "logs": "Traceback"}],
    }
    opened = hosted_item(HostedCallDelta("c", "python", "python", "", container_id="cntr_1"))
    assert opened["container_id"] == "cntr_1" and opened["code"] == ""
    mcp = HostedCall("c", "mcp", "add", '{"a": 1}', "calc")
    assert hosted_item(HostedResult(mcp, "3"))["output"] == "3"
    failed = hosted_item(HostedResult(mcp, "error: no", "no"))
    assert (failed["status"], failed["output"]) == ("failed", None) and failed["error"]["content"][0]["text"] == "no"
    assert hosted_item(ApprovalRequest(mcp)) == {
        "type": "mcp_approval_request",
        "server_label": "calc",
        "name": "add",
        "arguments": '{"a": 1}',
    }
    assert hosted_item(ToolList("calc", (), "gone"))["error"] == "gone"


def test_openai_reads_the_items():
    """The types of OpenAI's own client accept each item, with an id."""
    responses = pytest.importorskip("openai.types.responses")
    from pydantic import TypeAdapter

    adapter = TypeAdapter(responses.ResponseOutputItem)
    call = HostedCall("c", "mcp", "add", "{}", "calc")
    tool = {"name": "add", "description": "", "input_schema": {}, "annotations": None}
    events = [
        HostedResult(HostedCall("c", "browser", "browser.search", "", action={"type": "search", "query": "q"}), "x"),
        HostedResult(HostedCall("c", "browser", "browser.open", "", action={"type": "open_page", "url": "u"}), "x"),
        HostedResult(
            HostedCall("c", "browser", "browser.find", "", action={"type": "find_in_page", "url": "u", "pattern": "p"}),
            "x",
        ),
        HostedResult(HostedCall("c", "python", "python", "1", container_id="cntr_1"), "1"),
        HostedResult(call, "x"),
        HostedResult(call, "error: x", "x"),
        ApprovalRequest(call),
        ToolList("calc", (tool,)),
    ]
    for event in events:
        item = hosted_item(event)
        parsed = adapter.validate_python({"id": "x_1", **item})
        assert parsed.type == item["type"]
