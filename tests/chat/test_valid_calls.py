"""Every call is a valid call: generated tools and prompts at temperature 1, with the bundled model, which has seen none
of these tools. Their schemas have what can be enforced, and annotations.

The figure of 1,000 calls: python -m pytest -s -m slow tests/chat/test_valid_calls.py
"""

from __future__ import annotations

import json
from collections import Counter
from random import Random
from typing import Any

import pytest

import mlx_gptoss
from mlx_gptoss import Sampling
from mlx_gptoss.chat.reply import fold

PROMPTS = [
    "What is the weather in Paris?",
    "What is 12 + 30?",
    "Hello",
    "Fix the test in src/app.py and run it.",
    "Hi!",
]
VERBS = [
    "get",
    "list",
    "create",
    "update",
    "delete",
    "search",
    "read",
    "write",
    "run",
    "mcp__github__merge",
    "browser-open",
]
NOUNS = ["weather", "file", "issue", "user.profile", "todo", "page", "order", "event", "memory", "repo_tree", "v2"]
WORDS = [
    "path",
    "query",
    "limit",
    "user_id",
    "tags",
    "filter",
    "title",
    "body",
    "mode",
    "is_draft",
    "$type",
    "at-time",
    "größe",
]
SLOTS = 30


def schema(random: Random, depth: int = 0) -> dict[str, Any]:
    """A random schema of the kinds that agents and their libraries declare: pydantic, zod, MCP servers, by hand."""
    described = {"description": "What it is."} if random.random() < 0.3 else {}
    return described | SHAPES[random.randrange(len(SHAPES) if depth < 2 else SCALARS)](random, depth)


def string(random: Random, depth: int) -> dict[str, Any]:
    extra: list[dict[str, Any]] = [
        {"maxLength": random.randint(1, 12)},
        {"maxLength": 8, "default": "x", "examples": ["a"]},
        {"minLength": 1, "maxLength": 5, "title": "A"},
        {"pattern": "^[a-z_]{1,8}$"},
        {"format": random.choice(["date", "date-time", "uuid", "ipv4"])},
        {"format": "int64-as-string", "maxLength": 4},  # unknown: left out
        {},
    ]
    return {"type": "string"} | random.choice(extra)


def number(random: Random, depth: int) -> dict[str, Any]:
    bounds: list[dict[str, Any]] = [
        {},
        {"minimum": 0},
        {"minimum": 1, "maximum": 100, "default": 10},
        {"format": "int32"},
    ]
    return {"type": random.choice(["integer", "number"])} | random.choice(bounds)


def choice(random: Random, depth: int) -> dict[str, Any]:
    return random.choice(
        [{"type": "string", "enum": ["asc", "desc"]}, {"enum": ["a", 1, None]}, {"const": "file"}, {"type": "boolean"}]
    )


def nullable(random: Random, depth: int) -> dict[str, Any]:
    return random.choice(
        [
            {"type": ["string", "null"], "maxLength": 6},
            {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "title": "N"},
            {"type": "integer", "nullable": True},
        ]
    )


def array(random: Random, depth: int) -> dict[str, Any]:
    return {"type": "array", "items": schema(random, depth + 1), "maxItems": random.randint(1, 3)}


def closed(random: Random, depth: int) -> dict[str, Any]:
    names = random.sample(WORDS, random.randint(0, 4))
    required = [name for name in names if random.random() < 0.5]
    result: dict[str, Any] = {"type": "object", "properties": {name: schema(random, depth + 1) for name in names}}
    if required or random.random() < 0.5:
        result["required"] = required
    return result | random.choice([{}, {}, {"additionalProperties": False}])


def mapping(random: Random, depth: int) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": number(random, depth), "maxProperties": 2}


def tagged(random: Random, depth: int) -> dict[str, Any]:
    variants = []
    for tag in ("text", "image"):
        variant = closed(random, depth + 1)
        variant["properties"] = {"kind": {"const": tag}} | variant["properties"]
        variants.append(variant | {"required": ["kind"]})
    return {random.choice(["anyOf", "oneOf"]): variants}


def reference(random: Random, depth: int) -> dict[str, Any]:
    return {"$ref": "#/$defs/Item"}


SHAPES = [string, string, number, choice, nullable, array, closed, mapping, tagged, reference]
SCALARS = 5


def function(random: Random, number: int) -> dict[str, Any]:
    parameters = closed(random, 0)
    if '"#/$defs/Item"' in json.dumps(parameters):
        parameters["$defs"] = {"Item": closed(random, 2)}
    parameters |= random.choice([{}, {"$schema": "http://json-schema.org/draft-07/schema#"}, {"title": "Args"}])
    name = f"{random.choice(VERBS)}_{random.choice(NOUNS)}_{number}"
    declared = {"name": name, "description": "Does it.", "parameters": parameters}
    return {"type": "function", "function": declared | random.choice([{}, {"strict": False}])}


def ask(model: Any, number: int) -> tuple[dict[str, Any], Any]:
    """Begin one request. Returns the schemas of its tools by name, and its events."""
    random = Random(number)
    tools = [function(random, place) for place in range(random.choice([1, 1, 2, 5]))]
    named = random.choice(tools)["function"]["name"]
    choice = ("required", named, "auto", named, "required", named)[number % 6]
    # A model that was never shown such JSON does not find the end of a string that the schema does not end.
    closing = [model.tokenizer.encode(letter)[0] for letter in '"]}']
    sampling = Sampling(seed=number, temperature=1.0, logit_bias=dict.fromkeys(closing, 4.0))
    prompt = random.choice(PROMPTS)
    events = model.stream(prompt, tools=tools, tool_choice=choice, sampling=sampling, max_tokens=250, reasoning="low")
    return {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}, events


def rate(model: Any, first: int, requests: int) -> Counter[str]:
    """Counts: the calls made, those valid, the turns cut off by max_tokens, those without a call."""
    jsonschema = pytest.importorskip("jsonschema")
    counts: Counter[str] = Counter()
    for start in range(first, first + requests, SLOTS):
        numbers = range(start, min(start + SLOTS, first + requests))
        for number, (schemas, events) in [(number, ask(model, number)) for number in numbers]:
            _, _, calls, finished = fold(events)
            counts["calls"] += len(calls)
            counts["cut off"] += finished.finish_reason == "length"
            counts["none"] += finished.finish_reason == "stop"
            assert number % 6 == 2 or finished.finish_reason != "stop"
            for call in calls:
                try:
                    jsonschema.Draft202012Validator(schemas[call.name]).validate(json.loads(call.arguments))
                except (KeyError, ValueError, jsonschema.ValidationError) as error:
                    print(f"request {number}: {call.name} {call.arguments!r} under {schemas.get(call.name)}: {error}")
                else:
                    counts["valid"] += 1
    return counts


@pytest.fixture(scope="module")
def model() -> Any:
    with mlx_gptoss.load(backend="mlx", max_context=4096, slots=SLOTS) as loaded:
        yield loaded


def test_calls_of_generated_tools_are_valid(model: Any) -> None:
    counts = rate(model, 0, 24)
    assert counts["valid"] == counts["calls"] >= 16


@pytest.mark.slow
def test_calls_of_1000_generated_tools_are_valid(model: Any) -> None:
    counts: Counter[str] = Counter()
    first = 1000
    while counts["calls"] < 1000:
        counts += rate(model, first, 90)
        first += 90
    print(
        f"\n{counts['valid']} of {counts['calls']} calls are valid; {first - 1000} requests, {counts['cut off']} cut "
        f"off, {counts['none']} without a call"
    )
    assert counts["valid"] == counts["calls"]
