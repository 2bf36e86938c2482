"""Guides: replies sampled under a guide are well-formed Harmony, and the parser reads them as the guide intended."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from mlx_gptoss.errors import GptOssError, InvalidRequest
from mlx_gptoss.harmony.guide import HarmonyGuide, guide_for
from mlx_gptoss.harmony.messages import Conversation, Function, Message, ResponseFormat, TextFormat, ToolChoice
from mlx_gptoss.harmony.parse import Parser
from mlx_gptoss.harmony.render import render_reply
from mlx_gptoss.tokenizer import CALL, END, RETURN, Tokenizer

CLOSED = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Bern"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
STRICT = Function("get_weather", "", CLOSED, strict=True)
LOOSE = replace(STRICT, strict=False, parameters={key: CLOSED[key] for key in ("type", "properties", "required")})
FREE = Function("get.news-1")
NOTE = Function("note", text_format=TextFormat())
PATCH = Function("patch", text_format=TextFormat("lark", r'start: ("+" /[^\n]{1,9}/ "\n")+'))
FORM = ResponseFormat({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}, "n")
ASKED = Conversation((Message("user", "Hi"),))
AUTO, NONE, REQUIRED = (ToolChoice(kind) for kind in ("auto", "none", "required"))


def guided(tokenizer: Tokenizer, choice: ToolChoice = AUTO, **fields: Any) -> HarmonyGuide:
    guide = guide_for(replace(ASKED, **fields), tokenizer, choice)
    assert guide is not None
    return guide


def allowed_by(guide: HarmonyGuide, tokenizer: Tokenizer) -> list[int]:
    """The ids that may come next, special tokens included."""
    mask = guide.mask()
    return [id for id in range(tokenizer.vocab_size) if mask is None or mask[id >> 3] >> (id & 7) & 1]


def sample_reply(guide: HarmonyGuide, tokenizer: Tokenizer, random: Random) -> list[int]:
    """Sample a reply under the guide, up to and including the token that ends it.

    Tokens are drawn evenly from those allowed, which in a free body are all, except that one time in four special
    tokens are preferred, and one time in four tokens that close a string, an object or an array.
    """
    stops, ids = {tokenizer.special(RETURN), tokenizer.special(CALL)}, []
    while True:
        choices = allowed_by(guide, tokenizer)
        special = [id for id in choices if tokenizer.is_special(id)]
        closing = [id for id in choices if tokenizer.token_bytes(id) in (b'"', b"}", b"]")]
        for likely in (special, closing):
            if likely and random.random() < 0.25:
                choices = likely
                break
        ids.append(random.choice(choices))
        ends = guide.ends_with(ids[-1])
        if ends or (ends is None and ids[-1] in stops):
            return ids
        guide.accept(ids[-1])


def parsed(tokenizer: Tokenizer, ids: list[int]) -> list[Message]:
    parser = Parser(tokenizer)
    for id in ids:
        parser.push(id)
    parser.finish()
    return parser.messages


CASES: dict[str, dict[str, Any]] = {
    "format": {"response_format": FORM},
    "format and tools": {"response_format": FORM, "functions": (STRICT, FREE)},
    "format and built-in tools": {"response_format": FORM, "builtin_tools": ("browser", "python")},
    "tools": {"functions": (STRICT, FREE, NOTE, PATCH)},
    "built-in tools": {"functions": (LOOSE,), "builtin_tools": ("browser", "python")},
    "none": {"functions": (STRICT, FREE), "choice": NONE},
    "none, and a format": {"functions": (STRICT, FREE), "choice": NONE, "response_format": FORM},
    "required": {"functions": (LOOSE, FREE, NOTE), "choice": REQUIRED},
    "required, though there is a format": {"functions": (STRICT,), "choice": REQUIRED, "response_format": FORM},
    "named": {"functions": (STRICT, FREE), "choice": ToolChoice("required", ("get_weather",))},
    "named, not strict": {"functions": (LOOSE, FREE), "choice": ToolChoice("required", ("get_weather",))},
    "named, without parameters": {"functions": (STRICT, FREE), "choice": ToolChoice("required", ("get.news-1",))},
    "named, text": {"functions": (STRICT, NOTE), "choice": ToolChoice("required", ("note",))},
    "named, a grammar": {"functions": (STRICT, PATCH), "choice": ToolChoice("required", ("patch",))},
}


@pytest.mark.parametrize("case", CASES)
def test_the_parser_reads_sampled_replies_as_intended(nano: Tokenizer, case: str) -> None:
    """Whatever a model in confusion writes into free text, special tokens included, the request's promises hold."""
    options, random, seen = CASES[case], Random(case), set()
    functions = options.get("functions", ())
    choice = options.get("choice", AUTO)
    for _ in range(60):
        ids = sample_reply(guided(nano, **options), nano, random)
        *before, last = messages = parsed(nano, ids)
        assert all(m.recipient is None for m in before)
        seen |= {m.recipient or m.channel for m in messages}
        if last.recipient:
            called = last.recipient.removeprefix("functions.")
            assert choice.kind != "none" and (not choice.names or called in choice.names)
            check_call(last)
            if choice.kind == "required":
                assert len(before) <= 2
        else:
            assert choice.kind != "required" and last.channel in ("final", "commentary")
            if "response_format" in options:
                assert isinstance(json.loads(last.content)["n"], int)
                assert [m.channel for m in messages if m.channel != "analysis"] == ["final"]  # the text is all JSON
    offered = {f"functions.{f.name}" for f in functions if not choice.names or f.name in choice.names}
    if "builtin_tools" in options:
        offered |= {"browser.search", "browser.open", "browser.find", "python"}
    assert seen - {"analysis", "commentary", "final"} == (set() if choice.kind == "none" else offered)


def check_call(call: Message) -> None:
    if call.recipient == "functions.get_weather":
        assert set(json.loads(call.content)) - {"days"} == {"city"}
    elif call.recipient == "functions.get.news-1":
        assert json.loads(call.content) == {}
    elif call.recipient == "functions.patch":
        assert call.content.startswith("+") and call.content.endswith("\n") and call.content_type is None
    elif call.recipient == "functions.note":
        assert call.content_type is None
    elif call.recipient != "python":
        assert isinstance(json.loads(call.content), dict)


def test_nothing_to_enforce_needs_no_guide(nano: Tokenizer) -> None:
    assert guide_for(ASKED, nano, AUTO) is None and guide_for(ASKED, nano, NONE) is None
    for fields in ({"functions": (FREE,)}, {"builtin_tools": ("python",)}):
        for choice in (AUTO, NONE):
            assert guide_for(replace(ASKED, **fields), nano, choice) is not None


@pytest.mark.parametrize(
    "messages",
    [
        [Message("assistant", "hm", "analysis"), Message("assistant", '{"n": 1}', "final")],
        [Message("assistant", '{\n  "n": 1\n}', "final", content_type="<|constrain|>json")],
        [Message("assistant", '{"city": "Oslo"}', "commentary", "functions.get_weather", "<|constrain|>json")],
        [Message("assistant", '{"city": "Bern"}', "analysis", "functions.get_weather", "code")],
        [
            Message("assistant", "hm 🦙", "analysis"),
            Message("assistant", "I look it up.", "commentary"),
            Message("assistant", "{}", "commentary", "functions.get.news-1", "json"),
        ],
    ],
)
def test_replies_like_those_in_training_are_allowed(nano: Tokenizer, messages: list[Message]) -> None:
    guide = guided(nano, response_format=FORM, functions=(STRICT, FREE))
    *ids, last = render_reply(messages, nano)
    for id in ids:
        assert id in allowed_by(guide, nano), nano.decode([id], specials=True)
        guide.accept(id)
    assert last in allowed_by(guide, nano)


def test_the_recipient_may_follow_the_channel(nano: Tokenizer) -> None:
    text = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}'
    guide, ids = guided(nano, functions=(STRICT,)), nano.encode_with_specials(text)
    for id in ids:
        assert id in allowed_by(guide, nano)
        guide.accept(id)
    (message,) = parsed(nano, ids)
    assert (message.recipient, message.content) == ("functions.get_weather", '{"city": "Oslo"}')


def advanced(guide: HarmonyGuide, tokenizer: Tokenizer, text: str) -> HarmonyGuide:
    for id in tokenizer.encode_with_specials(text):
        assert id in allowed_by(guide, tokenizer)
        guide.accept(id)
    return guide


def test_bodies_without_a_grammar_are_free(nano: Tokenizer) -> None:
    for text in ("<|channel|>analysis<|message|>{", "<|channel|>commentary<|message|>a", "<|channel|>final<|message|>"):
        assert advanced(guided(nano, functions=(STRICT,)), nano, text).mask() is None
    call = "<|channel|>commentary to=functions.note<|message|>x"
    assert advanced(guided(nano, functions=(NOTE,)), nano, call).mask() is None


@pytest.mark.parametrize(
    ("written", "next"),
    [
        ("<|end|>", "<|start|>"),
        ("<|return|>", "<|start|>"),
        ("<|call|>", "<|start|>"),
        ("<|endoftext|>", "<|start|>"),
        ("<|start|>", "assistant"),
        ("<|channel|>", "final"),
        ("<|message|>", None),
        ("<|constrain|>", None),
    ],
)
def test_special_tokens_in_a_free_body_are_read_as_the_parser_reads_them(
    nano: Tokenizer, written: str, next: str | None
) -> None:
    guide = advanced(guided(nano, functions=(STRICT,)), nano, "<|channel|>analysis<|message|>hm")
    assert guide.ends_with(nano.special(written)) in (None, False)
    guide.accept(nano.special(written))
    if next is None:
        assert guide.mask() is None
    else:
        assert nano.encode_with_specials(next)[0] in allowed_by(guide, nano)
        assert len(allowed_by(guide, nano)) < 9


def test_the_turn_goes_on_after_analysis_and_ends_with_a_call(nano: Tokenizer) -> None:
    analysis = advanced(guided(nano, functions=(NOTE,)), nano, "<|channel|>analysis<|message|>hm")
    assert [analysis.ends_with(nano.special(name)) for name in (RETURN, CALL, END)] == [False, False, None]
    call = advanced(guided(nano, functions=(NOTE,)), nano, "<|channel|>commentary to=functions.note<|message|>x")
    assert [call.ends_with(nano.special(name)) for name in (RETURN, CALL, END)] == [True, True, True]
    final = advanced(guided(nano, functions=(NOTE,)), nano, "<|channel|>final<|message|>x")
    assert final.ends_with(nano.special(RETURN)) is None and final.ends_with(nano.encode("a")[0]) is None
    for choice, ends in ((AUTO, None), (REQUIRED, False)):
        preamble = advanced(guided(nano, choice, functions=(NOTE,)), nano, "<|channel|>commentary<|message|>x")
        assert preamble.ends_with(nano.special(RETURN)) is ends


def test_only_declared_recipients_may_be_called(nano: Tokenizer) -> None:
    guide = advanced(guided(nano, functions=(STRICT, FREE)), nano, "<|channel|>commentary")
    to, *rest = nano.encode(" to=functions.get_time")
    assert to in allowed_by(guide, nano)
    guide.accept(to)
    for id in rest:
        if id not in allowed_by(guide, nano):
            break
        guide.accept(id)
    else:
        raise AssertionError("an undeclared function may be called")


def test_headers_of_1024_functions_are_built_once_and_fast(nano: Tokenizer) -> None:
    functions = tuple(Function(f"mcp__server_{n % 30}__do_{n}", "", CLOSED) for n in range(1024))
    first = guided(nano, functions=functions)
    started = time.thread_time()
    guide = guided(nano, functions=functions)
    assert guide._tries is first._tries
    assert time.thread_time() - started < 0.5  # CPU seconds of this thread; usually a twentieth of it
    advanced(guide, nano, "<|channel|>commentary to=functions.mcp__server_3__do_1023<|message|>{")


def test_accepting_a_masked_header_token_is_an_error(nano: Tokenizer) -> None:
    with pytest.raises(GptOssError, match="not allowed in this header"):
        guided(nano, response_format=FORM).accept(nano.encode("x")[0])


@pytest.mark.parametrize(
    ("fields", "choice", "complaint"),
    [
        ({}, REQUIRED, "^tool_choice requires a call, but no function is declared"),
        ({"response_format": ResponseFormat({"not": {}})}, AUTO, "^response_format cannot be enforced"),
        ({"functions": (Function("f", "", {"not": {}}, True),)}, AUTO, "^the parameters of 'f' cannot be enforced"),
    ],
)
def test_refusals(nano: Tokenizer, fields: dict[str, Any], choice: ToolChoice, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        guide_for(replace(ASKED, **fields), nano, choice)


def test_a_schema_that_is_not_enforced_is_not_checked(nano: Tokenizer) -> None:
    loose = Function("f", "", {"type": "object", "not": {}})
    assert guide_for(replace(ASKED, functions=(loose,)), nano, REQUIRED) is not None
    strict = replace(loose, strict=True)
    assert guide_for(replace(ASKED, functions=(strict,)), nano, NONE) is not None
