"""POST /v1/markdown: Markdown as safe HTML, which the chat page asks for while an answer streams.

Well-kept packages do the work: markdown-it-py parses (tables, strikethrough and task lists as on GitHub; HTML is shown
as text), pygments highlights code, latex2mathml turns formulas into MathML, and nh3 removes all but a list of elements
and attributes. The answer has no styles, no scripts, no images, and links only to http, https and mailto.
"""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import nh3
from fastapi import APIRouter, Request
from latex2mathml.converter import convert as latex_to_mathml
from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.tasklists import tasklists_plugin
from pydantic import Field
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound
from starlette.responses import Response

from .body import BodyRoute
from .disconnect import on_thread
from .errors import JsonResponse
from .fields import RequestModel

MAX_CHARACTERS = 256 << 10  # of a request
MAX_BLOCK = 64 << 10  # a longer block is shown as it is: parsing may take quadratic time
MAX_CODE = 16 << 10  # characters of code that are highlighted: a regular expression of pygments cannot be interrupted
MAX_FORMULA = 1000
THREADS = 2  # that render at once


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LANGUAGES = _names(
    "bash c c++ cpp console cs csharp css diff docker dockerfile go graphql html http ini java javascript js json "
    "jsonc kotlin lua make makefile markdown md objective-c objc perl php powershell protobuf py python r rb ruby "
    "rust rs scala sh shell sql swift toml ts tsx typescript xml yaml yml zsh"
)
MATHML = _names(
    "math maction menclose merror mfenced mfrac mglyph mi mlabeledtr mmultiscripts mn mo mover mpadded mphantom "
    "mprescripts mroot mrow ms mspace msqrt mstyle msub msubsup msup mtable mtd mtext mtr munder munderover none "
    "semantics"
)
HTML = _names(
    "a blockquote br code del div em h3 h4 h5 h6 hr input li ol p pre s span strong table tbody td th thead tr ul"
)
ATTRIBUTES = {
    "a": {"href", "title"},
    "input": {"type", "checked", "disabled", "class"},
    "ol": {"start"},
    **{name: {"class"} for name in ("code", "div", "li", "pre", "span", "td", "th", "ul")},
    "math": {"display", "xmlns"},
    "mo": {"stretchy", "fence", "form", "separator", "lspace", "rspace", "minsize", "maxsize", "movablelimits"},
    "mi": {"mathvariant"},
    "mtable": {"columnalign", "rowspacing", "columnspacing"},
    "mtd": {"columnalign"},
    "mspace": {"width"},
    "mfrac": {"linethickness"},
    "mover": {"accent"},
    "munder": {"accentunder"},
}

router: APIRouter = APIRouter(route_class=BodyRoute)
_free = asyncio.Semaphore(THREADS)


class MarkdownRequest(RequestModel):
    text: str = Field(max_length=MAX_CHARACTERS)


@router.post("/v1/markdown")
async def render_markdown(body: MarkdownRequest, request: Request) -> Response:
    """The blocks of a Markdown text as HTML, each with the number of lines that it takes, so that a text that grows is
    sent again only from its last block on."""
    async with _free:
        blocks = await on_thread(request, render_blocks, body.text)
    return JsonResponse({"blocks": [{"html": text, "lines": lines} for text, lines in blocks]})


def render_blocks(text: str) -> list[tuple[str, int]]:
    """Each block (paragraph, list, table, code) as safe HTML, and how many lines it takes, empty ones behind it too."""
    text = text.encode("utf-8", "replace").decode()  # lone surrogates
    lines = text.split("\n")
    if max(map(len, lines)) > MAX_BLOCK:
        return [(_as_it_is(text), len(lines))]
    starts = [0, *_starts(text)[1:], len(lines)]
    return [(_render("\n".join(lines[a:b])), b - a) for a, b in pairwise(starts) if b > a]


def _starts(text: str) -> list[int]:
    """The lines where top-level blocks begin."""
    return sorted({token.map[0] for token in _block_parser().parse(text) if token.level == 0 and token.map})


def _render(source: str) -> str:
    if len(source) > MAX_BLOCK:
        return _as_it_is(source)
    tokens = _parser().parse(source)
    _shift_headings(tokens)
    rendered = _parser().renderer.render(tokens, _parser().options, {})
    return nh3.clean(
        rendered,
        tags=set(HTML | MATHML),
        attributes={name: set(names) for name, names in ATTRIBUTES.items()},
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer",
        set_tag_attribute_values={"a": {"target": "_blank"}},
        strip_comments=True,
    )


def _as_it_is(source: str) -> str:
    return f"<pre>{html.escape(source)}</pre>"


@cache
def _block_parser() -> MarkdownIt:
    """Finds blocks without looking into them."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").use(dollarmath_plugin)
    parser.core.ruler.disable(["inline"])
    _add_brackets(parser)
    return parser


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "highlight": _highlighted}).enable(["table", "strikethrough"])
    parser.use(dollarmath_plugin, allow_space=False, allow_digits=False, double_inline=True, renderer=_formula)
    parser.use(tasklists_plugin)
    _add_brackets(parser)
    parser.disable("image")
    for cell in ("th_open", "td_open"):
        parser.add_render_rule(cell, _cell)
    return parser


def _add_brackets(parser: MarkdownIt) -> None:
    r"""Formulas in \(...\) and \[...\], as models write them."""

    def rule(state: StateInline, silent: bool) -> bool:
        opening = state.src[state.pos : state.pos + 2]
        if opening not in (r"\(", r"\["):
            return False
        end = state.src.find(r"\)" if opening == r"\(" else r"\]", state.pos + 2)
        if end < 0 or end - state.pos > MAX_FORMULA:
            return False
        if not silent:
            token = state.push("math_inline" if opening == r"\(" else "math_inline_double", "math", 0)
            token.content = state.src[state.pos + 2 : end]
        state.pos = end + 2
        return True

    parser.inline.ruler.before("escape", "math_brackets", rule)


def _formula(source: str, options: dict[str, Any]) -> str:
    """MathML; the source where it is too long or broken."""
    display = "block" if options.get("display_mode") else "inline"
    if len(source) <= MAX_FORMULA:
        try:
            return latex_to_mathml(source.strip(), display=display)
        except Exception:  # of latex2mathml there are many, and some come from the standard library
            pass
    return f'<code class="formula">{html.escape(source)}</code>'


def _highlighted(code: str, language: str, attributes: str) -> str:
    """Code with pygments' classes; as it is where the language is not known or the code is long."""
    name = language.lower() if language.lower() in LANGUAGES else ""
    shown = html.escape(code)
    if name and len(code) <= MAX_CODE:
        try:
            lexer = get_lexer_by_name(name, stripnl=False, ensurenl=False)
            shown = highlight(code, lexer, HtmlFormatter(nowrap=True))
        except ClassNotFound:
            pass
    label = re.sub(r"[^\w+#.-]", "", language)[:30]
    return f'<pre><code class="language-{label or "text"}">{shown.removesuffix(chr(10))}</code></pre>'


def _cell(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """A table's cell with its alignment as a class: the page's policy forbids styles."""
    token = tokens[index]
    style = str(token.attrGet("style") or "")
    kind = style.rpartition(":")[2]
    return f'<{token.tag} class="{kind}">' if kind in ("left", "center", "right") else f"<{token.tag}>"


def _shift_headings(tokens: Sequence[Token]) -> None:
    """h1 to h6 as h3 to h6: the page itself has h1 and h2."""
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 2)}"
