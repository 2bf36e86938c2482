"""Events on a terminal: the answer on stdout as it arrives, all else dimmed on stderr, so that a pipe gets answers."""

from __future__ import annotations

from collections.abc import Iterator

import click

from mlx_gptoss.chat.reply import Event, Finished, ReasoningDelta, TextDelta, ToolCall
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.tools import ToolResult


def show_events(events: Iterator[Event | ToolResult], *, reasoning: bool, said: list[str] | None = None) -> Finished:
    """Print a reply while it is generated and return its last event. The text also goes to `said`, piece by piece, so
    that it is not lost when the reply is cut short."""
    shown = ""  # which kind of text the cursor stands behind
    try:
        for event in events:
            match event:
                case ReasoningDelta() if reasoning:
                    shown = _switch(shown, "reasoning")
                    click.secho(event.text, nl=False, dim=True, err=True)
                case TextDelta():
                    shown = _switch(shown, "text")
                    click.echo(event.text, nl=False)
                    if said is not None:
                        said.append(event.text)
                case ToolCall():
                    shown = _switch(shown, "call")
                    click.secho(f"{event.name}({event.arguments})", nl=False, dim=True, err=True)
                case ToolResult():
                    shown = _switch(shown, "result")
                    click.secho(event.text, nl=False, dim=True, err=True)
                case Finished():
                    return event
    finally:
        _switch(shown, "")
    raise GptOssError("the stream ended early: its engine was closed")


def _switch(shown: str, to: str) -> str:
    """A line break where one kind of text ends and another begins."""
    if shown and shown != to:
        click.echo(err=shown != "text")
    return to


def stats_line(finished: Finished, load_s: float) -> str:
    usage, timings = finished.usage, finished.timings
    drafts = f"{finished.accepted} of {finished.drafted} drafts accepted, " if finished.drafted else ""
    return (
        f"{usage.prompt_tokens} prompt tokens ({timings.prefill_tok_s:.1f} tok/s), "
        f"{usage.completion_tokens} generated ({timings.decode_tok_s:.1f} tok/s), {drafts}"
        f"first token after {timings.ttft_s:.2f} s, loaded in {load_s:.2f} s"
    )
