"""Events on a terminal: the answer on stdout as it arrives, everything else dimmed on stderr, so that a pipe gets only
the answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import click

from mlx_gptoss.chat.reply import Event, Finished, ReasoningDelta, TextDelta, ToolCall
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.tools import ToolResult


class AnswerWriter(Protocol):
    """Writes the text of an answer to stdout."""

    def write(self, text: str) -> None: ...

    def close(self) -> None:
        """End the text, with a line break."""


class _PlainWriter:
    def write(self, text: str) -> None:
        click.echo(text, nl=False)

    def close(self) -> None:
        click.echo()


def show_events(
    events: Iterator[Event | ToolResult],
    *,
    reasoning: bool,
    shown: list[str] | None = None,
    answer: AnswerWriter | None = None,
) -> Finished:
    """Print a reply while it is generated and return its last event.

    shown: receives the text piece by piece, so that it is not lost if the reply is interrupted.
    answer: writes the text; None prints it as it is.
    """
    last = ""  # the kind of text before the cursor
    writer = answer or _PlainWriter()

    def switch(to: str) -> None:
        """End the text before the cursor if another kind begins."""
        nonlocal last
        ended, last = last, to
        if ended == to:
            return
        if ended == "text":
            writer.close()
        elif ended:
            click.echo(err=True)

    try:
        for event in events:
            match event:
                case ReasoningDelta() if reasoning:
                    switch("reasoning")
                    click.secho(event.text, nl=False, dim=True, err=True)
                case TextDelta():
                    switch("text")
                    writer.write(event.text)
                    if shown is not None:
                        shown.append(event.text)
                case ToolCall():
                    switch("call")
                    click.secho(f"{event.name}({event.arguments})", nl=False, dim=True, err=True)
                case ToolResult():
                    switch("result")
                    click.secho(event.text, nl=False, dim=True, err=True)
                case Finished():
                    return event
    finally:
        switch("")
    raise GptOssError("the stream ended early: its engine was closed")


def stats_line(finished: Finished, load_s: float) -> str:
    usage, timings = finished.usage, finished.timings
    drafts = f"{finished.accepted} of {finished.drafted} drafts accepted, " if finished.drafted else ""
    return (
        f"{usage.prompt_tokens} prompt tokens ({timings.prefill_tok_s:.1f} tok/s), "
        f"{usage.completion_tokens} generated ({timings.decode_tok_s:.1f} tok/s), {drafts}"
        f"first token after {timings.ttft_s:.2f} s, loaded in {load_s:.2f} s"
    )
