"""serve --install-service and --remove-service: the server as a systemd user unit on Linux, a LaunchAgent on macOS.

The service runs `serve` with the options given, without the one that installs it. Variables that bear on the server and
an --api-key go into its environment, which only the user can read.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from mlx_gptoss.errors import GptOssError

from .supervisors import CALL_TIMEOUT_S, LAUNCHD, NAME, Command, Launchd, Step, Supervisor, Systemd

API_KEY = "MLX_GPTOSS_API_KEY"
MODEL = ("model", "model_names")  # the option --model, whose values may be paths, and its variable
OURS = ("install_service", "remove_service", "api_key")  # options that the service's command does not have
PATHS = ("tools_config", "prompt_cache")  # options whose value is a path
KEPT_PREFIXES = ("MLX_", "HF_", "HUGGINGFACE_", "CUDA_", "NVIDIA_", "TRITON_", "PYTORCH_")
KEPT = (
    *(
        "PATH",
        "PYTHONPATH",
        "LD_LIBRARY_PATH",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
    ),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
)
DROPPED = ("MLX_GPTOSS_INSTALL_SERVICE", "MLX_GPTOSS_REMOVE_SERVICE", LAUNCHD)
STOP_MARGIN_S = 15  # between the end of the drain and SIGKILL


def install(ctx: click.Context) -> None:
    """Write the service that runs `serve` with the options of `ctx`, start it, and say where it is.

    Nothing is written for options that the server would refuse, or where there is no supervisor. If the supervisor does
    not start the service, the files stay, and the error names the commands. Raises UsageError or GptOssError.
    """
    supervisor = find_supervisor()
    _check(ctx, installed=supervisor.unit.exists())
    command = service_command(ctx, sys.argv)
    if shutil.which(supervisor.program) is None:
        raise GptOssError(
            f"there is no {supervisor.program} here, so nothing was written; let your own supervisor run: "
            f"{shlex.join(command.words)}"
        )
    _replace_files(supervisor.render(command))
    if (failure := _run(supervisor.start)) is not None:
        raise GptOssError(
            f"wrote {supervisor.unit}, but {failure}; the file stays, start it with: {_shown(supervisor.start)}"
        )
    host, port = ctx.params["host"], ctx.params["port"]
    click.echo(
        f"{NAME} is a service now, at http://{f'[{host}]' if ':' in host else host}:{port} once its model is loaded.\n"
        f"Defined in {supervisor.unit}\n"
        f"Logs: {supervisor.logs}\n"
        f"Remove it: {NAME} serve --remove-service"
    )
    if supervisor.note:
        click.echo(supervisor.note)


def remove(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """The callback of --remove-service: stop the service, remove its files, and exit."""
    if not value or ctx.resilient_parsing:
        return
    supervisor = find_supervisor()
    found = [path for path in (supervisor.unit, *supervisor.other_files) if os.path.lexists(path)]
    if not found:
        click.echo(f"There is no service to remove: {supervisor.unit} does not exist.")
        ctx.exit()
    failure = _run(supervisor.stop)
    for path in found:
        path.unlink(missing_ok=True)
        if path.parent.name == NAME:
            with suppress(OSError):  # it has other files
                path.parent.rmdir()
    _run(supervisor.cleanup)
    if failure is not None:
        raise GptOssError(
            f"removed {supervisor.unit}, but {failure}; if the service still runs, stop it with: "
            f"{_shown(supervisor.stop)}"
        )
    click.echo(f"Removed the service {supervisor.unit}")
    ctx.exit()


SERVICE_OPTIONS = (
    click.option(
        "--install-service",
        is_flag=True,
        allow_from_autoenv=False,
        help="Run this command as a service from now on and after each login (systemd, or launchd on macOS), and exit.",
    ),
    click.option(
        "--remove-service",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        allow_from_autoenv=False,
        callback=remove,
        help="Stop and remove the service, and exit.",
    ),
)


def find_supervisor() -> Supervisor:
    """The supervisor of this system. Raises GptOssError where there is none, or for a user who has become root."""
    platform: str = sys.platform
    if os.geteuid() == 0 and os.environ.get("SUDO_USER"):
        raise GptOssError("the service belongs to your user: run the command without sudo")
    if platform == "darwin":
        return Launchd()
    if platform == "linux":
        return Systemd()
    raise GptOssError(f"services are for macOS and for Linux with systemd, not for {platform}")


def _check(ctx: click.Context, installed: bool) -> None:
    """Refuse what serve would refuse after its own checks of the options: a port in use, a model that is not there, an
    alias of none. A model of the hub is downloaded.

    installed: whether a service exists, which may be what listens on the port.
    """
    from mlx_gptoss.loading import hub, library
    from mlx_gptoss.loading.plan import LoadRequest, open_source, plan_load
    from mlx_gptoss.options import LoadOptions
    from mlx_gptoss.ranks import find_launch
    from mlx_gptoss.server import run
    from mlx_gptoss.server.models.named import NamedModel, model_names
    from mlx_gptoss.server.models.remote import RemoteModel

    from .serve import _named

    if find_launch() is not None:
        raise click.UsageError("--install-service is for a server in one process; run it without a launcher")
    if ctx.params["port"] == 0:
        raise click.UsageError("a service needs a fixed --port")
    if not installed:
        run.listen(ctx.params["host"], ctx.params["port"]).close()
    options = LoadOptions(
        **{each.name: ctx.params[each.name] for each in fields(LoadOptions) if each.name in ctx.params}
    )
    names = ctx.params["model_names"] or [model.name for model in library.installed_models()][:1]
    found = []
    for name in names:
        path = hub.resolve(name)
        request = LoadRequest(model=str(path), **vars(options))
        plan_load(request, open_source(request))
        found.append(NamedModel(RemoteModel(name, path, options), *model_names(name)))
    _named(found, ctx.params["aliases"])


def service_command(ctx: click.Context, argv: Sequence[str]) -> Command:
    """The command of the service. ctx: of this run of `serve`. argv: sys.argv of it.

    Raises GptOssError for a value that a service's file cannot hold.
    """
    from mlx_gptoss.server.run import DRAIN_TIMEOUT_S

    words = list(argv[argv.index(str(ctx.info_name), 1) + 1 :])
    given, _, order = ctx.command.make_parser(ctx).parse_args(words)
    options = [*_options(given, order)]
    environment = _environment(os.environ, _names_in(ctx.params.get("tools_config")))
    if (key := ctx.params["api_key"]) is not None:
        environment[API_KEY] = str(key)
    for where, text in [*(("an option", text) for text in options), *environment.items()]:
        if not all(map(_is_plain, text)):
            raise GptOssError(f"{where} has a character that a service's file cannot hold: {text!r}")
    return Command(
        (*_program(argv[0]), str(ctx.info_name), *options),
        environment,
        stop_s=int(DRAIN_TIMEOUT_S) + STOP_MARGIN_S,
        hardened=not ctx.params.get("tools"),
    )


def _options(given: Mapping[str, Any], order: Iterable[click.Parameter]) -> Iterable[str]:
    """The options of a command line as --name=value, in their order."""
    for param in dict.fromkeys(order):
        name = str(param.name)
        if name in OURS:
            continue
        flag = max(param.opts, key=len)
        values = given[name] if isinstance(given[name], (list, tuple)) else [given[name]]
        for value in values:
            if getattr(param, "is_flag", False):
                yield flag if value or not param.secondary_opts else max(param.secondary_opts, key=len)
            else:
                yield f"{flag}={_absolute(name, str(value))}"


def _names_in(config: Path | None) -> set[str]:
    """The words of the tools' settings, which name variables with keys, and the names of such variables by default."""
    from mlx_gptoss.server.hosted.settings import KEY_VARIABLES

    return set() if config is None else {*KEY_VARIABLES.values(), *re.findall(r"\w+", config.read_text("utf-8"))}


def _environment(variables: Mapping[str, str], names: Container[str]) -> dict[str, str]:
    """The variables that bear on the server. names: further ones."""
    kept = {
        name: value
        for name, value in variables.items()
        if (name in KEPT or name in names or name.startswith(KEPT_PREFIXES))
        and name not in DROPPED
        and name.isidentifier()
    }
    for name in (*PATHS, *MODEL):
        variable = f"MLX_GPTOSS_{name.upper()}"
        if variable in kept:
            values = kept[variable].split(os.pathsep) if name in MODEL else [kept[variable]]
            kept[variable] = os.pathsep.join(_absolute(name, value) for value in values)
    return kept


def _absolute(option: str, value: str) -> str:
    """The value of an option, a path in it made absolute: a service has its own working folder."""
    from mlx_gptoss.loading.library import NANO_ALIAS, NANO_NAME

    path = Path(value).expanduser()
    is_path = option in PATHS or (option in MODEL and value not in (NANO_ALIAS, NANO_NAME) and path.exists())
    return os.path.abspath(path) if is_path else value


def _program(argv0: str) -> list[str]:
    """The words that start this program: the script, whose path outlives an upgrade, or else the interpreter."""
    script = os.path.abspath(shutil.which(argv0) or argv0)
    if os.path.basename(script) == NAME and os.access(script, os.X_OK):
        return [script]
    return [os.path.abspath(sys.executable), "-m", "mlx_gptoss_cli"]


def _is_plain(character: str) -> bool:
    """Whether XML and systemd take the character: no control character, no half of a pair, no noncharacter."""
    code = ord(character)
    if code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000:
        return False
    return not (0xFDD0 <= code < 0xFDF0 or code & 0xFFFE == 0xFFFE)


def _replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write files that only the user can read. None is replaced before all are written."""
    written: list[tuple[str, Path]] = []
    try:
        for path, data in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
            written.append((temporary, path))
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in written:
            os.replace(temporary, path)
    finally:
        for temporary, _ in written:
            with suppress(FileNotFoundError):
                os.unlink(temporary)


def _run(steps: Iterable[Step]) -> str | None:
    """Make the calls in turn. Returns what went wrong with the first that failed."""
    for step in steps:
        deadline = time.monotonic() + step.wait_s
        while (failure := _call(step)) is not None and time.monotonic() < deadline:
            time.sleep(0.5)
        if failure is not None:
            return failure
    return None


def _call(step: Step) -> str | None:
    """Make one call. Returns what went wrong."""
    shown = shlex.join(step.words)
    try:
        done = subprocess.run(
            step.words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CALL_TIMEOUT_S
        )
    except FileNotFoundError:
        return f"there is no {step.words[0]} here"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"`{shown}` failed ({error})"
    if done.returncode in step.accepted:
        return None
    said = " ".join((done.stderr or done.stdout).split())[:300]
    return f"`{shown}` failed with exit code {done.returncode}" + (f" ({said})" if said else "")


def _shown(steps: Iterable[Step]) -> str:
    """The calls as one line for a shell, without those that wait."""
    return "; ".join(shlex.join(step.words) for step in steps if not step.wait_s)
