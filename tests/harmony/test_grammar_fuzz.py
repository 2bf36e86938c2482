"""Random schemas are refused, or every sampled text is valid under them. Broken schemas are refused."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.harmony.grammar import json_grammar
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


def value(random: Random, depth: int = 0) -> Any:
    """Return a random JSON value."""
    match random.randrange(5 if depth < 2 else 3):
        case 0:
            return random.choice([None, True, False, 1.5, -0.25, 0.0, 1e3, 1e-3])
        case 1:
            return random.randint(-50, 2**53)
        case 2:
            return random.choice(["a", "bb", "é\n", "", '日本"', "\\"])
        case 3:
            return [value(random, depth + 1) for _ in range(random.randrange(3))]
        case _:
            return {random.choice(NAMES): value(random, depth + 1) for _ in range(random.randrange(3))}


def schema(random: Random, depth: int = 0) -> Any:
    """Return a random schema. All enforced keywords occur, and many of them contradict each other."""

    def inner() -> Any:
        return schema(random, depth + 1)

    def some(chance: float, **keywords: Any) -> dict[str, Any]:
        return keywords if random.random() < chance else {}

    low, few = random.choice([-10, -1.5, 0, 0.25, 3]), random.randrange(3)
    match random.randrange(10 if depth < 3 else 4):
        case 0:
            result = {"type": random.choice(["integer", "number"])} | some(0.4, minimum=low)
            result |= some(0.2, exclusiveMinimum=low)
            result |= some(0.4, maximum=low + random.choice([0, 1, 2.5, 1000])) | some(0.2, exclusiveMaximum=low + 7)
            # The validator divides in floating point, which is exact for these.
            result |= some(0.2, multipleOf=random.choice([1, 2, 3, 0.5, 0.25, 7, 10]))
        case 1:
            result = {"type": "string"} | some(0.4, minLength=few) | some(0.5, maxLength=few + random.randrange(5))
            result |= some(0.4, pattern=random.choice(PATTERNS)) | some(0.1, format=random.choice(FORMATS))
        case 2:
            result = random.choice([{"enum": [value(random) for _ in range(few + 1)]}, {"const": value(random)}])
        case 3:
            result = random.choice([*SCALARS, {"$ref": "#/$defs/p"}, {"$ref": "#/$defs/q"}])
        case 4 | 5:
            result = {"type": "array"} | some(0.7, items=inner()) | some(0.3, prefixItems=[inner(), inner()])
            result |= some(0.4, minItems=few) | some(0.6, maxItems=few + random.randrange(3))
        case 6 | 7 | 8:
            names = random.sample(NAMES, random.randrange(4))
            result = some(0.9, type="object") | {"properties": {name: inner() for name in names}}
            result |= some(0.7, required=[name for name in [*names, "z"] if random.random() < 0.5])
            result |= some(0.5, additionalProperties=False) or some(0.4, additionalProperties=inner())
            result |= some(0.15, patternProperties={random.choice(["^x", "^a$", "b"]): inner()})
            result |= some(0.15, maxProperties=few) | some(0.1, minProperties=1)
        case _:
            result = {random.choice(["anyOf", "oneOf", "allOf"]): [inner() for _ in range(few + 1)]}
    if isinstance(result, dict) and random.random() < 0.1 and isinstance(other := inner(), dict):
        result = dict(random.sample(list((result | other).items()), len(result | other)))
    return result


def check(seed: int, tokenizer: Tokenizer, sample_text: Any, jsonschema: Any) -> bool:
    """Return whether the schema of this seed can be enforced. If so, check texts sampled under it."""
    random = Random(seed)
    result = {"allOf": [schema(random)], "$defs": {"p": schema(random, 3), "q": schema(random, 2)}}
    try:
        grammar = json_grammar(result, tokenizer, "schema")
    except InvalidRequest:
        return False
    for _ in range(3):
        text = sample_text(grammar, tokenizer, RETURN, random, 500)
        if text is not None:
            jsonschema.Draft202012Validator(result).validate(json.loads(text))
    return True


def test_random_schemas(nano: Tokenizer, sample_text: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert sum(check(seed, nano, sample_text, jsonschema) for seed in range(400)) > 200


@pytest.mark.slow
def test_many_more_random_schemas(nano: Tokenizer, sample_text: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert sum(check(seed, nano, sample_text, jsonschema) for seed in range(1000, 31_000)) > 15_000


def test_broken_schemas_are_refused_without_other_errors(nano: Tokenizer) -> None:
    """Replace the value of a random keyword with any JSON value."""
    corpus = list(json.loads((Path(__file__).parents[1] / "data" / "schemas.json").read_text("utf-8")).values())
    random, refused = Random(0), 0
    for _ in range(600):
        result = json.loads(json.dumps(random.choice(corpus)))
        place = result
        while isinstance(place, (dict, list)) and place:
            key = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if random.random() < 0.5:
                place[key] = value(random)
                break
            place = place[key]
        try:
            json_grammar(result, nano, "schema")
        except InvalidRequest:
            refused += 1
    assert 100 < refused < 500
