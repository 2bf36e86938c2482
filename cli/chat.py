"""mlx-gptoss chat: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
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

if TYPE_CHECKING:
    from typing import TextIO

    from mlx_gptoss import Conversation, Model, Tool
    from mlx_gptoss.harmony.messages import Effort

    from .chat_editor import Editor


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
    """Chat with the model. /help lists the commands inside.

    Without a terminal on stdin, every line of it is a message, and stdout gets only the answers.
    """
    from mlx_gptoss.chat.stream import as_conversation

    (system,) = fill_in(variables, system_text(system, system_file))
    offered, settings = load_tools(tools), split_sampling(given)
    settings |= {} if max_tokens is None else {"max_tokens": max_tokens}
    opening = replace(as_conversation("-", reasoning=reasoning, system=system), messages=())
    session = Session(load(**given), given, opening, settings, offered, not hide_reasoning, stats, plain)
    with closing(session):
        session.run()


class Session:
    """A conversation and its settings.

    given: the options that models are loaded with. settings: options of Model.stream(). unanswered: the last question,
    if it failed or was stopped before its answer began, and so is not in the conversation. editor: None where lines are
    read as they are.
    """

    def __init__(
        self,
        model: Model,
        given: dict[str, Any],
        conversation: Conversation,
        settings: dict[str, Any],
        tools: Sequence[Tool],
        show_reasoning: bool,
        stats: bool,
        plain: bool,
    ) -> None:
        from .chat_input import has_editor

        self.model = model
        self.given = given
        self.conversation = conversation
        self.settings = settings
        self.tools = tools
        self.show_reasoning = show_reasoning
        self.stats = stats
        self.unanswered: str | None = None
        self.terminal = sys.stdin.isatty()
        self.editor: Editor | None = None
        if has_editor():
            from .chat_commands import COMMANDS, values_after
            from .chat_editor import Editor

            self.editor = Editor(COMMANDS, values_after)
        self.markdown = self.editor is not None and sys.stdout.isatty() and not plain

    def close(self) -> None:
        self.model.close()

    def run(self) -> None:
        """Carry out lines until the end of input, /quit, or Ctrl-C twice (KeyboardInterrupt)."""
        if self.terminal:
            click.echo(f"{self.model_line}. /help lists commands and keys.", err=True)
        interrupted = False
        while True:
            try:
                line = self._read_line()
                interrupted = False
                self._carry_out(line)
            except EOFError:
                return
            except KeyboardInterrupt as error:
                if not self.terminal or (interrupted and not error.args):
                    raise
                interrupted = True
                click.echo("Ctrl-C again leaves." if self.editor else "\nCtrl-C again leaves.", err=True)

    @property
    def model_line(self) -> str:
        return f"{self.model.name} ({self.model.format}, {self.model.backend})"

    @property
    def last_question(self) -> str | None:
        users = [message.content for message in self.conversation.messages if message.role == "user"]
        return users[-1] if users else None

    @property
    def last_answer(self) -> str:
        """The text of the last answer. Raises InvalidRequest if there is none."""
        from mlx_gptoss.errors import InvalidRequest

        answers = [message.content for message in self.conversation.messages if message.channel == "final"]
        if not answers:
            raise InvalidRequest("there is no answer yet")
        return answers[-1]

    def drop_turn(self) -> str:
        """Take the last question and all after it out of the conversation, and return it. Raises InvalidRequest if
        there is none."""
        from mlx_gptoss.errors import InvalidRequest

        messages = self.conversation.messages
        asked = [index for index, message in enumerate(messages) if message.role == "user"]
        if not asked:
            raise InvalidRequest("there is no question yet")
        self.conversation = replace(self.conversation, messages=messages[: asked[-1]])
        return messages[asked[-1]].content

    def ask(self, question: str) -> None:
        """Answer one question. If that fails, the question is not kept in the conversation; Ctrl-C keeps it with the
        text so far, if there is any."""
        from mlx_gptoss import GptOssError, Message, answer
        from mlx_gptoss.chat.stream import with_reply

        from .printer import PlainText, Writer, show_events, stats_line
        from .progress import with_prefill_bar

        writer: Writer = PlainText()
        quiet: Any = nullcontext()
        if self.editor is not None:
            from .chat_editor import keys_kept

            quiet = keys_kept()
        if self.markdown:
            from .markdown import MarkdownWriter

            writer = MarkdownWriter()
        asked, self.unanswered = self.conversation.with_user(question), question
        shown: list[str] = []
        try:
            with quiet:
                events = with_prefill_bar(answer(self.model, asked, self.tools, **self.settings), self.model)
                finished = show_events(events, reasoning=self.show_reasoning, shown=shown, writer=writer)
        except GptOssError as error:
            click.echo(f"error: {error}", err=True)
            return
        except KeyboardInterrupt:
            if not shown:
                click.echo("stopped before the answer began; /retry asks again", err=True)
                return
            click.echo("stopped", err=True)
            reply: tuple[Message, ...] = (Message("assistant", "".join(shown), channel="final"),)
        else:
            reply = finished.messages
            if self.stats:
                click.echo(stats_line(finished, self.model.load_s), err=True)
        self.conversation, self.unanswered = with_reply(asked, reply), None

    def change_model(self, name: str) -> None:
        """Go on with another model. If it cannot be loaded, the present one stays (GptOssError). Where memory does not
        hold both, the present one is closed first, and loaded again if need be."""
        from mlx_gptoss.errors import DoesNotFit, InvalidRequest
        from mlx_gptoss.ranks import find_launch

        if find_launch() is not None:
            raise InvalidRequest("a model that is split over several processes cannot be changed; start chat anew")
        wanted, before = {**self.given, "model": name}, self.model
        try:
            loaded = _load_with_tokenizer(wanted)
        except DoesNotFit:
            before.close()
            try:
                loaded = _load_with_tokenizer(wanted)
            except BaseException:
                self.model = load(**self.given)
                raise
        before.close()
        self.model, self.given = loaded, wanted

    def _read_line(self) -> str:
        from .chat_input import read_plain

        return read_plain(self.terminal) if self.editor is None else self.editor.read()

    def _carry_out(self, line: str) -> None:
        """A command or a message. Raises EOFError to leave."""
        from mlx_gptoss import GptOssError

        from .chat_commands import COMMANDS, OTHER_NAMES, find_command
        from .chat_input import message_of, split_command

        command = split_command(line, {*COMMANDS, *OTHER_NAMES})
        if command is None:
            return self.ask(message_of(line)) if line else None
        try:
            find_command(command[0]).run(self, command[1])
        except BrokenPipeError:
            raise  # the reader of the output has gone
        except (GptOssError, OSError, click.ClickException) as error:
            message = error.format_message() if isinstance(error, click.ClickException) else str(error)
            click.echo(f"error: {' '.join(message.split())}", err=True)
        except (KeyboardInterrupt, click.Abort):
            click.echo("\nstopped", err=True)


def _load_with_tokenizer(given: dict[str, Any]) -> Model:
    """The model. Raises CheckpointError for one without a tokenizer, which cannot chat."""
    model = load(**given)
    try:
        assert model.tokenizer
    except BaseException:
        model.close()
        raise
    return model
