"""What the tests of the chat page share: the browser's flags, and how to ask and to answer."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested through playwright")
expect = playwright.expect
expect.set_options(timeout=120_000)  # the machine may be busy

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
ARGUMENTS += ["disable-component-update", "disable-sync"]
COMPLETIONS = "**/v1/chat/completions"
SUM, SUM_ANSWER = "What is 12 + 30?", "12 + 30 = 42"


def ask(page: Any, question: str) -> None:
    page.get_by_label("Your message").fill(question)
    page.keyboard.press("Enter")


def mock_replies(page: Any, status: int = 200, headers: dict[str, str] | None = None, **answer: Any) -> None:
    """Answer the next requests from the test: with `deltas`, with an `error`, or with an empty stream."""
    body = json.dumps({"error": {"message": answer["error"]}}) if "error" in answer else ""
    for delta in answer.get("deltas", ()):
        body += f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': None}]})}\n\n"
    body += answer.get("end", "data: [DONE]\n\n") if "error" not in answer else ""
    page.route(COMPLETIONS, lambda route: route.fulfill(status=status, headers=headers or {}, body=body))


def wait_until_ready(page: Any) -> None:
    """The list of conversations is there."""
    page.wait_for_selector("html[data-ready]", state="attached")
