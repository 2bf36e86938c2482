"""mlx-gptoss batch: answer a file of requests, as many at once as the model has slots."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_gptoss.options import LoadOptions

from .options import CACHE_OPTIONS, LOAD_OPTIONS, declared, load, options, serve_extra

if TYPE_CHECKING:
    from mlx_gptoss.server.batch import Batch

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("requests", metavar="IN.jsonl", type=FILE)
@click.argument("answers", metavar="OUT.jsonl", type=FILE)
@options(LOAD_OPTIONS, CACHE_OPTIONS, declared(LoadOptions, slots=8))
@click.option("--retry", is_flag=True, help="Repeat the requests that failed; their errors are removed from OUT.jsonl.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def batch(requests: Path, answers: Path, model: str | None, retry: bool, as_json: bool, **given: Any) -> None:
    """Answer the requests in IN.jsonl, in OpenAI's batch format, and append the answers to OUT.jsonl as they finish.

    Each answer is what the server would return; a malformed line gets an error. If the command is interrupted, the same
    command continues after the answers in OUT.jsonl. It exits with 0 when every line has an answer or an error.
    """
    with serve_extra():
        from mlx_gptoss.server.batch import Batch
        from mlx_gptoss.server.guard import Gate
        from mlx_gptoss.server.models.named import NamedModel, model_names, with_adapters
        from mlx_gptoss.server.responses.store import ResponseStore
        from mlx_gptoss.server.service import Service

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    with Batch(requests, answers, retry=retry) as work:
        try:
            if work.done < work.total:
                with load(model, several_adapters=True, **given) as loaded, _bar(work) as progress:
                    named = with_adapters(NamedModel(loaded, *model_names(model)), loaded.adapters)
                    work.run(Service(named, Gate(), store=ResponseStore(max_bytes=0)), progress)
        except KeyboardInterrupt:
            click.echo(
                f"interrupted; {work.done} of {work.total} lines are answered; the same command continues after them",
                err=True,
            )
            raise SystemExit(130) from None
        report = _report(work)
    click.echo(json.dumps(report) if as_json else _summary(report, answers))


@contextmanager
def _bar(work: Batch) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal's stderr; yields the function that updates it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .terminal import new_console

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed, {task.fields[speed]:.0f} tok/s"),
        TimeRemainingColumn(),
    )
    console = new_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=work.total, completed=work.done, failed=work.failed, speed=0.0)
        yield lambda: bar.update(task, completed=work.done, failed=work.failed, speed=work.completion_tok_s)


def _report(work: Batch) -> dict[str, Any]:
    return {
        "total": work.total,
        "completed": work.done - work.failed,
        "failed": work.failed,
        "earlier": work.earlier,
        "prompt_tokens": work.prompt_tokens,
        "completion_tokens": work.completion_tokens,
        "seconds": work.seconds,
        "completion_tok_s": work.completion_tok_s,
    }


def _summary(report: dict[str, Any], answers: Path) -> str:
    earlier = f", {report['earlier']} of them by an earlier run" if report["earlier"] else ""
    return (
        f"{answers}: {report['completed']} answered and {report['failed']} failed of {report['total']}{earlier}; "
        f"{report['completion_tokens']} tokens in {report['seconds']:.1f} s, {report['completion_tok_s']:.1f} tok/s"
    )
