"""Answers in JSON as values: pydantic classes, bare schemas, and answers that are none. And replies in notebooks."""

from __future__ import annotations

import sys

import pytest

import mlx_gptoss
from mlx_gptoss import Reply, ToolCall
from mlx_gptoss.chat.reply import Timings, Usage
from mlx_gptoss.chat.structured import as_response_format
from mlx_gptoss.errors import GptOssError

pydantic = pytest.importorskip("pydantic")
SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}


class Sum(pydantic.BaseModel):
    sum: int


class Odd(pydantic.BaseModel):
    sum: int

    @pydantic.field_validator("sum")
    @classmethod
    def is_odd(cls, value):
        if value % 2 == 0:
            raise ValueError("it is even")
        return value


@pytest.fixture(scope="module")
def model():
    with mlx_gptoss.load(max_context=1024) as loaded:
        yield loaded


@pytest.mark.parametrize(
    ("form", "value"),
    [
        (Sum, Sum(sum=42)),
        (SCHEMA, {"sum": 42}),
        ({**SCHEMA, "title": "sum"}, {"sum": 42}),
        ({"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}}, {"sum": 42}),
        ({"type": "text"}, None),
        (None, None),
    ],
    ids=["pydantic", "bare", "titled", "OpenAI's", "text", "none"],
)
def test_parsed_is_the_value_of_the_answer(model, form, value):
    reply = model.generate("What is 12 + 30?", response_format=form, temperature=0)
    assert reply.parsed == value and type(reply.parsed) is type(value)
    assert reply.conversation.response_format is None  # of this turn alone


def test_a_class_is_told_by_its_methods():
    """No module of pydantic is imported for it."""

    class LikePydantic:
        @classmethod
        def model_json_schema(cls):
            return SCHEMA

        @classmethod
        def model_validate_json(cls, text):
            return text

    form = as_response_format(LikePydantic)
    assert (form.schema, form.name) == (SCHEMA, "LikePydantic")
    assert "pydantic" not in vars(sys.modules["mlx_gptoss.chat.structured"])


def test_a_cut_off_answer_has_no_value(model):
    reply = model.generate("What is 12 + 30?", response_format=Sum, temperature=0, max_tokens=50)
    assert reply.finish_reason == "length"
    with pytest.raises(GptOssError, match=r"cut off.*max_tokens"):
        _ = reply.parsed
    reply = model.generate("What is 12 + 30?", response_format=Sum, temperature=0, stop="4")
    with pytest.raises(GptOssError, match="cut off"):
        _ = reply.parsed


def test_a_classs_own_validators_are_heard(model):
    reply = model.generate("What is 12 + 30?", response_format=Odd, temperature=0)
    with pytest.raises(pydantic.ValidationError, match="it is even"):
        _ = reply.parsed


@pytest.mark.parametrize("schema", [{"enum": [1, 2]}, {"type": ["string", "null"]}, {"$ref": "#/$defs/a", "$defs": {}}])
def test_bare_schemas_are_recognised(schema):
    assert as_response_format(schema).schema == schema


def reply(**fields):
    given = {"text": "", "reasoning": "", "tool_calls": (), "finish_reason": "stop"} | fields
    asked = mlx_gptoss.Conversation()
    return Reply(**given, usage=Usage(1, 1), timings=Timings(0, 0, 0), ids=(), logprobs=(), conversation=asked)


def test_markdown_of_a_reply():
    assert reply(text="**Yes**")._repr_markdown_() == "**Yes**"
    shown = reply(text="no", reasoning="a < b\n</details><script>")._repr_markdown_()
    assert shown == "<details><summary>Reasoning</summary>a &lt; b<br>&lt;/details&gt;&lt;script&gt;</details>\n\nno"
    call = ToolCall("1", "f", '{"code": "```"}')
    assert reply(tool_calls=(call,))._repr_markdown_() == '````\nf({"code": "```"})\n````'
    assert reply(text="It", finish_reason="length")._repr_markdown_() == "It\n\n*(cut off)*"
