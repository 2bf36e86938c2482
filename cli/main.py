"""The `mlx-gptoss` command: imports a subcommand when it is used, and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from .terminal import BROKEN_PIPE_EXIT, PipeClosed, discard_streams, no_codes, open_streams

if TYPE_CHECKING:
    from mlx_gptoss.ranks import Launch

COMMANDS = {
    "generate": "Answer one prompt.",
    "chat": "Chat in the terminal.",
    "convert": "Write a checkpoint in another format.",
    "serve": "Serve OpenAI's HTTP API and a chat page.",
    "batch": "Answer a file of requests in OpenAI's batch format.",
    "show": "Show format, sizes and memory plan of a checkpoint.",
    "bench": "Measure prefill and decode speed.",
    "eval": "Measure perplexity and the divergence from another checkpoint.",
    "selftest": "Check that this machine computes correctly.",
    "list": "List the models on this machine.",
    "pull": "Download a model.",
    "rm": "Remove a downloaded model.",
    "ps": "Show what a running server does.",
    "config": "Show or change the defaults of options.",
}
OTHER_NAMES = {
    "ls": "list",
    "models": "list",
    "tags": "list",
    "download": "pull",
    "get": "pull",
    "remove": "rm",
    "delete": "rm",
    "run": "chat",
    "ask": "generate",
    "complete": "generate",
    "info": "show",
    "quantize": "convert",
    "start": "serve",
    "server": "serve",
    "benchmark": "bench",
    "perplexity": "eval",
    "status": "ps",
    "doctor": "selftest",
    "self-test": "selftest",
    "check": "selftest",
    "set": "config",
}  # what other programs call it
MODULES = {"list": "list_"}  # modules and functions that Python does not let have the command's name


class Commands(click.Group):
    """The subcommands by name; `--help` lists them without importing any."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f".{MODULES.get(cmd_name, cmd_name)}", __package__)
        command = getattr(module, MODULES.get(cmd_name, cmd_name))
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, *rest = args
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            raise click.UsageError(f"there is no command {name!r}{_like(name)}", ctx)
        found = super().resolve_command(ctx, args)
        if found[1] is not None and name != "config" and not ctx.resilient_parsing:
            ctx.default_map = {name: _defaults(name, found[1], rest)}
        return found

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)
        except BrokenPipeError as error:  # of --help. Click itself would exit with 1
            raise PipeClosed from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise PipeClosed from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _like(name: str) -> str:
    """The commands that a wrong name may mean."""
    import difflib

    near = [OTHER_NAMES[name]] if name in OTHER_NAMES else difflib.get_close_matches(name, COMMANDS, 3)
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(COMMANDS)}"


def _defaults(name: str, command: click.Command, args: list[str]) -> dict[str, Any]:
    """What the config file says of a command's options. --help is answered whatever the file contains."""
    from mlx_gptoss.errors import GptOssError

    from . import config_file

    try:
        return config_file.defaults_for(name, command, config_file.read())
    except GptOssError:
        if {"-h", "--help"} & set(args):
            return {}
        raise


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version  # takes a third of the time of --help

        click.echo(f"mlx-gptoss {version('mlx-gptoss')}")
        ctx.exit()


def _set_ranks_secret_file(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        os.environ["MLX_GPTOSS_SECRET_FILE"] = value


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@click.option(
    "--ranks-secret-file",
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_set_ranks_secret_file,
    help="A file with the secret that the ranks on several machines share.",
)
def group() -> None:
    """Run OpenAI's gpt-oss models on this machine.

    Without --model, commands use MLX_GPTOSS_MODEL, or the model of the config file, or the small bundled one, nano.
    """


def _launch() -> Launch | None:
    """The launch that this process belongs to, from mlx.launch or torchrun; None for a single process."""
    if not {"MLX_RANK", "RANK"} & set(os.environ):
        return None
    from mlx_gptoss.ranks import find_launch

    group.make_context("mlx-gptoss", sys.argv[1:], resilient_parsing=True)  # every rank needs --ranks-secret-file
    return find_launch()


def main() -> None:
    """Run the command line.

    Exit codes: 0; 1 with one line on stderr; 2 for usage errors; 130 for Ctrl-C; 141 if the reader of the output has
    gone, as of a program that SIGPIPE ends. A closed stdin is empty; what goes to a closed stdout or stderr is lost.
    """
    open_streams()
    try:
        try:
            _run()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except (BrokenPipeError, PipeClosed):
        discard_streams()
        sys.exit(BROKEN_PIPE_EXIT)
    except KeyboardInterrupt:  # also while an error is printed or the other ranks are dismissed
        sys.exit(130)


def _run() -> None:
    from mlx_gptoss.errors import GptOssError

    launch = None
    try:
        launch = _launch()
        if launch is not None and launch.rank:  # only rank 0 runs the command; the others follow it
            from mlx_gptoss.loading.distributed import serve_rank

            serve_rank(launch)
        else:
            group.main(standalone_mode=False, color=False if no_codes() else None)
    except click.ClickException as error:
        error.show()
        # launchd restarts a service after any code but 0; a usage error does not go away by itself.
        sys.exit(0 if error.exit_code == 2 and "MLX_GPTOSS_LAUNCHD" in os.environ else error.exit_code)
    except click.Abort:
        sys.exit(130)
    except BrokenPipeError:
        raise  # main() ends the process
    except (GptOssError, OSError) as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
    finally:
        if launch is not None and not launch.rank:
            from mlx_gptoss.loading.distributed import dismiss

            dismiss(launch)
