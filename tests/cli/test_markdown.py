"""Markdown that streams is rendered as it would be in one piece, and loses nothing."""

from __future__ import annotations

import io
import random

import mlx_gptoss_cli.markdown as markdown
import pyte
import pytest
from rich.console import Console

ANSWER = """# A title

A paragraph with **bold**, `code` and <b>HTML</b>,
over two lines.

- one
- two
  - inner

1. first
2. second

| left | right |
|:-----|------:|
| a    |     1 |
| b    |    20 |

```python
def f(x):
    return x
```

> quoted

The end, ~~struck~~."""
SHOWN = [
    *("A title", "A paragraph with bold, code and <b>HTML</b>,", "one", "two", "inner", "1 first", "2 second"),
    *("left", "right", "20", "def f(x):", "    return x", "quoted", "The end, struck."),
]


def shown(pieces, monkeypatch, columns=60, rows=24):
    """The whole screen, scrolled lines too, after these pieces."""
    out = io.StringIO()
    monkeypatch.setattr(
        markdown,
        "new_console",
        lambda **options: Console(file=out, force_terminal=True, width=columns, height=rows, **options),
    )
    writer = markdown.MarkdownWriter()
    for piece in pieces:
        writer.write(piece)
    writer.close()
    screen = pyte.HistoryScreen(columns, rows, history=5000)
    pyte.Stream(screen).feed(out.getvalue().replace("\n", "\r\n"))
    above = ["".join(line[x].data for x in range(columns)) for line in screen.history.top]
    return "\n".join(line.rstrip() for line in [*above, *screen.display]).rstrip()


def cut(text, seed):
    rng, pieces = random.Random(seed), []
    while text:
        size = rng.randint(1, 9)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("refresh", [0, 1e9], ids=["drawn at each piece", "never"])
def test_in_pieces_as_whole(monkeypatch, seed, refresh):
    whole = shown([ANSWER], monkeypatch)
    monkeypatch.setattr(markdown, "REFRESH_S", refresh)
    assert shown(cut(ANSWER, seed), monkeypatch) == whole
    for text in SHOWN:
        assert text in whole, whole
    assert "**" not in whole and "~~" not in whole


@pytest.mark.parametrize("rows", [6, 10])
def test_a_block_taller_than_the_terminal(monkeypatch, rows):
    code = "```\n" + "".join(f"line {i}\n" for i in range(100)) + "```\n\nAfter."
    monkeypatch.setattr(markdown, "REFRESH_S", 0)
    text = shown(cut(code, 1), monkeypatch, rows=rows)
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("line")]
    assert lines == [f"line {i}" for i in range(100)]
    assert text.endswith("After.")


def test_a_narrow_terminal(monkeypatch):
    text = shown(cut(ANSWER, 2), monkeypatch, columns=20)
    assert "The end, struck." in text and max(map(len, text.splitlines())) <= 20


@pytest.mark.parametrize("text", ["", " \n\n", "```", "| a |", "[x]: y", "\x00\x1b[31m", "- " * 500, "> " * 500 + "x"])
def test_odd_texts(monkeypatch, text):
    shown(cut(text, 3), monkeypatch)
