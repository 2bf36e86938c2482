"""Options that several commands share, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from mlx_gptoss import Model, Sampling, Tool

Command = TypeVar("Command", bound=Callable[..., Any])
SERVE_PACKAGES = ("fastapi", "starlette", "pydantic", "uvicorn", "h11", "prometheus_client")

MODEL_OPTIONS = (
    click.option("--model", metavar="PATH|REPO", help="A folder, or a hub id such as openai/gpt-oss-20b."),
    click.option("--backend", default="auto", metavar="auto|mlx|cuda", show_default=True, help="What computes."),
    click.option("--device", metavar="cpu|gpu|cuda:N", help="Where; the backend's best by default."),
    click.option("--dtype", metavar="NAME", help="Of activations: float32, bfloat16 or float16."),
    click.option(
        "--max-context", type=click.IntRange(min=1), metavar="N", help="Tokens of prompt and answer together."
    ),
)
RUN_OPTIONS = (
    click.option("--quantize", metavar="NAME", help="Quantize while loading: an MLX format, rest-8bit or rest-4bit."),
    click.option("--kv-bits", type=click.Choice(["8"]), help="Keep the K/V cache of full layers in 8 bits."),
    click.option("--speculate", is_flag=True, help="Guess tokens ahead from the text so far; --stats says how well."),
)
CACHE_OPTIONS = (
    click.option(
        "--prefix-cache", type=click.IntRange(min=0), metavar="MB", help="Memory for what is known of earlier prompts."
    ),
    click.option("--prompt-cache", metavar="DIR", help="Keep that in files there, too, for the next start."),
)
SAMPLING_OPTIONS = (
    click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Most tokens to generate."),
    click.option("--temperature", type=float, metavar="T", help="0 is greedy; the model's own by default (1)."),
    click.option("--top-p", type=float, metavar="P", help="Keep the likeliest tokens that reach P."),
    click.option("--top-k", type=int, metavar="K", help="Keep the K likeliest tokens."),
    click.option("--min-p", type=float, metavar="P", help="Drop tokens below P times the likeliest."),
    click.option("--seed", type=int, metavar="S", help="The same seed gives the same text."),
)
TOOL_OPTION = click.option(
    "--tool",
    "tools",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="Run this Python file, and let the model call its functions, without asking. May be given again.",
)
HARMONY_OPTIONS = (
    click.option("--reasoning", type=click.Choice(["low", "medium", "high"]), default="medium", show_default=True),
    click.option("--system", metavar="TEXT", help="Instructions to the model."),
    click.option("--hide-reasoning", is_flag=True, help="Show the answer only."),
)


def options(*groups: tuple[Callable[[Command], Command], ...]) -> Callable[[Command], Command]:
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


def sampling(model: Model, **given: Any) -> Sampling:
    """The model's own sampling with what was given on the command line in its place."""
    return replace(model.default_sampling, **{name: value for name, value in given.items() if value is not None})


def load_tools(files: tuple[str, ...]) -> tuple[Tool, ...]:
    """The functions of all files. A line for each goes to stderr, since they will be called without asking."""
    if not files:
        return ()
    import mlx_gptoss

    tools = tuple(tool for file in files for tool in mlx_gptoss.load_tools(file))
    for tool in tools:
        click.echo(f"the model may call {tool.function.name}", err=True)
    return tools


def load(
    model: str | None,
    backend: str,
    device: str | None,
    dtype: str | None,
    max_context: int | None,
    quantize: str | None,
    kv_bits: str | None,
    speculate: bool,
    prefix_cache: int | None,
    prompt_cache: str | None = None,
    **more: Any,
) -> Model:
    """The model, with a spinner on a terminal's stderr while it loads. prefix_cache: megabytes."""
    from rich.console import Console

    import mlx_gptoss

    with Console(stderr=True).status(f"Loading {model or 'the bundled model'}"):
        return mlx_gptoss.load(
            model,
            backend=backend,
            device=device,
            dtype=dtype,
            max_context=max_context,
            quantize=quantize,
            kv_bits=None if kv_bits is None else int(kv_bits),
            speculate=speculate,
            prefix_cache=None if prefix_cache is None else prefix_cache * 10**6,
            prompt_cache=prompt_cache,
            **more,
        )
