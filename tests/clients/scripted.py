"""A server whose model writes what a script says: HTTP, parser, guides and engine are the real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from serving import serving

from mlx_gptoss import Message, Model
from mlx_gptoss.backends.base import Limits, Row, Sampled, allowed_tokens
from mlx_gptoss.engine import Engine
from mlx_gptoss.harmony.render import render_reply
from mlx_gptoss.loading.plan import LoadRequest, open_checkpoint, plan_load
from mlx_gptoss.server.run import Server
from mlx_gptoss.tokenizer import RETURN, Tokenizer

Reply = Sequence[Message]
Chooser = Callable[[str], Reply]  # from the prompt as the model sees it, special tokens included, to the reply


def thinks(text: str) -> Message:
    """The reasoning of a reply."""
    return Message("assistant", text, "analysis")


def says(text: str) -> Message:
    """The final answer of a reply."""
    return Message("assistant", text, "final")


def calls(function: str, arguments: str, content_type: str | None = "<|constrain|>json") -> Message:
    """A function call, which ends a reply. content_type: None for a custom tool, which takes text."""
    return Message("assistant", arguments, "commentary", f"functions.{function}", content_type)


WEATHER_THOUGHT = "The tool knows the weather."
WEATHER_ANSWER = "It is 4 degrees in Oslo."
WEATHER: Sequence[Reply] = (  # a question, the tool's call, its result, the answer
    [thinks(WEATHER_THOUGHT), calls("get_weather", '{"location": "Oslo"}')],
    [thinks("Four degrees."), says(WEATHER_ANSWER)],
)


def check_weather(prompts: Sequence[str], result: str = "4 degrees") -> None:
    """Assert that the second prompt of WEATHER has the reasoning, the call and its result, as gpt-oss was trained."""
    assert len(prompts) == 2
    turn = prompts[1].partition("<|start|>user")[2]
    thought, call, answer = (
        turn.find(f"<|channel|>analysis<|message|>{WEATHER_THOUGHT}<|end|>"),
        turn.find("to=functions.get_weather"),
        turn.find("<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>"),
    )
    assert -1 < thought < call < answer, turn
    assert result in turn[answer:]


def answers_with_tool(tool: str, arguments: str, answer: str, thought: str = "I look first.") -> Chooser:
    """Replies that call `tool` unless the prompt has its result, and then give the answer."""

    def choose(prompt: str) -> Reply:
        if f"<|start|>functions.{tool} to=assistant" in prompt:
            return [thinks("That is all."), says(answer)]
        return [thinks(thought), calls(tool, arguments)]

    return choose


class NextReply:
    """The reply to every prompt, which tests that share a server set before they ask."""

    def __init__(self) -> None:
        self.reply: Reply = [says("Hello.")]

    def __call__(self, prompt: str) -> Reply:
        return self.reply


class Script:
    """Chooses the reply of each request, and keeps the prompts.

    replies: one reply for each request, in the order of their arrival, or a function of the prompt for clients that
    send requests of their own (titles, summaries) between those of the conversation.
    masked: of each request, whether some step allowed only some of the tokens.
    """

    def __init__(self, replies: Sequence[Reply] | Chooser, tokenizer: Tokenizer) -> None:
        self.prompts: list[str] = []
        self.masked: list[bool] = []
        self.failures: list[str] = []
        self.tokenizer = tokenizer
        self._replies = replies

    def next_ids(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """The ids that the model writes after `prompt`."""
        text = self.tokenizer.decode(prompt, specials=True)
        self.prompts.append(text)
        self.masked.append(False)
        if callable(self._replies):
            return tuple(render_reply(self._replies(text), self.tokenizer))
        if len(self.prompts) > len(self._replies):
            self.fail(f"request {len(self.prompts)} came, and the script has {len(self._replies)} replies")
        return tuple(render_reply(self._replies[len(self.prompts) - 1], self.tokenizer))

    def fail(self, message: str) -> None:
        """Fail the request, which gets a 500, and the test, at the end of its server."""
        self.failures.append(message)
        raise RuntimeError(message)


@dataclass
class Slot:
    length: int = 0
    prompt_length: int = 0
    ids: tuple[int, ...] = ()
    number: int = 0  # of its request


@dataclass(frozen=True)
class Step:
    results: list[Sampled | None]

    def wait(self) -> list[Sampled | None]:
        return self.results


@dataclass(frozen=True)
class Saved:
    start: int
    end: int
    nbytes: int = 1


@dataclass
class ScriptedRunner:
    """Samples the tokens of the script. A token that the row's mask does not allow fails the request and the test."""

    script: Script
    config: Any
    limits: Limits
    slots: list[Slot] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = [Slot() for _ in range(self.limits.slots)]

    def submit(self, rows: Sequence[Row]) -> Step:
        return Step([self._feed(row) for row in rows])

    def _feed(self, row: Row) -> Sampled | None:
        slot = self.slots[row.slot]
        slot.length = row.start + len(row.tokens or (0,))
        if row.sampling is None:
            return None
        if row.prompt is not None:
            slot.prompt_length, slot.ids = len(row.prompt), self.script.next_ids(row.prompt)
            slot.number = len(self.script.prompts) - 1
        index = slot.length - slot.prompt_length
        if index >= len(slot.ids):  # the step after the last token, planned before that was read
            return Sampled(self.script.tokenizer.special(RETURN), 0.0)
        self.script.masked[slot.number] |= row.mask is not None
        self._check_mask(row.mask, slot.ids, index)
        return Sampled(slot.ids[index], 0.0, ((slot.ids[index], 0.0),))

    def _check_mask(self, mask: bytes | None, ids: Sequence[int], index: int) -> None:
        allowed = allowed_tokens([mask], self.config.vocab_size)[0]
        if not allowed[ids[index]]:
            decode = partial(self.script.tokenizer.decode, specials=True)
            possible = [decode([int(id)]) for id in np.flatnonzero(allowed)[:20]]
            self.script.fail(
                f"the mask does not allow {decode([ids[index]])!r} after {decode(ids[:index])!r}; "
                f"it allows {int(allowed.sum())} tokens: {possible}"
            )

    def release(self, slot: int) -> None:
        self.slots[slot] = Slot()

    def save(self, slot: int, start: int, end: int) -> Saved:
        return Saved(start, end)

    def restore(self, slot: int, chain: Sequence[Saved]) -> None:
        self.slots[slot] = Slot(chain[-1].end)

    def logits(self, ids: Sequence[int]) -> Any:
        return np.zeros((len(ids), self.config.vocab_size), np.float32)

    def peak_memory(self) -> int:
        return 0

    def close(self) -> None:
        pass


def scripted_model(replies: Sequence[Reply] | Chooser, max_context: int = 131072) -> tuple[Model, Script]:
    """A model with the bundled model's tokenizer and the script's replies."""
    checkpoint = open_checkpoint(None)
    plan = plan_load(LoadRequest(slots=4, max_context=max_context), checkpoint)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    script = Script(replies, tokenizer)
    limits = Limits(slots=4, max_context=max_context, chunk=2048)
    engine = Engine(lambda: ScriptedRunner(script, checkpoint.config, limits), prefix_bytes=1 << 20)
    model = Model(checkpoint, checkpoint.format, tokenizer, engine, plan.backend, plan.memory, "scripted", load_s=0.0)
    return model, script


@contextmanager
def serving_script(replies: Sequence[Reply] | Chooser) -> Iterator[Server]:
    """A server whose model gives these replies; `server.script.prompts` has the prompts. Fails if the script did."""
    model, script = scripted_model(replies)
    with model, serving(model) as server:
        server.script = script
        yield server
    assert not script.failures, script.failures
