"""The streaming parser on well-formed and malformed output. test_parse_fuzz.py generates more."""

from __future__ import annotations

import time
from typing import Any

import pytest

from mlx_gptoss.harmony.header import Header
from mlx_gptoss.harmony.messages import Message
from mlx_gptoss.harmony.parse import Parser
from mlx_gptoss.tokenizer import Tokenizer

THINK = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"


def assistant(content: str, channel: str | None = None, *rest: str | None) -> Message:
    return Message("assistant", content, channel, *rest)


def test_a_reply_is_parsed_token_by_token(small: Tokenizer) -> None:
    parser = Parser(small)
    deltas = []
    for id in small.encode_with_specials(f"{THINK}<|channel|>final<|message|>Hé!"):
        deltas.append([(delta.kind, delta.text, delta.message, delta.starts) for delta in parser.push(id)])
    assert [delta for delta in deltas if delta] == [
        [("reasoning", "", 0, True)],
        [("reasoning", "h", 0, False)],
        [("reasoning", "m", 0, False)],
        [("text", "", 1, True)],
        [("text", "H", 1, False)],
        [("text", "é", 1, False)],
        [("text", "!", 1, False)],
    ]
    assert parser.messages == [assistant("hm", "analysis")]
    assert parser.finish() == []
    assert parser.messages == [assistant("hm", "analysis"), assistant("Hé!", "final")]


CALL = assistant("{}", "commentary", "functions.f", "<|constrain|>json")
PYTHON = assistant("1", "analysis", "python", "<|constrain|>python")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>", CALL),
        (" to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>", CALL),
        ("<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}<|call|>", CALL),
        ("<|channel|>commentary to=functions.f <|constrain|> json <|message|>{}", CALL),
        ("<|channel|>commentary functions.f <|constrain|>json<|message|>{}<|call|>", CALL),
        ("<|channel|>to=functions.f commentary <|constrain|>json<|message|>{}<|call|>", CALL),
        ("assistant to=functions.f<|channel|>commentary<|channel|>commentary <|constrain|>json<|message|>{}", CALL),
        (" to=functions.f<|channel|><|channel|>commentary <|constrain|>json<|message|><|message|>{}<|call|>", CALL),
        ("<|channel|>commentary to=functions.f <|constrain|>json{}<|call|>", None),
        (
            "<|channel|>commentary to=functions.f json<|message|>{}",
            assistant("{}", "commentary", "functions.f", "json"),
        ),
        (" to=functions.f json<|message|>{}<|call|>", assistant("{}", None, "functions.f", "json")),
        ("<|channel|>analysis to=functions.f code<|message|>{}", assistant("{}", "analysis", "functions.f", "code")),
        ("<|channel|>analysis to=python code<|message|>1<|call|>", assistant("1", "analysis", "python", "code")),
        (" to=python<|channel|>analysis <|constrain|>python<|message|>1", PYTHON),
        ("<|channel|>analysis to=python <|constrain|>python<|message|>1<|call|>", PYTHON),
        ("<|channel|>analysis to=browser.search<|message|>{}<|call|>", assistant("{}", "analysis", "browser.search")),
        ("<|channel|>commentary<|message|>I shall look.<|end|>", assistant("I shall look.", "commentary")),
        ("<|channel|>final <|constrain|>json<|message|>{}", assistant("{}", "final", None, "<|constrain|>json")),
        ("<|channel|>final json<|message|>{}", assistant("{}", "final", None, "json")),
        ("<|channel|>final\n<|message|>Hi", assistant("Hi", "final")),
        ("<|channel|>strange<|message|>Hi", assistant("Hi", "strange")),
        ("<|message|>Hi<|return|>", assistant("Hi")),
        ("final<|message|>Hi", assistant("Hi", "final")),
        ("<|channel|>final<|message|><|return|>", assistant("", "final")),
        ("<|start|>user:bob<|message|>Hi<|end|>", Message("user", "Hi", name="bob")),
        (
            "<|start|>functions.f to=assistant<|channel|>commentary<|message|>3<|end|>",
            Message("tool", "3", "commentary", "assistant", name="functions.f"),
        ),
        (
            "<|start|>python<|channel|>analysis to=assistant<|message|>3<|end|>",
            Message("tool", "3", "analysis", "assistant", name="python"),
        ),
        # Malformed: no <|message|>
        ("Hello", assistant("Hello")),
        ("Hello there, how are you today?", assistant("Hello there, how are you today?")),
        ("Hello\nworld<|return|>", assistant("Hello\nworld")),
        ("<|channel|>final Hello there<|return|>", assistant(" Hello there", "final")),
        ("<|channel|>finally, some text", assistant("finally, some text")),
        ("<|channel|>final<|return|>", assistant("", "final")),
        ("<|channel|>commentary to=functions.f {}<|call|>", assistant(" {}", "commentary", "functions.f")),
        ("<|channel|>commentary to=functions.f<|call|>", assistant("", "commentary", "functions.f")),
        ("<|start|>assistant Hi", assistant(" Hi")),
        # Malformed: header words that fit no field
        ("Sure! <|channel|>final<|message|>Hi", assistant("Sure! Hi", "final")),
        ("<|channel|>final a b c<|message|>Hi", assistant(" a b cHi", "final")),
        ("<|channel|>commentary to=functions.f to=functions.g<|message|>{}", None),
        # Special tokens within a text
        (
            "<|channel|>final<|message|>a<|message|>b<|constrain|>c<|startoftext|>d<|return|>",
            assistant("abcd", "final"),
        ),
        ("<|channel|>final<|message|>a <|channel|>b c", assistant("a b c", "final")),
    ],
)
def test_one_message(parse: Any, text: str, message: Message | None) -> None:
    messages = parse(text).messages
    assert len(messages) == 1
    if message is not None:
        assert messages == [message]
    else:
        assert messages[0].recipient == "functions.f"
        assert messages[0].content in ("json{}", " to=functions.g{}")


@pytest.mark.parametrize(
    "text",
    [
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>",
        "<|channel|>analysis<|message|>a<|end|><|channel|>final<|message|>b<|return|>",
        "<|channel|>analysis<|message|>a<|end|>assistant<|channel|>final<|message|>b<|return|>",
        "<|channel|>analysis<|message|>a<|channel|>final<|message|>b<|return|>",
        "<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>b",
        "<|channel|>analysis<|message|>a<|end|><|end|><|start|><|start|>assistant<|channel|>final<|message|>b<|return|>",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant final<|message|>b<|return|><|endoftext|>",
    ],
)
def test_reasoning_then_answer(parse: Any, text: str) -> None:
    assert parse(text).messages == [assistant("a", "analysis"), assistant("b", "final")]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("c<|channel|>o", [assistant("co")]),
        ("c<|channel|>o<|start|>assistant<|channel|>final<|message|>b", [assistant("co"), assistant("b", "final")]),
        (
            "<|channel|>final<|message|>a<|channel|>an<|start|>assistant<|message|>b",
            [assistant("a", "final"), assistant("b")],
        ),
    ],
)
def test_only_the_end_of_a_header_can_be_truncated(parse: Any, text: str, messages: list[Message]) -> None:
    assert parse(text).messages == messages


TRUNCATED_HEADERS = [
    "",
    "<|channel|>",
    "<|channel|>analysis",
    " to=functions.f<|channel|>comm",
    "<|channel|>commentary to",
    " ass",
]


@pytest.mark.parametrize("text", TRUNCATED_HEADERS)
def test_a_truncated_header_is_no_message(parse: Any, text: str) -> None:
    assert parse(text).messages == []
    assert parse(THINK + text).messages == [assistant("hm", "analysis")]


def test_text_without_a_header_is_streamed(small: Tokenizer) -> None:
    parser = Parser(small)
    deltas = [parser.push(id) for id in small.encode("I say this without any header")]
    early = "".join(delta.text for pushed in deltas for delta in pushed)
    assert early == "I say this without any header"
    assert sum(map(bool, deltas)) > 5


def test_a_role_is_read_only_after_start(parse: Any) -> None:
    turn = "<|start|>user<|message|>q<|end|>"
    assert parse(f"{turn}user hi<|return|>").messages == [Message("user", "q"), assistant("user hi")]
    assert parse(f"{turn}<|start|>user hi<|return|>").messages == [Message("user", "q"), Message("user", " hi")]


@pytest.mark.parametrize(
    ("header", "kind", "function"),
    [
        (Header(channel="analysis"), "reasoning", None),
        (Header(channel="final"), "text", None),
        (Header(channel="commentary"), "text", None),
        (Header(channel="commentary", recipient="functions.f.g"), "call", "f.g"),
        (Header(channel="analysis", recipient="functions.f"), "call", "f"),
        (Header(channel="analysis", recipient="python"), "call", "python"),
        (Header(channel="analysis", recipient="browser.search"), "call", "browser.search"),
        (Header(channel="final", recipient="functions.f"), "call", "f"),
        (Header(recipient="functions.f"), "call", "f"),
        (Header(channel="commentary", recipient="f"), "call", "f"),
        (Header(channel="final", recipient="f"), "text", None),
        (Header(channel="commentary", recipient="all"), "text", None),
        (Header(channel="strange"), "text", None),
        (Header(), "text", None),
    ],
)
def test_kind_and_function_of_a_header(header: Header, kind: str, function: str | None) -> None:
    assert (header.kind, header.function) == (kind, function)


def test_a_truncated_character_becomes_a_replacement_character(small: Tokenizer, parse: Any) -> None:
    ids = small.encode_with_specials("<|channel|>final<|message|>ok 🎉")
    for missing in (1, 2):
        assert parse(ids[:-missing]).messages == [assistant("ok \ufffd", "final")]
        assert parse([*ids[:-missing], small.special("<|return|>")]).messages == [assistant("ok \ufffd", "final")]
    assert [delta.text for delta in parse(ids).deltas] == ["", "o", "k", " ", "🎉"]


def test_endless_headers_are_read_in_linear_time(parse: Any) -> None:
    started = time.thread_time()
    for text in ("to=" + "a" * 20_000, " " * 20_000 + "b", "<|channel|>" * 20_000 + "b", "<|channel|>final" * 4_000):
        parse(text)
    assert time.thread_time() - started < 10
    assert parse("to=" + "a" * 20_000).messages == [assistant("to=" + "a" * 20_000)]
