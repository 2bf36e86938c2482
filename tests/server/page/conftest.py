"""A headless Chromium, and pages of a real server with the bundled model in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from page_helpers import ARGUMENTS, CHROMIUM, playwright


@pytest.fixture(scope="module")  # sync playwright keeps an event loop running in its thread until it is closed
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=[f"--{name}" for name in ARGUMENTS])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any, server: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page; `page.bodies` are the bodies of its requests.

    Afterwards the browser must not have contacted another host or logged an error: no script error, no violation of
    the content security policy.
    """
    contexts: list[Any] = []
    hosts, errors = set(), []

    def note(message: Any) -> None:
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            errors.append(message.text)

    def note_request(request: Any) -> None:
        hosts.add(request.url.split("/")[2].split(":")[0])
        if request.method == "POST" and not request.url.endswith("/v1/markdown"):
            request.frame.page.bodies.append(request.post_data_json)

    def opened(url: str = server.url, *, context: Any = None, **options: Any) -> Any:
        """context: that of another page, for a second tab. options: of the new context otherwise."""
        if context is None:
            context = browser.new_context(**{"viewport": {"width": 1000, "height": 800}, **options})
            contexts.append(context)
        context.set_default_timeout(120_000)
        page = context.new_page()
        page.bodies = []
        page.on("console", note)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", note_request)
        page.goto(url)
        return page

    opened.url = server.url  # type: ignore[attr-defined]
    yield opened
    for context in contexts:
        context.close()
    assert errors == []
    assert hosts == {"127.0.0.1"}
