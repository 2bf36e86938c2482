"""The text of an evaluation: its documents, what of them is predicted, and from what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.measure.passages import Document, places, read_documents, windows


@given(
    st.lists(st.tuples(st.integers(2, 60), st.integers(1, 59)), min_size=1, max_size=4),
    st.integers(1, 20),
    st.none() | st.integers(1, 80),
)
def test_every_token_that_counts_is_predicted_once_from_what_precedes_it(sizes, context, max_tokens):
    documents = [
        Document(tuple(range(100 * n, 100 * n + size)), min(first, size - 1)) for n, (size, first) in enumerate(sizes)
    ]
    wanted = [id for document in documents for id in document.ids[document.first :]]
    cut = windows(documents, context, max_tokens)
    got = []
    for window in cut:
        assert 1 <= len(window.inputs) <= context
        assert len(window.targets) <= len(window.inputs)
        run = (*window.inputs, window.targets[-1])
        assert run[-len(window.targets) :] == window.targets
        assert list(run) == list(range(run[0], run[-1] + 1)) and run[0] // 100 == run[-1] // 100
        for target in window.targets:
            assert target - run[0] >= min(target % 100, context // 2 + 1)
        got += window.targets
    assert got == wanted[:max_tokens]


def test_documents_end_where_the_text_says(tokenizer):
    text = "One.<|endoftext|>\nTwo.<|endoftext|>Three.<|endoftext|>\r\n"
    documents = read_documents(text, tokenizer)
    assert [tokenizer.decode(d.ids) for d in documents] == ["One.", "Two.", "Three."]
    assert [d.first for d in documents] == [1, 1, 1]


def test_replies_are_what_follows_the_last_message_of_others(tokenizer):
    history = "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Hello<|end|>"
    prompt = history + "<|start|>user<|message|>2 + 2?<|end|><|start|>assistant"
    reply = "<|channel|>analysis<|message|>4<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    (document,) = read_documents(prompt + reply, tokenizer, "replies")
    assert tokenizer.decode(document.ids[: document.first], specials=True) == prompt
    assert tokenizer.decode(document.ids[document.first :], specials=True) == reply


@pytest.mark.parametrize(
    ("text", "score", "message"),
    [
        ("", "all", "nothing to predict"),
        ("<|endoftext|>\n<|endoftext|>", "all", "nothing to predict"),
        ("<|return|>", "all", "two tokens"),
        ("plain text", "replies", "document 1 .* without a reply"),
        ("<|start|>assistant hi<|return|><|endoftext|><|start|>user<|message|>x<|end|>", "replies", "document 2"),
        ("<|start|>user<|message|>x<|end|><|start|>assistant", "replies", "nothing to predict"),
        ("text", "some", "score"),
    ],
)
def test_texts_without_anything_to_predict(tokenizer, text, score, message):
    with pytest.raises(InvalidRequest, match=message):
        read_documents(text, tokenizer, score)


def test_channels_and_replies_of_a_text(tokenizer):
    first = (
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>analysis<|message|>Think<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    )
    text = f"{first}<|endoftext|>\nprose<|endoftext|><|start|>user<|message|>No reply<|end|>"
    documents = read_documents(text, tokenizer)
    by_channel = {
        name: tokenizer.decode(
            [id for id, at in zip(documents[0].ids, documents[0].channels, strict=True) if at == name], specials=True
        )
        for name in ("analysis", "commentary")
    }
    assert by_channel == {"analysis": "Think<|end|>", "commentary": "{}<|call|>"}
    reply = documents[0].reply
    assert reply and tokenizer.decode(documents[0].ids[reply:], specials=True).startswith("<|channel|>analysis")
    assert [document.reply for document in documents[1:]] == [None, None]
    assert not any(any(document.channels) for document in documents[1:])
    for context in (10, 500):
        found = places(list(windows(documents, context)))
        assert (found.reply == 0).sum() == len(documents[0].ids) - reply and (found.reply <= 0).all()
        assert (found.channel == "commentary").sum() == 3 and len(found.window) == sum(
            len(d.ids) - 1 for d in documents
        )
    assert (places(list(windows(documents, 500, 12))).reply == -1).all()  # a reply that was cut is none
