"""Events on a terminal: the answer on stdout as it arrives, reasoning dimmed on stderr, so that a pipe gets answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from mlx_gptoss.chat import Event, Finished, ReasoningDelta, TextDelta, ToolCall


def show_events(events: Iterator[Event], *, reasoning: bool) -> Finished | None:
    """Print a reply while it is generated, and return its last event; None when it was cut short."""
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
                case ToolCall():
                    shown = _switch(shown, "call")
                    click.echo(f"{event.name}({event.arguments})", nl=False)
                case Finished():
                    return event
    finally:
        _switch(shown, "")
        sys.stdout.flush()
    return None


def _switch(shown: str, to: str) -> str:
    """A line break where one kind of text ends and another begins."""
    if shown and shown != to:
        click.echo(err=shown == "reasoning")
    return to


def stats_line(finished: Finished, load_s: float) -> str:
    usage, timings = finished.usage, finished.timings
    return (
        f"{usage.prompt_tokens} prompt tokens ({timings.prefill_tok_s:.1f} tok/s), "
        f"{usage.completion_tokens} generated ({timings.decode_tok_s:.1f} tok/s), "
        f"first token after {timings.ttft_s:.2f} s, loaded in {load_s:.2f} s"
    )
