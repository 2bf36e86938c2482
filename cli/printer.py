"""Events on a terminal: the answer on stdout as it arrives, everything else dimmed on stderr, so that a pipe gets only
the answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import click

from mlx_gptoss.chat.reply import Event, Finished, ReasoningDelta, TextDelta, ToolCall
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.tools import ToolResult


class Writer(Protocol):
    """Shows an answer's text as it arrives. end(): the text is complete, or something else follows; more may come."""

    def write(self, text: str) -> None: ...

    def end(self) -> None: ...


class PlainText:
    """Writes the text to stdout as it is."""

    def write(self, text: str) -> None:
        click.echo(text, nl=False)

    def end(self) -> None:
        click.echo()


def show_events(
    events: Iterator[Event | ToolResult],
    *,
    reasoning: bool,
    shown: list[str] | None = None,
    writer: Writer | None = None,
) -> Finished:
    """Print a reply while it is generated and return its last event.

    shown: receives the text piece by piece, so that it is not lost if the reply is interrupted. writer: shows the
    text; PlainText by default.
    """
    writer = writer or PlainText()
    last = ""  # the kind of text before the cursor
    try:
        for event in events:
            match event:
                case ReasoningDelta() if reasoning:
                    last = _switch(last, "reasoning", writer)
                    click.secho(event.text, nl=False, dim=True, err=True)
                case TextDelta():
                    last = _switch(last, "text", writer)
                    if shown is not None:
                        shown.append(event.text)
                    writer.write(event.text)
                case ToolCall():
                    last = _switch(last, "call", writer)
                    click.secho(f"{event.name}({event.arguments})", nl=False, dim=True, err=True)
                case ToolResult():
                    last = _switch(last, "result", writer)
                    click.secho(event.text, nl=False, dim=True, err=True)
                case Finished():
                    return event
    finally:
        _switch(last, "", writer)
    raise GptOssError("the stream ended early: its engine was closed")


def _switch(last: str, to: str, writer: Writer) -> str:
    """End the line where one kind of text ends and another begins."""
    if last == "text" and to != "text":
        writer.end()
    elif last and last != to:
        click.echo(err=True)
    return to


def stats_line(finished: Finished, load_s: float) -> str:
    usage, timings = finished.usage, finished.timings
    drafts = f"{finished.accepted} of {finished.drafted} drafts accepted, " if finished.drafted else ""
    return (
        f"{usage.prompt_tokens} prompt tokens ({timings.prefill_tok_s:.1f} tok/s), "
        f"{usage.completion_tokens} generated ({timings.decode_tok_s:.1f} tok/s), {drafts}"
        f"first token after {timings.ttft_s:.2f} s, loaded in {load_s:.2f} s"
    )
