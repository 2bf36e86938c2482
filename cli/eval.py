"""mlx-gptoss eval: perplexity of checkpoints on a text, and their divergence from a reference."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from mlx_gptoss.options import LoadOptions

from .options import (
    ADAPTER_OPTION,
    DEVICE_OPTIONS,
    MODEL_VARIABLE,
    PLOT_STYLE_OPTION,
    ModelName,
    declared,
    options,
)

if TYPE_CHECKING:
    from mlx_gptoss.measure.evaluation import Divergence, Evaluation
    from mlx_gptoss.measure.layers import LayerError


@click.command()
@click.argument("models", metavar="[MODEL]...", nargs=-1, type=ModelName(), envvar=MODEL_VARIABLE)
@click.option(
    "--against", multiple=True, type=ModelName(), metavar="MODEL", help="A reference to compare with. Repeatable."
)
@click.option("--text", type=Path, metavar="FILE", help="A UTF-8 file; special tokens in it count.")
@click.option(
    "--score",
    type=click.Choice(["all", "replies"]),
    default="all",
    help="Count all tokens (the default), or only the assistant's replies at the ends of documents.",
)
@click.option("--context", type=click.IntRange(min=1), metavar="N", help="Maximum tokens before a prediction.")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Stop after N predictions.")
@click.option("--layers", is_flag=True, help="With --against: the error after each layer, on 2048 tokens, in numpy.")
@click.option("--plot", type=Path, metavar="FILE.png", help="Plot KL by position and, for several models, by format.")
@options((PLOT_STYLE_OPTION,))
@options(DEVICE_OPTIONS, declared(LoadOptions, "kv_bits"), (ADAPTER_OPTION,))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, or a list for several comparisons.")
def eval(
    models: tuple[str, ...],
    against: tuple[str, ...],
    text: Path | None,
    score: Literal["all", "replies"],
    context: int | None,
    max_tokens: int | None,
    layers: bool,
    plot: Path | None,
    plot_style: str,
    as_json: bool,
    kv_bits: int | None,
    adapters: dict[str, str] | None,
    **where: str | None,
) -> None:
    """Perplexity of each MODEL on a text and, with --against, the distance of its predictions from a reference's:
    KL(reference || MODEL) in nats, and how often both rank the same token first.

    `<|endoftext|>` in the text ends a document. The default text is a sample of what the bundled model was trained on,
    which says little about other models. A reference's logits are kept on disk: 4 bytes per token and vocabulary entry.
    Standard errors are those of documents. A reply is exact if every token of it is the model's first choice.
    With --kv-bits, the references still keep their K/V cache as computed, and with --adapter they are without it.
    """
    if adapters and len(adapters) > 1:
        raise click.UsageError("give one --adapter")
    if layers and not against:
        raise click.UsageError("--layers shows the difference from a reference: give one with --against")
    if plot and not against:
        raise click.UsageError("--plot shows the divergence from a reference: give one with --against")
    if plot:
        from mlx_gptoss.measure.plot import check_plot

        check_plot(plot)
    results = _evaluate(
        models,
        against=against,
        text=None if text is None else _read(text),
        score=score,
        context=context,
        max_tokens=max_tokens,
        kv_bits=kv_bits,
        adapter=next(iter(adapters.values())) if adapters else None,
        adapter_name=next(iter(adapters)) if adapters else None,
        **where,
    )
    errors = _layers(results, None if text is None else _read(text)) if layers else []
    if as_json:
        reports = [
            _report(result, divergence, results[0].against[index] if number and divergence else None)
            for number, result in enumerate(results)
            for index, divergence in enumerate(result.against or (None,))
        ]
        for report, (_, found) in zip(reports, errors, strict=False):
            report["layers"] = [vars(one) for one in found]
        click.echo(json.dumps(reports if len(reports) > 1 else reports[0]))
    else:
        _print(results)
        _print_layers(errors)
    if plot:
        from mlx_gptoss.measure.plot import plot_divergences

        plot_divergences(results, plot, plot_style)


def _read(file: Path) -> str:
    from mlx_gptoss.errors import InvalidRequest

    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); convert it first") from None


def _evaluate(models: tuple[str, ...], **options: Any) -> tuple[Evaluation, ...]:
    """evaluate(), with a progress bar if stderr is a terminal."""
    from mlx_gptoss.measure.evaluation import evaluate

    from .progress import count_bar

    with count_bar("Evaluating") as update:
        return evaluate(*models, progress=update, **options)


def _report(result: Evaluation, divergence: Divergence | None, first: Divergence | None) -> dict[str, Any]:
    """first: the comparison of the first model with the same reference, for a model that comes after it."""
    report: dict[str, Any] = {
        "perplexity": result.perplexity,
        "perplexity_error": _known(result.perplexity_error),
        "tokens": result.tokens,
        "model": result.model,
        "format": result.format,
        "size_bytes": result.size_bytes,
        "bits_per_weight": result.bits_per_weight,
        "context": result.context,
    } | ({"adapter": result.adapter} if result.adapter else {})
    if result.replies is not None:
        report["replies_exact"], report["replies"] = result.replies
    if divergence is not None:
        report |= {
            "kl_mean": divergence.kl_mean,
            "kl_error": _known(divergence.kl_error),
            "kl_median": divergence.kl_median,
            "kl_p99": divergence.kl_p99,
            "kl_max": divergence.kl_max,
            "top1_agreement": divergence.top1_agreement,
            "against": divergence.reference.model,
            "against_format": divergence.reference.format,
            "against_perplexity": divergence.reference.perplexity,
            "channels": {
                name: {
                    "tokens": len(part.kl),
                    "kl_mean": part.kl_mean,
                    "kl_error": _known(part.kl_error),
                    "top1_agreement": part.top1_agreement,
                }
                for name, part in divergence.by_channel()
            },
        }
        if first is not None:
            difference = divergence.difference(first)
            report |= {"kl_difference": difference.mean, "kl_difference_error": _known(difference.error)}
    return report


def _known(error: float) -> float | None:
    """A standard error, or null in JSON where a text of one window has none."""
    return None if isnan(error) else error


def _print(results: tuple[Evaluation, ...]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from mlx_gptoss.loading.memory import gigabytes

    from .terminal import new_console

    console = new_console(highlight=False)
    first = results[0]
    console.print(f"{first.tokens} tokens predicted, each from at most {first.context} before it")
    table = Table(box=None, header_style="bold")
    table.add_column("model", overflow="fold")
    table.add_column("format", no_wrap=True)
    for column in ("size", "bits per weight", "perplexity"):
        table.add_column(column, justify="right")
    for result in (*(divergence.reference for divergence in first.against), *results):
        numbers = (gigabytes(result.size_bytes), f"{result.bits_per_weight:.2f}", f"{result.perplexity:.4f}")
        table.add_row(escape(result.label), result.format, *numbers)
    console.print(table)
    for index, divergence in enumerate(first.against):
        reference = divergence.reference
        console.print(f"\nKL in nats against [bold]{escape(reference.model)}[/bold], {reference.format}:")
        console.print(_divergences(results, index))
        if len(results) > 1 or first.replies is not None:
            console.print(_details(results, index))


def _divergences(results: tuple[Evaluation, ...], index: int) -> Any:
    """A table of every model compared with the reference `index`."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("model", overflow="fold")
    table.add_column("format", no_wrap=True)
    for column in ("KL mean", "±", "median", "p99", "max", "top-1 agreement"):
        table.add_column(column, justify="right")
    for result in results:
        kl = result.against[index]
        numbers = [f"{value:.3g}" for value in (kl.kl_median, kl.kl_p99, kl.kl_max)]
        mean, error = f"{kl.kl_mean:.3g}", _error(kl.kl_error)
        table.add_row(escape(result.label), result.format, mean, error, *numbers, f"{kl.top1_agreement:.2%}")
    return table


def _layers(results: tuple[Evaluation, ...], text: str | None) -> list[tuple[Divergence, list[LayerError]]]:
    """The errors of each model's layers against each reference, in the order of the reports."""
    from mlx_gptoss.measure.layers import layer_errors

    def name(model: str) -> str | None:
        return None if model == "the bundled model" else model

    return [
        (divergence, layer_errors(name(result.model), divergence.reference.model, text))
        for result in results
        for divergence in result.against
    ]


def _print_layers(errors: list[tuple[Divergence, list[LayerError]]]) -> None:
    from rich.table import Table

    from .terminal import new_console

    if not errors:
        return
    console = new_console(highlight=False)
    table = Table(box=None, header_style="bold")
    table.add_column("relative error, own / so far", no_wrap=True)
    for number in range(1, len(errors) + 1):
        table.add_column(f"({number})", justify="right")
    for rows in zip(*(found for _, found in errors), strict=True):
        table.add_row(rows[0].part, *(f"{one.own:.2g} / {one.total:.2g}" for one in rows))
    console.print()
    console.print(table)


def _details(results: tuple[Evaluation, ...], index: int) -> Any:
    """A table of each model's KL less the first's on the same predictions, of its KL in each channel, and of the
    replies that it gives token by token."""
    from rich.markup import escape
    from rich.table import Table

    first = results[0].against[index]
    channels = [name for name, _ in first.by_channel()]
    table = Table(box=None, header_style="bold")
    table.add_column("model", overflow="fold")
    several = len(results) > 1
    for column in (*(("less the first's", "±") if several else ()), *channels, "exact replies"):
        table.add_column(column, justify="right")
    for result in results:
        kl = result.against[index]
        difference = kl.difference(first)
        numbers = (
            [f"{difference.mean:+.3g}", _error(difference.error)] if kl is not first else ["", ""] if several else []
        )
        parts = [f"{part.kl_mean:.3g}" for _, part in kl.by_channel()]
        replies = "" if result.replies is None else "{} of {}".format(*result.replies)
        table.add_row(escape(result.label), *numbers, *parts, replies)
    return table


def _error(value: float) -> str:
    """A standard error, to two digits; nothing if it is not known."""
    return "" if isnan(value) else f"{value:.2g}"
