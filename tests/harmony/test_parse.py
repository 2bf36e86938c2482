"""The stream parser: well-formed output as openai-harmony reads it; malformed output without a word lost."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss.harmony.header import Header
from mlx_gptoss.harmony.messages import Message
from mlx_gptoss.harmony.parse import Delta, Parser
from mlx_gptoss.harmony.render import render_messages, render_reply
from mlx_gptoss.tokenizer import SPECIALS, Tokenizer

THINK = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"


def parse(tokenizer: Tokenizer, ids: Iterable[int]) -> tuple[list[Delta], list[Message]]:
    parser = Parser(tokenizer)
    deltas = [delta for id in ids for delta in parser.push(id)] + parser.finish()
    assert_consistent(deltas, parser.messages)
    return deltas, parser.messages


def assert_consistent(deltas: list[Delta], messages: list[Message]) -> None:
    """Deltas come in order, each message starts once, and what they say is what the messages hold."""
    places = [delta.message for delta in deltas]
    assert places == sorted(places)
    assert [delta.message for delta in deltas if delta.starts] == list(range(len(messages)))
    for place, message in enumerate(messages):
        pieces = [delta for delta in deltas if delta.message == place]
        assert "".join(piece.text for piece in pieces) == message.content
        assert pieces[0].starts
        for piece in pieces:
            head = (piece.role, piece.channel, piece.recipient, piece.content_type, piece.name)
            assert head == (message.role, message.channel, message.recipient, message.content_type, message.name)


def read(tokenizer: Tokenizer, text: str) -> list[Message]:
    return parse(tokenizer, tokenizer.encode_with_specials(text))[1]


def said(content: str, channel: str | None = None, *rest: str | None) -> Message:
    return Message("assistant", content, channel, *rest)


def test_a_reply_arrives_piece_by_piece(small: Tokenizer) -> None:
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
    assert parser.messages == [said("hm", "analysis")]
    assert parser.finish() == []
    assert parser.messages == [said("hm", "analysis"), said("Hé!", "final")]


CALL = said("{}", "commentary", "functions.f", "<|constrain|>json")


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
        ("<|channel|>commentary to=functions.f json<|message|>{}", said("{}", "commentary", "functions.f", "json")),
        (" to=functions.f json<|message|>{}<|call|>", said("{}", None, "functions.f", "json")),
        ("<|channel|>analysis to=functions.f code<|message|>{}", said("{}", "analysis", "functions.f", "code")),
        ("<|channel|>final <|constrain|>json<|message|>{}", said("{}", "final", None, "<|constrain|>json")),
        ("<|channel|>final json<|message|>{}", said("{}", "final", None, "json")),
        ("<|channel|>final\n<|message|>Hi", said("Hi", "final")),
        ("<|channel|>strange<|message|>Hi", said("Hi", "strange")),
        ("<|message|>Hi<|return|>", said("Hi")),
        ("final<|message|>Hi", said("Hi", "final")),
        ("<|channel|>final<|message|><|return|>", said("", "final")),
        ("<|start|>user:bob<|message|>Hi<|end|>", Message("user", "Hi", name="bob")),
        (
            "<|start|>functions.f to=assistant<|channel|>commentary<|message|>3<|end|>",
            Message("tool", "3", "commentary", "assistant", name="functions.f"),
        ),
        # Malformed: no <|message|>
        ("Hello", said("Hello")),
        ("Hello there, how are you today?", said("Hello there, how are you today?")),
        ("Hello\nworld<|return|>", said("Hello\nworld")),
        ("<|channel|>final Hello there<|return|>", said(" Hello there", "final")),
        ("<|channel|>finally, some text", said("finally, some text")),
        ("<|channel|>final<|return|>", said("", "final")),
        ("<|channel|>commentary to=functions.f {}<|call|>", said(" {}", "commentary", "functions.f")),
        ("<|channel|>commentary to=functions.f<|call|>", said("", "commentary", "functions.f")),
        ("<|start|>assistant Hi", said(" Hi")),
        # Malformed: words that fit nowhere
        ("Sure! <|channel|>final<|message|>Hi", said("Sure! Hi", "final")),
        ("<|channel|>final a b c<|message|>Hi", said(" a b cHi", "final")),
        ("<|channel|>commentary to=functions.f to=functions.g<|message|>{}", None),
        # Specials within a text
        ("<|channel|>final<|message|>a<|message|>b<|constrain|>c<|startoftext|>d<|return|>", said("abcd", "final")),
        ("<|channel|>final<|message|>a <|channel|>b c", said("a b c", "final")),
    ],
)
def test_one_message(small: Tokenizer, text: str, message: Message | None) -> None:
    messages = read(small, text)
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
def test_thought_then_answer(small: Tokenizer, text: str) -> None:
    assert read(small, text) == [said("a", "analysis"), said("b", "final")]


HALVES = [
    "",
    "<|channel|>",
    "<|channel|>analysis",
    " to=functions.f<|channel|>comm",
    "<|channel|>commentary to",
    " ass",
]


@pytest.mark.parametrize("text", HALVES)
def test_half_a_header_is_no_message(small: Tokenizer, text: str) -> None:
    assert read(small, text) == []
    assert read(small, THINK + text) == [said("hm", "analysis")]


def test_text_without_a_header_does_not_wait_for_its_end(small: Tokenizer) -> None:
    parser = Parser(small)
    deltas = [parser.push(id) for id in small.encode("I say this without any header")]
    early = "".join(delta.text for pushed in deltas for delta in pushed)
    assert early == "I say this without any header"
    assert sum(map(bool, deltas)) > 5


def test_only_start_is_followed_by_a_role(small: Tokenizer) -> None:
    turn = "<|start|>user<|message|>q<|end|>"
    assert read(small, f"{turn}user hi<|return|>") == [Message("user", "q"), said("user hi")]
    assert read(small, f"{turn}<|start|>user hi<|return|>") == [Message("user", "q"), Message("user", " hi")]


@pytest.mark.parametrize(
    ("header", "kind", "function"),
    [
        (Header(channel="analysis"), "reasoning", None),
        (Header(channel="final"), "text", None),
        (Header(channel="commentary"), "text", None),
        (Header(channel="commentary", recipient="functions.f.g"), "call", "f.g"),
        (Header(channel="analysis", recipient="functions.f"), "call", "f"),
        (Header(channel="final", recipient="functions.f"), "call", "f"),
        (Header(recipient="functions.f"), "call", "f"),
        (Header(channel="commentary", recipient="f"), "call", "f"),
        (Header(channel="final", recipient="f"), "text", None),
        (Header(channel="commentary", recipient="all"), "text", None),
        (Header(channel="strange"), "text", None),
        (Header(), "text", None),
    ],
)
def test_where_a_message_goes(header: Header, kind: str, function: str | None) -> None:
    assert (header.kind, header.function) == (kind, function)


def test_a_truncated_character_becomes_a_replacement(small: Tokenizer) -> None:
    ids = small.encode_with_specials("<|channel|>final<|message|>ok 🎉")
    for missing in (1, 2):
        assert parse(small, ids[:-missing])[1] == [said("ok \ufffd", "final")]
        assert parse(small, [*ids[:-missing], small.special("<|return|>")])[1] == [said("ok \ufffd", "final")]
    deltas, _ = parse(small, ids)
    assert [delta.text for delta in deltas] == ["", "o", "k", " ", "🎉"]


def test_a_header_without_end_is_read_in_linear_time(small: Tokenizer) -> None:
    started = time.perf_counter()
    for text in ("to=" + "a" * 20_000, " " * 20_000 + "b", "<|channel|>" * 20_000 + "b", "<|channel|>final" * 4_000):
        read(small, text)
    assert time.perf_counter() - started < 10
    assert read(small, "to=" + "a" * 20_000) == [said("to=" + "a" * 20_000)]


GLUED = st.sampled_from(
    [*SPECIALS, *SPECIALS[2:], " to=functions.f ", " json", "assistant", "user", "final", "analysis"]
)
PLAIN = st.sampled_from(["W", " W", " W", "\n", " ", "🎉"])


def numbered(pieces: list[str]) -> str:
    """Every word is another one, so that each can be looked for."""
    return "".join(piece.replace("W", f"w{place:04}") for place, piece in enumerate(pieces))


STREAMS = st.lists(PLAIN | GLUED, max_size=25).map(numbered)


@settings(max_examples=1500, deadline=None)
@given(text=STREAMS)
def test_no_word_is_lost_or_said_twice(small: Tokenizer, text: str) -> None:
    _, messages = parse(small, small.encode_with_specials(text))
    told = " ".join(
        part
        for message in messages
        for part in (message.content, message.channel, message.recipient, message.content_type, message.name)
        if part
    )
    for word in re.findall(r"w\d{4}", text):
        assert told.count(word) == 1, (word, messages)


@settings(max_examples=500, deadline=None)
@given(text=STREAMS.map(lambda text: text.replace("<|", "<¦")), data=st.data())
def test_content_is_kept_to_the_letter(small: Tokenizer, text: str, data: st.DataObject) -> None:
    specials = st.sampled_from(["", "<|message|>", "<|constrain|>", "<|startoftext|>"])
    at = data.draw(st.integers(0, len(text)))
    streamed = f"<|channel|>final<|message|>{text[:at]}{data.draw(specials)}{text[at:]}<|return|>"
    assert read(small, streamed) == [said(text, "final")]


@settings(max_examples=1000, deadline=None)
@given(ids=st.lists(st.integers(0, 300), max_size=60), prefix=st.sampled_from(["", THINK, f"{THINK}<|message|>"]))
def test_any_ids_are_read(small: Tokenizer, prefix: str, ids: list[int]) -> None:
    parse(small, small.encode_with_specials(prefix) + ids)


TEXTS = st.text(max_size=20) | st.sampled_from(["", " x", "<|end|>", "🎉🎉", '{"a": "é"}\n'])
REPLIES = st.lists(
    st.one_of(
        st.builds(said, TEXTS, st.sampled_from(["analysis", "commentary", "final", "other"])),
        st.builds(
            said,
            TEXTS,
            st.sampled_from(["commentary", "analysis"]),
            st.sampled_from(["functions.f", "browser.search", "python"]),
            st.sampled_from([None, "json", "<|constrain|>json", "code"]),
        ),
    ),
    min_size=1,
    max_size=5,
)
RESULT = Message("tool", "3", "commentary", "assistant", name="functions.f")


@settings(max_examples=300, deadline=None)
@given(reply=REPLIES)
def test_what_is_rendered_is_read_back(small: Tokenizer, reply: list[Message]) -> None:
    assert parse(small, render_reply(reply, small))[1] == reply
    whole = [Message("user", "Hi", name="bob"), *reply, RESULT, Message("developer", "x")]
    assert parse(small, render_messages(whole, small))[1] == whole


def recipient_last(text: str) -> str:
    """Headers as the model writes them: the recipient after the channel."""
    return re.sub(r"( to=[^\s<]+)<\|channel\|>(\w+)", r"<|channel|>\2\1", text)


@settings(max_examples=500, deadline=None)
@given(reply=REPLIES, moved=st.booleans())
def test_well_formed_output_is_read_as_openai_harmony_does(
    published: Tokenizer, judge: Any, reply: list[Message], moved: bool
) -> None:
    import openai_harmony as oh

    ids = render_messages([*reply, RESULT, *reply], published)[2:]
    if moved and not any("<|" in message.content for message in reply):
        ids = published.encode_with_specials(recipient_last(published.decode(ids, specials=True)))
    theirs = oh.StreamableParser(judge, oh.Role.ASSISTANT)
    ours = Parser(published)
    written = [""]
    for id in ids:
        theirs.process(id)
        deltas = ours.push(id)
        assert "".join(delta.text for delta in deltas) == (theirs.last_content_delta or "")
        if theirs.state == oh.StreamState.CONTENT:
            written = [""] if deltas and deltas[0].starts else written
            written += [delta.text for delta in deltas]
            assert "".join(written) == theirs.current_content
    ours.finish()
    assert ours.messages == [as_ours(message) for message in theirs.messages]


def as_ours(message: Any) -> Message:
    content = "".join(part.text for part in message.content)
    author = message.author
    return Message(
        author.role.value, content, message.channel, message.recipient, message.content_type, name=author.name
    )
