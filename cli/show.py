"""mlx-gptoss show: what a checkpoint or a LoRA adapter is, and whether it fits here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from mlx_gptoss.options import LoadOptions

from .options import (
    ADAPTER_OPTION,
    DEVICE_OPTIONS,
    JSON_OPTION,
    MODEL_VARIABLE,
    ModelArgument,
    ModelName,
    declared,
    options,
)
from .show_adapter import adapter_report, print_adapter, show_alone, value_bytes

if TYPE_CHECKING:
    from mlx_gptoss.loading.memory import MemoryPlan
    from mlx_gptoss.loading.plan import LoadPlan
    from mlx_gptoss.loading.recommend import Recommendation
    from mlx_gptoss.weights.checkpoint import Summary

PRODUCTS = {
    "compiled": "compiled for it by llvmlite, with weights as they are stored",
    "numpy": "by numpy and MLX; pip install 'mlx-gptoss[cpu]' compiles them, which is several times faster",
    "reference": "by PyTorch, as the reference of the CUDA kernels; --backend mlx is the fast one here",
}


@click.command()
@click.argument("model", required=False, cls=ModelArgument, type=ModelName(), envvar=MODEL_VARIABLE)
@click.option(
    "--context", type=click.IntRange(min=1), metavar="N", help="Plan for N tokens. Default: the model's maximum."
)
@options(DEVICE_OPTIONS, declared(LoadOptions, "kv_bits"), (ADAPTER_OPTION,))
@click.option("--ranks", type=click.IntRange(min=2), metavar="N", help="Also show what each of N ranks would hold.")
@options((JSON_OPTION,))
def show(
    model: str | None,
    context: int | None,
    ranks: int | None,
    adapters: dict[str, str] | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Format, sizes and bits per weight of MODEL (a folder or a hub id), and the memory it needs here.

    Reads headers and a few rows. Without MODEL it shows the one that other commands take without --model.

    MODEL may be a LoRA adapter: what it changes, and which of OpenAI's models it fits. With --adapter: whether it fits
    MODEL, and the memory of both.
    """
    from mlx_gptoss import api
    from mlx_gptoss.backends import find_backend
    from mlx_gptoss.loading.plan import LoadRequest, plan_load
    from mlx_gptoss.loading.recommend import mappable_by_format, recommend, run_otherwise
    from mlx_gptoss.weights.tensor import storage_name

    if model is not None and api.is_adapter(model):
        return show_alone(model, as_json, context=context, ranks=ranks, adapters=adapters, **given)
    checkpoint, title = api.open_checkpoint(model), model or "the bundled nano model"
    described = {
        each: api.describe_adapter(path, {title: checkpoint.config}) for each, path in (adapters or {}).items()
    }
    size = value_bytes(given["backend"], given["device"], given["dtype"])
    module, name = find_backend(given.pop("backend"))
    plan = api.memory_plan(
        checkpoint,
        module,
        max_context=context,
        as_stored=name == "mlx",
        adapter_values=sum(each.device_values or 0 for each in described.values()),
        **given,
    )
    may_stay = mappable_by_format(checkpoint) if name == "mlx" else None
    best = recommend(checkpoint, plan, api.sizes_in_other_formats(checkpoint), context, may_stay)
    summary = checkpoint.summary()
    wider = {storage_name(stored): storage_name(ran) for stored, ran in run_otherwise(checkpoint, name).items()}
    parts: list[LoadPlan] = []
    if ranks is not None:
        fitting = {each: path for each, path in (adapters or {}).items() if described[each].fits}
        request = LoadRequest(
            model=model, backend=name, max_context=context, prefix_cache=0, adapters=fitting or None, **given
        )
        parts = [plan_load(request, checkpoint, rank, ranks) for rank in range(ranks)]
    kernels = module.custom_kernels(given.get("device"))
    products = module.cpu_products(given.get("device"), given.get("dtype"))
    if as_json:
        report = _report(summary, plan, best) | {"backend": name, "runs_as": wider, "custom_kernels": kernels}
        report["cpu_products"] = products or None
        if adapters:
            report["adapters"] = [
                adapter_report(each, adapters[each], about, size) for each, about in described.items()
            ]
        click.echo(json.dumps(report | {"ranks": [_part_report(part) for part in parts]} if parts else report))
    else:
        _print(title, summary, plan)
        for stored, ran in wider.items():
            click.echo(f"The {name} backend has no kernel for {stored}: it runs as {ran}, with the same values.")
        for check, verdict in kernels.items():
            click.echo(f"Custom kernel ({check}): {f'not used here, {verdict}' if verdict else 'in use'}")
        if products:
            click.echo(f"Products on this CPU: {PRODUCTS[products]}")
        click.echo(_advice(best, model or "MODEL"))
        for each, about in described.items():
            print_adapter(each, about, size)
        if parts:
            _print_parts(parts)


def _advice(best: Recommendation | None, model: str) -> str:
    from mlx_gptoss.loading.memory import gigabytes
    from mlx_gptoss.loading.recommend import DESCRIPTIONS

    if best is None:
        return "Recommended here: a machine with more memory; in no format does it fit"
    if best.as_is:
        return "Recommended here: run it as it is"
    search = " --search mse" if best.format == "mlx-4bit" else ""
    return (
        f"Recommended here: {best.format} ({gigabytes(best.size_bytes)}; {DESCRIPTIONS[best.format]}): "
        f"mlx-gptoss convert {model} DEST --to {best.format}{search}"
    )


def _report(summary: Summary, plan: MemoryPlan, best: Recommendation | None) -> dict[str, Any]:
    return {
        "format": summary.format,
        "parameters": summary.parameters,
        "size_bytes": summary.size_bytes,
        "bits_per_weight": summary.bits_per_weight,
        "roles": summary.roles,
        "note": summary.note,
        "recommended": best and best.format,
        "memory": _memory(plan),
    }


def _memory(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "weights_bytes": plan.weights_bytes,
        "mapped_bytes": plan.mapped_bytes,
        "upcast_bytes": plan.upcast_bytes,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "ring_bytes": plan.ring_bytes,
        "working_bytes": plan.working_bytes,
        "adapter_bytes": plan.adapter_bytes,
        "context": plan.context,
        "needed_bytes": plan.needed_bytes,
        "available_bytes": plan.available_bytes,
        "fits": plan.fits,
    }


def _part_report(part: LoadPlan) -> dict[str, Any]:
    shard = part.shard
    assert shard is not None
    held = {"query_heads": len(shard.query_heads), "kv_heads": len(shard.kv_heads), "experts": len(shard.experts)}
    return {"rank": shard.rank, **held, "vocabulary": len(shard.vocabulary), "memory": _memory(part.memory)}


def _print_parts(parts: Sequence[LoadPlan]) -> None:
    from rich.table import Table

    from mlx_gptoss.loading.memory import gigabytes

    from .terminal import new_console

    table = Table(box=None, header_style="bold")
    for column in ("rank", "KV heads", "experts", "token ids", "weights", "context", "needed"):
        table.add_column(column, justify="right")
    table.add_column("on a machine like this")
    for part in map(_part_report, parts):
        memory = part["memory"]
        table.add_row(
            *(str(part[name]) for name in ("rank", "kv_heads", "experts", "vocabulary")),
            gigabytes(memory["weights_bytes"]),
            str(memory["context"]),
            gigabytes(memory["needed_bytes"]),
            "[green]fits[/green]" if memory["fits"] else "[red]does not fit[/red]",
        )
    new_console(highlight=False).print(table)


def _print(name: str, summary: Summary, plan: MemoryPlan) -> None:
    from rich.markup import escape
    from rich.table import Table

    from mlx_gptoss.loading.memory import gigabytes, wired_limit
    from mlx_gptoss.machine import mac_memory

    from .terminal import new_console

    console = new_console(highlight=False)
    console.print(
        f"[bold]{escape(name)}[/bold]: {summary.format}, {summary.parameters / 1e9:.3g} billion parameters, "
        f"{gigabytes(summary.size_bytes)}, {summary.bits_per_weight:.2f} bits per weight"
    )
    if summary.note:
        console.print(summary.note)
    table = Table("part", "stored as", "bits per weight", box=None, header_style="bold")
    for role, stored in summary.roles.items():
        table.add_row(role, str(stored["format"]), f"{stored['bits']:.2f}")
    console.print(table)
    verdict = "[green]fits[/green]" if plan.fits else "[red]does not fit[/red]"
    adapters = f", adapters {gigabytes(plan.adapter_bytes)}" if plan.adapter_bytes else ""
    console.print(
        f"Memory for {plan.context} tokens: {gigabytes(plan.needed_bytes)} needed "
        f"(weights {gigabytes(plan.weights_bytes)}, KV cache {gigabytes(plan.context * plan.kv_bytes_per_token)}, "
        f"working space {gigabytes(plan.working_bytes + plan.ring_bytes - plan.adapter_bytes)}{adapters}), "
        f"{gigabytes(plan.available_bytes)} available: {verdict}"
    )
    if plan.mapped_bytes:
        console.print(
            f"Memory is short: {gigabytes(plan.mapped_bytes)} of it, the embeddings, stay in the mapped file."
        )
    if line := wired_limit(plan, mac_memory()):
        console.print(f"It would fit after: {line}")
    if not plan.fits and plan.largest_context:
        console.print(f"It fits with a context of {plan.largest_context} tokens (--max-context).")
