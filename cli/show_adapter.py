"""What `mlx-gptoss show` says about LoRA adapters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mlx_gptoss.weights.adapters.summary import AdapterSummary

MAX_NAMES = 12


def adapter_report(name: str, path: str, summary: AdapterSummary, value_bytes: int) -> dict[str, Any]:
    """The object of --json. value_bytes: of a value on the device."""
    values = summary.device_values
    return {
        "name": name,
        "path": path,
        "kind": summary.kind,
        "base_model": summary.base_model or None,
        "ranks": summary.ranks,
        "alpha": summary.alpha,
        "rslora": summary.rslora,
        "scales": summary.scales,
        "targets": summary.targets,
        "parameters": summary.parameters,
        "size_bytes": summary.size_bytes,
        "memory_bytes": None if values is None else values * value_bytes,
        "unused_fields": summary.unused_fields,
        "unused_files": summary.unused_files,
        "fits": {model: reason is None for model, reason in summary.misfits.items()},
        "misfits": {model: reason for model, reason in summary.misfits.items() if reason is not None},
    }


def print_adapter(name: str, summary: AdapterSummary, value_bytes: int) -> None:
    """Print the same for a reader."""
    from rich.markup import escape

    from mlx_gptoss.loading.memory import gigabytes

    from .terminal import new_console

    console = new_console(highlight=False, soft_wrap=True)
    base = f", for {summary.base_model}" if summary.base_model else ", which names no model"
    console.print(f"Adapter [bold]{escape(name)}[/bold]: LoRA by {summary.kind}{escape(base)}")
    facts = [f"rank{'s' * (len(summary.ranks) > 1)} {_numbers(summary.ranks)}"]
    facts += [f"alpha {summary.alpha:g}"] * (summary.alpha is not None)
    facts += [f"scale {_numbers(summary.scales)}"] * bool(summary.scales)
    facts += ["rank-stabilized (rslora)"] * summary.rslora
    memory = "" if summary.device_values is None else f", {gigabytes(summary.device_values * value_bytes)} in memory"
    parameters = f"{summary.parameters:,} parameters, {gigabytes(summary.size_bytes)} stored{memory}"
    console.print(escape(f"  {', '.join(facts)}; {parameters}"))
    for layers, modules in _by_layers(summary.targets).items():
        console.print(escape(f"  {_names(modules)} in {_spans(layers)}"))
    for what, names in (("settings", summary.unused_fields), ("files", summary.unused_files)):
        if names:
            console.print(escape(f"  Not used, {what}: {_names(names)}"))
    for model, reason in summary.misfits.items():
        if reason is None:
            console.print(f"  {escape(model)}: [green]the adapter fits[/green]")
        else:
            console.print(f"  {escape(model)}: [red]the adapter does not fit[/red]: {escape(reason)}")


def show_alone(path: str, as_json: bool, backend: str, device: str | None, dtype: str | None, **other: Any) -> None:
    """`show PATH` of an adapter: compared with the published models. Raises UsageError for options of a model."""
    import json
    import os

    from mlx_gptoss import api

    if given := next((name for name, value in other.items() if value is not None), None):
        name = "adapter" if given == "adapters" else given.replace("_", "-")
        raise click.UsageError(f"{path} is a LoRA adapter, and --{name} is for a model: show MODEL --adapter {path}")
    summary, size = api.describe_adapter(path), value_bytes(backend, device, dtype)
    name = os.path.basename(os.path.abspath(path.partition("@")[0]))
    if as_json:
        click.echo(json.dumps(adapter_report(name, path, summary, size)))
    else:
        print_adapter(name, summary, size)


def value_bytes(backend: str, device: str | None, dtype: str | None) -> int:
    """Bytes of a factor's value on the device."""
    from mlx_gptoss.backends import find_backend
    from mlx_gptoss.loading.plan import ACTIVATION_BYTES

    return ACTIVATION_BYTES[find_backend(backend)[0].dtype_name(device, dtype)]


def _numbers(values: Sequence[float]) -> str:
    return _names([f"{value:g}" for value in values]) or "unknown"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _by_layers(targets: Any) -> dict[tuple[int, ...], list[str]]:
    """The modules by the layers that they are changed in."""
    found: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for module, layers in targets.items():
        found[layers].append(module)
    return found


def _spans(layers: Sequence[int]) -> str:
    """Layers 0 to 3 and 7, as "layers 0-3, 7"."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    names = [f"{first}-{last}" if last > first else str(first) for first, last in spans]
    return f"layer{'s' * (len(layers) > 1)} {_names(names)}"
