"""mlx-gptoss generate: one prompt, one answer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from .options import (
    GENERATION_OPTIONS,
    HIDE_REASONING_OPTION,
    LOAD_OPTIONS,
    SAMPLING_OPTIONS,
    TOOL_OPTION,
    load,
    load_tools,
    options,
    split_sampling,
)

if TYPE_CHECKING:
    from mlx_gptoss import Event, Model, ToolResult
    from mlx_gptoss.harmony.messages import Effort

    Events = Iterator[Event | ToolResult]


@click.command()
@click.argument("prompt", required=False)
@options(LOAD_OPTIONS, GENERATION_OPTIONS, SAMPLING_OPTIONS, (HIDE_REASONING_OPTION, TOOL_OPTION))
@click.option("--raw", is_flag=True, help="Continue PROMPT itself, without the chat format. Its special tokens count.")
@click.option("--stats", is_flag=True, help="Print token counts and speeds to stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming.")
def generate(
    prompt: str | None,
    max_tokens: int | None,
    reasoning: Effort | None,
    system: str | None,
    hide_reasoning: bool,
    tools: tuple[str, ...],
    raw: bool,
    stats: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Answer PROMPT, or stdin if PROMPT is - or left out.

    The answer streams to stdout, the model's reasoning, dimmed, to stderr.
    """
    from mlx_gptoss.chat.stream import as_conversation
    from mlx_gptoss.tools import answer

    text = _prompt(prompt)
    if raw and tools:
        raise click.UsageError("--raw has no tools; leave out --raw or --tool")
    offered, chosen = load_tools(tools), split_sampling(given)
    with load(**given, prefix_cache=None if tools else 0) as loaded:
        sampling = replace(loaded.default_sampling, **chosen)
        if raw:
            ids = loaded.tokenizer.encode_with_specials(text)
            events: Events = loaded.stream_raw(ids, sampling=sampling, max_tokens=max_tokens)
        else:
            asked = as_conversation(text, reasoning=reasoning, system=system)
            events = answer(loaded, asked, offered, sampling=sampling, max_tokens=max_tokens)
        if as_json:
            click.echo(json.dumps(_report(loaded, events), ensure_ascii=False))
        else:
            _print(loaded, events, reasoning=not hide_reasoning, stats=stats)


def _prompt(argument: str | None) -> str:
    if argument is None and sys.stdin.isatty():
        raise click.UsageError("give a PROMPT, or - to read it from stdin")
    if argument is None or argument == "-":
        if "MLX_RANK" in os.environ:
            raise click.UsageError("give the PROMPT as an argument: mlx.launch does not pass on the end of stdin")
        text = sys.stdin.buffer.read().decode("utf-8", errors="replace")
    else:
        text = argument
    if not text.strip():
        raise click.UsageError("the prompt is empty; write a question")
    return text


def _print(model: Model, events: Events, *, reasoning: bool, stats: bool) -> None:
    from .printer import show_events, stats_line

    finished = show_events(events, reasoning=reasoning)
    if stats:
        click.echo(stats_line(finished, model.load_s), err=True)


def _report(model: Model, events: Events) -> dict[str, Any]:
    from mlx_gptoss.chat.reply import fold
    from mlx_gptoss.tools import ToolResult

    reasoning, text, calls, finished = fold(event for event in events if not isinstance(event, ToolResult))
    return {
        "text": text,
        "reasoning": reasoning,
        "tool_calls": [vars(call) for call in calls],
        "finish_reason": finished.finish_reason,
        "ids": [token.id for token in finished.tokens],
        "usage": vars(finished.usage),
        "timings": {
            "load_s": model.load_s,
            **{name: value for name, value in vars(finished.timings).items() if name != "queue_s"},
            "peak_memory_bytes": model.peak_memory(),
        },
        "model": model.name,
        "backend": model.backend,
        "format": model.format,
    }
