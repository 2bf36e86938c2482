"""mlx-gptoss chat: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from .options import (
    CACHE_OPTIONS,
    GENERATION_OPTIONS,
    HIDE_REASONING_OPTION,
    LOAD_OPTIONS,
    SAMPLING_OPTIONS,
    TOOL_OPTION,
    fill_in,
    load,
    load_tools,
    options,
    split_sampling,
    system_text,
)
from .terminal import no_codes

if TYPE_CHECKING:
    from typing import TextIO

    from mlx_gptoss import Conversation, Model, Sampling, Tool
    from mlx_gptoss.harmony.messages import Effort

EFFORTS: dict[str, Effort] = {"low": "low", "medium": "medium", "high": "high"}
HELP = """\
/help                          show this list
/reset                         start a new conversation
/reasoning low|medium|high     how much to think before answering
/system TEXT                   instructions to the model; without TEXT, none
/stats                         switch token counts and speeds on or off
/quit                          leave, as does Ctrl-D
Ctrl-C stops an answer; the text so far stays in the conversation."""


@click.command()
@options(LOAD_OPTIONS, CACHE_OPTIONS, GENERATION_OPTIONS, SAMPLING_OPTIONS, (HIDE_REASONING_OPTION, TOOL_OPTION))
@click.option("--stats", is_flag=True, help="Print token counts and speeds after each answer.")
def chat(
    max_tokens: int | None,
    reasoning: Effort | None,
    system: str | None,
    system_file: TextIO | None,
    variables: tuple[str, ...],
    hide_reasoning: bool,
    tools: tuple[str, ...],
    stats: bool,
    **given: Any,
) -> None:
    """Chat with the model. /help lists the commands inside."""
    (system,) = fill_in(variables, system_text(system, system_file))
    offered, chosen = load_tools(tools), split_sampling(given)
    with load(**given) as loaded:
        sampling = replace(loaded.default_sampling, **chosen)
        Session(loaded, sampling, max_tokens, reasoning, system, offered, not hide_reasoning, stats).run()


class Session:
    """A conversation and its settings."""

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        max_tokens: int | None,
        reasoning: Effort | None,
        system: str | None,
        tools: Sequence[Tool],
        show_reasoning: bool,
        stats: bool,
    ) -> None:
        from mlx_gptoss.chat.stream import as_conversation

        self.model = model
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.tools = tools
        self.show_reasoning = show_reasoning
        self.stats = stats
        opening = as_conversation("-", reasoning=reasoning, system=system)
        self.conversation: Conversation = replace(opening, messages=())

    def run(self) -> None:
        if sys.stdin.isatty():
            if not no_codes():
                import readline  # noqa: F401 - line editing and history for input()

            click.echo(
                f"{self.model.name} ({self.model.format}, {self.model.backend}). /help lists commands.", err=True
            )
        while (line := _read_line()) is not None:
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.turn(line)

    def command(self, line: str) -> None:
        """Carry out a line that begins with a slash."""
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        if name == "help":
            click.echo(HELP, err=True)
        elif name == "reset":
            self.conversation = replace(self.conversation, messages=())
        elif name == "reasoning" and argument in EFFORTS:
            self.conversation = replace(self.conversation, reasoning=EFFORTS[argument])
        elif name == "system":
            self.conversation = replace(self.conversation, instructions=argument or None)
        elif name == "stats":
            self.stats = not self.stats
        else:
            click.echo(f"no such command: {line}. /help lists them.", err=True)

    def turn(self, line: str) -> None:
        """Answer one question. If that fails, the question is not kept in the conversation."""
        from mlx_gptoss import GptOssError, Message, answer
        from mlx_gptoss.chat.stream import with_reply

        from .printer import show_events, stats_line

        asked = self.conversation.with_user(line)
        shown: list[str] = []
        try:
            events = answer(self.model, asked, self.tools, sampling=self.sampling, max_tokens=self.max_tokens)
            finished = show_events(events, reasoning=self.show_reasoning, shown=shown)
        except GptOssError as error:
            click.echo(f"error: {error}", err=True)
            return
        except KeyboardInterrupt:
            self.conversation = with_reply(asked, (Message("assistant", "".join(shown), channel="final"),))
            return
        self.conversation = with_reply(asked, finished.messages)
        if self.stats:
            click.echo(stats_line(finished, self.model.load_s), err=True)


def _read_line() -> str | None:
    """The next line, stripped; None at the end of input. Ctrl-C at the prompt leaves."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
