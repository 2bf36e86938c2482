"""Options that several commands share. Those of loading, generating and sampling are made from their declarations in
mlx_gptoss/options and mlx_gptoss/sampling.py."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlx_gptoss.options import GenerationOptions, LoadOptions
from mlx_gptoss.options.declare import Flag
from mlx_gptoss.sampling import Sampling

if TYPE_CHECKING:
    from typing import TextIO

    from click.shell_completion import CompletionItem

    from mlx_gptoss import Model, Tool

Command = TypeVar("Command", bound=Callable[..., Any])
Option = Callable[[Command], Command]
SERVE_PACKAGES = (
    *("fastapi", "starlette", "pydantic", "uvicorn", "h11", "prometheus_client"),
    *("markdown_it", "mdit_py_plugins", "nh3", "pygments", "latex2mathml"),
)
MODEL_VARIABLE = "MLX_GPTOSS_MODEL"
SHORT = {"temperature": "-t", "system": "-s"}
TYPES = {"int": int, "float": float, "str": str}


def declared(options: type, *names: str, **defaults: Any) -> tuple[Option[Any], ...]:
    """Command-line options for these fields of a dataclass of options, in the order of its fields.

    defaults: fields with a default of the command's own; None tells an option that was not given.
    """
    chosen = [declaration for declaration in fields(options) if declaration.name in {*names, *defaults}]
    return tuple(_option(each, defaults.get(each.name, each.default)) for each in chosen)


def _option(declaration: Any, default: Any) -> Option[Any]:
    flag, name = declaration.metadata["flag"], f"--{declaration.name.replace('_', '-')}"
    assert isinstance(flag, Flag), f"{name} is not offered on the command line"
    help = declaration.metadata["help"].replace('"', "")
    if declaration.type == "bool" and default:
        return click.option(f"{name}/--no-{name[2:]}", default=True, help=help)
    if declaration.type == "bool":
        return click.option(name, is_flag=True, help=help)
    if flag.repeatable:
        return click.option(name, multiple=True, metavar=flag.metavar, help=help)
    names = [SHORT[declaration.name], name] if declaration.name in SHORT else [name]
    of = TYPES.get(declaration.type.partition(" ")[0], str)
    kind: Any = of
    if flag.choices:
        kind = click.Choice(flag.choices)
    elif flag.minimum is not None:
        kind = click.IntRange(min=flag.minimum)

    def convert(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        value = value if value is None else of(value)
        return value if value is None or flag.unit == 1 else value * flag.unit

    return click.option(
        *names,
        type=kind,
        default=default,
        show_default=default is not None,
        metavar=flag.metavar,
        help=help,
        callback=convert,
    )


class ModelName(click.types.StringParamType):
    """A model's name. In the environment variable, os.pathsep stands between several."""

    envvar_list_splitter = os.pathsep

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The models on this machine; folders and files for what begins like a path."""
        from click.shell_completion import CompletionItem

        if incomplete.startswith((".", "/", "~")):
            return [CompletionItem(incomplete, type="file")]
        from mlx_gptoss.loading.library import model_names

        return [CompletionItem(name) for name in model_names() if name.startswith(incomplete)]


class _OneModel(click.Parameter):
    """A parameter for one model. Of several in the environment variable, which are for serve, it takes the first."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        value = super().resolve_envvar_value(ctx)
        return value and next(filter(None, value.split(os.pathsep)), None)


class ModelOption(_OneModel, click.Option):
    """An option for one model."""


class ModelArgument(_OneModel, click.Argument):
    """An argument for one model."""


MODEL_OPTION = click.option(
    "-m",
    "--model",
    cls=ModelOption,
    type=ModelName(),
    envvar=MODEL_VARIABLE,
    metavar="PATH|REPO",
    help="A folder, a hub id such as openai/gpt-oss-20b, or a name that `list` shows. Default: MLX_GPTOSS_MODEL, or "
    "the config file's model, or nano, the bundled one.",
)
DEVICE_OPTIONS = declared(LoadOptions, "backend", "device", "dtype")


def _adapters(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, str] | None:
    """The --adapter options as LoadOptions takes them. Without NAME= an adapter has the name of its folder."""
    from mlx_gptoss.options.load import ADAPTER_NAME

    found: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not ADAPTER_NAME.fullmatch(name):
            name, path = os.path.basename(os.path.abspath(value.partition("@")[0])), value
        if not path or name in found:
            reason = "names a second adapter so; write NAME=PATH" if path else "has no path; write NAME=PATH"
            raise click.UsageError(f"--adapter {value} {reason}")
        found[name] = path
    return found or None


ADAPTER_OPTION = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=PATH",
    callback=_adapters,
    help=next(each.metadata["help"] for each in fields(LoadOptions) if each.name == "adapters"),
)
RUN_OPTIONS = (
    *declared(LoadOptions, "max_context", "quantize", "kv_bits", "speculate", "custom_kernels"),
    ADAPTER_OPTION,
)
LOAD_OPTIONS = (MODEL_OPTION, *DEVICE_OPTIONS, *RUN_OPTIONS)
CACHE_OPTIONS = declared(LoadOptions, "prefix_cache", "prompt_cache")
SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "seed")
SAMPLING_OPTIONS = declared(Sampling, **dict.fromkeys(SAMPLING_NAMES))
STOP_OPTIONS = declared(Sampling, "stop")
SYSTEM_FILE_OPTION = click.option(
    "--system-file",
    type=click.File(encoding="utf-8"),
    metavar="FILE",
    help="Read the instructions of --system from this file.",
)
VAR_OPTION = click.option(
    "--var",
    "variables",
    multiple=True,
    metavar="NAME=VALUE",
    help="Put VALUE in place of {NAME} in the prompt and the instructions. Other braces stay. Repeatable.",
)
GENERATION_OPTIONS = (
    *declared(GenerationOptions, "max_tokens", "reasoning", "system"),
    SYSTEM_FILE_OPTION,
    VAR_OPTION,
    *STOP_OPTIONS,
)
HIDE_REASONING_OPTION = click.option("--hide-reasoning", is_flag=True, help="Show only the answer.")
VERBOSE_OPTION = click.option(
    "-v", "--verbose", is_flag=True, help="Show tokens per second while the answer streams, and --stats after it."
)
PLOT_STYLE_OPTION = click.option(
    "--plot-style",
    type=click.Choice(["light", "dark"]),
    default="light",
    show_default=True,
    help="Colors of the plot, for a light or a dark page.",
)
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
TOOL_OPTION = click.option(
    "--tool",
    "tools",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="Run this Python file, and let the model call its functions without asking. Repeatable.",
)


def options(*groups: tuple[Option[Any], ...]) -> Callable[[Command], Command]:
    """All options of the groups, in order."""

    def add(command: Command) -> Command:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return add


@contextmanager
def serve_extra() -> Iterator[None]:
    """For importing mlx_gptoss.server in: where its packages are missing, the error names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in SERVE_PACKAGES:
            raise
        from mlx_gptoss.errors import GptOssError

        raise GptOssError("the server's packages are missing: pip install 'mlx-gptoss[serve]'") from error


def split_sampling(given: dict[str, Any]) -> dict[str, Any]:
    """The sampling options among `given`, taken out of it. Those that were not given are left out."""
    taken = {name: given.pop(name) for name in SAMPLING_NAMES}
    stop = given.pop("stop", ())
    return {name: value for name, value in taken.items() if value is not None} | ({"stop": stop} if stop else {})


def system_text(system: str | None, file: TextIO | None) -> str | None:
    """The instructions of --system or of --system-file, which comes before a --system that the config file sets.

    Raises UsageError if both were given.
    """
    if file is None:
        return system
    source = click.get_current_context().get_parameter_source("system")
    if system is not None and source is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("give --system or --system-file, not both")
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{file.name} is not UTF-8 ({error.reason} at byte {error.start})") from error


def fill_in(variables: Sequence[str], *texts: str | None) -> list[str | None]:
    """The texts with VALUE in place of every {NAME} of the --var options NAME=VALUE. Other braces stay, also those in
    a VALUE. Raises UsageError for a --var of another form, and for one whose {NAME} is in none of the texts."""
    values: dict[str, str] = {}
    for variable in variables:
        name, equals, value = variable.partition("=")
        if not equals or not name.isidentifier():
            raise click.UsageError(f"--var {variable!r} must be NAME=VALUE, where NAME is a word")
        values[name] = value
    unused = [name for name in values if not any(text and f"{{{name}}}" in text for text in texts)]
    if unused:
        raise click.UsageError(f"--var {unused[0]}: neither the prompt nor the instructions have {{{unused[0]}}}")
    if not values:
        return list(texts)
    pattern = re.compile("{(" + "|".join(map(re.escape, values)) + ")}")
    return [text and pattern.sub(lambda match: values[match[1]], text) for text in texts]


def load_tools(files: tuple[str, ...]) -> tuple[Tool, ...]:
    """The functions of all files. A line for each goes to stderr, since the model calls them without asking."""
    if not files:
        return ()
    import mlx_gptoss

    tools = tuple(tool for file in files for tool in mlx_gptoss.load_tools(file))
    for tool in tools:
        click.echo(f"the model may call {tool.function.name}", err=True)
    return tools


def load(model: str | None, *, several_adapters: bool = False, **options: Any) -> Model:
    """The model, with a bar on a terminal's stderr while it loads. options: LoadOptions' fields.

    The only adapter is used where a request names none. Several are refused, unless requests can choose.
    """
    adapters = options.get("adapters") or {}
    if len(adapters) > 1 and not several_adapters:
        raise click.UsageError("give one --adapter; serve and batch take several")
    from mlx_gptoss import api
    from mlx_gptoss.loading.plan import LoadRequest

    from .progress import byte_bar

    request = LoadRequest(model=model, **options)
    loading = f"Loading {request.name}"
    with byte_bar(loading) as update:
        loaded = api.load_request(request, lambda done, total: update(done, total, loading))
    loaded.default_adapter = next(iter(adapters)) if len(adapters) == 1 else None
    return loaded
