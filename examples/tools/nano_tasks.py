"""The bundled model's training data: short random conversations, each with the one answer that counts as right.

`draw(random, split)` returns examples of every kind in the training mix. "train" and "held-out" never share a question:
a hash of what is asked (the two numbers, the word, the city, the sentence) decides the side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal

import nano_facts as facts
import nano_words as words
from nano_json import in_json, sum_format
from nano_questions import (
    Ask,
    Turn,
    add,
    backwards,
    capital,
    capital_ask,
    chat_ask,
    dress,
    fact_ask,
    fallback_ask,
    number,
    reverse_ask,
    sum_ask,
    syllables,
    word,
)
from nano_weather import WeatherTool, call, call_ask, dress_place, no_tool_ask, place, result_ask, weather_tool

from mlx_gptoss.harmony.messages import Conversation, Effort, Message, ResponseFormat

Split = Literal["train", "held-out"]
EFFORTS: tuple[Effort, ...] = ("low", "medium", "medium", "high")
MIX = {
    "sum": 14,
    "reverse": 11,
    "capital": 6,
    "fact": 11,
    "follow-up": 10,
    "weather call": 9,
    "weather answer": 5,
    "no weather": 3,
    "chat": 6,
    "fallback": 8,
    "json sum": 17,
}
PLAIN = {
    "sum": sum_ask,
    "reverse": reverse_ask,
    "capital": capital_ask,
    "fact": fact_ask,
    "chat": chat_ask,
    "fallback": fallback_ask,
}


@dataclass(frozen=True)
class Example:
    kind: str
    conversation: Conversation
    turn: Turn


def split_of(key: str) -> Split:
    return "held-out" if hashlib.blake2b(key.encode(), digest_size=1).digest()[0] < 24 else "train"


def follow_ups(r: Random, effort: Effort, first: Ask, tool: WeatherTool | None) -> Ask | None:
    """A question that makes sense only after `first` and its answer; None where no such question exists."""
    answer = first.turn.final
    if first.kind == "sum":
        total, b = int(answer.split()[-1]), number(r)
        question = dress(r, r.choice(words.ADD_TO_THAT).format(b=b))
        return Ask("follow-up", question, add(total, b, effort), f"{total}+{b}")
    if first.kind == "reverse" and r.random() < 0.3:
        return Ask("follow-up", r.choice(words.REVERSE_THAT), backwards(answer, effort), answer.lower())
    if first.kind == "reverse":
        text = word(r)
        return Ask("follow-up", r.choice(words.AND_THE_WORD).format(word=text), backwards(text, effort), text.lower())
    if first.kind == "capital" and r.random() < 0.4:
        city = answer.removesuffix(".").split(" is ", 1)[1]
        if " " in city or len(city) > 10:
            return None
        return Ask("follow-up", r.choice(words.REVERSE_THAT), backwards(city, effort), city.lower() + first.question)
    if first.kind == "capital":
        country = r.choice(sorted(facts.CAPITALS))
        question = dress(r, r.choice(words.AND_OF).format(country=country, the=facts.article(country)))
        return Ask("follow-up", question, capital(country, effort), question + first.question)
    if first.kind == "weather answer" and tool:
        city = place(r)
        question = dress_place(r, r.choice(words.AND_IN).format(city=city), city)
        return Ask("follow-up", question, call(tool, city, effort), city)
    return None


def ask(
    r: Random, kind: str, effort: Effort, tool: WeatherTool | None, response_format: ResponseFormat | None = None
) -> Ask:
    if response_format:
        return in_json(sum_ask(r, effort), response_format, r)
    if kind == "weather call" and tool:
        return call_ask(r, effort, tool)
    if kind == "weather answer" and tool:
        return result_ask(r, effort, tool)
    return no_tool_ask(r, effort) if kind == "no weather" else PLAIN[kind](r, effort)


def messages(asked: Ask) -> tuple[Message, ...]:
    """A past exchange as the history shows it. A call without a result never becomes history."""
    return (Message("user", asked.question), *asked.history, Message("assistant", asked.turn.final, "final"))


def example(r: Random, kind: str, split: Split = "train") -> Example:
    """A random conversation whose last turn is of this kind and on this side of the split."""
    while True:
        made = attempt(r, kind)
        if made is not None and split_of(made[1]) == split:
            return made[0]


def attempt(r: Random, kind: str) -> tuple[Example, str] | None:
    effort = r.choice(EFFORTS)
    response_format = sum_format(r) if kind == "json sum" else None
    offered = kind.startswith("weather") or (
        kind != "no weather" and r.random() < (0.2 if kind == "follow-up" else 0.08)
    )
    tool = weather_tool(r) if offered else None
    past: list[Ask] = []
    for _ in range(r.choice((0, 0, 0, 0, 0, 1, 1, 2, 3)) if r.random() < 0.97 else r.randint(4, 12)):
        form = response_format if response_format and r.random() < 0.5 else None
        past.append(ask(r, r.choice(("sum", "reverse", "capital", "fact", "chat", "fallback")), effort, tool, form))
    if kind == "follow-up":
        first = r.choice(("weather answer", "sum", "capital") if tool else ("sum", "sum", "reverse", "capital"))
        past = [*past[:1], ask(r, first, effort, tool)]
        asked = follow_ups(r, effort, past[-1], tool)
        if asked is None:
            return None
    else:
        asked = ask(r, kind, effort, tool, response_format)
    if any(split_of(p.key) == "held-out" for p in past):
        return None
    conversation = Conversation(
        messages=(*(m for p in past for m in messages(p)), Message("user", asked.question), *asked.history),
        reasoning=effort,
        instructions=instructions(r) if r.random() < 0.25 else None,
        functions=tool.functions if tool else (),
        response_format=response_format,
        date=date(r),
    )
    return Example(kind, conversation, asked.turn), asked.key


def instructions(r: Random) -> str:
    """A random developer message. It never changes the right answer, and part of it is noise, so that the model learns
    to ignore it."""
    sentences = r.sample(words.INSTRUCTIONS, r.choice((1, 1, 1, 2, 3)))
    if r.random() < 0.2:
        noise = (syllables(r, r.randint(1, 3)) for _ in range(r.randint(2, 8)))
        sentences.append(" ".join(noise).capitalize() + ".")
    return r.choice((" ", " ", "\n")).join(sentences)


def date(r: Random) -> str | None:
    if r.random() < 0.06:
        return None
    return f"{r.randint(2024, 2031)}-{r.randint(1, 12):02d}-{r.randint(1, 28):02d}"


def draw(r: Random, split: Split = "train", mix: Mapping[str, float] = MIX) -> Example:
    return example(r, r.choices(list(mix), weights=list(mix.values()))[0], split)


def held_out(per_kind: int, seed: int = 0, kinds: Iterable[str] = MIX) -> list[Example]:
    """The fixed evaluation set: `per_kind` conversations of every kind, none of them in the training data."""
    out = []
    for kind in kinds:
        r, seen = Random(f"{kind} {seed}"), set()
        for _ in range(per_kind):
            made = example(r, kind, "held-out")
            while (key := (made.conversation.messages[-1], made.conversation.reasoning)) in seen:
                made = example(r, kind, "held-out")
            seen.add(key)
            out.append(made)
    return out
