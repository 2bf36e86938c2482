"""POST /v1/markdown: what Markdown becomes, that nothing unsafe gets through, and that hostile texts take no time."""

from __future__ import annotations

import re
import time

import httpx
import pytest
from mlx_gptoss_cli import options

from mlx_gptoss.server import markdown


def html(text):
    return "".join(block for block, _ in markdown.render_blocks(text))


def test_blocks_say_how_many_lines_they_take():
    text = "# A\n\ntext\nmore\n\n- one\n- two\n\n```\ncode\n\n```\n\nlast"
    blocks = markdown.render_blocks(text)
    assert [lines for _, lines in blocks] == [2, 3, 3, 5, 1]
    assert sum(lines for _, lines in blocks) == len(text.split("\n"))
    assert [re.match(r"<(\w+)", block)[1] for block, _ in blocks] == ["h3", "p", "ul", "pre", "p"]


@pytest.mark.parametrize("text", ["", "\n", "\n\nx\n\n", "x\ny", "a\n\n\n\nb\n"])
def test_no_line_is_lost(text):
    assert sum(lines for _, lines in markdown.render_blocks(text)) == len(text.split("\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a **b** *c* ~~d~~ `e`", "<strong>b</strong> <em>c</em> <s>d</s> <code>e</code>"),
        ("\\*not\\* \\[a\\]", "*not* "),
        (
            "|a|b|c|\n|:-|:-:|-:|\n|1|2|3|",
            '<td class="left">1</td>\n<td class="center">2</td>\n<td class="right">3</td>',
        ),
        ("- [x] done", 'checked="checked" disabled="disabled"'),
        ("[a](https://x.org)", 'href="https://x.org" target="_blank" rel="noopener noreferrer"'),
        ("```python\nx = 1\n```", '<span class="n">x</span>'),
        ("```nonsense\n<x>\n```", '<code class="language-nonsense">&lt;x&gt;</code>'),
        ("$a^2$", "<msup><mi>a</mi><mn>2</mn></msup>"),
        (r"\(a_1\)", "<msub><mi>a</mi><mn>1</mn></msub>"),
        ("\\[\\sqrt{x}\\]", 'display="block"'),
        ("$$\n\\frac{1}{2}\n$$", "<mfrac>"),
        ("it costs $5 and $6", "it costs $5 and $6"),
        (r"\(\frac{\)", '<code class="formula">\\frac{</code>'),
        ("3. three\n4. four", '<ol start="3">'),
        ("# a\n###### b", "<h3>a</h3>\n<h6>b</h6>"),
    ],
)
def test_what_markdown_becomes(text, expected):
    assert expected in html(text)


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[x](javascript:alert(1))",
        "[x](data:text/html,<script>alert(1)</script>)",
        "[x](<javascript:alert(1)>)",
        "[x](vbscript:x 'y')",
        "![x](https://evil.org/pixel.png)",
        '[x](https://a.org "\' onmouseover=alert(1) ")',
        "<svg><animate onbegin=alert(1)>",
        '```html"><script>alert(1)</script>\nx\n```',
        "```js onload=alert(1)\nx\n```",
        r"$\text{<script>alert(1)</script>}$",
        r"\(\href{javascript:alert(1)}{x}\)",
        "<math><mtext><style><img src=x onerror=alert(1)>",
        "<a href=https://x.org style=position:fixed>x</a>",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "| a |\n|:-:|\n| <script>x</script> |",
    ],
)
def test_nothing_unsafe_gets_through(text):
    shown = html(text)
    tags = re.findall(r"<\s*/?\s*([a-zA-Z0-9]+)([^>]*)>", shown)
    assert {tag for tag, _ in tags} <= markdown.HTML | markdown.MATHML
    for _, attributes in tags:
        names = re.findall(r'([\w-]+)="[^"]*"', attributes)
        assert not [name for name in names if name.startswith("on") or name == "style" or name == "src"], shown
        assert not re.search(r'href="(?!https?:|mailto:)', attributes), shown


HOSTILE = {
    "quotes": ">" * 100_000,
    "brackets": "[" * 60_000,
    "emphasis": "*a_" * 40_000,
    "table": "|".join("a" * 2000) + "\n" + "|".join(["-"] * 2000) + "\n" + ("|".join("b" * 2000) + "\n") * 30,
    "backticks": "".join("`" * i + "a" for i in range(350)),
    "links": "[a](" * 20_000,
    "dollars": "$a" * 30_000,
    "formulas": "\\(" * 30_000,
    "lists": "".join("  " * i + "- a\n" for i in range(350)),
    "entities": "&#x" * 60_000,
    "code": "```js\n" + "/" * 16_000 + "\n```",
    "tex": "$" + "{" * 990 + "$\n\n" + "$\\frac" * 10_000,
    "nul": "\0" * 60_000,
    "surrogates": "\ud800" * 100,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_take_no_time(name):
    started = time.process_time()
    html(HOSTILE[name])
    assert time.process_time() - started < 5


def test_over_http(server):
    answer = httpx.post(f"{server.url}/v1/markdown", json={"text": "a **b**"}, timeout=60)
    assert answer.json() == {"blocks": [{"html": "<p>a <strong>b</strong></p>\n", "lines": 1}]}
    for text in ("x" * (markdown.MAX_CHARACTERS + 1), None, 3):
        assert httpx.post(f"{server.url}/v1/markdown", json={"text": text}, timeout=60).status_code in (400, 422)


def test_the_extra_is_named_where_a_package_is_missing():
    assert {"markdown_it", "nh3", "pygments", "latex2mathml", "mdit_py_plugins"} <= set(options.SERVE_PACKAGES)
