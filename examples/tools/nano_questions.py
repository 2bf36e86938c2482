"""Questions that the bundled model answers without a function: sums, words backwards, facts, small talk."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import nano_facts as facts
import nano_words as words

from mlx_gptoss.harmony.messages import Effort, Message

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Turn:
    """The assistant's turn: the analysis, then a final text or a call (recipient and JSON arguments).

    json: whether the final text is JSON, as a response format asks for.
    """

    analysis: str
    final: str = ""
    recipient: str = ""
    arguments: str = ""
    json: bool = False

    def text(self) -> str:
        """The turn as the model writes it after `<|start|>assistant`, with its special tokens."""
        thought = f"<|channel|>analysis<|message|>{self.analysis}<|end|><|start|>assistant"
        if self.recipient:
            header = f"<|channel|>commentary to={self.recipient} <|constrain|>json<|message|>"
            return f"{thought}{header}{self.arguments}<|call|>"
        constraint = " <|constrain|>json" if self.json else ""
        return f"{thought}<|channel|>final{constraint}<|message|>{self.final}<|return|>"


@dataclass(frozen=True)
class Ask:
    """A user's question with its answer, before it becomes a conversation.

    key: the text that the split hashes. history: messages between question and turn (a call and its result).
    """

    kind: str
    question: str
    turn: Turn
    key: str
    history: tuple[Message, ...] = ()


# ---- sums ------------------------------------------------------------------------------------------------------------


def columns(a: int, b: int) -> list[tuple[str, int, int]]:
    """The columns from the right, each as (sum written out, digit to write, carry)."""
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
    """A number of up to 3 digits; sometimes of 4, because follow-ups add to earlier sums."""
    if r.random() < 0.03:
        return r.randrange(1000, 2000)
    return r.randrange(10 ** r.choice((1, 2, 2, 3, 3, 3)))


def sum_ask(r: Random, effort: Effort) -> Ask:
    a, b = number(r), number(r)
    return Ask("sum", dress(r, r.choice(words.SUMS).format(a=a, b=b)), add(a, b, effort), f"{a}+{b}")


# ---- words backwards -------------------------------------------------------------------------------------------------


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


# ---- facts, small talk, everything else ------------------------------------------------------------------------------


def known(topic: str, answer: str, effort: Effort) -> Turn:
    thought = "I know this." if effort == "low" else f"The question is about {topic}. I know this."
    if effort == "high":
        thought += f"\nI would answer: {answer}\nThat is right."
    return Turn(thought, answer)


def capital(country: str, effort: Effort) -> Turn:
    return known(country, f"The capital of {country} is {facts.CAPITALS[country]}.", effort)


def capital_ask(r: Random, effort: Effort) -> Ask:
    country = r.choice(sorted(facts.CAPITALS))
    question = dress(r, r.choice(words.CAPITAL_QUESTIONS).format(country=country, the=facts.article(country)))
    return Ask("capital", question, capital(country, effort), question)


def fact_ask(r: Random, effort: Effort) -> Ask:
    fact = r.choice(facts.FACTS)
    question = dress(r, r.choice(fact.questions))
    return Ask("fact", question, known(fact.topic, fact.answer, effort), question)


def chat_ask(r: Random, effort: Effort) -> Ask:
    talk = r.choice(facts.SMALL_TALK)
    question = dress(r, r.choice(talk.questions))
    thought = f"This is {talk.topic}." + {"low": "", "medium": " I answer kindly."}.get(
        effort, f" I answer kindly.\nI would answer: {talk.answer}\nThat is polite."
    )
    return Ask("chat", question, Turn(thought, talk.answer), question)


def fallback(effort: Effort) -> Turn:
    thought = "I cannot do this." + {"low": "", "medium": " I say what I can do."}.get(
        effort, " It is no sum, no word to reverse and nothing that I know.\nI say what I can do."
    )
    return Turn(thought, facts.FALLBACK)


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
            country=r.choice(sorted(facts.CAPITALS)),
            a=number(r),
            b=number(r),
        )
        question = dress(r, question)
    return Ask("fallback", question or "?", fallback(effort), question)


def dress(r: Random, question: str) -> str:
    """A random variant of a question: other casing, other punctuation, a polite word."""
    if r.random() < 0.2:
        question = r.choice(words.PREFIXES) + question
    elif r.random() < 0.2:
        question = r.choice(("please ", "now ", "so ", "ok, ")) + question[:1].lower() + question[1:]
    if r.random() < 0.2:
        question = question.lower()
    if r.random() < 0.25:
        question = question.rstrip(".?!")
    elif r.random() < 0.1:
        question = question.rstrip(".?!") + r.choice(("!", "?", ".", " please", ", please."))
    return question
