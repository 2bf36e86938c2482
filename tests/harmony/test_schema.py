"""JSON schemas as TypeScript: golden texts, and openai-harmony's text over generated schemas."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss.harmony.messages import Function
from mlx_gptoss.harmony.schema import compact_json, tools_section, type_of

WEATHER = Function(
    "get_weather",
    "The weather in a place.\nNow or later.",
    {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "City and state", "examples": ["Paris", "Rome"]},
            "format": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
            "days": {"type": ["integer", "null"], "title": "Days", "default": 1},
            "where": {
                "description": "A point or a name",
                "default": {"x": 1, "y": [None, 2.5]},
                "oneOf": [
                    {"type": "object", "properties": {"x": {"type": "number", "nullable": True}}, "required": ["x"]},
                    {"type": "string", "description": "its name", "default": "here"},
                ],
            },
            "tags": {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}}, "default": "none"},
            "other": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
        "required": ["location", "where"],
    },
)
GOLDEN = """\
# Tools

## functions

namespace functions {

// The weather in a place.
// Now or later.
type get_weather = (_: {
// City and state
// Examples:
// - "Paris"
// - "Rome"
location: string,
format?: "celsius" | "fahrenheit", // default: celsius
// Days
//
days?: number | null, // default: 1
// A point or a name
// default: {"x":1,"y":[null,2.5]}
where:
 | {
   x: number | null,
   }
 | string // its name default: "here"
,
tags?: boolean[][], // default: "none"
other?: any,
}) => any;

type stop = () => any;

} // namespace functions"""

NAMES = st.text("abZ_9é", min_size=1, max_size=6)
TEXTS = st.text('ab "\\\n\r/{}é\u2028', max_size=12)
# Few digits and small exponents: openai-harmony reads longer ones without rounding them to the nearest float.
FLOATS = st.builds(lambda digits, exponent: float(f"{digits}e{exponent}"), st.integers(-999, 999), st.integers(-20, 20))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64) | FLOATS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=4,
)
TYPES = ["string", "number", "integer", "boolean", "null", "array", "object", "strange"]
NOTES = {
    "title": TEXTS,
    "description": TEXTS | st.just("the same"),
    "default": VALUES | st.sampled_from(["a", "b"]),
    "examples": st.lists(VALUES, max_size=3),
    "enum": st.lists(st.sampled_from(["a", "b", 3, None]), max_size=3),
    "nullable": st.booleans(),
    "format": TEXTS,
}


def with_parts(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {"type": st.sampled_from([*TYPES, "object", "object", "array"])},
        optional={
            **NOTES,
            "properties": st.dictionaries(NAMES, inner, max_size=4),
            "required": st.lists(st.sampled_from(["a", "b", "Z", 3]), max_size=3),
            "items": inner,
            "oneOf": st.lists(inner, max_size=3) | st.none(),
            "anyOf": st.lists(inner, max_size=2),
        },
    )


LEAVES = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(TYPES) | st.lists(st.sampled_from([*TYPES, 1]), max_size=3), **NOTES}
)
SCHEMAS = st.recursive(LEAVES | st.booleans() | st.none(), with_parts, max_leaves=8)
OBJECTS = st.fixed_dictionaries(
    {"type": st.just("object"), "properties": st.dictionaries(NAMES, SCHEMAS, max_size=5)},
    optional={"required": st.lists(NAMES, max_size=3), "description": TEXTS},
)
FUNCTIONS = st.builds(
    Function, NAMES, TEXTS, st.none() | OBJECTS | SCHEMAS.filter(lambda schema: isinstance(schema, dict))
)


def judged(judge: Any, functions: list[Function]) -> str:
    """The text of a developer message with these tools, as openai-harmony renders it."""
    import openai_harmony as oh

    tools = [oh.ToolDescription.new(tool.name, tool.description, tool.parameters) for tool in functions]
    content = oh.DeveloperContent.new().with_function_tools(tools)
    text = judge.decode(judge.render(oh.Message.from_role_and_content(oh.Role.DEVELOPER, content)))
    return text.removeprefix("<|start|>developer<|message|>").removesuffix("<|end|>")


def test_golden() -> None:
    assert tools_section([WEATHER, Function("stop")]) == GOLDEN


def test_golden_is_openai_harmonys(judge: Any) -> None:
    assert judged(judge, [WEATHER, Function("stop")]) == GOLDEN


@settings(max_examples=600, deadline=None)
@given(functions=st.lists(FUNCTIONS, min_size=1, max_size=3))
def test_any_schema_is_written_as_openai_harmony_does(judge: Any, functions: list[Function]) -> None:
    assert tools_section(functions) == judged(judge, functions)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-5, "0.00001"), (1e-6, "1e-6"), (1e16, "1e16"), (1e15, "1000000000000000.0"), (2**64, "1.8446744073709552e19")],
)
def test_numbers_are_written_as_serde_json_does(value: float, text: str) -> None:
    assert compact_json(value) == text


def test_what_is_no_schema_is_any() -> None:
    assert [type_of(thing) for thing in (True, None, 3, [], {}, {"type": "null"})] == ["any"] * 6
