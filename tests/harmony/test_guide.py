"""Guides: replies sampled under a guide are well-formed Harmony, and the parser reads them as the guide intended."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from mlx_gptoss.errors import GptOssError, InvalidRequest
from mlx_gptoss.harmony.guide import HarmonyGuide, guide_for
from mlx_gptoss.harmony.messages import Conversation, Function, Message, ResponseFormat, ToolChoice
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
FREE = Function("get.news-1")
FORM = ResponseFormat({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}, "n")
ASKED = Conversation((Message("user", "Hi"),))
AUTO, NONE, REQUIRED = (ToolChoice(kind) for kind in ("auto", "none", "required"))


def guided(tokenizer: Tokenizer, choice: ToolChoice = AUTO, parallel: bool = True, **fields: Any) -> HarmonyGuide:
    guide = guide_for(replace(ASKED, **fields), tokenizer, choice, parallel_tool_calls=parallel)
    assert guide is not None
    return guide


def sample_reply(guide: HarmonyGuide, tokenizer: Tokenizer, random: Random) -> list[int]:
    """Sample a reply under the guide, up to and including a stop token.

    Tokens are drawn evenly from the mask, except that one time in four special tokens are preferred, and one time in
    four tokens that close a string, an object or an array.
    """
    stops, ids = {tokenizer.special(RETURN), tokenizer.special(CALL)}, []
    while True:
        mask = guide.mask()
        choices = [id for id in range(tokenizer.vocab_size) if mask[id >> 3] >> (id & 7) & 1]
        special = [id for id in choices if tokenizer.is_special(id)]
        closing = [id for id in choices if tokenizer.token_bytes(id) in (b'"', b"}", b"]")]
        for likely in (special, closing):
            if likely and random.random() < 0.25:
                choices = likely
                break
        ids.append(random.choice(choices))
        if ids[-1] in stops:
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
    "strict": {"functions": (STRICT, FREE)},
    "none": {"functions": (STRICT, FREE), "choice": NONE},
    "none, and a format": {"functions": (STRICT, FREE), "choice": NONE, "response_format": FORM},
    "required": {"functions": (STRICT, FREE), "choice": REQUIRED},
    "required, though there is a format": {"functions": (STRICT,), "choice": REQUIRED, "response_format": FORM},
    "named": {"functions": (STRICT, FREE), "choice": ToolChoice("required", ("get_weather",))},
    "named, free": {"functions": (STRICT, FREE), "choice": ToolChoice("required", ("get.news-1",))},
    "one call": {"functions": (FREE,), "parallel": False},
}


@pytest.mark.parametrize("case", CASES)
def test_the_parser_reads_sampled_replies_as_intended(nano: Tokenizer, case: str) -> None:
    options, random, seen = CASES[case], Random(case), set()
    names = {f"functions.{f.name}" for f in options.get("functions", ())}
    choice = options.get("choice", AUTO)
    for _ in range(60):
        ids = sample_reply(guided(nano, **options), nano, random)
        *before, last = messages = parsed(nano, ids)
        assert all(m.recipient is None and m.channel != "final" for m in before) or "response_format" not in options
        assert nano.decode([id for id in ids if nano.is_special(id)], specials=True).count(CALL) <= 1
        calls = [m for m in messages if m.recipient]
        seen |= {m.recipient or m.channel for m in messages}
        if ids[-1] == nano.special(CALL):
            assert calls == [last] and choice.kind != "none"
            assert not choice.names or last.recipient == f"functions.{choice.names[0]}"
            if last.recipient == "functions.get_weather":
                assert set(json.loads(last.content)) - {"days"} == {"city"}
        else:
            assert not calls and last.channel == "final" and choice.kind != "required"
            if "response_format" in options:
                assert isinstance(json.loads(last.content)["n"], int)
                assert [m.channel for m in messages].count("commentary") == 0  # a preamble would be part of the text
        if choice.kind == "required":
            assert len(before) <= 2
    offered = {"browser.search", "browser.open", "browser.find", "python"} if "builtin_tools" in options else names
    named = {f"functions.{name}" for name in choice.names}
    kept = named or (set() if choice.kind == "none" else offered)
    assert seen - {"analysis", "commentary", "final"} == kept


def test_nothing_to_enforce_needs_no_guide(nano: Tokenizer) -> None:
    for fields in ({}, {"functions": (FREE,)}, {"builtin_tools": ("python",)}):
        assert guide_for(replace(ASKED, **fields), nano, AUTO, parallel_tool_calls=True) is None
    assert guide_for(ASKED, nano, NONE, parallel_tool_calls=False) is None
    asked = replace(ASKED, builtin_tools=("python",))
    assert guide_for(asked, nano, NONE, parallel_tool_calls=True) is not None


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
            Message("assistant", "", "commentary", "functions.get.news-1", "json"),
        ],
    ],
)
def test_replies_like_those_in_training_are_allowed(nano: Tokenizer, messages: list[Message]) -> None:
    guide = guided(nano, response_format=FORM, functions=(STRICT, FREE))
    *ids, last = render_reply(messages, nano)
    for id in ids:
        assert guide.mask()[id >> 3] >> (id & 7) & 1, nano.decode([id], specials=True)
        guide.accept(id)
    assert guide.mask()[last >> 3] >> (last & 7) & 1


def test_the_recipient_may_follow_the_channel(nano: Tokenizer) -> None:
    text = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}'
    guide, ids = guided(nano, functions=(STRICT,)), nano.encode_with_specials(text)
    for id in ids:
        assert guide.mask()[id >> 3] >> (id & 7) & 1
        guide.accept(id)
    (message,) = parsed(nano, ids)
    assert (message.recipient, message.content) == ("functions.get_weather", '{"city": "Oslo"}')


def test_analysis_may_be_any_text(nano: Tokenizer) -> None:
    guide = guided(nano, response_format=FORM)
    for id in nano.encode_with_specials("<|channel|>analysis<|message|>{"):
        guide.accept(id)
    allowed = {id for id in range(nano.vocab_size) if guide.mask()[id >> 3] >> (id & 7) & 1}
    text = {id for id in range(nano.vocab_size) if not nano.is_special(id)}
    assert allowed == text | {nano.special(END)}


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
        guide_for(replace(ASKED, **fields), nano, choice, parallel_tool_calls=True)


def test_a_schema_that_is_not_enforced_is_not_checked(nano: Tokenizer) -> None:
    loose = Function("f", "", {"not": {}})
    assert guide_for(replace(ASKED, functions=(loose,)), nano, REQUIRED, parallel_tool_calls=True) is not None
    strict = replace(loose, strict=True)
    assert guide_for(replace(ASKED, functions=(strict,)), nano, NONE, parallel_tool_calls=True) is not None
