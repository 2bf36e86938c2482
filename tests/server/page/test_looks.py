"""The chat page at two widths in both colour schemes: nothing overlaps or scrolls sideways, and axe finds nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from page_helpers import SUM, ask, expect, mock_replies, wait_until_ready

axe_core = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

ANSWER = r"""## The result

A paragraph with **bold**, `code`, a [link](https://example.org/) and a formula \(e^{i\pi} + 1 = 0\).

| name | amount | a rather long heading |
|:-----|-------:|:---------------------:|
| first entry of the table | 1,200 | yes |
| second | 34 | no |

```python
def area(radius: float) -> float:  # in square metres
    return 3.14159 * radius ** 2 + len("a rather long line of code that does not fit on a narrow screen")
```

$$\int_0^1 x^2 \, dx = \frac{1}{3}$$

- [x] done
- [ ] to do

> A quotation.
"""
WIDTHS = pytest.mark.parametrize("width", [375, 1280])
SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])


@pytest.fixture
def check(visit: Any, request: Any) -> Any:
    """check(page, name): axe's rules, no sideways scrolling; a screenshot into PAGE_SCREENSHOTS, if that is set."""

    def check(page: Any, name: str) -> None:
        page.evaluate("document.getAnimations().forEach((animation) => animation.finish())")
        if folder := os.environ.get("PAGE_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / f"{name}-{request.node.callspec.id}.png")
        found = axe_core.Axe().run(page).response["violations"]
        assert not found, json.dumps(
            [(each["id"], each["help"], [node["html"] for node in each["nodes"][:3]]) for each in found], indent=1
        )
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate(
            "document.querySelector('#scroller').scrollWidth <= document.querySelector('#scroller').clientWidth + 1"
        )

    return check


@WIDTHS
@SCHEMES
def test_every_state(visit: Any, check: Any, width: int, scheme: Any) -> None:
    page = visit(viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True)
    wait_until_ready(page)
    check(page, "empty")
    mock_replies(page, deltas=[{"reasoning": "I think about it."}, {"content": ANSWER}])
    ask(page, "Show me a table, some code and a formula")
    expect(page.locator(".reply .stats, .reply .actions").first).to_be_visible()
    expect(page.locator("blockquote")).to_have_text("A quotation.")
    expect(page.locator(".math math")).to_have_count(2)
    check(page, "answer")
    page.evaluate("document.querySelector('#scroller').scrollTop = 0")
    check(page, "answer-top")
    page.get_by_role("button", name="Conversations", exact=True).click()
    expect(page.locator("#conversations li")).to_have_count(1)
    check(page, "list")
    page.get_by_role("button", name="Close the list").click()
    page.get_by_role("button", name="Settings").click()
    check(page, "settings")
    page.keyboard.press("Escape")
    mock_replies(page, status=503, error="The server is busy.")
    ask(page, SUM)
    expect(page.get_by_role("alert").first).to_contain_text("busy")
    check(page, "error")


def test_the_keyboard_alone(visit: Any) -> None:
    page = visit()
    wait_until_ready(page)
    page.get_by_role("button", name="Conversations", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Conversations", exact=True)).to_be_focused()
    expect(page.locator("#sidebar")).to_be_hidden()
    page.get_by_label("Your message").focus()
    page.keyboard.type(SUM)
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_have_text("12 + 30 = 42")  # announced once, not token by token


def test_installable(visit: Any) -> None:
    page = visit()
    link = page.locator("link[rel=manifest]").get_attribute("href")
    manifest = page.evaluate(f"fetch('{link}').then((response) => response.json())")
    assert manifest["display"] == "standalone" and manifest["start_url"] == "../"
    sizes = {}
    for icon in manifest["icons"]:
        found = page.evaluate(
            "(src) => new Promise((done) => { const image = new Image(); image.onerror = () => done(null);"
            " image.onload = () => done([image.naturalWidth, image.naturalHeight]); image.src = src; })",
            f"page/{icon['src']}",
        )
        sizes[icon["src"]] = found
    assert sizes["icon-192.png"] == [192, 192] and sizes["icon-512.png"] == sizes["icon-maskable.png"] == [512, 512]


def test_behind_a_proxy_that_rewrites_host(visit: Any, server: Any) -> None:
    """The page is served whatever the Host; what the server refuses is said."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    for path, status in (("/", 200), ("/page/app.js", 200), ("/v1/models", 403)):
        connection.request("GET", path, headers={"Host": "chat.example.org"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status, path
    page = visit("about:blank")
    refusal = {"error": {"message": "the Host 'chat.example.org' is not allowed: use http://127.0.0.1"}}
    page.route("**/v1/models", lambda route: route.fulfill(status=403, json=refusal))
    page.goto(visit.url)
    expect(page.get_by_role("alert").first).to_contain_text("The server refuses this page: the Host 'chat.example.org'")
