"""What functions take: arguments under the schemas that agents really send, and text under a grammar."""

from __future__ import annotations

import json
import logging
from random import Random
from typing import Any

import pytest

from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.harmony.grammar import Grammar, arguments_grammar, json_grammar
from mlx_gptoss.harmony.json_limits import MAX_DEPTH, MAX_DIGITS
from mlx_gptoss.harmony.json_schema import _CHECKS, MAX_CHARACTERS
from mlx_gptoss.tokenizer import CALL, Tokenizer


def arguments(schema: Any, tokenizer: Tokenizer, *, strict: bool = False) -> Grammar:
    return arguments_grammar(schema, tokenizer, "the parameters of 'f'", strict)


STRING, INTEGER = {"type": "string"}, {"type": "integer"}
# schema, arguments that are valid, arguments that are not, what the warning names (None: nothing is left out)
AGENTS: dict[str, tuple[Any, list[str], list[str], str | None]] = {
    "no parameters": (None, ["{}"], ['{"a": 1}'], None),
    "no properties": ({"type": "object", "properties": {}}, ["{}"], ['{"a": 1}'], None),
    "any object": ({"type": "object"}, ["{}", '{"a": [1]}'], ["1"], None),
    "nothing at all": ({}, ["{}", '{"a": [1]}'], ["1", '"a"'], None),
    "zod": (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {"path": {"type": "string", "description": "p", "examples": ["a"], "default": "a"}},
            "required": ["path"],
            "additionalProperties": False,
        },
        ['{"path": "b"}'],
        ["{}", '{"path": 1}', '{"path": "b", "x": 1}'],
        None,
    ),
    "not closed": (
        {"type": "object", "properties": {"a": STRING, "b": {"type": "object", "properties": {"c": INTEGER}}}},
        ["{}", '{"a": "x", "b": {"c": 1}}'],
        ['{"x": 1}', '{"b": {"x": 1}}', '{"a": 1}'],
        None,
    ),
    "open": (
        {"type": "object", "properties": {"a": STRING}, "additionalProperties": {}},
        ['{"a": "x", "y": 1}'],
        ['{"a": 1}'],
        None,
    ),
    "free inner object": (
        {"type": "object", "properties": {"env": {"type": "object", "additionalProperties": STRING}}},
        ['{"env": {"A": "b"}}'],
        ['{"env": {"A": 1}}'],
        None,
    ),
    "properties without a type": (
        {"properties": {"a": {"properties": {"b": INTEGER}}}},
        ['{"a": {"b": 1}}'],
        ["1"],
        None,
    ),
    "one of several is required": (
        {
            "type": "object",
            "properties": {"a": STRING, "b": STRING},
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        ['{"b": "x"}', '{"a": "x"}'],
        ["{}", '{"c": 1}'],
        None,
    ),
    "all of": (
        {"allOf": [{"type": "object", "properties": {"a": STRING}}, {"properties": {"b": INTEGER}, "required": ["b"]}]},
        ['{"a": "x", "b": 1}', '{"b": 2}'],
        ['{"a": "x"}', '{"a": 1, "b": 1}'],
        None,
    ),
    "variants": (
        {
            "anyOf": [
                {"type": "object", "properties": {"a": STRING}, "required": ["a"]},
                {"type": "object", "properties": {"b": INTEGER}, "required": ["b"]},
            ]
        },
        ['{"a": "x"}', '{"b": 1}'],
        ["{}", '{"a": 1}', '{"a": "x", "b": 1}'],
        None,
    ),
    "references": (
        {
            "type": "object",
            "properties": {"tree": {"$ref": "#/$defs/Node"}},
            "$defs": {
                "Node": {
                    "type": "object",
                    "properties": {"name": STRING, "kids": {"type": "array", "items": {"$ref": "#/$defs/Node"}}},
                    "required": ["name"],
                }
            },
        },
        ['{"tree": {"name": "a", "kids": [{"name": "b"}]}}'],
        ['{"tree": {"kids": []}}', '{"tree": {"name": "a", "x": 1}}'],
        None,
    ),
    "an unknown keyword": (
        {"type": "object", "properties": {"a": {"type": "string", "x-order": 1, "nullable": True}}, "strict": True},
        ['{"a": "x"}'],
        ['{"a": 1}', '{"a": null}'],
        None,
    ),
    "an unknown format": (
        {
            "type": "object",
            "properties": {"a": {"type": "string", "format": "path"}, "n": {"type": "integer", "format": "int32"}},
        },
        ['{"a": "x", "n": 1}'],
        ['{"a": 1}', '{"n": 1.5}'],
        None,
    ),
    "look-around": (
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?!x)", "maxLength": 2}}},
        ['{"a": "yy"}'],
        ['{"a": "yyy"}'],
        "look-around",
    ),
    "not and if": (
        {
            "type": "object",
            "properties": {"a": {"type": "string", "not": {"const": "x"}}},
            "if": {"required": ["a"]},
            "then": {"required": ["b"]},
            "required": ["a"],
        },
        ['{"a": "y"}'],
        ["{}", '{"a": 2}'],
        "the keyword 'not'|the keyword 'if'",
    ),
    "counting": (
        {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "minProperties": 2, "maxProperties": 2},
        ['{"a": 1, "b": 2}'],
        ['{"c": 1}'],
        "cannot be counted",
    ),
    "a remote reference": (
        {"type": "object", "properties": {"a": {"$ref": "https://example.org/x"}, "b": INTEGER}},
        ['{"a": [1], "b": 1}'],
        ['{"a": 1, "b": "x"}'],
        "does not point into this schema",
    ),
    "draft 4 and 3": (
        {
            "type": "object",
            "properties": {
                "n": {"type": "number", "minimum": 0, "exclusiveMinimum": True},
                "s": {"type": "string", "required": True},
            },
        },
        ['{"n": 1, "s": "x"}'],
        ['{"n": -1}', '{"s": 1}'],
        "not a number|a list of names",
    ),
    "a tuple of draft 7": (
        {
            "type": "object",
            "properties": {"at": {"type": "array", "items": [INTEGER, STRING], "additionalItems": False}},
        },
        ['{"at": [1, "x"]}'],
        ['{"at": ["x"]}'],
        "'additionalItems'",
    ),
    "wrong types": (
        {"type": "object", "properties": {"a": "string", "b": {"type": "float"}, "c": INTEGER}, "required": None},
        ['{"a": 1, "b": "x", "c": 1}'],
        ['{"c": "x"}'],
        "is not a schema|unknown type 'float'|a list of names",
    ),
    "variants that overlap": (
        {"type": "object", "properties": {"a": {"oneOf": [INTEGER, {"type": "number"}, {"type": "null"}]}}},
        ['{"a": 1.5}', '{"a": null}'],
        ['{"a": "x"}'],
        None,
    ),
    "uncompilable": (
        {"type": "object", "patternProperties": {"a": INTEGER, "b": STRING}},
        ['{"anything": []}'],
        ["[]"],
        "may have any JSON object",
    ),
    "no object": ({"type": "string"}, ['{"anything": []}'], ['"x"'], "of type object"),
    "a circle": ({"$ref": "#"}, ['{"anything": []}'], ['"x"'], "leads back"),
    "too large": (
        {"type": "object", "description": "x" * MAX_CHARACTERS},
        ['{"anything": []}'],
        ['"x"'],
        "plain JSON of at most",
    ),
    "not JSON": ({"type": "object", "const": {1}}, ['{"anything": []}'], ['"x"'], "plain JSON"),
}


@pytest.mark.parametrize("name", AGENTS)
def test_what_agents_send_is_enforced_as_far_as_possible(
    nano: Tokenizer, name: str, caplog: pytest.LogCaptureFixture, allows: Any
) -> None:
    schema, valid, invalid, warning = AGENTS[name]
    with caplog.at_level(logging.WARNING):
        grammar = arguments_grammar(schema, nano, f"the parameters of {name!r}", False)
        arguments_grammar(schema, nano, f"the parameters of {name!r}", False)
    for text in valid:
        assert allows(grammar, nano, text), text
    for text in invalid:
        assert not allows(grammar, nano, text), text
    said = [record.getMessage() for record in caplog.records if record.name == "mlx_gptoss.harmony.grammar"]
    assert len(said) == (warning is not None)  # once per schema
    assert all(any(part in line for part in (warning or "").split("|")) for line in said), said


@pytest.mark.parametrize("name", [name for name, case in AGENTS.items() if case[3] is not None or "unknown" in name])
def test_a_strict_function_is_refused_what_cannot_be_enforced(nano: Tokenizer, name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^the parameters of 'f'"):
        arguments(AGENTS[name][0], nano, strict=True)


def test_a_strict_schema_is_closed_too_and_a_response_format_is_not(nano: Tokenizer, allows: Any) -> None:
    schema = AGENTS["not closed"][0]
    assert not allows(arguments(schema, nano, strict=True), nano, '{"x": 1}')
    assert allows(json_grammar(schema, nano, "response_format"), nano, '{"x": 1}')


def test_the_schema_is_not_modified(nano: Tokenizer) -> None:
    for schema, *_ in AGENTS.values():
        if name_is_json(schema):
            before = json.dumps(schema)
            arguments(schema, nano)
            assert json.dumps(schema) == before


def name_is_json(schema: Any) -> bool:
    try:
        json.dumps(schema)
    except TypeError:
        return False
    return True


ODD: list[Any] = [None, True, 3, -1.5, "string", [], {}, ["a"], [{"type": "string"}], {"a": 1}, {"$ref": "#/nowhere"}]


def test_any_schema_gives_a_grammar_of_objects(nano: Tokenizer, allowed_ids: Any) -> None:
    """Keywords with values that they must not have."""
    random, keywords = Random(0), [*_CHECKS, "not", "if", "$id", "nullable", "definitions", "title", "x-guidance"]
    for _ in range(300):
        inner = {random.choice(keywords): random.choice(ODD) for _ in range(random.randrange(4))}
        schema = {"type": "object", "properties": {"a": inner, "b": {"type": "integer"}}}
        schema |= {random.choice(keywords): random.choice(ODD) for _ in range(random.randrange(3))}
        matcher = arguments(schema, nano).matcher(nano.special(CALL))
        assert set(allowed_ids(matcher.mask(), nano.vocab_size)) >= set(nano.encode("{"))


def longest(grammar: Grammar, tokenizer: Tokenizer, start: str, again: str) -> int:
    """How often `again` may follow `start`, up to 1000 times."""
    matcher = grammar.matcher(tokenizer.special(CALL))
    for id in tokenizer.encode(start):
        matcher.accept(id)
    (id,) = tokenizer.encode(again)
    for count in range(1000):
        if not matcher.mask()[id >> 3] >> (id & 7) & 1:
            return count
        matcher.accept(id)
    return 1000


def test_numbers_nesting_and_white_space_end(nano: Tokenizer, allows: Any) -> None:
    anything, number = json_grammar({}, nano, "s"), json_grammar({"type": "number"}, nano, "s")
    for start, again in (("1", "1"), ("0.", "3"), ("-1e", "9"), ("1e-", "0")):
        assert longest(number, nano, start, again) <= MAX_DIGITS
    assert longest(json_grammar({"type": "integer", "minimum": 3}, nano, "s"), nano, "4", "4") <= MAX_DIGITS
    assert longest(anything, nano, "", "[") == MAX_DEPTH
    assert longest(anything, nano, "[1,", " ") <= 1
    assert allows(number, nano, "-0.30000000000000004") and allows(number, nano, "1.7976931348623157e+308")
    text = json.dumps({"a": '[[{{"\\"' * 200 + "1" * 200, "b": [1, [2, {"c": {}}]]})
    assert allows(anything, nano, text)


def test_a_pattern_may_ask_for_more_digits_and_a_schema_for_deeper_nesting(
    nano: Tokenizer, sample_text: Any, allows: Any
) -> None:
    assert allows(json_grammar({"type": "string", "pattern": "^[0-9]{90}$"}, nano, "s"), nano, f'"{"7" * 90}"')
    deep = json.loads("[" * (MAX_DEPTH + 6) + "1" + "]" * (MAX_DEPTH + 6))
    assert json.loads(sample_text(json_grammar({"const": deep}, nano, "s"), nano, CALL, Random(2))) == deep
