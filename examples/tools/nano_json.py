"""Questions that the nano model learns to answer in JSON: a plain question, and the form that its answer must have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

import nano_words as words
from nano_questions import Ask, capital_ask, chat_ask, fact_ask, fallback_ask, reverse_ask, sum_ask, syllables

from mlx_gptoss.harmony.messages import Effort, ResponseFormat

KINDS = ("json sum", "json reverse", "json capital", "json fact", "json object")
ABOUT = ("sum", "reverse", "capital", "fact")


@dataclass(frozen=True)
class Form:
    """The form of one conversation's JSON answers.

    about: the kind of question ("sum", "reverse", "capital" or "fact").
    keys: the property that holds the answer, after those that repeat the question's own parts, if any.
    instruction: what the developer's text says about it; "" for nothing.
    """

    about: str
    keys: tuple[str, ...]
    response_format: ResponseFormat
    instruction: str = ""


def json_form(r: Random, kind: str) -> Form:
    """A random form for one of KINDS. "json object" asks for any object: the model then uses the usual key."""
    if kind == "json object":
        about = r.choice(ABOUT)
        instruction = r.choice(words.IN_JSON).strip() if r.random() < 0.35 else ""
        return Form(about, words.JSON_KEYS[about][:1], ResponseFormat({"type": "object"}), instruction)
    about = kind.removeprefix("json ")
    keys = (key(r, about),)
    if about in words.JSON_PARTS and r.random() < 0.15:
        keys = (*r.choice(words.JSON_PARTS[about]), *keys)
    number = "integer" if r.random() < 0.85 else "number"
    shown = schema(r, dict.fromkeys(keys, number if about == "sum" else "string"))
    name = r.choice((keys[-1], keys[-1], about, *words.JSON_NAMES))
    description = r.choice(words.JSON_DESCRIPTIONS) if r.random() < 0.1 else ""
    return Form(about, keys, ResponseFormat(shown, name, description))


def key(r: Random, about: str) -> str:
    """A property's name; made up now and then, so that the model copies it from the schema."""
    if r.random() < 0.75:
        return r.choice(words.JSON_KEYS[about])
    return "_".join(syllables(r, r.randint(1, 3)) + r.choice("aeiou") for _ in range(r.choice((1, 1, 2))))


def schema(r: Random, kinds: Mapping[str, str]) -> dict[str, object]:
    """A schema as people write it, or as pydantic does; kinds: the properties' types by name."""
    titled, described = r.random() < 0.25, r.random() < 0.15
    properties: dict[str, object] = {}
    for name, kind in kinds.items():
        title = {"title": name.capitalize()} if titled else {}
        text = {"description": r.choice(words.JSON_DESCRIPTIONS)} if described else {}
        properties[name] = {**title, "type": kind, **text} if titled else {"type": kind, **text}
    required = {"required": list(kinds)} if r.random() < 0.85 else {}
    closed = {"additionalProperties": False} if r.random() < 0.6 else {}
    if titled:
        return {"properties": properties, **required, "title": r.choice(words.JSON_NAMES), "type": "object", **closed}
    return {"type": "object", "properties": properties, **required, **closed}


def json_ask(r: Random, kind: str, effort: Effort, form: Form) -> Ask:
    """A question whose answer has this form. The reasoning is that of the same question without a form."""
    plain = r.choice(PLAIN[form.about])(r, effort)
    fields = dict(zip(form.keys, values(plain, len(form.keys)), strict=True))
    answer = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
    shown = form.response_format.name is not None or form.instruction != ""
    asked = r.random() < (0.2 if shown else 0.85)
    question = plain.question + (r.choice(words.IN_JSON) if asked else "")
    turn = replace(plain.turn, final=answer, json="said" if shown or asked else "forced")
    return Ask(kind, question, turn, plain.key)


PLAIN = {
    "sum": (sum_ask,),
    "reverse": (reverse_ask,),
    "capital": (capital_ask,),
    "fact": (fact_ask, fact_ask, fact_ask, chat_ask, fallback_ask),
}


def values(plain: Ask, n: int) -> list[object]:
    """The last n of: the parts of the question (two numbers, the word, the country), the answer."""
    final = plain.turn.final
    if plain.kind == "sum":
        a, _, b, _, total = final.split()
        return [int(a), int(b), int(total)][-n:]
    if plain.kind == "capital":
        country, city = final.removeprefix("The capital of ").removesuffix(".").split(" is ")
        return [country, city][-n:]
    return [final[::-1], final][-n:]
