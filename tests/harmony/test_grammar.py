"""Grammars: every text that a grammar allows is valid under its schema; schemas that cannot be enforced are refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mlx_gptoss.errors import GptOssError, InvalidRequest
from mlx_gptoss.harmony.grammar import json_grammar, vocabulary
from mlx_gptoss.harmony.json_schema import MAX_CHARACTERS, normalize_schema
from mlx_gptoss.tokenizer import CALL, RETURN, Tokenizer

SCHEMAS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "schemas.json").read_text("utf-8"))


@pytest.mark.parametrize("name", SCHEMAS)
def test_sampled_texts_are_valid_under_the_schema(nano: Tokenizer, sample_text: Any, name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema, random = SCHEMAS[name], Random(name)
    grammar, validator = json_grammar(schema, nano, "schema"), jsonschema.Draft202012Validator(schema)
    texts = [sample_text(grammar, nano, RETURN, random) for _ in range(12)]
    finished = [text for text in texts if text is not None]
    assert len(finished) > 8
    for text in finished:
        validator.validate(json.loads(text))
        assert text.encode("utf-8")  # no lone surrogate
    assert not any("  " in text.replace("\n", "\n|").split("|")[0] for text in finished if '"' not in text)


def test_whitespace_is_bounded_and_usual_layouts_are_allowed(nano: Tokenizer, allowed_ids: Any) -> None:
    value = {"a": [1, {"b": "x"}], "c": {}}
    schema = {"const": value}
    for layout in (json.dumps(value), json.dumps(value, indent=2), json.dumps(value, separators=(",", ":"))):
        matcher = json_grammar(schema, nano, "schema").matcher(nano.special(CALL))
        for id in nano.encode(layout):
            matcher.accept(id)
        assert allowed_ids(matcher.mask(), nano.vocab_size) == [nano.special(CALL)]
    matcher = json_grammar(schema, nano, "schema").matcher(nano.special(CALL))
    for id in nano.encode("{\n" + 24 * " "):
        matcher.accept(id)
    assert allowed_ids(matcher.mask(), nano.vocab_size) == nano.encode('"')


def test_accepting_a_masked_token_is_an_error(nano: Tokenizer) -> None:
    matcher = json_grammar({"type": "integer"}, nano, "schema").matcher(nano.special(RETURN))
    with pytest.raises(GptOssError, match="not allowed by the schema"):
        matcher.accept(nano.encode("x")[0])


def test_a_mask_has_the_tokens_it_is_made_of(nano: Tokenizer, allowed_ids: Any) -> None:
    known = vocabulary(nano)
    assert allowed_ids(known.mask([3, 340]), nano.vocab_size) == [3, 340]
    assert len(known.mask([])) * 8 >= nano.vocab_size and vocabulary(nano) is known


REFUSED: list[tuple[Any, str]] = [
    ([], "an object"),
    ("string", "an object"),
    ({"type": "array", "uniqueItems": True}, "at #/uniqueItems"),
    ({"properties": {"a": {"not": {"type": "string"}}}}, "#/properties/a: the keyword 'not'"),
    ({"if": {}, "then": {}}, "'if'"),
    ({"type": "object", "propertyNames": {"pattern": "a"}}, "'propertyNames'"),
    ({"type": "array", "contains": {"type": "integer"}}, "'contains'"),
    ({"unevaluatedProperties": False}, "'unevaluatedProperties'"),
    ({"dependentRequired": {}}, "'dependentRequired'"),
    ({"type": "string", "nullable": True}, "'nullable' cannot be enforced; write"),
    ({"type": "integer", "minimun": 3}, "'minimun'"),
    ({"x-guidance": {"lenient": True}, "uniqueItems": True}, "'x-guidance'"),
    ({"properties": {"a": {"$id": "b"}}}, "'\\$id'"),
    ({"type": "string", "format": "color"}, "unknown format 'color'"),
    ({"type": "text"}, "unknown type 'text'"),
    ({"type": "array", "items": [{"type": "string"}]}, "prefixItems"),
    ({"anyOf": []}, "non-empty list"),
    ({"allOf": {"type": "string"}}, "non-empty list"),
    ({"properties": []}, "map names to schemas"),
    ({"properties": {"a": 3}}, "3 is not a schema"),
    ({"$ref": "https://example.org/schema"}, "must begin with #/"),
    ({"$ref": "#/$defs/a"}, "points to nothing"),
    ({"$ref": "#/examples/0", "examples": [{"not": {}}]}, "#/examples/0: the keyword 'not'"),
    ({"$ref": "#"}, "leads back"),
    ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "leads back"),
    ({"items": {"allOf": [{"$ref": "#/$defs/a"}]}, "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, "leads back"),
    ({"type": "integer", "minimum": 2**60}, "2\\^53"),
    ({"type": "integer", "exclusiveMaximum": True}, "not a number"),
    ({"type": "integer", "multipleOf": 99999999}, "multipleOf"),
    ({"type": "integer", "multipleOf": 0}, "multipleOf"),
    ({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, "multipleOf"),
    ({"type": "object", "minProperties": 2}, "cannot be counted"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "object"}}}, "oneOf"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"type": "string", "pattern": "["}, "is invalid"),
    ({"type": "string", "pattern": "(a"}, "regex parse error"),
    ({"type": "string", "pattern": 3}, "is invalid"),
    ({"patternProperties": {"\\bx": {}}}, "is invalid, or uses"),
    ({"type": "object", "patternProperties": {"a": {"type": "integer"}, "b": {"type": "string"}}}, "not disjoint"),
    ({"patternProperties": {f"^a{n}_": {} for n in range(51)}}, "more than 50 patterns"),
    ({"properties": {"a": {}}, "patternProperties": {"^(a)$": {}}}, "may match only names in properties"),
    ({"oneOf": [{"const": str(n)} for n in range(101)]}, "more than 100 schemas"),
    ({"enum": []}, "Unsatisfiable"),
    ({"allOf": [{"type": "string"}, {"type": "number"}]}, "Unsatisfiable"),
    ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "Unsatisfiable"),
    ({"enum": {1, 2}}, "plain JSON"),
    ({"const": float("nan")}, "plain JSON"),
    ({"description": "x" * MAX_CHARACTERS}, "characters"),
    ({"anyOf": [{"const": n} for n in range(3000)]}, "2000 subschemas"),
]


@pytest.mark.parametrize(("schema", "complaint"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_schema_that_cannot_be_enforced_is_refused_by_name(nano: Tokenizer, schema: Any, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint) as refusal:
        json_grammar(schema, nano, "response_format")
    message = str(refusal.value)
    assert message.startswith("response_format") and "\n" not in message and len(message) < 800


def test_a_schema_nested_too_deeply_is_refused(nano: Tokenizer) -> None:
    for depth in (200, 100_000):
        schema: dict[str, Any] = {"type": "string"}
        for _ in range(depth):
            schema = {"type": "array", "items": schema}
        with pytest.raises(InvalidRequest, match=r"nested too deeply|recursion"):
            json_grammar(schema, nano, "schema")


def test_one_of_disjoint_schemas_becomes_any_of() -> None:
    text = normalize_schema(SCHEMAS["one of, tagged, by reference"], "schema")
    assert "oneOf" not in text and next(iter(json.loads(text))) == "anyOf"
    for schema in (
        {"oneOf": [{"type": "boolean"}, {"enum": [False, []]}]},
        {"oneOf": [{}, {"type": "null"}]},
        {"oneOf": [{"enum": ["a", "b"]}, {"const": "b"}]},
    ):
        with pytest.raises(InvalidRequest, match="oneOf: two of its schemas may match the same value"):
            normalize_schema(schema, "schema")
    both = {"oneOf": [{"type": "string"}, {"type": "null"}], "anyOf": [{"type": "null"}]}
    with pytest.raises(InvalidRequest, match="oneOf and anyOf in the same schema"):
        normalize_schema(both, "schema")
    assert "anyOf" in normalize_schema({"oneOf": [{"enum": ["a", "b"]}, {"const": "c"}, {"const": 1}]}, "schema")


HOSTILE: dict[str, Any] = {
    "a chain of references": {
        "$ref": "#/$defs/d0",
        "$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} if n < 1500 else {"type": "null"} for n in range(1501)},
    },
    "doubling references": {
        "$ref": "#/$defs/d0",
        "$defs": {
            f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} if n < 20 else {"type": "null"} for n in range(21)
        },
    },
    "product of unions": {"allOf": [{"anyOf": [{"required": [f"{n}.{m}"]} for m in range(4)]} for n in range(9)]},
    "repeated repetition": {"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"},
    "many states": {"type": "string", "pattern": ".*a.{300}$"},
    "many values": {"enum": [f"value {n * 7919}" for n in range(7000)]},
    "many properties": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(1900)}},
    "backtracking": {
        "type": "object",
        "properties": {"a" * 40 + "b": {"type": "string", "pattern": "^(a+)+$"}},
        "patternProperties": {"^(a+)+$": {"type": "null"}},
    },
    "many references to much": {
        "anyOf": [{"$ref": "#/$defs/a"} for _ in range(900)],
        "$defs": {"a": {"allOf": [{"minimum": n} for n in range(900)]}},
    },
    "many patterns": {"type": "object", "patternProperties": {f"^a{n}_": {"type": "string"} for n in range(50)}},
    "endless": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": False},
    "long": {"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**6}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused_or_costs_little(nano: Tokenizer, allowed_ids: Any, name: str) -> None:
    """The limits are in CPU seconds, which a busy machine hardly changes. Usually a tenth of them is used."""
    random, longest = Random(name), 0.0
    started = time.process_time()
    try:
        matcher = json_grammar(HOSTILE[name], nano, "schema").matcher(nano.special(RETURN))
    except InvalidRequest:
        assert time.process_time() - started < 10
        return
    assert time.process_time() - started < 10
    for _ in range(100):
        started = time.process_time()
        try:
            choices = allowed_ids(matcher.mask(), nano.vocab_size)
        except GptOssError:
            break
        longest = max(longest, time.process_time() - started)
        if choices == [nano.special(RETURN)]:
            break
        matcher.accept(random.choice([id for id in choices if not nano.is_special(id)]))
    assert longest < 1
