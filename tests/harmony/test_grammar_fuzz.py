"""Random schemas: refused, or whatever is drawn under them is valid; and nonsense in the place of schemas."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.harmony.grammar import Grammar
from mlx_gptoss.tokenizer import RETURN, Tokenizer

NAMES = ["a", "b", "xa", "é", 'a"b', ""]
PATTERNS = [
    *("^a", "b$", "^[a-c]+$", r"\d", r"^\w*$", "^.{2,4}$", "[^x]", "^(a|bc)*$", r"^\s?\S+$", "a.?b", "^$", "é"),
    *(r'^[^"\\]*$', r"\.", '^[^"]+,', r"^[^\n]*$", "^[ -~]{3}$", r"^(?:x|[^\x00-\x1f])y?$"),
]
SCALARS = [
    {"type": "boolean"},
    {"type": "null"},
    {},
    True,
    {"type": ["string", "null"]},
    {"type": ["integer", "boolean"]},
]
FORMATS = ["date", "date-time", "uuid", "ipv4", "duration", "time"]


def value(r: Random, depth: int = 0) -> Any:
    match r.randrange(5 if depth < 2 else 3):
        case 0:
            return r.choice([None, True, False, 1.5, -0.25, 0.0, 1e3, 1e-3])
        case 1:
            return r.randint(-50, 2**53)
        case 2:
            return r.choice(["a", "bb", "é\n", "", '日本"', "\\"])
        case 3:
            return [value(r, depth + 1) for _ in range(r.randrange(3))]
        case _:
            return {r.choice(NAMES): value(r, depth + 1) for _ in range(r.randrange(3))}


def schema(r: Random, depth: int = 0) -> Any:
    """Every keyword that is enforced, many of them at odds with each other."""

    def inner() -> Any:
        return schema(r, depth + 1)

    def some(chance: float, **keywords: Any) -> dict[str, Any]:
        return keywords if r.random() < chance else {}

    low, few = r.choice([-10, -1.5, 0, 0.25, 3]), r.randrange(3)
    match r.randrange(10 if depth < 3 else 4):
        case 0:
            made = {"type": r.choice(["integer", "number"])} | some(0.4, minimum=low) | some(0.2, exclusiveMinimum=low)
            made |= some(0.4, maximum=low + r.choice([0, 1, 2.5, 1000])) | some(0.2, exclusiveMaximum=low + 7)
            made |= some(0.2, multipleOf=r.choice([1, 2, 3, 0.5, 0.25, 7, 10]))  # where floating point is exact
        case 1:
            made = {"type": "string"} | some(0.4, minLength=few) | some(0.5, maxLength=few + r.randrange(5))
            made |= some(0.4, pattern=r.choice(PATTERNS)) | some(0.1, format=r.choice(FORMATS))
        case 2:
            made = r.choice([{"enum": [value(r) for _ in range(few + 1)]}, {"const": value(r)}])
        case 3:
            made = r.choice([*SCALARS, {"$ref": "#/$defs/p"}, {"$ref": "#/$defs/q"}])
        case 4 | 5:
            made = {"type": "array"} | some(0.7, items=inner()) | some(0.3, prefixItems=[inner(), inner()])
            made |= some(0.4, minItems=few) | some(0.6, maxItems=few + r.randrange(3))
        case 6 | 7 | 8:
            names = r.sample(NAMES, r.randrange(4))
            made = some(0.9, type="object") | {"properties": {name: inner() for name in names}}
            made |= some(0.7, required=[name for name in [*names, "z"] if r.random() < 0.5])
            made |= some(0.5, additionalProperties=False) or some(0.4, additionalProperties=inner())
            made |= some(0.15, patternProperties={r.choice(["^x", "^a$", "b"]): inner()})
            made |= some(0.15, maxProperties=few) | some(0.1, minProperties=1)
        case _:
            made = {r.choice(["anyOf", "oneOf", "allOf"]): [inner() for _ in range(few + 1)]}
    if isinstance(made, dict) and r.random() < 0.1 and isinstance(other := inner(), dict):
        made = dict(r.sample(list((made | other).items()), len(made | other)))
    return made


def check(seed: int, tokenizer: Tokenizer, sample_text: Any, jsonschema: Any) -> bool:
    """Whether the schema of this seed can be enforced; if so, it is."""
    r = Random(seed)
    made = {"allOf": [schema(r)], "$defs": {"p": schema(r, 3), "q": schema(r, 2)}}
    try:
        grammar = Grammar(made, tokenizer, "schema")
    except InvalidRequest:
        return False
    for _ in range(3):
        text = sample_text(grammar, tokenizer, RETURN, r, 500)
        if text is not None:
            jsonschema.Draft202012Validator(made).validate(json.loads(text))
    return True


def test_a_few_hundred_random_schemas(nano: Tokenizer, sample_text: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert sum(check(seed, nano, sample_text, jsonschema) for seed in range(400)) > 200


@pytest.mark.slow
def test_many_random_schemas(nano: Tokenizer, sample_text: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert sum(check(seed, nano, sample_text, jsonschema) for seed in range(1000, 31_000)) > 15_000


def test_nonsense_is_refused_and_nothing_worse(nano: Tokenizer) -> None:
    """Any JSON in the place of any keyword's value."""
    corpus = list(json.loads((Path(__file__).parents[1] / "data" / "schemas.json").read_text("utf-8")).values())
    r, refused = Random(0), 0
    for _ in range(600):
        made = json.loads(json.dumps(r.choice(corpus)))
        place = made
        while isinstance(place, (dict, list)) and place:
            key = r.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if r.random() < 0.5:
                place[key] = value(r)
                break
            place = place[key]
        try:
            Grammar(made, nano, "schema")
        except InvalidRequest:
            refused += 1
    assert 100 < refused < 500
