"""Takes the README's screenshot: the server's chat page after two questions to the bundled model.

    python examples/tools/screenshot.py .github/screenshot.png

Needs playwright (in the `test` extra) and a Chromium on the PATH.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

QUESTIONS = ("What is 128 + 256?", "What is the capital of France?")
WIDTH, HEIGHT = 1000, 560
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FILE.png")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("error: no Chromium was found; install one and put it on the PATH")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        sys.exit("error: playwright is missing: python -m pip install -e '.[test]'")
    with serve() as url, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(url)
        for number, question in enumerate(QUESTIONS, 1):
            ask(page, question, number)
        page.locator("#log details summary").first.click()
        page.mouse.move(0, 0)
        page.screenshot(path=sys.argv[1])
        chromium.close()
    print(f"{sys.argv[1]}: {Path(sys.argv[1]).stat().st_size / 1000:.0f} kB")


def ask(page: Any, question: str, number: int) -> None:
    """Send a question and wait for the end of its answer, which is when the page counts its tokens."""
    page.get_by_label("Your message").fill(question)
    page.keyboard.press("Enter")
    page.get_by_text(re.compile("tokens/s")).nth(number - 1).wait_for(timeout=120_000)


@contextmanager
def serve() -> Iterator[str]:
    """A server with the bundled model on a free port; its URL, read from its greeting."""
    words = [sys.executable, "-m", "mlx_gptoss", "serve", "--port", "0"]
    server = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if found := re.search(r"http://[\d.]+:\d+", line):
                yield found.group()
                return
        raise SystemExit("error: the server did not start")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
