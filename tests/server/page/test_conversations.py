"""Conversations of the chat page: kept in the browser, listed, edited, exported and imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from page_helpers import SUM, SUM_ANSWER, ask, expect, mock_replies, wait_until_ready

CAPITAL = "What is the capital of France?"


def answered(page: Any, count: int = 1) -> None:
    expect(page.locator(".reply .text")).to_have_count(count)
    expect(page.locator(".reply .stats")).to_have_count(count)


def open_list(page: Any) -> Any:
    page.get_by_role("button", name="Conversations", exact=True).click()
    return page.get_by_role("complementary", name="Conversations")


def titles(page: Any) -> list[str]:
    return page.locator("#conversations .title").all_inner_texts()


@pytest.fixture
def two(visit: Any) -> Any:
    """A page with two conversations, the list open."""
    page = visit()
    for question in (SUM, CAPITAL):
        ask(page, question)
        answered(page)
        page.get_by_role("button", name="New chat").click()
    open_list(page)
    expect(page.locator("#conversations li")).to_have_count(2)
    return page


def test_they_are_there_after_a_reload_and_go_on(two: Any) -> None:
    two.reload()
    wait_until_ready(two)
    open_list(two)
    expect(two.locator("#conversations .title").first).to_have_text(CAPITAL)
    assert titles(two) == [CAPITAL, SUM]
    two.locator("#conversations").get_by_role("button", name=SUM, exact=True).click()
    expect(two.locator(".question .said")).to_have_text(SUM)
    expect(two.locator(".reply .text")).to_have_text(SUM_ANSWER)
    ask(two, CAPITAL)
    answered(two, 2)
    assert [message["content"] for message in two.bodies[-1]["messages"]] == [SUM, SUM_ANSWER, CAPITAL]
    assert set(two.bodies[-1]["messages"][1]) == {"role", "content"}  # the rest of what is kept is not sent
    expect(two.locator("#conversations .title").first).to_have_text(SUM)


def test_search_rename_delete_and_undo(two: Any) -> None:
    search = two.get_by_role("searchbox", name="Search conversations")
    search.fill("PARIS")  # in the answer
    expect(two.locator("#conversations li")).to_have_count(1)
    assert titles(two) == [CAPITAL]
    search.fill("nothing at all")
    expect(two.locator("#none")).to_have_text("Nothing found")
    search.fill("")
    two.locator("#conversations li", has_text=SUM).hover()
    two.get_by_role("button", name=f"Rename “{SUM}”").click()
    two.get_by_label("New title").fill("A sum")
    two.keyboard.press("Enter")
    expect(two.get_by_role("button", name="A sum", exact=True)).to_be_visible()
    two.locator("#conversations li", has_text="A sum").hover()
    two.get_by_role("button", name="Delete “A sum”").click()
    expect(two.locator("#conversations li")).to_have_count(1)
    two.get_by_role("button", name="Undo").click()
    expect(two.locator("#conversations li")).to_have_count(2)
    two.locator("#conversations li", has_text="A sum").hover()
    two.get_by_role("button", name="Delete “A sum”").click()
    expect(two.locator("#conversations li")).to_have_count(1)
    two.reload()
    wait_until_ready(two)
    open_list(two)
    expect(two.locator("#conversations li")).to_have_count(1)


def test_two_tabs_do_not_overwrite_each_other(two: Any, visit: Any) -> None:
    other = visit(context=two.context)
    wait_until_ready(other)
    for page in (two, other):
        if page is other:
            open_list(page)
        page.locator("#conversations").get_by_role("button", name=SUM, exact=True).click()
        answered(page)
    for page, question in ((two, CAPITAL), (other, "Reverse the word planet.")):
        ask(page, question)
        answered(page, 2)
    expect(two.locator("#conversations li")).to_have_count(3)
    assert sorted(titles(two)) == sorted([CAPITAL, SUM, f"{SUM} (copy)"])


def test_export_and_import(two: Any, visit: Any, tmp_path: Path) -> None:
    with two.expect_download() as started:
        two.get_by_role("button", name="Export all").click()
    started.value.save_as(tmp_path / "all.json")
    data = json.loads((tmp_path / "all.json").read_text())
    assert [each["title"] for each in data["conversations"]] and data["format"] == "mlx-gptoss conversations"
    two.locator("#conversations li", has_text=SUM).hover()
    with two.expect_download() as started:
        two.get_by_role("button", name=f"Export “{SUM}”").click()
    assert started.value.suggested_filename == "What is 12 30.md"
    started.value.save_as(tmp_path / "one.md")
    assert (tmp_path / "one.md").read_text() == f"# {SUM}\n\n## Question\n\n{SUM}\n\n## Answer\n\n{SUM_ANSWER}\n"
    other = visit()
    open_list(other)
    other.locator("#import-file").set_input_files(tmp_path / "all.json")
    expect(other.locator("#conversations li")).to_have_count(2)
    other.locator("#conversations").get_by_role("button", name=SUM, exact=True).click()
    expect(other.locator(".reply .text")).to_have_text(SUM_ANSWER)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json", "This file is not JSON"),
        ("[]", "has no conversations of this page"),
        ('{"format": "mlx-gptoss conversations", "version": 2, "conversations": []}', "has no conversations"),
        ('{"format": "mlx-gptoss conversations", "version": 1, "conversations": [{"title": 3}]}', "Conversation 1"),
        (
            '{"format": "mlx-gptoss conversations", "version": 1, "conversations": '
            '[{"title": "x", "messages": [{"role": "system", "content": {}}]}]}',
            "has a message that is not one",
        ),
    ],
)
def test_a_damaged_file_is_refused(visit: Any, tmp_path: Path, content: str, words: str) -> None:
    page = visit()
    open_list(page)
    (tmp_path / "bad.json").write_text(content)
    page.locator("#import-file").set_input_files(tmp_path / "bad.json")
    expect(page.get_by_role("alert").first).to_contain_text(words)
    expect(page.locator("#conversations li")).to_have_count(0)


def test_edit_and_regenerate(visit: Any) -> None:
    page = visit()
    ask(page, SUM)
    answered(page)
    ask(page, CAPITAL)
    answered(page, 2)
    page.get_by_role("button", name="Regenerate").nth(1).click()
    answered(page, 2)
    assert [m["content"] for m in page.bodies[-1]["messages"]] == [SUM, SUM_ANSWER, CAPITAL]
    page.get_by_role("button", name="Edit question").first.click()
    field = page.get_by_label("Your message")
    expect(field).to_have_value(SUM)
    expect(page.locator("article")).to_have_count(0)
    field.fill("What is 20 + 30?")
    page.keyboard.press("Enter")
    expect(page.locator(".reply .text")).to_have_text("20 + 30 = 50")
    assert len(page.bodies[-1]["messages"]) == 1


def test_copy(visit: Any) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    mock_replies(page, deltas=[{"content": "Here:\n\n```python\nx = 1\n```\n"}])
    ask(page, "Show me")
    page.get_by_role("button", name="Copy answer").click()
    expect(page.get_by_text("Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "Here:\n\n```python\nx = 1\n```\n"
    page.locator(".code-block .copy").click()
    page.wait_for_function("navigator.clipboard.readText().then((text) => text === 'x = 1')")


def test_settings_belong_to_a_conversation(visit: Any) -> None:
    page = visit()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Instructions").fill("Be brief.")
    page.get_by_label("Top P").fill("0.5")
    page.get_by_role("button", name="Save").click()
    ask(page, SUM)
    answered(page)
    assert page.bodies[-1]["top_p"] == 0.5 and page.bodies[-1]["messages"][0]["content"] == "Be brief."
    page.get_by_role("button", name="New chat").click()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Instructions").fill("")
    page.get_by_label("Top P").fill("")
    page.get_by_role("button", name="Save").click()
    ask(page, CAPITAL)
    answered(page)
    assert "top_p" not in page.bodies[-1] and page.bodies[-1]["messages"][0]["role"] == "user"
    open_list(page)
    page.locator("#conversations").get_by_role("button", name=SUM, exact=True).click()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Instructions")).to_have_value("Be brief.")


def test_a_browser_that_keeps_nothing(visit: Any) -> None:
    page = visit("about:blank")
    page.add_init_script("indexedDB.open = () => { throw new DOMException('no', 'SecurityError'); };")
    page.goto(visit.url)
    open_list(page)
    expect(page.get_by_text("This browser keeps nothing here")).to_be_visible()
    ask(page, SUM)
    answered(page)
    expect(page.locator("#conversations li")).to_have_count(1)


def test_progress_of_a_long_prompt(visit: Any) -> None:
    page = visit()
    slots = [{"id": 0, "n_prompt_tokens": 1000, "n_prompt_tokens_processed": 250}]
    page.route("**/slots", lambda route: route.fulfill(json=slots))
    page.route("**/v1/chat/completions", lambda route: None)  # never answers
    ask(page, SUM)
    bar = page.get_by_role("progressbar", name="Reading the conversation")
    expect(bar).to_be_visible()
    assert (bar.get_attribute("value"), bar.get_attribute("max")) == ("250", "1000")
    page.get_by_role("button", name="Stop").click()
    expect(bar).to_have_count(0)


def test_tools_of_the_server(visit: Any) -> None:
    """The Responses endpoint is used, and each call that the server has made is shown."""
    page = visit("about:blank")
    tools = [{"type": "web_search"}]
    page.route("**/props", lambda route: route.fulfill(json={"hosted_tools": tools}))
    item = {"type": "web_search_call", "action": {"type": "search", "query": "weather"}}
    events = [
        {"type": "response.reasoning_text.delta", "delta": "I search."},
        {"type": "response.output_item.done", "item": item},
        {"type": "response.output_text.delta", "delta": "It is **sunny**."},
        {"type": "response.completed", "response": {"usage": {"input_tokens": 9, "output_tokens": 5}}},
    ]
    body = "".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in events)
    page.route("**/v1/responses", lambda route: route.fulfill(body=body))
    page.goto(visit.url)
    wait_until_ready(page)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Let the model use the server's own tools").check()
    page.get_by_role("button", name="Save").click()
    ask(page, "How is the weather?")
    expect(page.locator(".reply .text")).to_have_text("It is sunny.")
    expect(page.locator(".hosted summary")).to_have_text("Searched the web")
    expect(page.locator(".hosted pre")).to_have_text("weather")
    assert page.bodies[0]["tools"] == tools and page.bodies[0]["reasoning"] == {"effort": "medium"}
    assert page.bodies[0]["input"] == [{"role": "user", "content": "How is the weather?"}]
