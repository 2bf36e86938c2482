"""mlx-gptoss selftest: whether this machine computes correctly, and what to change about it."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .options import DEVICE_OPTIONS, JSON_OPTION, options

if TYPE_CHECKING:
    from mlx_gptoss.measure.facts import Finding
    from mlx_gptoss.measure.selftest import Plan, Result


@click.command()
@options(DEVICE_OPTIONS)
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    help="Run only the checks whose names contain this, with * and ?. Repeatable.",
)
@click.option("--list", "list_only", is_flag=True, help="List the names of the checks.")
@options((JSON_OPTION,))
def selftest(*, only: tuple[str, ...], list_only: bool, as_json: bool, **where: str | None) -> None:
    """Check every kernel of this machine against float32 on the CPU, at the widths of gpt-oss.

    Every way in which weights are stored, attention, rotations, experts, the sampler, the caches, and whole steps; then
    the memory's bandwidth and a decode step. Downloads nothing, needs 3 GB of memory and a minute or two, and ends with
    exit code 1 if a check fails. Bug reports want the output of --json.
    """
    from mlx_gptoss.errors import GptOssError
    from mlx_gptoss.measure import facts
    from mlx_gptoss.measure.selftest import plan

    started = time.perf_counter()
    chosen = plan(where["backend"] or "auto", where["device"], where["dtype"], only)
    try:
        if list_only:
            names = [check.name for check in chosen.checks]
            click.echo(json.dumps(names) if as_json else "\n".join(names))
            return
        known = facts.facts(chosen.machine)
        if not as_json:
            _print_facts(known)
        results = _run(chosen, as_json)
        advice = facts.findings(known, chosen.machine, results)
    finally:
        chosen.close()
    seconds = time.perf_counter() - started
    if as_json:
        click.echo(json.dumps(_report(known, results, advice, seconds)))
    else:
        _print_summary(results, advice, seconds)
    failed = [result for result in results if not result.ok]
    if failed:
        raise GptOssError(
            f"{len(failed)} of {len(results)} checks failed ({'; '.join(result.name for result in failed[:3])}"
            f"{'; ...' * (len(failed) > 3)}): this machine computes wrongly there; the advice is above"
            if not as_json
            else f"{len(failed)} of {len(results)} checks failed: see `checks` in the output"
        )


def _run(chosen: Plan, as_json: bool) -> list[Result]:
    """Run the checks, each with a line when it is done: on stdout, or with --json on a terminal's stderr."""
    results = []
    with _running(chosen) as begin:
        checks = iter(chosen.run())
        for check in chosen.checks:
            begin(check.name)
            result = next(checks)
            results.append(result)
            begin(None)
            if not as_json or sys.stderr.isatty():
                click.echo(_line(result), err=as_json)
    return results


@contextmanager
def _running(chosen: Plan) -> Iterator[Callable[[str | None], None]]:
    """A function that shows the name of the check that runs, on a terminal's stderr. None hides it."""
    from .terminal import new_console

    console = new_console(stderr=True)
    status = console.status("")
    done = 0

    def begin(name: str | None) -> None:
        nonlocal done
        if name is None:
            done += 1
            status.stop()
        elif console.is_terminal:
            from rich.markup import escape

            status.update(escape(f"{done + 1} of {len(chosen.checks)}: {name}"))
            status.start()

    try:
        yield begin
    finally:
        status.stop()


def _line(result: Result) -> str:
    """A result on one line, and its failures on lines of their own."""
    mark = "FAILED" if not result.ok else "ok" if result.ran else "skipped"
    figures = []
    if result.ok and result.worst:
        figures.append(f"error {_short(result.worst.error)}, limit {_short(result.worst.limit)}")
    figures += [f"{measured.what} {_short(measured.value)} {measured.unit}" for measured in result.measured]
    if not result.ran:
        figures += [skipped.reason for skipped in result.skipped]
    lines = [f"{mark:8}{result.name:42}{result.seconds:6.1f} s  {'; '.join(figures)}".rstrip()]
    lines += [
        f"          {case.case}: error {_short(case.error)}, limit {_short(case.limit)}"
        for case in result.compared
        if not case.ok
    ]
    lines += [f"          {result.problem}"] if result.problem else []
    lines += [f"          To do: {result.advice}"] if not result.ok else []
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def _print_facts(known: dict[str, Any]) -> None:
    from mlx_gptoss.loading.memory import gigabytes

    packages, device = known["packages"], known["device"]
    name = device.get("device_name") or device.get("device")
    limit = known["open_files"]["soft"]
    rows = [
        ("machine", f"{known['chip']}, {known['cores']} cores, {gigabytes(known['memory_bytes'])}, {known['os']}"),
        ("device", f"{known['backend']} on {name} in {known['dtype']}"),
        ("versions", ", ".join([f"Python {known['python']}", *(f"{key} {value}" for key, value in packages.items())])),
        ("limits", f"{'any number of' if limit is None else limit} open files"),
        *_mac_rows(known),
        ("hub cache", f"{known['hub_cache']['path']}, {gigabytes(known['hub_cache']['free_bytes'])} free"),
    ]
    rows += [("", f"{name}={value}") for name, value in known["variables"].items()]
    for label, text in rows:
        click.echo(f"{label:10}{text}")
    click.echo()


def _mac_rows(known: dict[str, Any]) -> list[tuple[str, str]]:
    """What matters on a Mac alone; nothing elsewhere."""
    rows = []
    if (buffers := known["device"].get("command_buffers")) is not None:
        limits = f"up to {buffers['ops']} launches and {buffers['mb']} MB, {buffers['least_a_token']} or more a token"
        rows.append(("buffers", f"{limits}, set by {buffers['set_by']} ({buffers['why']})"))
    if "matrix_kernels" in known:
        lacking = ", ".join(name for name, there in known["matrix_kernels"].items() if not there)
        tag = known["wheels"].get("mlx-metal", "no wheel")
        rows.append(
            ("matrix", f"{tag}; " + (f"matrix units not used: lacking {lacking}" if lacking else "matrix units used"))
        )
    if known.get("iogpu.wired_limit_mb") is not None:
        rows.append(("wired", f"iogpu.wired_limit_mb={known['iogpu.wired_limit_mb']} (0 is macOS's own)"))
    return rows


def _print_summary(results: list[Result], advice: list[Finding], seconds: float) -> None:
    ran = [result for result in results if result.ran]
    failed = sum(not result.ok for result in ran)
    click.echo(f"\n{len(ran)} checks in {seconds:.0f} s, {failed} failed, {len(results) - len(ran)} skipped")
    cases: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for skipped in result.skipped:
            cases.setdefault((skipped.case, skipped.reason), []).append(result.name)
    for (case, reason), names in cases.items():
        whose = names[0] if len(names) == 1 else f"{len(names)} checks"
        click.echo(f"Not checked ({whose}{'' if case == 'all' else f': {case}'}): {reason}")
    for finding in advice:
        click.echo(f"Note: {finding.what}: {finding.do}")


def _report(known: dict[str, Any], results: list[Result], advice: list[Finding], seconds: float) -> dict[str, Any]:
    return {
        "ok": all(result.ok for result in results),
        "checks": [_check(result) for result in results if result.ran],
        "skipped": [{"name": result.name, **asdict(case)} for result in results for case in result.skipped],
        "findings": [asdict(finding) for finding in advice],
        "facts": known,
        "seconds": round(seconds, 1),
    }


def _check(result: Result) -> dict[str, Any]:
    worst = result.worst
    found: dict[str, Any] = {"name": result.name, "ok": result.ok, "seconds": round(result.seconds, 2)}
    if worst is not None:
        found |= {"error": _finite(worst.error), "limit": worst.limit, "worst": worst.case}
        found["cases"] = [asdict(case) | {"ok": case.ok, "error": _finite(case.error)} for case in result.compared]
    if result.measured:
        found["measured"] = [asdict(measured) for measured in result.measured]
    if not result.ok:
        found |= {"problem": result.problem, "advice": result.advice}
    return found


def _finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None
