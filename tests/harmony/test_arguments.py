"""What functions take: arguments under the schemas that agents really send, and text under a grammar."""

from __future__ import annotations

import json
import logging
import time
from random import Random
from typing import Any

import pytest

from mlx_gptoss.errors import GptOssError, InvalidRequest
from mlx_gptoss.harmony.grammar import MAX_DEFINITION, Grammar, arguments_grammar, json_grammar, text_grammar
from mlx_gptoss.harmony.json_limits import MAX_DEPTH, MAX_DIGITS
from mlx_gptoss.harmony.json_schema import _CHECKS, MAX_CHARACTERS
from mlx_gptoss.tokenizer import CALL, Tokenizer

CODEX_APPLY_PATCH = r"""
start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?

hunk: add_hunk | delete_hunk | update_hunk
add_hunk: "*** Add File: " filename LF add_line+
delete_hunk: "*** Delete File: " filename LF
update_hunk: "*** Update File: " filename LF change_move? change?

filename: /(.+)/
add_line: "+" /(.*)/ LF -> line

change_move: "*** Move to: " filename LF
change: (change_context | change_line)+ eof_line?
change_context: ("@@" | "@@ " /(.+)/) LF
change_line: ("+" | "-" | " ") /(.*)/ LF
eof_line: "*** End of File" LF

%import common.LF
"""


def allows(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text is in the grammar, from its first token to its end."""
    matcher, end = grammar.matcher(tokenizer.special(CALL)), tokenizer.special(CALL)
    for id in [*tokenizer.encode(text), end]:
        mask = matcher.mask()
        if not mask[id >> 3] >> (id & 7) & 1:
            return False
        if id != end:
            matcher.accept(id)
    return True


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
    nano: Tokenizer, name: str, caplog: pytest.LogCaptureFixture
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


def test_a_strict_schema_is_closed_too_and_a_response_format_is_not(nano: Tokenizer) -> None:
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


def test_numbers_nesting_and_white_space_end(nano: Tokenizer) -> None:
    anything, number = json_grammar({}, nano, "s"), json_grammar({"type": "number"}, nano, "s")
    for start, again in (("1", "1"), ("0.", "3"), ("-1e", "9"), ("1e-", "0")):
        assert longest(number, nano, start, again) <= MAX_DIGITS
    assert longest(json_grammar({"type": "integer", "minimum": 3}, nano, "s"), nano, "4", "4") <= MAX_DIGITS
    assert longest(anything, nano, "", "[") == MAX_DEPTH
    assert longest(anything, nano, "[1,", " ") <= 1
    assert allows(number, nano, "-0.30000000000000004") and allows(number, nano, "1.7976931348623157e+308")
    text = json.dumps({"a": '[[{{"\\"' * 200 + "1" * 200, "b": [1, [2, {"c": {}}]]})
    assert allows(anything, nano, text)


def test_a_pattern_may_ask_for_more_digits_and_a_schema_for_deeper_nesting(nano: Tokenizer, sample_text: Any) -> None:
    assert allows(json_grammar({"type": "string", "pattern": "^[0-9]{90}$"}, nano, "s"), nano, f'"{"7" * 90}"')
    deep = json.loads("[" * (MAX_DEPTH + 6) + "1" + "]" * (MAX_DEPTH + 6))
    assert json.loads(sample_text(json_grammar({"const": deep}, nano, "s"), nano, CALL, Random(2))) == deep


PATCH = """*** Begin Patch
*** Add File: hello.txt
+Hello, <|call|> world!
+
*** Update File: src/a.py
*** Move to: src/b.py
@@ def f():
 a
-b
+é
*** Delete File: x
*** End Patch
"""


def test_codex_apply_patch(nano: Tokenizer) -> None:
    grammar = text_grammar("lark", CODEX_APPLY_PATCH, nano, "the grammar of 'apply_patch'")
    assert allows(grammar, nano, PATCH) and allows(grammar, nano, PATCH.rstrip("\n"))
    for wrong in (PATCH.replace("+Hello", "Hello"), PATCH.replace("*** End Patch\n", ""), "{" + PATCH, ""):
        assert not allows(grammar, nano, wrong)


def test_codex_apply_patch_is_valid_when_sampled(nano: Tokenizer, sample_text: Any) -> None:
    grammar, random = text_grammar("lark", CODEX_APPLY_PATCH, nano, "patch"), Random(1)
    texts = [sample_text(grammar, nano, CALL, random, 400) for _ in range(20)]
    ended = [text for text in texts if text is not None]
    assert len(ended) > 5
    for text in ended:
        assert text.startswith("*** Begin Patch\n*** ") and text.rstrip("\n").endswith("\n*** End Patch")


def test_a_regular_expression(nano: Tokenizer) -> None:
    grammar = text_grammar("regex", r"[a-z]+\d{2}", nano, "g")
    assert allows(grammar, nano, "abc12") and not allows(grammar, nano, "abc1") and not allows(grammar, nano, "12")


@pytest.mark.parametrize(
    ("syntax", "definition", "complaint"),
    [
        ("lark", "start: (", "Expected token"),
        ("lark", 'a: "b"', "no start rule"),
        ("lark", "start: foo", "unknown name"),
        ("lark", "start: " + "(" * 5000 + '"a"' + ")" * 5000, "too deeply nested"),
        ("lark", '%import /etc/passwd\nstart: "a"', "Expected name"),
        ("lark", "x" * (MAX_DEFINITION + 1), "smaller grammar"),
        ("regex", "(", "unclosed group"),
        ("regex", "(?!a)b", "look-around"),
        ("regex", "x" * (MAX_DEFINITION + 1), "smaller grammar"),
    ],
)
def test_a_broken_grammar_is_refused(nano: Tokenizer, syntax: Any, definition: str, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint) as refusal:
        text_grammar(syntax, definition, nano, "the grammar of 'f'")
    message = str(refusal.value)
    assert message.startswith("the grammar of 'f'") and "\n" not in message and len(message) < 400


HOSTILE: dict[str, tuple[Any, str]] = {
    "repeated repetition": ("regex", "((a{1,1000}){1,1000}){1,1000}"),
    "many states": ("regex", ".*a.{300}"),
    "endless": ("lark", 'start: "a" start'),
    "ambiguous": ("lark", 'start: a\na: "a" | a a'),
    "doubling": ("lark", "start: x1\n" + "".join(f"x{n}: x{n + 1} x{n + 1}\n" for n in range(1, 40)) + 'x40: "a"'),
    "large counts": ("lark", 'start: b{1,100000}\nb: c{1,100000}\nc: "a"'),
    "intersections": ("lark", "start: A\nA: /[a-z]{1,400}/ & ~/.*abc.{50}/"),
    "many rules": (
        "lark",
        "start: " + "|".join(f"r{n}" for n in range(2500)) + "".join(f'\nr{n}: "{n}x"' for n in range(2500)),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_or_costs_little(nano: Tokenizer, name: str) -> None:
    syntax, definition = HOSTILE[name]
    started = time.process_time()
    try:
        matcher = text_grammar(syntax, definition, nano, "g").matcher(nano.special(CALL))
        (id,) = nano.encode("a")
        for _ in range(100):
            matcher.mask()
            matcher.accept(id)
    except GptOssError:  # also an InvalidRequest
        pass
    assert time.process_time() - started < 10  # CPU seconds; usually a hundredth of it
