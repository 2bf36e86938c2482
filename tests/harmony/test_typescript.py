"""Tool declarations as TypeScript: golden texts. test_corpus.py compares generated ones with openai-harmony's."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_gptoss.harmony.messages import Function, TextFormat
from mlx_gptoss.harmony.typescript import Namespace, compact_json, tools_section, typescript_type

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


def test_golden() -> None:
    assert tools_section([Namespace("functions", functions=[WEATHER, Function("stop")])]) == GOLDEN


def test_golden_matches_openai_harmony(reference: Any) -> None:
    import openai_harmony as oh

    tools = [
        oh.ToolDescription.new(tool.name, tool.description, tool.parameters) for tool in (WEATHER, Function("stop"))
    ]
    content = oh.DeveloperContent.new().with_function_tools(tools)
    text = reference.decode(reference.render(oh.Message.from_role_and_content(oh.Role.DEVELOPER, content)))
    assert text == f"<|start|>developer<|message|>{GOLDEN}<|end|>"


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-5, "0.00001"), (1e-6, "1e-6"), (1e16, "1e16"), (1e15, "1000000000000000.0"), (2**64, "1.8446744073709552e19")],
)
def test_numbers_are_formatted_as_by_serde_json(value: float, text: str) -> None:
    assert compact_json(value) == text


def test_invalid_and_empty_schemas_become_any() -> None:
    assert [typescript_type(thing) for thing in (True, None, 3, [], {}, {"type": "null"})] == ["any"] * 6


def test_a_function_of_text_says_so_and_shows_its_grammar() -> None:
    patch = Function("apply_patch", "Edit files.", text_format=TextFormat("lark", 'start: "a" LF\n%import common.LF\n'))
    note = Function("note", text_format=TextFormat())
    assert (
        tools_section([Namespace("functions", functions=(patch, note))])
        == """\
# Tools

## functions

namespace functions {

// Edit files.
// The input is plain text, not JSON. It must match this Lark grammar:
// start: "a" LF
// %import common.LF
type apply_patch = (_: string) => any;

// The input is plain text, not JSON.
type note = (_: string) => any;

} // namespace functions"""
    )
