"""Sums that are answered in JSON: the schema, and a plain question's answer in its form."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random

import nano_words as words
from nano_questions import Ask

from mlx_gptoss.harmony.messages import ResponseFormat

KEYS = ("sum", "sum", "answer", "result", "total")


def sum_format(r: Random) -> ResponseFormat:
    """A schema with one integer property."""
    key = r.choice(KEYS)
    properties = {key: {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": [key], "additionalProperties": False}
    return ResponseFormat(schema, r.choice((key, key, "sum", "answer")), "")


def in_json(asked: Ask, response_format: ResponseFormat, r: Random) -> Ask:
    """The same question and reasoning; the final answer is the sum as an object of the schema, without white space."""
    (key,) = response_format.schema["properties"]
    answer = json.dumps({key: int(asked.turn.final.split()[-1])}, separators=(",", ":"))
    question = asked.question + (r.choice(words.IN_JSON) if r.random() < 0.2 else "")
    return replace(asked, kind="json sum", question=question, turn=replace(asked.turn, final=answer, json=True))
