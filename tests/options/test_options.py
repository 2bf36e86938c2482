"""Options are declared once: signatures, help and the command line all come from the dataclasses."""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields

import click
import pytest
from mlx_gptoss_cli.main import COMMANDS, group
from mlx_gptoss_cli.options import declared

import mlx_gptoss
from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.options import GenerationOptions, LoadOptions, RawOptions
from mlx_gptoss.options.declare import Flag
from mlx_gptoss.options.sampling import SamplingOptions
from mlx_gptoss.weights.formats import CONVERTERS

# Of a text; names of tools; files of functions.
OTHER_MEANING = {
    ("convert", "adapter"),  # a folder, not a name
    ("eval", "max_tokens"),
    ("serve", "tools"),
    ("generate", "tools"),
    ("chat", "tools"),
}


def parameters(function):
    return {name: p.default for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}


def defaults(options):
    return {declaration.name: declaration.default for declaration in fields(options)}


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (mlx_gptoss.load, LoadOptions),
        (mlx_gptoss.Model.generate, GenerationOptions),
        (mlx_gptoss.Model.stream, GenerationOptions),
        (mlx_gptoss.Model.agenerate, GenerationOptions),
        (mlx_gptoss.Model.astream, GenerationOptions),
        (mlx_gptoss.Model.complete, RawOptions),
        (mlx_gptoss.Model.acomplete, RawOptions),
        (mlx_gptoss.Model.stream_raw, RawOptions),
        (mlx_gptoss.Model.astream_raw, RawOptions),
    ],
    ids=lambda each: each.__name__,
)
def test_signature_and_help_name_every_option(function, options):
    assert parameters(function) == defaults(options)
    text = inspect.getdoc(function)
    for declaration in fields(options):
        assert f"\n    {declaration.name}: " in text
    assert "Raises" in text


@pytest.mark.parametrize("options", [LoadOptions, GenerationOptions, mlx_gptoss.Sampling])
def test_classes_document_their_fields(options):
    text = inspect.getdoc(options)
    assert all(f"\n{declaration.name}: " in text for declaration in fields(options))


def test_convert_names_every_format_it_writes():
    assert all(f'"{name}"' in inspect.getdoc(mlx_gptoss.convert) for name in CONVERTERS)


def test_an_unknown_option_is_a_type_error_that_names_the_nearest():
    with pytest.raises(TypeError, match=r"load\(\) has no option 'max_contxt'; did you mean 'max_context'\?"):
        mlx_gptoss.load(max_contxt=1)
    with pytest.raises(TypeError, match=r"load\(\) has no option 'zzz'; help\(load\) lists them"):
        mlx_gptoss.load(zzz=1)


def test_coroutine_functions_are_known_as_such():
    if sys.version_info >= (3, 12):  # before, nothing but `async def` is
        assert inspect.iscoroutinefunction(mlx_gptoss.Model.agenerate)
    assert not inspect.iscoroutinefunction(mlx_gptoss.Model.generate)


def test_the_fields_of_sampling_are_options_of_the_same_names_and_texts():
    names = {each.name: each.metadata["help"] for each in fields(mlx_gptoss.Sampling)}
    options = {each.name: each.metadata["help"] for each in fields(SamplingOptions) if each.name != "sampling"}
    assert options == names


def test_sampling_by_name_changes_only_what_is_named():
    default = mlx_gptoss.Sampling(temperature=0.5, top_p=0.9, stop=("x",))
    assert RawOptions().resolve(default) == default
    assert RawOptions(temperature=1.0).resolve(default) == mlx_gptoss.Sampling(temperature=1.0, top_p=0.9, stop=("x",))
    assert RawOptions(stop=(), top_k=3).resolve(default) == mlx_gptoss.Sampling(temperature=0.5, top_p=0.9, top_k=3)
    assert RawOptions(stop="y").resolve(default).stop == ("y",)
    chosen = mlx_gptoss.Sampling(seed=4)
    assert RawOptions(sampling=chosen).resolve(default) == chosen
    with pytest.raises(InvalidRequest, match="sampling and temperature, seed are both given"):
        GenerationOptions(sampling=chosen, temperature=0, seed=1)


def test_no_command_declares_an_option_of_its_own_that_stands_in_a_dataclass():
    """Name, default and help are the dataclass's; a command may choose another default."""
    every = {each.name: each for cls in (LoadOptions, GenerationOptions, mlx_gptoss.Sampling) for each in fields(cls)}
    seen = set()
    for command in COMMANDS:
        for option in group.get_command(click.Context(group), command).params:
            declaration = every.get(option.name)
            if declaration is None or (command, option.name) in OTHER_MEANING:
                continue
            seen.add(option.name)
            assert isinstance(declaration.metadata["flag"], Flag)
            assert option.help == declaration.metadata["help"].replace('"', "")
    assert {"backend", "slots", "prefix_cache", "max_tokens", "temperature", "seed"} <= seen


def run(options, *words):
    given = {}
    command = click.Command("c", params=[], callback=lambda **values: given.update(values))
    for option in options:
        command = option(command)
    command.main(list(words), standalone_mode=False)
    return given


def test_units_choices_and_minimums():
    options = declared(LoadOptions, "prefix_cache", "kv_bits", "speculate", "custom_kernels", slots=4)
    defaults = {"prefix_cache": None, "kv_bits": None, "speculate": False, "custom_kernels": True, "slots": 4}
    assert run(options) == defaults
    words = ("--prefix-cache", "8", "--kv-bits", "8", "--speculate", "--no-custom-kernels", "--slots", "2")
    wanted = {"prefix_cache": 8 * 10**6, "kv_bits": 8, "speculate": True, "custom_kernels": False, "slots": 2}
    assert run(options, *words) == wanted
    for words in (("--kv-bits", "4"), ("--slots", "0"), ("--prefix-cache", "-1")):
        with pytest.raises(click.BadParameter):
            run(options, *words)
