"""mlx-gptoss convert: write a checkpoint in another format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mlx_gptoss.options import LoadOptions

from .options import ModelName, declared, options
from .progress import byte_bar

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def _formats(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The values of --to that begin so."""
    from click.shell_completion import CompletionItem

    from mlx_gptoss.weights.formats import CONVERTERS

    return [CompletionItem(name) for name in CONVERTERS if name.startswith(incomplete)]


@click.command()
@click.argument("source", type=ModelName())
@click.argument("destination", metavar="DEST", type=click.Path())
@click.option(
    "--to",
    required=True,
    shell_complete=_formats,
    metavar="NAME",
    help="The format to write: mxfp4, bf16, mlx-4bit, mlx-mxfp4-q8, gguf, ...",
)
@click.option(
    "--search",
    type=click.Choice(["mse"]),
    help="Search the 4-bit affine scales with the least squared error; slower.",
)
@click.option(
    "--calibrate",
    is_flag=False,
    flag_value="",
    metavar="[FILE]",
    help="Choose the codes that change the outputs least on a text: FILE (.txt, .jsonl), or one that is built in.",
)
@click.option(
    "--bits-per-weight",
    type=click.FloatRange(min=3),
    metavar="B",
    help="With --calibrate: 3, 4, 6 or 8 bits for each matrix, by what it gains, and B in all.",
)
@click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="Instead of --bits-per-weight: as many bits as fit into GB of a GPU's memory with --context tokens.",
)
@click.option("--context", type=click.IntRange(min=1), metavar="N", help="The tokens of --memory. Default: 8192.")
@options(declared(LoadOptions, "backend", "device"))
@click.option("--adapter", metavar="PATH", help="Merge this LoRA adapter into the weights; with --to bf16 alone.")
@click.option("--overwrite", is_flag=True, help="Replace an existing DEST.")
def convert(
    source: str,
    destination: str,
    to: str,
    search: str | None,
    calibrate: str | None,
    bits_per_weight: float | None,
    memory: float | None,
    context: int | None,
    backend: str,
    device: str | None,
    adapter: str | None,
    overwrite: bool,
) -> None:
    """Write SOURCE (a folder, a hub id or nano) to the folder DEST in another format.

    Streams: at most one layer is in memory. DEST appears when it is complete and verified, or not at all. After an
    interruption the same command continues after the last complete shard (2 GB), kept in a hidden folder next to DEST.

    --calibrate computes the model on a text, layer by layer, and quantizes each matrix so that its outputs change
    least. It takes longer and changes neither layout nor size. It continues after the last complete layer.

    --backend and --device: with --calibrate, their GPU computes the large products; without one, numpy does on the CPU.

    --memory: what a Mac lets its GPU take is two thirds of its memory up to 32 GB, and three quarters above; more on
    macOS 26. `mlx-gptoss show` prints it.
    """
    from mlx_gptoss import api
    from mlx_gptoss.loading.memory import gigabytes

    for name, value in (("--bits-per-weight", bits_per_weight), ("--memory", memory), ("--context", context)):
        if value is not None and calibrate is None:
            raise click.UsageError(f"{name} is for widths measured on a text: give --calibrate, too")
    plan = None
    if calibrate is not None:
        plan = api.plan_calibration(
            source,
            to,
            calibrate or True,
            bits_per_weight=bits_per_weight,
            memory=None if memory is None else int(memory * 1e9),
            context=context,
            backend=backend,
            device=device,
        )
        click.echo(
            f"calibrating on {plan.text.tokens} tokens, with {plan.products.name}; needs at most "
            f"{gigabytes(plan.memory_bytes)} of memory and {gigabytes(plan.disk_bytes)} of disk space until it is done",
            err=True,
        )
    try:
        with byte_bar("Converting") as update:
            report = api.convert(
                source,
                destination,
                to,
                search=search,
                calibrate=plan,
                adapter=adapter,
                overwrite=overwrite,
                progress=update,
            )
    except KeyboardInterrupt as stop:
        click.echo(f"interrupted; {stop or 'nothing was written'}", err=True)
        raise SystemExit(130) from None
    resumed = f" after {gigabytes(report.resumed_bytes)} of an earlier run" if report.resumed_bytes else ""
    click.echo(
        f"{report.source_format} -> {report.format}: {gigabytes(report.bytes)} in {report.seconds:.1f} s{resumed}, "
        f"written to {report.destination}"
    )
