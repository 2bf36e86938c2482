"""The streaming parser on generated output: it agrees with openai-harmony on well-formed output, and loses no
character of malformed output."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss.harmony.messages import Message
from mlx_gptoss.harmony.parse import Parser
from mlx_gptoss.harmony.render import render_messages, render_reply
from mlx_gptoss.tokenizer import SPECIALS, START, STARTOFTEXT, Tokenizer

THINK = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
WORDS = ("analysis", "commentary", "final", "json", "code", "assistant", "to=")
HEADER_WORD = re.compile(
    r"((system|developer|user|assistant|tool)(:\S*)?|to=\S*|functions\.\S+|browser\.\S+|python"
    r"|analysis|commentary|final|json|code)"
)


def runs(tokenizer: Tokenizer, ids: list[int]) -> list[tuple[str, bool]]:
    """Return the runs of text between special tokens, and whether the end of the stream or `<|start|>` truncates each.

    `<|startoftext|>` has no meaning anywhere and does not separate runs.
    """
    found, run, decoder = [], "", tokenizer.decoder()
    for id in ids:
        run += decoder.push(id)
        if tokenizer.is_special(id) and id != tokenizer.special(STARTOFTEXT):
            found.append((run, id == tokenizer.special(START)))
            run = ""
    return [*found, (run + decoder.flush(), True)]


def assert_nothing_is_lost(tokenizer: Tokenizer, ids: list[int], messages: list[Message]) -> None:
    """Check that the joined contents consist of a suffix of every run, and that only header words precede a suffix."""
    header_fields = {field for message in messages for field in (message.channel, message.content_type) if field}
    known = {field.removeprefix("<|constrain|>") for field in header_fields}
    contents = "".join(message.content for message in messages)
    ends = {0}  # where in `contents` the suffixes so far may end
    for run, cut_off in runs(tokenizer, ids):
        kept = suffixes(run, cut_off, known)
        ends = {end + len(suffix) for end in ends for suffix in kept if contents.startswith(suffix, end)}
        assert ends, (run, messages)
    assert len(contents) in ends, messages


def suffixes(run: str, cut_off: bool, known: set[str]) -> set[str]:
    """Return the suffixes of a run that may be content, because only header words precede them."""
    found = {run}
    for word in re.finditer(r"\S+", run):
        if not (HEADER_WORD.fullmatch(word[0]) or word[0] in known):
            break
        found.add(run[word.end() :])
    partial = {rest for rest in found if cut_off and any(word.startswith(rest.strip()) for word in WORDS)}
    return found | ({""} if partial or any(not rest.strip() for rest in found) else set())


GLUED = st.sampled_from(
    [
        *SPECIALS,
        *SPECIALS[2:],
        *(" to=functions.f ", " to=python ", " json", " code", "assistant", "user", "final", "analysis", "comm"),
    ]
)
PLAIN = st.sampled_from(["W", " W", " W", "\n", " ", "🎉", "a", "c", "co"])


def numbered(pieces: list[str]) -> str:
    """Make every W a different word, so that the test can look for each."""
    return "".join(piece.replace("W", f"w{place:04}") for place, piece in enumerate(pieces))


STREAMS = st.lists(PLAIN | GLUED, max_size=25).map(numbered)
TEXTS = st.text(max_size=20) | st.sampled_from(["", " x", "<|end|>", "🎉🎉", '{"a": "é"}\n'])
TEXT_MESSAGES = st.builds(
    Message, st.just("assistant"), TEXTS, st.sampled_from(["analysis", "commentary", "final", "other", None])
)
CALLS = st.builds(
    Message,
    st.just("assistant"),
    TEXTS,
    st.sampled_from(["commentary", "analysis", None]),
    st.sampled_from(["functions.f", "functions.get_weather", "browser.search", "python"]),
    st.sampled_from([None, "json", "code", "<|constrain|>json", "<|constrain|>python", "<|constrain|>text/plain"]),
)
REPLIES = st.lists(TEXT_MESSAGES | CALLS, min_size=1, max_size=5)
RESULTS = st.builds(
    Message,
    st.just("tool"),
    TEXTS,
    st.sampled_from(["commentary", "analysis"]),
    st.just("assistant"),
    name=st.sampled_from(["functions.f", "browser.search", "python"]),
)


def check_words(small: Tokenizer, parse: Any, text: str) -> None:
    messages = parse(text).messages
    fields = " ".join(
        part
        for message in messages
        for part in (message.content, message.channel, message.recipient, message.content_type, message.name)
        if part
    )
    for word in re.findall(r"w\d{4}", text):
        assert fields.count(word) == 1, (word, messages)
    assert_nothing_is_lost(small, small.encode_with_specials(text), messages)


@settings(max_examples=1000, deadline=None)
@given(text=STREAMS)
def test_no_word_is_lost_or_duplicated(small: Tokenizer, parse: Any, text: str) -> None:
    check_words(small, parse, text)


@settings(max_examples=300, deadline=None)
@given(text=STREAMS.map(lambda text: text.replace("<|", "<¦")), data=st.data())
def test_content_is_unchanged(parse: Any, text: str, data: st.DataObject) -> None:
    specials = st.sampled_from(["", "<|message|>", "<|constrain|>", "<|startoftext|>"])
    at = data.draw(st.integers(0, len(text)))
    streamed = f"<|channel|>final<|message|>{text[:at]}{data.draw(specials)}{text[at:]}<|return|>"
    assert parse(streamed).messages == [Message("assistant", text, "final")]


@st.composite
def garbled(draw: st.DrawFn, small: Tokenizer) -> list[int]:
    """A well-formed conversation that is then truncated, or gets tokens dropped, repeated, swapped or inserted."""
    ids = render_messages(draw(st.lists(TEXT_MESSAGES | CALLS | RESULTS, min_size=1, max_size=4)), small)
    ids = ids[draw(st.sampled_from([0, 2])) :]
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, max(0, len(ids) - 1)))
        change = draw(st.sampled_from(["cut", "drop", "double", "swap", "insert"]))
        if change == "cut":
            ids = ids[:at] if draw(st.booleans()) else ids[at:]
        elif change == "drop":
            ids[at : at + draw(st.integers(1, 3))] = []
        elif change == "double":
            ids[at:at] = ids[at : at + draw(st.integers(1, 3))] * draw(st.integers(1, 3))
        elif change == "swap":
            ids[at : at + 2] = ids[at : at + 2][::-1]
        else:
            ids[at:at] = draw(
                st.lists(st.sampled_from(sorted(small.specials.values())) | st.integers(0, 300), max_size=3)
            )
    return ids


def check_garbled(small: Tokenizer, parse: Any, data: st.DataObject) -> None:
    ids = data.draw(garbled(small))
    assert_nothing_is_lost(small, ids, parse(ids).messages)


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_no_character_of_garbled_output_is_lost(small: Tokenizer, parse: Any, data: st.DataObject) -> None:
    check_garbled(small, parse, data)


@settings(max_examples=500, deadline=None)
@given(ids=st.lists(st.integers(0, 300), max_size=60), prefix=st.sampled_from(["", THINK, f"{THINK}<|message|>"]))
def test_any_ids_are_parsed(small: Tokenizer, parse: Any, prefix: str, ids: list[int]) -> None:
    ids = small.encode_with_specials(prefix) + ids
    assert_nothing_is_lost(small, ids, parse(ids).messages)


@settings(max_examples=200, deadline=None)
@given(reply=REPLIES, result=RESULTS)
def test_rendered_messages_are_parsed_back(small: Tokenizer, parse: Any, reply: list[Message], result: Message) -> None:
    assert parse(render_reply(reply, small)).messages == reply
    whole = [Message("user", "Hi", name="bob"), *reply, result, Message("developer", "x")]
    assert parse(render_messages(whole, small)).messages == whole


@st.composite
def headers(draw: st.DrawFn, message: Message) -> str:
    """The header of a message, with recipient and content type before or after the channel, as models write them."""
    channel = "" if message.channel is None else f"<|channel|>{message.channel}"
    recipient = message.recipient or ""
    if recipient:
        bare = f"to={recipient}" if recipient == "assistant" else recipient
        recipient = draw(st.sampled_from([f" to={recipient}", f" to={recipient} ", f" {bare}"]))
    kind = message.content_type or ""
    if kind:
        kind = draw(st.sampled_from([f" {kind}", kind if kind.startswith("<|") else f" {kind}"]))
    order = draw(st.sampled_from([recipient + channel + kind, channel + recipient + kind, recipient + kind + channel]))
    author = message.name or draw(st.sampled_from(["assistant", "assistant "]))
    return f"<|start|>{author}{order}<|message|>"


@st.composite
def conversations(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    """The ids after `<|start|>assistant`: a reply, possibly with tool results in it."""
    reply = draw(st.lists(TEXT_MESSAGES | CALLS, min_size=1, max_size=2))
    rest = draw(st.lists(TEXT_MESSAGES | CALLS | RESULTS, max_size=4))
    ids: list[int] = []
    for message in [*reply, *rest]:
        end = "<|call|>" if message.recipient and message.role == "assistant" else "<|end|>"
        ids += tokenizer.encode_with_specials(draw(headers(message)))
        ids += [*tokenizer.encode(message.content), tokenizer.special(end)]
    return ids[2:]


def check_against_openai_harmony(published: Tokenizer, reference: Any, ids: list[int]) -> None:
    """Check that both parsers agree on the delta at each id, the content so far, and the messages, streamed or not."""
    import openai_harmony as oh

    theirs = oh.StreamableParser(reference, oh.Role.ASSISTANT)
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
    assert ours.finish() == []
    assert ours.messages == [from_openai_harmony(message) for message in theirs.messages]
    at_once = reference.parse_messages_from_completion_tokens(ids, oh.Role.ASSISTANT)
    assert ours.messages == [from_openai_harmony(message) for message in at_once]


def from_openai_harmony(message: Any) -> Message:
    content = "".join(part.text for part in message.content)
    author = message.author
    return Message(
        author.role.value, content, message.channel, message.recipient, message.content_type, name=author.name
    )


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_well_formed_output_is_parsed_as_by_openai_harmony(
    published: Tokenizer, reference: Any, data: st.DataObject
) -> None:
    check_against_openai_harmony(published, reference, data.draw(conversations(published)))


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None)
@given(data=st.data())
def test_much_more_well_formed_output(published: Tokenizer, reference: Any, data: st.DataObject) -> None:
    check_against_openai_harmony(published, reference, data.draw(conversations(published)))


@pytest.mark.slow
@settings(max_examples=50_000, deadline=None)
@given(text=STREAMS)
def test_many_more_words(small: Tokenizer, parse: Any, text: str) -> None:
    check_words(small, parse, text)


@pytest.mark.slow
@settings(max_examples=50_000, deadline=None)
@given(data=st.data())
def test_much_more_garbled_output(small: Tokenizer, parse: Any, data: st.DataObject) -> None:
    check_garbled(small, parse, data)
