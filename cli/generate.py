"""mlx-gptoss generate: one prompt, one answer."""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
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
    VERBOSE_OPTION,
    fill_in,
    load,
    load_tools,
    options,
    split_sampling,
    system_text,
)

if TYPE_CHECKING:
    from typing import TextIO

    from mlx_gptoss import Event, Model, ToolResult
    from mlx_gptoss.harmony.messages import Effort

    Events = Iterator[Event | ToolResult]

WAIT_NOTICE_S = 2.0


@click.command()
@click.argument("prompt", required=False)
@options(LOAD_OPTIONS, GENERATION_OPTIONS, SAMPLING_OPTIONS, (HIDE_REASONING_OPTION, TOOL_OPTION))
@click.option("--raw", is_flag=True, help="Continue PROMPT itself, without the chat format. Its special tokens count.")
@click.option("--stats", is_flag=True, help="Print token counts and speeds to stderr.")
@options((VERBOSE_OPTION,))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming.")
def generate(
    prompt: str | None,
    max_tokens: int | None,
    reasoning: Effort | None,
    system: str | None,
    system_file: TextIO | None,
    variables: tuple[str, ...],
    hide_reasoning: bool,
    tools: tuple[str, ...],
    raw: bool,
    stats: bool,
    verbose: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Answer PROMPT, or stdin if PROMPT is - or left out. A file or a pipe on stdin is appended to PROMPT.

    The answer streams to stdout, the model's reasoning, dimmed, to stderr.
    """
    from mlx_gptoss.chat.stream import as_conversation
    from mlx_gptoss.tools import answer

    from .progress import with_prefill_bar, with_speed

    text, system = _prompt(prompt, system_text(system, system_file), variables)
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
        events = with_prefill_bar(events, loaded)
        if as_json:
            click.echo(json.dumps(_report(loaded, events, rounds=bool(tools)), ensure_ascii=False))
        else:
            events = with_speed(events, loaded) if verbose else events
            _print(loaded, events, reasoning=not hide_reasoning, stats=stats or verbose)


def _prompt(argument: str | None, system: str | None, variables: tuple[str, ...]) -> tuple[str, str | None]:
    """The prompt and the instructions, with the variables filled in; what stdin appends to PROMPT stays as it is."""
    if argument is None and sys.stdin.isatty():
        raise click.UsageError("give a PROMPT, or - to read it from stdin")
    appended = ""
    if argument is None or argument == "-":
        if "MLX_RANK" in os.environ:
            raise click.UsageError("give the PROMPT as an argument: mlx.launch does not pass on the end of stdin")
        text = _read_stdin()
    else:
        text, appended = argument, _appended()
    filled, instructions = fill_in(variables, text, system)
    text = "\n\n".join(part for part in (filled, appended) if part and part.strip())
    if not text:
        raise click.UsageError("the prompt is empty; write a question")
    return text, instructions


def _appended() -> str:
    """What a file or a pipe on stdin holds. A pipe may be one that its other end never closes, as a program may leave
    it to the commands it runs; a line then says what is waited for."""
    kind = os.fstat(sys.stdin.fileno()).st_mode
    if "MLX_RANK" in os.environ or not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
        return ""
    message = "waiting for the end of stdin, which is appended to the prompt; with </dev/null there is none"
    notice = threading.Timer(WAIT_NOTICE_S, click.echo, (message,), {"err": True})
    notice.daemon = True
    notice.start()
    try:
        return _read_stdin()
    finally:
        notice.cancel()


def _read_stdin() -> str:
    return sys.stdin.buffer.read().decode("utf-8", errors="replace")


def _print(model: Model, events: Events, *, reasoning: bool, stats: bool) -> None:
    from .printer import show_events, stats_line

    finished = show_events(events, reasoning=reasoning)
    if stats:
        click.echo(stats_line(finished, model.load_s), err=True)


def _report(model: Model, events: Events, rounds: bool) -> dict[str, Any]:
    """The object of --json. rounds: whether to list the replies of the turn apart, each with its calls and their
    results; text and reasoning are then the last reply's."""
    from mlx_gptoss.chat.reply import fold

    replies: list[dict[str, Any]] = []
    reasoning, text, calls, finished = fold(_collect(events, replies))
    last = replies[-1] if rounds else {"text": text, "reasoning": reasoning}
    return {
        "text": last["text"],
        "reasoning": last["reasoning"],
        "tool_calls": [vars(call) for call in calls],
        **({"rounds": replies} if rounds else {}),
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


def _collect(events: Events, replies: list[dict[str, Any]]) -> Iterator[Event]:
    """The events without the results of tools. Each reply is added to `replies`, with the results of its calls."""
    from mlx_gptoss.chat.reply import ReasoningDelta, TextDelta, ToolCall
    from mlx_gptoss.tools import ToolResult

    answered = True  # what comes next begins a reply
    for event in events:
        if isinstance(event, ToolResult):
            answered = True
            for call in replies[-1]["tool_calls"]:
                if call["id"] == event.call.id:
                    call["result"] = event.text
            continue
        if answered:
            replies.append({"reasoning": "", "text": "", "tool_calls": []})
            answered = False
        match event:
            case ReasoningDelta():
                replies[-1]["reasoning"] += event.text
            case TextDelta():
                replies[-1]["text"] += event.text
            case ToolCall():
                replies[-1]["tool_calls"].append(dict(vars(event)))
        yield event
