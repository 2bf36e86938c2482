"""The page at / in a headless Chromium, against a real server with the bundled model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from page_helpers import COMPLETIONS, SUM, SUM_ANSWER, ask, expect, mock_replies


def forbid_end(page: Any, server: Any) -> None:
    """Forbid the tokens that end a message in the next requests."""
    ends = [server.service.model.tokenizer.special(f"<|{name}|>") for name in ("end", "return", "call", "endoftext")]
    bias = {"logit_bias": {str(id): -100 for id in ends}}
    page.route(COMPLETIONS, lambda route: route.continue_(post_data=json.dumps(route.request.post_data_json | bias)))


def test_two_questions_and_a_new_chat(visit: Any) -> None:
    page = visit()
    expect(page).to_have_title("mlx-gptoss-nano")
    ask(page, SUM)
    replies = page.locator(".reply")
    expect(replies.locator(".text")).to_have_text(SUM_ANSWER)
    expect(page.locator(".question .said")).to_have_text(SUM)
    expect(page.get_by_text("What would you like to know?")).to_be_hidden()
    expect(replies.locator("summary")).to_contain_text("Thought for")
    expect(replies.locator(".reasoning-text")).to_be_hidden()
    replies.locator("summary").click()
    expect(replies.locator(".reasoning-text")).to_contain_text("The sum is 42")
    facts = replies.locator(".stats").inner_text()
    assert all(word in facts for word in (" tokens · ", " tokens/s · first token after ", " s · prompt ")), facts
    expect(page.locator("#used")).to_contain_text("tokens so far")
    ask(page, "What is the capital of France?")
    expect(replies).to_have_count(2)
    expect(replies.nth(1).locator(".text")).to_contain_text("Paris")
    assert [(message["role"], message["content"]) for message in page.bodies[1]["messages"]] == [
        ("user", SUM),
        ("assistant", SUM_ANSWER),
        ("user", "What is the capital of France?"),
    ]
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    page.get_by_role("button", name="Reverse the word planet.").click()
    expect(page.locator(".reply .text")).to_contain_text("tenalp")
    assert len(page.bodies[2]["messages"]) == 1


@pytest.mark.parametrize("how", ["button", "escape"])
def test_reply_streams_until_it_is_stopped(visit: Any, server: Any, idle: Any, how: str) -> None:
    page = visit()
    forbid_end(page, server)
    ask(page, SUM)
    summary = page.locator(".reply summary")
    expect(summary).to_have_text("Thinking")
    thoughts = page.locator(".reasoning-text")
    for _ in range(3):
        seen = thoughts.text_content().rstrip()
        expect(thoughts).not_to_have_text(seen)
        assert thoughts.text_content().startswith(seen) and server.service.open_queues
    expect(page.get_by_role("button", name="Send")).to_be_hidden()
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".stats")).to_have_text("stopped")
    expect(summary).to_contain_text("Thought for")
    assert idle(server)
    page.unroute(COMPLETIONS)
    ask(page, SUM)
    expect(page.locator(".reply .text")).to_have_text(SUM_ANSWER)
    assert len(page.bodies[-1]["messages"]) == 1  # the stopped reply had no text


def test_effort_is_set_by_keyboard_and_remembered(visit: Any) -> None:
    page = visit()
    page.get_by_role("radio", name="Medium").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="High")).to_be_checked()
    ask(page, SUM)
    expect(page.locator(".stats")).to_be_visible()
    page.reload()
    expect(page.get_by_role("radio", name="High")).to_be_checked()
    page.get_by_text("Low").click()
    ask(page, SUM)
    expect(page.locator(".stats")).to_be_visible()
    assert [body["reasoning_effort"] for body in page.bodies] == ["high", "low"]


def test_call_is_shown_and_its_result_sent(visit: Any, weather_tool: dict[str, Any]) -> None:
    page = visit()
    page.get_by_role("button", name="Settings").click()
    functions = page.get_by_label("Functions the model may call")
    functions.fill("get_weather")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("must be a JSON list")).to_be_visible()
    functions.fill(json.dumps([weather_tool]))
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Save").click()
    ask(page, "What is the weather in Oslo?")
    call, result = page.locator(".call"), page.get_by_label("Result of get_weather")
    expect(result).to_be_focused()
    expect(call.locator("h2")).to_have_text("Calls get_weather")
    assert json.loads(call.locator("pre").inner_text()) == {"location": "Oslo"}
    result.fill('{"temperature": 21, "sky": "sunny"}')
    page.get_by_role("button", name="Send result").click()
    expect(page.locator(".reply").nth(1).locator(".text")).to_contain_text("21")
    asked, answered = page.bodies
    assert asked["temperature"] == 0 and asked["tools"] == [weather_tool]
    user, called, result = answered["messages"]
    assert called["tool_calls"][0]["id"] == result["tool_call_id"] and called["reasoning_content"]
    assert (user["role"], result["role"], result["content"]) == ("user", "tool", '{"temperature": 21, "sky": "sunny"}')


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"status": 503, "headers": {"Retry-After": "3"}, "error": "8 wait."}, "8 wait. Try again in 3 s."),
        ({"status": 500}, "The server responded with 500"),
        ({"end": ""}, "The reply was interrupted"),
        ({"end": 'data: {"error": {"message": "The engine was closed."}}\n\n'}, "The engine was closed."),
    ],
)
def test_errors_are_shown_and_the_question_is_restored(visit: Any, answer: dict[str, Any], words: str) -> None:
    page = visit()
    mock_replies(page, **answer)
    ask(page, SUM)
    expect(page.get_by_role("alert").first).to_contain_text(words)
    expect(page.get_by_label("Your message")).to_have_value(SUM)
    expect(page.locator("article")).to_have_count(0)
    page.unroute(COMPLETIONS)
    page.keyboard.press("Enter")
    expect(page.locator(".reply .text")).to_have_text(SUM_ANSWER)
    expect(page.get_by_role("alert").first).to_be_hidden()


def test_rejected_requests_and_lost_connections(visit: Any) -> None:
    page = visit()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Functions the model may call").fill('[{"type": "web_search"}]')
    page.get_by_role("button", name="Save").click()
    asked: list[Any] = []

    def lose_the_second(route: Any) -> None:
        asked.append(route)
        route.abort() if len(asked) > 1 else route.continue_()

    page.route(COMPLETIONS, lose_the_second)
    ask(page, SUM)
    expect(page.get_by_role("alert").first).to_contain_text("send functions, or no tools")
    question = page.get_by_label("Your message")
    expect(question).to_have_value(SUM)
    question.press("Enter")
    expect(page.get_by_role("alert").first).to_contain_text("Is it still running?")


def test_interrupted_reply_keeps_its_text(visit: Any) -> None:
    page = visit()
    mock_replies(page, deltas=[{"content": "The sum"}], end="")
    ask(page, SUM)
    expect(page.get_by_role("alert").first).to_contain_text("The reply was interrupted")
    expect(page.locator(".reply .text")).to_have_text("The sum")
    expect(page.locator(".stats")).to_have_text("interrupted")


def test_api_key_is_requested_when_the_server_needs_one(visit: Any, serve: Any, model: Any) -> None:
    with serve(model, api_key="open sesame") as locked:
        page = visit(locked.url)
        key = page.get_by_label("API key")
        for wrong, words in (("", "needs an API key"), ("sesame", "rejects this API key")):
            if wrong:
                key.fill(wrong)
                page.keyboard.press("Enter")
            expect(page.get_by_role("alert").first).to_contain_text(words)
        key.fill("open sesame")
        page.keyboard.press("Enter")
        expect(key).to_be_hidden()
        ask(page, SUM)
        expect(page.locator(".reply .text")).to_have_text(SUM_ANSWER)


MARKDOWN = """\
# A *title*
Some `code`, **bold**, [a link](https://example.org/), [none](javascript:alert(1)) and <script>alert(1)</script>
<img src=x onerror=alert(1)>

```html
<b>not bold</b>

  indented
```
1. one
   - inner
2. two

| a | b |
|---|---|
| 1 | `2` |

> quoted
"""


def test_markdown_is_rendered_and_html_stays_text(visit: Any) -> None:
    page = visit()
    mock_replies(page, deltas=[{"content": MARKDOWN[start : start + 7]} for start in range(0, len(MARKDOWN), 7)])
    ask(page, "Show me")
    expect(page.locator("blockquote")).to_have_text("quoted")
    text = page.locator(".reply .text")
    assert text.locator("script, img, b").count() == 0
    assert "<script>alert(1)</script>" in text.inner_text() and "<img src=x onerror=alert(1)>" in text.inner_text()
    assert text.locator("h3").inner_text() == "A title"
    assert [link.get_attribute("href") for link in text.locator("a").all()] == ["https://example.org/"]
    assert text.locator("pre").inner_text() == "<b>not bold</b>\n\n  indented"
    assert text.locator("ol > li").count() == 2 and text.locator("ol ul li").inner_text() == "inner"
    assert text.locator("td").all_inner_texts() == ["1", "2"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_follow_the_system(visit: Any, scheme: Any) -> None:
    page = visit(color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(", "))) / 3
    assert (lightness > 200) if scheme == "light" else (lightness < 50)
