"""mlx-gptoss bench: speed of a model on this machine, relative to the memory bandwidth and to other engines."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_gptoss.options import LoadOptions

from .options import (
    ADAPTER_OPTION,
    DEVICE_OPTIONS,
    JSON_OPTION,
    MODEL_OPTION,
    PLOT_STYLE_OPTION,
    declared,
    options,
)

if TYPE_CHECKING:
    from mlx_gptoss.config import ModelConfig
    from mlx_gptoss.measure.benchmark import Report, Target
    from mlx_gptoss.measure.timing import Case, TimedEngine
    from mlx_gptoss.weights.checkpoint import CheckpointLike

COUNT = click.IntRange(min=1)
AGAINST = ["mlx-lm", "transformers", "mlx", "cuda"]


@click.command()
@options((MODEL_OPTION,))
@click.option("--synthetic", metavar="20b|120b|tiny", help="Random weights of these shapes instead of a model.")
@click.option("--format", "format_name", metavar="NAME", help="Format of the synthetic weights. Default: mxfp4.")
@click.option("--layers", type=COUNT, metavar="N", help="Number of layers of the synthetic model.")
@click.option("--prompt", type=COUNT, default=512, show_default=True, metavar="N", help="Tokens to prefill.")
@click.option("--generate", type=COUNT, default=64, show_default=True, metavar="N", help="Tokens to decode.")
@click.option(
    "--context",
    type=COUNT,
    multiple=True,
    metavar="N",
    help="Tokens before decoding, at least the prompt.",
)
@click.option("--batch", type=COUNT, multiple=True, default=(1,), metavar="B", help="Sequences at once.")
@click.option("--repeat", type=COUNT, default=3, show_default=True, metavar="R", help="Report the median of R runs.")
@click.option("--against", type=click.Choice(AGAINST), help="Time this engine or our other backend as well, in turns.")
@click.option("--against-dtype", metavar="NAME", help="Data type for --against. Default: its own.")
@options(DEVICE_OPTIONS, declared(LoadOptions, "quantize", "kv_bits", "speculate"), (ADAPTER_OPTION,))
@click.option("--plot", type=Path, metavar="FILE.png", help="Plot speed by context and by batch.")
@click.option(
    "--report",
    "report_path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.json",
    help="Write a report to send to us, and a plot next to it. Neither contains names, paths or addresses.",
)
@options((PLOT_STYLE_OPTION,))
@options((JSON_OPTION,))
def bench(
    *,
    context: tuple[int, ...],
    batch: tuple[int, ...],
    prompt: int,
    generate: int,
    repeat: int,
    plot: Path | None,
    plot_style: str,
    report_path: Path | None,
    as_json: bool,
    **choices: Any,
) -> None:
    """Measure prefill and decode speed, memory, and the share of the bound set by memory bandwidth.

    --context and --batch are repeatable; every pair is timed. The bound of a decode step is the bytes it must read
    divided by the bandwidth of a copy on the same device, measured in the same run. A GPU's logits are checked before
    it is timed. With --speculate the prompt repeats a passage, and how many drafts were right is reported: the gain
    depends on the text.
    """
    if choices["quantize"] and choices["against"] in AGAINST[:2]:
        raise click.UsageError("--against loads the checkpoint as it is: convert it first and leave out --quantize")
    if choices["adapters"] and (choices["against"] or len(choices["adapters"]) > 1):
        raise click.UsageError("give one --adapter, and leave out --against")
    if choices["kv_bits"] and choices["against"] in AGAINST[:2]:
        raise click.UsageError("the other engine has no 8-bit K/V cache: leave out --kv-bits or --against")
    if choices["speculate"] and choices["against"]:
        raise click.UsageError("with drafts the speed depends on the text: leave out --speculate or --against")
    source = click.get_current_context().get_parameter_source("model")
    if choices["synthetic"] and source is not click.core.ParameterSource.COMMANDLINE:
        choices["model"] = None  # the default of the environment or of the config file
    if choices["model"] and choices["synthetic"]:
        raise click.UsageError("give --model or --synthetic, not both")
    if (choices["format_name"] or choices["layers"]) and not choices["synthetic"]:
        raise click.UsageError("--format and --layers describe synthetic weights: give --synthetic too")
    if min(context, default=prompt) < prompt:
        raise click.UsageError(f"the context of {min(context)} tokens is shorter than the prompt of {prompt}")
    if plot:
        from mlx_gptoss.measure.plot import check_plot

        check_plot(plot)
    if report_path:
        from mlx_gptoss.measure.report import check_report

        check_report(report_path)
    from mlx_gptoss.measure.timing import Case

    cases = [Case(b, prompt, c, generate) for b in sorted(set(batch)) for c in sorted(set(context or (prompt,)))]
    with _progress_log() as log:
        report, config = _bench(cases, repeat, log, **choices)
    if report_path:
        _write_report(report_path, report, config, plot_style, **choices)
    if as_json:
        click.echo(json.dumps(_json(report)))
    else:
        _print(report)
    if plot:
        from mlx_gptoss.measure.plot import plot_speeds

        plot_speeds(report.results, plot, plot_style)


def _write_report(path: Path, report: Report, config: ModelConfig, style: str, **choices: Any) -> None:
    from mlx_gptoss.measure import facts
    from mlx_gptoss.measure.report import write_report
    from mlx_gptoss.measure.selftest import plan

    chosen = plan(report.results[0].backend, choices["device"], choices["dtype"])
    try:
        write_report(path, report, config, facts.facts(chosen.machine), style)
    finally:
        chosen.close()
    click.echo(f"{path} and {path.with_suffix('.png')} have the report", err=True)


def _bench(cases: list[Case], repeat: int, log: Callable[[str], None], **choices: Any) -> tuple[Report, ModelConfig]:
    """The report, and the config of the model."""
    from mlx_gptoss.backends import BACKENDS
    from mlx_gptoss.loading.plan import LoadRequest
    from mlx_gptoss.measure.benchmark import BenchModel, Target, bench, load
    from mlx_gptoss.ranks import find_launch
    from mlx_gptoss.weights.formats import WRITERS
    from mlx_gptoss.weights.requantize import Requantized

    quantize, against, launch = choices["quantize"], choices["against"], find_launch()
    if launch is not None:
        if against:
            raise click.UsageError("--against needs a single process: leave it out with several ranks")
        choices["backend"] = launch.backend if choices["backend"] == "auto" else choices["backend"]
    with ExitStack() as stack:
        source, folder = _source(stack, log, **choices)
        synthetic = (choices["synthetic"], choices["layers"], source.format) if choices["synthetic"] else None
        request = LoadRequest(
            model=choices["model"],
            synthetic=synthetic,
            backend=choices["backend"],
            quantize=quantize,
            kv_bits=choices["kv_bits"],
            speculate=choices["speculate"],
            prefix_cache=0,
            adapters=choices["adapters"],
        )
        suffix = (", 8-bit K/V" if choices["kv_bits"] else "") + (", drafts" if choices["speculate"] else "")
        model = BenchModel(source, source.size_bytes, source.format + suffix, request)
        if quantize:
            weights = Requantized(source, quantize)
            format_name = quantize if quantize in WRITERS else f"{source.format}, {quantize}"
            model = BenchModel(weights, weights.size_bytes, format_name + suffix, request)
        context = max(case.length(repeat) for case in cases)
        single = None if launch is not None else model
        target = Target.find(choices["backend"], choices["device"], choices["dtype"], single, context)
        others: list[TimedEngine] = []
        if against in BACKENDS:
            other = Target.find(against, choices["device"], choices["against_dtype"] or target.dtype)
            second, _ = load(model, cases, repeat, other, log)
            stack.callback(second.close)
            others.append(second)
        elif against:
            log(f"starting {against}")
            others.append(stack.enter_context(_peer(against, folder, source.format, target, choices["against_dtype"])))
        must_agree = against is not None and against != "mlx-lm"  # mlx-lm rounds YaRN's correction range
        found = bench(model, cases, target, repeat=repeat, others=others, must_agree=must_agree, log=log)
        return found, source.config


def _source(stack: ExitStack, log: Callable[[str], None], **choices: Any) -> tuple[CheckpointLike, Path | None]:
    """The weights, and the folder of their checkpoint, which another engine can load. Synthetic weights are written to
    a temporary folder if another engine needs them, else they have none."""
    from mlx_gptoss import api
    from mlx_gptoss.weights.synthetic import Synthetic, preset

    if not choices["synthetic"]:
        checkpoint = api.open_checkpoint(choices["model"])
        return checkpoint, checkpoint.folder
    source = Synthetic(preset(choices["synthetic"], choices["layers"]), choices["format_name"] or "mxfp4")
    if choices["against"] not in AGAINST[:2]:
        return source, None
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlx-gptoss-bench-"))) / "checkpoint"
    log(f"writing {source.size_bytes / 1e9:.1f} GB of synthetic weights for {choices['against']}")
    source.write(folder)
    return source, folder


def _peer(name: str, folder: Path | None, format_name: str, target: Target, dtype: str | None) -> Any:
    from .peers.process import Peer

    assert folder is not None
    if name == "transformers":  # its logits must match ours, so by default it computes in the same dtype
        dtype = dtype or target.dtype
    return Peer(name, folder, format_name, "cpu" if target.name == "cpu" else "gpu", dtype)


@contextmanager
def _progress_log() -> Iterator[Callable[[str], None]]:
    """A function that logs each stage as it begins: a spinner if stderr is a terminal, else a line on stderr."""
    from rich.markup import escape

    from .terminal import new_console

    console = new_console(stderr=True)
    if not console.is_terminal:
        yield lambda what: click.echo(what, err=True)
        return
    with console.status("Starting") as status:
        yield lambda what: status.update(escape(what[:1].upper() + what[1:]))


def _json(report: Report) -> dict[str, Any]:
    optional = ("ratio", "adapter", "drafts")
    results = [{k: v for k, v in asdict(result).items() if k not in optional or v} for result in report.results]
    found: dict[str, Any] = {"results": results, "agreement": [asdict(agreement) for agreement in report.agreements]}
    found |= {"launches_per_token": report.launches} if report.launches else {}
    found |= {"command_buffers_per_token": report.command_buffers} if report.command_buffers else {}
    found |= {"cpu": asdict(report.cpu)} if report.cpu else {}
    found |= {"published_bandwidth": asdict(report.chip)} if report.chip else {}
    return found | ({"ratio": report.ratio} if report.ratio else {})


def _per_token(report: Report) -> list[str]:
    """What a decoded token costs, case by case, and what it would cost on an Apple GPU."""
    ours = [result for result in report.results if result.bytes_per_token]
    lines = []
    for r in ours:
        costs = [f"{r.bytes_per_token / 1e6:.1f} MB read" if r.bytes_per_token else ""]
        if r.host_ms_per_step is not None:
            host = r.host_ms_per_step if r.drafts else r.host_ms_per_step / r.batch
            costs.append(f"{host:.2f} ms of host time{' a step' if r.drafts else ''}")
        if report.chip and r.published_bound_tok_s:
            speed = f"{r.decode_tok_s / r.published_bound_tok_s:.1%} of {r.published_bound_tok_s:.0f} tok/s"
            costs.append(f"{speed}, the bound of {report.chip.gb_s:g} GB/s")
        lines.append(f"A token, batch {r.batch}, context {r.context}: {', '.join(filter(None, costs))}")
        if r.drafts:
            lines.append(f"Drafts: {r.drafts.right} of {r.drafts.drafted} were right, in {r.drafts.steps} steps")
    if report.chip:
        lines.append(f"{report.chip.chip}: {report.chip.gb_s:g} GB/s ({report.chip.source})")
    if report.cpu:
        cpu = report.cpu
        lines.append(f"This CPU: {cpu.threads} threads, products {cpu.products}, sgemm {cpu.sgemm_gflops:.0f} GFLOP/s")
        lines += [f"A prompt of {r.prompt}, batch {r.batch}: {r.fraction_of_sgemm:.0%} of sgemm" for r in ours[:1]]
    if report.launches:
        lines.append(f"Launches a token: {', '.join(f'{name} {n}' for name, n in report.launches.items())}")
    if report.command_buffers:
        counts = ", ".join(f"{n} by {whose}" for whose, n in report.command_buffers.items())
        lines.append(f"Command buffers a token on an Apple GPU, estimated: {counts}")
    return lines


def _print(report: Report) -> None:
    from rich.markup import escape
    from rich.table import Table

    from mlx_gptoss.loading.memory import gigabytes

    from .terminal import new_console

    console = new_console(highlight=False, width=None if sys.stdout.isatty() else 140)
    first = report.results[0]
    adapter = f", adapter {first.adapter}" if first.adapter else ""
    console.print(
        f"[bold]{escape(first.device)}[/bold], backend {first.backend}, {first.format}{escape(adapter)}; "
        f"copy bandwidth {first.bandwidth_gb_s or 0:.0f} GB/s, reads and writes counted"
    )
    for found in report.agreements:
        decoded = "" if found.decode_error is None else f", decoded log-probabilities off by {found.decode_error:.2g}"
        console.print(
            f"Against {escape(found.against)}, {found.layers} layers, {found.tokens} tokens: "
            f"KL {found.kl:.2g} nats, top-1 {found.top1:.1%}, relative error {found.relative_error:.2g} "
            f"(worst {found.worst_error:.2g}){decoded}"
        )
    table = Table(box=None, header_style="bold")
    for column in ("engine", "batch", "prompt", "prefill tok/s", "context", "decode tok/s", "bytes a step"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for column in ("of bound", "peak memory", "load"):
        table.add_column(column, justify="right")
    for r in report.results:
        table.add_row(
            escape(f"{r.engine} ({r.backend})"), str(r.batch), str(r.prompt), f"{r.prefill_tok_s:.1f}", str(r.context),
            f"{r.decode_tok_s:.1f}", gigabytes(round(r.bytes_per_step)) if r.bytes_per_step else "",
            f"{r.fraction_of_bound:.1%}" if r.fraction_of_bound else "", gigabytes(r.peak_memory_bytes),
            f"{r.load_s:.1f} s",
        )  # fmt: skip
    console.print(table)
    for line in _per_token(report):
        console.print(escape(line))
    if report.ratio:
        console.print(f"Ours over theirs: prefill {report.ratio['prefill']:.2f}, decode {report.ratio['decode']:.2f}")
