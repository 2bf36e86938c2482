"""/v1/completions through OpenAI's own client."""

from __future__ import annotations

import openai
import pytest

from mlx_gptoss import Sampling

MODEL = "mlx-gptoss-nano"
TEXT = "12 + 30 = "


def create(client, **fields):
    return client.completions.create(**{"model": MODEL, "prompt": TEXT, "max_tokens": 12, **fields})


@pytest.fixture(scope="module")
def expected(model):
    """The result of the Python API."""
    return model.complete(model.tokenizer.encode(TEXT), max_tokens=12, sampling=Sampling(temperature=0, logprobs=2))


def test_text_and_ids_streamed_or_not(client, model, expected):
    for prompt in (TEXT, model.tokenizer.encode(TEXT)):
        reply = create(client, prompt=prompt)
        assert (reply.choices[0].text, reply.choices[0].finish_reason) == (expected.text, expected.finish_reason)
        assert reply.usage.prompt_tokens == expected.usage.prompt_tokens
    chunks = list(create(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected.text
    assert chunks[-1].usage == reply.usage


def test_special_tokens_in_a_prompt_are_recognized(client):
    prompt = "<|start|>user<|message|>What is 12 + 30?<|end|><|start|>assistant<|channel|>final<|message|>"
    reply = create(client, prompt=prompt)
    assert reply.choices[0].text.startswith("12 + 30 =") and reply.usage.prompt_tokens < 30


def test_several_prompts_and_choices(client):
    reply = create(client, prompt=["12 + 30 = ", "abc"], n=2, echo=True)
    texts = [choice.text for choice in reply.choices]
    assert [text.startswith(prompt) for text, prompt in zip(texts, ["12", "12", "abc", "abc"], strict=True)] == [
        True
    ] * 4
    assert texts[0] == texts[1] and [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    streamed = [""] * 4
    for chunk in create(client, prompt=["12 + 30 = ", "abc"], n=2, echo=True, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_logprobs(client, expected, model):
    shown = create(client, logprobs=2).choices[0].logprobs
    plain = [t for t in zip(expected.ids, expected.logprobs, strict=True) if not model.tokenizer.is_special(t[0])]
    assert shown.token_logprobs == pytest.approx([logprob for _, logprob in plain][: len(shown.tokens)])
    assert "".join(shown.tokens) == expected.text
    assert [len(top) for top in shown.top_logprobs] == [2] * len(shown.tokens)
    assert [expected.text[start:].startswith(t) for start, t in zip(shown.text_offset, shown.tokens, strict=True)]


def test_default_is_sixteen_tokens(client):
    assert create(client, max_tokens=None).usage.completion_tokens <= 16


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 10**9]}, None),
        ({"prompt": ["a"] * 9, "n": 2}, "n"),
        ({"logprobs": 6}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_unsupported_fields_are_rejected(client, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, **fields)
    assert refused.value.param == param
