"""What the nano model learns: little conversations, made up at random, each with the one answer that counts as right.

`draw(random, split)` yields examples of every kind in the training mix; "train" and "held-out" never share a question:
a hash of what is asked (the two numbers, the word, the city, the sentence) decides which side it is on.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from random import Random
from typing import Literal

import nano_words as words

from mlx_gptoss.harmony.messages import Conversation, Effort, Function, Message

Split = Literal["train", "held-out"]
EFFORTS: tuple[Effort, ...] = ("low", "medium", "medium", "high")


@dataclass(frozen=True)
class Turn:
    """What the assistant says: the analysis, then a final text or a call (recipient and JSON arguments)."""

    analysis: str
    final: str = ""
    recipient: str = ""
    arguments: str = ""

    def text(self) -> str:
        """The turn as the model writes it after `<|start|>assistant`, with its special tokens."""
        thought = f"<|channel|>analysis<|message|>{self.analysis}<|end|><|start|>assistant"
        if self.recipient:
            header = f"<|channel|>commentary to={self.recipient} <|constrain|>json<|message|>"
            return f"{thought}{header}{self.arguments}<|call|>"
        return f"{thought}<|channel|>final<|message|>{self.final}<|return|>"


@dataclass(frozen=True)
class Example:
    kind: str
    conversation: Conversation
    turn: Turn


@dataclass(frozen=True)
class Ask:
    """One question of a user with its answer, before it is put into a conversation.

    key: what the split hashes. history: messages between the question and the turn (a call and its result).
    tools: whether the question needs get_weather to be offered (None: either way is fine).
    """

    kind: str
    question: str
    turn: Turn
    key: str
    tools: bool | None = None
    history: tuple[Message, ...] = ()


def split_of(key: str) -> Split:
    return "held-out" if hashlib.blake2b(key.encode(), digest_size=1).digest()[0] < 24 else "train"


# ---- sums ----------------------------------------------------------------------------------------------------------


def columns(a: int, b: int) -> list[tuple[str, int, int]]:
    """The columns from the right: (the sum written out, digit to write, carry)."""
    out, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        out.append((f"{x}+{y}" + (f"+{carry}" if place else "") + f"={total}", total % 10, total // 10))
        carry = total // 10
    return out


def add(a: int, b: int, effort: Effort) -> Turn:
    if effort == "low":
        thought = f"{a} + {b}: " + ", ".join(line for line, _, _ in columns(a, b))
    else:
        thought = f"{a} + {b}, column by column from the right:\n" + written_sum(a, b)
    if effort == "high":
        thought += "\nLet me check it the other way round:\n" + written_sum(b, a) + "\nBoth agree."
    return Turn(thought, f"{a} + {b} = {a + b}")


def written_sum(a: int, b: int) -> str:
    lines = [f"{line}, write {digit}, carry {carry}." for line, digit, carry in columns(a, b)]
    return "\n".join([*lines, f"The sum is {a + b}."])


def number(r: Random) -> int:
    """Up to 3 digits; now and then 4, because a sum that is added to may have them."""
    if r.random() < 0.03:
        return r.randrange(1000, 2000)
    return r.randrange(10 ** r.choice((1, 2, 2, 3, 3, 3)))


def sum_ask(r: Random, effort: Effort) -> Ask:
    a, b = number(r), number(r)
    return Ask("sum", dress(r, r.choice(words.SUMS).format(a=a, b=b)), add(a, b, effort), f"{a}+{b}")


# ---- words backwards -----------------------------------------------------------------------------------------------


def backwards(word: str, effort: Effort) -> Turn:
    numbered = [f"{(i + 1) % 10}{letter}" for i, letter in enumerate(word)]
    forth, back = " ".join(numbered), " ".join(reversed(numbered))
    if effort == "low":
        return Turn(f"{forth}; {back}", word[::-1])
    thought = f"I number the letters of {word}:\n{forth}\nFrom the last to the first:\n{back}\nThat gives {word[::-1]}."
    if effort == "high":
        again = [f"{(i + 1) % 10}{letter}" for i, letter in enumerate(word[::-1])]
        thought += f"\nLet me check it the other way round:\n{' '.join(again)}\n{' '.join(reversed(again))}"
        thought += f"\nThat gives {word}. Both agree."
    return Turn(thought, word[::-1])


def word(r: Random) -> str:
    form = r.random()
    if form < 0.25:
        text = r.choice(words.COMMON)
    elif form < 0.6:
        text = syllables(r, r.randint(1, 4))
    else:
        text = "".join(r.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(r.randint(3, 10)))
    text = text[: r.randint(8, 10)] if len(text) >= 3 else text + "ton"
    case = r.random()
    return text.upper() if case < 0.06 else text.capitalize() if case < 0.16 else text


def syllables(r: Random, n: int) -> str:
    return "".join(r.choice(words.ONSETS) + r.choice("aeiou") + r.choice(words.CODAS) for _ in range(n))


def reverse_ask(r: Random, effort: Effort) -> Ask:
    text = word(r)
    question = r.choice(words.REVERSALS).format(word=text)
    return Ask("reverse", question, backwards(text, effort), text.lower())


# ---- facts, small talk, everything else ----------------------------------------------------------------------------


def known(topic: str, answer: str, effort: Effort) -> Turn:
    thought = "I know this." if effort == "low" else f"The question is about {topic}. I know this."
    if effort == "high":
        thought += f"\nI would answer: {answer}\nThat is right."
    return Turn(thought, answer)


def capital(country: str, effort: Effort) -> Turn:
    return known(country, f"The capital of {country} is {words.CAPITALS[country]}.", effort)


def capital_ask(r: Random, effort: Effort) -> Ask:
    country = r.choice(sorted(words.CAPITALS))
    question = dress(r, r.choice(words.CAPITAL_QUESTIONS).format(country=country, the=words.article(country)))
    return Ask("capital", question, capital(country, effort), question)


def fact_ask(r: Random, effort: Effort) -> Ask:
    fact = r.choice(words.FACTS)
    question = dress(r, r.choice(fact.questions))
    return Ask("fact", question, known(fact.topic, fact.answer, effort), question)


def chat_ask(r: Random, effort: Effort) -> Ask:
    talk = r.choice(words.SMALL_TALK)
    question = dress(r, r.choice(talk.questions))
    thought = f"This is {talk.topic}." + {"low": "", "medium": " I answer kindly."}.get(
        effort, f" I answer kindly.\nI would answer: {talk.answer}\nThat is polite."
    )
    return Ask("chat", question, Turn(thought, talk.answer), question)


def fallback(effort: Effort) -> Turn:
    thought = "I cannot do this." + {"low": "", "medium": " I say what I can do."}.get(
        effort, " It is no sum, no word to reverse and nothing that I know.\nI say what I can do."
    )
    return Turn(thought, words.FALLBACK)


def fallback_ask(r: Random, effort: Effort) -> Ask:
    form = r.random()
    if form < 0.08:
        question = "".join(
            r.choice("abcdefghijklmnopqrstuvwxyz ?!.,0123456789") for _ in range(r.randint(1, 12))
        ).strip()
    elif form < 0.16:
        question = r.choice(words.ODD_PROMPTS)
    else:
        question = r.choice(words.OTHER_QUESTIONS).format(
            noun=r.choice(words.NOUNS) if r.random() < 0.7 else syllables(r, 2),
            other=r.choice(words.NOUNS),
            name=r.choice(words.NAMES) if r.random() < 0.6 else syllables(r, 2).capitalize(),
            country=r.choice(sorted(words.CAPITALS)),
            a=number(r),
            b=number(r),
        )
        question = dress(r, question)
    return Ask("fallback", question or "?", fallback(effort), question)


def dress(r: Random, question: str) -> str:
    """The same question in another casing, with other punctuation or a polite word."""
    if r.random() < 0.15:
        question = r.choice(words.PREFIXES) + question
    elif r.random() < 0.15:
        question = r.choice(("please ", "now ", "so ", "ok, ")) + question[:1].lower() + question[1:]
    if r.random() < 0.12:
        question = question.lower()
    if r.random() < 0.2:
        question = question.rstrip(".?!")
    return question


# ---- the weather ---------------------------------------------------------------------------------------------------


def place(r: Random) -> str:
    form = r.random()
    if form < 0.6:
        return r.choice(words.CITIES)
    name = syllables(r, r.randint(1, 3)).capitalize()
    return f"{r.choice(('New', 'San', 'Port', 'Saint', 'North', 'Bad'))} {name}" if form > 0.92 else name


@dataclass(frozen=True)
class WeatherTool:
    """How get_weather is offered in one conversation: its name, the name of its parameter, all functions."""

    name: str
    parameter: str
    functions: tuple[Function, ...]

    @property
    def recipient(self) -> str:
        return f"functions.{self.name}"


def weather_tool(r: Random) -> WeatherTool:
    name = "get_weather" if r.random() < 0.85 else "get_current_weather"
    parameter = "location" if r.random() < 0.85 else "city"
    schema: dict[str, object] = {"type": "string"}
    if r.random() < 0.6:
        schema["description"] = r.choice(words.PARAMETER_DESCRIPTIONS)
    properties: dict[str, object] = {parameter: schema}
    if r.random() < 0.25:
        properties[r.choice(("unit", "format"))] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    description = r.choice(words.FUNCTION_DESCRIPTIONS) if r.random() < 0.9 else ""
    if r.random() < 0.1:
        description += f" Uses {syllables(r, 3)} {syllables(r, 2)}."
    parameters = {"type": "object", "properties": properties, "required": [parameter]}
    if r.random() < 0.1:
        del parameters["required"]
    functions = [Function(name, description, parameters)]
    if r.random() < 0.25:
        functions.insert(r.randint(0, 1), r.choice(OTHER_FUNCTIONS))
    return WeatherTool(name, parameter, tuple(functions))


def _function(name: str, description: str, **types: str) -> Function:
    properties = {key: {"type": kind} for key, kind in types.items()}
    return Function(name, description, {"type": "object", "properties": properties, "required": list(types)})


OTHER_FUNCTIONS = (
    Function("get_time", "Gets the current time."),
    _function("search", "Searches the web.", query="string"),
    _function("get_stock_price", "Get the price of a stock.", symbol="string"),
    _function("send_email", "Send an email.", to="string", body="string"),
    _function("play_music", "Plays a song.", title="string"),
    _function("set_timer", "Set a timer.", minutes="number"),
)


def call(tool: WeatherTool, city: str, effort: Effort) -> Turn:
    thought = f"The user asks about the weather in {city}. I call {tool.name}."
    if effort == "low":
        thought = f"I call {tool.name}."
    elif effort == "high":
        thought += f"\nIt needs the {tool.parameter}: {city}.\nIts result will tell me what to answer."
    arguments = json.dumps({tool.parameter: city}, ensure_ascii=False)
    return Turn(thought, recipient=tool.recipient, arguments=arguments)


def call_ask(r: Random, effort: Effort, tool: WeatherTool) -> Ask:
    city = place(r)
    question = dress_place(r, r.choice(words.WEATHER_QUESTIONS).format(city=city), city)
    return Ask("weather call", question, call(tool, city, effort), city, tools=True)


def dress_place(r: Random, question: str, city: str) -> str:
    """As `dress`, but the city keeps its capitals: they are copied into the call."""
    return dress(r, question.replace(city, "\0")).replace("\0", city)


def result_ask(r: Random, effort: Effort, tool: WeatherTool) -> Ask:
    """The turn after the function has answered."""
    asked = call_ask(r, effort, tool)
    city = json.loads(asked.turn.arguments)[tool.parameter]
    degrees, sky = str(r.randint(-20, 42)), r.choice(words.SKIES)
    result, answer = weather_result(r, city, degrees, sky)
    thought = f"{tool.name} has answered. I tell the user."
    if effort == "low":
        thought = "I tell the user."
    elif effort == "high":
        thought += f"\nThe result is about {city}.\nI would answer: {answer}\nThat is right."
    called = Message("assistant", asked.turn.arguments, "commentary", tool.recipient, "json")
    said = Message("tool", result, "commentary", "assistant", name=tool.recipient)
    reasoned = (Message("assistant", asked.turn.analysis, "analysis"),) if r.random() < 0.5 else ()
    turn = Turn(thought, answer)
    return Ask("weather answer", asked.question, turn, f"{city} {degrees}", True, (*reasoned, called, said))


def weather_result(r: Random, city: str, degrees: str, sky: str) -> tuple[str, str]:
    """What the function says, in one of the shapes that functions use, and the sentence made of it."""
    form = r.random()
    value = int(degrees)
    if form < 0.08:
        return json.dumps({"temperature": value}), f"It is {degrees} degrees in {city}."
    if form < 0.16:
        return json.dumps({r.choice(words.SKY_KEYS): sky}), f"It is {sky} in {city}."
    answer = f"It is {degrees} degrees and {sky} in {city}."
    if form < 0.24:
        return r.choice(("{} degrees and {}", "{} degrees, {}", "{}°C, {}", "{} C, {}")).format(degrees, sky), answer
    fields: list[tuple[str, object]] = [
        (r.choice(("temperature", "temperature", "temp")), value),
        (r.choice(words.SKY_KEYS), sky),
    ]
    if r.random() < 0.2:
        fields.reverse()
    if r.random() < 0.2:
        fields.insert(r.randint(0, 2), ("unit", r.choice(("celsius", "C"))))
    if r.random() < 0.2:
        fields.insert(0, (r.choice(("location", "city")), city))
    tight = (",", ":") if r.random() < 0.3 else None
    return json.dumps(dict(fields), separators=tight, ensure_ascii=False), answer


def no_tool_ask(r: Random, effort: Effort) -> Ask:
    city = place(r)
    question = dress_place(r, r.choice(words.WEATHER_QUESTIONS).format(city=city), city)
    thought = "No function for the weather." + {"low": "", "medium": " I say so."}.get(
        effort, f" I say so.\nThe user asks about the weather in {city}, but I cannot know it."
    )
    return Ask("no weather", question, Turn(thought, words.NO_WEATHER), city, tools=False)


# ---- follow-up turns -----------------------------------------------------------------------------------------------


def follow_ups(r: Random, effort: Effort, first: Ask, tool: WeatherTool | None) -> Ask | None:
    """A question that can only be understood after `first` and its answer; None if there is none for it."""
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
        country = r.choice(sorted(words.CAPITALS))
        question = dress(r, r.choice(words.AND_OF).format(country=country, the=words.article(country)))
        return Ask("follow-up", question, capital(country, effort), question + first.question)
    if first.kind == "weather answer" and tool:
        city = place(r)
        question = dress_place(r, r.choice(words.AND_IN).format(city=city), city)
        return Ask("follow-up", question, call(tool, city, effort), city, tools=True)
    return None


# ---- whole conversations -------------------------------------------------------------------------------------------

MIX = {
    "sum": 26,
    "reverse": 20,
    "capital": 9,
    "fact": 9,
    "follow-up": 14,
    "weather call": 7,
    "weather answer": 5,
    "no weather": 2,
    "chat": 3,
    "fallback": 9,
}
PLAIN = {
    "sum": sum_ask,
    "reverse": reverse_ask,
    "capital": capital_ask,
    "fact": fact_ask,
    "chat": chat_ask,
    "fallback": fallback_ask,
}


def ask(r: Random, kind: str, effort: Effort, tool: WeatherTool | None) -> Ask:
    if kind == "weather call" and tool:
        return call_ask(r, effort, tool)
    if kind == "weather answer" and tool:
        return result_ask(r, effort, tool)
    return no_tool_ask(r, effort) if kind == "no weather" else PLAIN[kind](r, effort)


def messages(asked: Ask) -> tuple[Message, ...]:
    """A past exchange, as history shows it (a call that was never answered does not become history)."""
    return (Message("user", asked.question), *asked.history, Message("assistant", asked.turn.final, "final"))


def example(r: Random, kind: str, split: Split = "train") -> Example:
    """One conversation whose last turn is of this kind and on this side of the split."""
    while True:
        made = attempt(r, kind)
        if made is not None and split_of(made[1]) == split:
            return made[0]


def attempt(r: Random, kind: str) -> tuple[Example, str] | None:
    effort = r.choice(EFFORTS)
    offered = kind.startswith("weather") or (
        kind != "no weather" and r.random() < (0.2 if kind == "follow-up" else 0.08)
    )
    tool = weather_tool(r) if offered else None
    past: list[Ask] = []
    for _ in range(r.choice((0, 0, 0, 0, 0, 1, 1, 2, 3)) if r.random() < 0.97 else r.randint(4, 12)):
        past.append(ask(r, r.choice(("sum", "reverse", "capital", "fact", "chat", "fallback")), effort, tool))
    if kind == "follow-up":
        first = r.choice(("weather answer", "sum", "capital") if tool else ("sum", "sum", "reverse", "capital"))
        past = [*past[:1], ask(r, first, effort, tool)]
        asked = follow_ups(r, effort, past[-1], tool)
        if asked is None:
            return None
    else:
        asked = ask(r, kind, effort, tool)
    if any(split_of(p.key) == "held-out" for p in past):
        return None
    conversation = Conversation(
        messages=(*(m for p in past for m in messages(p)), Message("user", asked.question), *asked.history),
        reasoning=effort,
        instructions=instructions(r) if r.random() < 0.25 else None,
        functions=tool.functions if tool else (),
        date=date(r),
    )
    return Example(kind, conversation, asked.turn), asked.key


def instructions(r: Random) -> str:
    """A developer's text. None changes what is right, so some of it is noise: the model learns to read past it."""
    sentences = r.sample(words.INSTRUCTIONS, r.choice((1, 1, 1, 2, 3)))
    if r.random() < 0.2:
        noise = (syllables(r, r.randint(1, 3)) for _ in range(r.randint(2, 8)))
        sentences.append(" ".join(noise).capitalize() + ".")
    return r.choice((" ", " ", "\n")).join(sentences)


def date(r: Random) -> str | None:
    if r.random() < 0.06:
        return None
    return f"{r.randint(2024, 2031)}-{r.randint(1, 12):02d}-{r.randint(1, 28):02d}"


def draw(r: Random, split: Split = "train") -> Example:
    return example(r, r.choices(list(MIX), weights=list(MIX.values()))[0], split)


def held_out(per_kind: int, seed: int = 0) -> list[Example]:
    """The fixed set on which the model is judged: so many conversations of every kind, none ever trained on."""
    out, seen = [], set()
    for kind in MIX:
        r = Random(f"{kind} {seed}")
        for _ in range(per_kind):
            made = example(r, kind, "held-out")
            while (key := (made.conversation.messages[-1], made.conversation.reasoning)) in seen:
                made = example(r, kind, "held-out")
            seen.add(key)
            out.append(made)
    return out
