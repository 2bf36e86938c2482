"""mlx-gptoss chat: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from .chat_commands import run_command, split_command
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

    from .printer import AnswerWriter


@click.command()
@options(LOAD_OPTIONS, CACHE_OPTIONS, GENERATION_OPTIONS, SAMPLING_OPTIONS, (HIDE_REASONING_OPTION, TOOL_OPTION))
@click.option("--stats", is_flag=True, help="Print token counts and speeds after each answer.")
@click.option("--plain", is_flag=True, help="Print answers as they are, without rendering their Markdown.")
def chat(
    max_tokens: int | None,
    reasoning: Effort | None,
    system: str | None,
    system_file: TextIO | None,
    variables: tuple[str, ...],
    hide_reasoning: bool,
    tools: tuple[str, ...],
    stats: bool,
    plain: bool,
    **given: Any,
) -> None:
    """Chat with the model. /help lists the commands and keys inside."""
    (system,) = fill_in(variables, system_text(system, system_file))
    offered, chosen = load_tools(tools), split_sampling(given)
    session = Session(given, chosen, max_tokens, reasoning, system, offered)
    session.show_reasoning, session.stats, session.plain = not hide_reasoning, stats, plain
    try:
        session.run()
    finally:
        session.model.close()


class Session:
    """A conversation, its settings, and the model that answers.

    max_tokens: of an answer. show_reasoning, stats, plain: what is shown, as the options say. left: whether to leave.
    """

    def __init__(
        self,
        load_options: Mapping[str, Any],
        chosen: Mapping[str, Any],
        max_tokens: int | None,
        reasoning: Effort | None,
        system: str | None,
        tools: Sequence[Tool],
    ) -> None:
        from mlx_gptoss.chat.stream import as_conversation

        self._load_options = dict(load_options)
        self.model: Model = load(**self._load_options)
        self.chosen = dict(chosen)  # sampling fields that are not the model's own
        self.max_tokens = max_tokens
        self.tools = tools
        self.show_reasoning, self.stats, self.plain, self.left = True, False, False, False
        opening = as_conversation("-", reasoning=reasoning, system=system)
        self.conversation: Conversation = replace(opening, messages=())

    @property
    def sampling(self) -> Sampling:
        return replace(self.model.default_sampling, **self.chosen)

    def run(self) -> None:
        """Read and answer until the user leaves."""
        if sys.stdin.isatty():
            name, stored, backend = self.model.name, self.model.format, self.model.backend
            click.echo(f"{name} ({stored}, {backend}). /help lists commands and keys.", err=True)
        for text in _lines(self):
            split = split_command(text)
            if split is not None:
                run_command(self, *split)
            elif text:
                self.ask(text[1:] if text.startswith("//") else text)
            if self.left:
                return

    def ask(self, text: str) -> None:
        """Answer one question. If that fails, the question is not kept in the conversation."""
        from mlx_gptoss import GptOssError, Message, answer
        from mlx_gptoss.chat.stream import with_reply

        from .printer import show_events, stats_line
        from .progress import with_prefill_bar

        asked = self.conversation.with_user(text)
        shown: list[str] = []
        try:
            events = answer(self.model, asked, self.tools, sampling=self.sampling, max_tokens=self.max_tokens)
            finished = show_events(
                with_prefill_bar(events, self.model),
                reasoning=self.show_reasoning,
                shown=shown,
                answer=self._answer_writer(),
            )
        except GptOssError as error:
            click.echo(f"error: {error}", err=True)
            return
        except KeyboardInterrupt:
            click.echo(err=True)  # after the ^C that the terminal shows
            self.conversation = with_reply(asked, (Message("assistant", "".join(shown), channel="final"),))
            return
        self.conversation = with_reply(asked, finished.messages)
        if self.stats:
            click.echo(stats_line(finished, self.model.load_s), err=True)

    def change_model(self, name: str) -> None:
        """Answer with another model from now on. If it cannot be loaded, the present one stays. Raises GptOssError."""
        from mlx_gptoss import GptOssError, api

        api.open_checkpoint(name)  # most mistakes show here, while the present model is still loaded
        self.model.close()
        try:
            self.model = load(**{**self._load_options, "model": name})
        except (GptOssError, OSError, KeyboardInterrupt):
            self.model = load(**self._load_options)
            raise
        self._load_options["model"] = name

    def _answer_writer(self) -> AnswerWriter | None:
        if self.plain or not sys.stdout.isatty() or no_codes():
            return None
        from .markdown import MarkdownWriter

        return MarkdownWriter()


def _lines(session: Session) -> Iterator[str]:
    """What the user says, stripped, until the end of input. Line editing needs a terminal that takes escape codes."""
    if sys.stdin.isatty() and sys.stdout.isatty() and not no_codes():
        from .chat_editor import edited_messages

        yield from edited_messages(session)
        return
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        yield text
