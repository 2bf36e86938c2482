"""Events on a terminal: the answer on stdout as it arrives, everything else dimmed on stderr, so that a pipe gets only
the answer."""

from __future__ import annotations

from collections.abc import Iterator

import click

from mlx_gptoss.chat.reply import Event, Finished, ReasoningDelta, TextDelta, ToolCall
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.tools import ToolResult


def show_events(events: Iterator[Event | ToolResult], *, reasoning: bool, shown: list[str] | None = None) -> Finished:
    """Print a reply while it is generated and return its last event.

    shown: receives the text piece by piece, so that it is not lost if the reply is interrupted.
    """
    last = ""  # the kind of text before the cursor
    try:
        for event in events:
            match event:
                case ReasoningDelta() if reasoning:
                    last = _switch(last, "reasoning")
                    click.secho(event.text, nl=False, dim=True, err=True)
                case TextDelta():
                    last = _switch(last, "text")
                    click.echo(event.text, nl=False)
                    if shown is not None:
                        shown.append(event.text)
                case ToolCall():
                    last = _switch(last, "call")
                    click.secho(f"{event.name}({event.arguments})", nl=False, dim=True, err=True)
                case ToolResult():
                    last = _switch(last, "result")
                    click.secho(event.text, nl=False, dim=True, err=True)
                case Finished():
                    return event
    finally:
        _switch(last, "")
    raise GptOssError("the stream ended early: its engine was closed")


def _switch(last: str, to: str) -> str:
    """Print a line break where one kind of text ends and another begins."""
    if last and last != to:
        click.echo(err=last != "text")
    return to


def stats_line(finished: Finished, load_s: float) -> str:
    usage, timings = finished.usage, finished.timings
    drafts = f"{finished.accepted} of {finished.drafted} drafts accepted, " if finished.drafted else ""
    return (
        f"{usage.prompt_tokens} prompt tokens ({timings.prefill_tok_s:.1f} tok/s), "
        f"{usage.completion_tokens} generated ({timings.decode_tok_s:.1f} tok/s), {drafts}"
        f"first token after {timings.ttft_s:.2f} s, loaded in {load_s:.2f} s"
    )
