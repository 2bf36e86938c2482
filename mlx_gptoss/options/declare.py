"""Options as a frozen dataclass whose fields carry their help text, and functions that take them by name.

`takes(Options)` turns a method `f(self, prompt, options: Options)` into `f(self, prompt, *, name=default, ...)`: its
signature, type and documentation come from the dataclass. The command line makes its options from the same fields
(cli/options.py). So each option has one name, one default and one text.
"""

from __future__ import annotations

import difflib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import update_wrapper
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

Options = TypeVar("Options")
Fields = ParamSpec("Fields")
Owner = TypeVar("Owner")
First = TypeVar("First")
Result = TypeVar("Result")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Flag:
    """How an option looks on the command line.

    metavar: its placeholder in --help. choices: the values allowed, as text. minimum: of a number.
    unit: what one unit on the command line is worth in Python, such as 10**6 for megabytes that Python takes in bytes.
    repeatable: whether it may be given more than once.
    """

    metavar: str | None = None
    choices: tuple[str, ...] = ()
    minimum: int | None = None
    unit: int = 1
    repeatable: bool = False


def option(default: Value, help: str, flag: Flag | None = None) -> Value:
    """A dataclass field with its help text. Without a flag the command line does not offer it."""
    return field(default=default, metadata={"help": help, "flag": flag})


def documentation(options: type) -> str:
    """A paragraph per field, `name: help`, wrapped to 110 columns."""
    wrap = textwrap.TextWrapper(width=110, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrap.fill(f"{declared.name}: {declared.metadata['help']}") for declared in fields(options))


def documented(options: type[Options]) -> type[Options]:
    """A class decorator: the documentation of the fields follows the class's docstring."""
    options.__doc__ = f"{inspect.getdoc(options)}\n\n{documentation(options)}"
    return options


def takes(
    options: Callable[Fields, Options],
) -> Callable[[Callable[[Owner, First, Options], Result]], Callable[Concatenate[Owner, First, Fields], Result]]:
    """A decorator for a method with one argument before its options. That argument may be given by its name, too."""

    def decorate(
        method: Callable[[Owner, First, Options], Result],
    ) -> Callable[Concatenate[Owner, First, Fields], Result]:
        def call(owner: Owner, *first: Any, **named: Any) -> Result:
            check_names(call, named)
            argument = list(inspect.signature(method).parameters)[1]
            if len(first) > 1 or (first and argument in named):
                raise TypeError(f"{call.__name__}() takes one {argument}; give options by name, such as max_tokens=100")
            if not first and argument not in named:
                raise TypeError(f"{call.__name__}() needs {argument}")
            value = first[0] if first else named.pop(argument)
            return method(owner, value, cast("Callable[..., Options]", options)(**named))

        spell_out(call, method, options)
        return cast("Callable[Concatenate[Owner, First, Fields], Result]", call)

    return decorate


def check_names(function: Callable[..., Any], named: Iterable[str]) -> None:
    """Raise TypeError for a name that the function's signature does not have; it suggests the nearest one."""
    known = list(inspect.signature(function).parameters)
    for name in named:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            remedy = f"did you mean {near[0]!r}?" if near else f"help({function.__qualname__}) lists them"
            raise TypeError(f"{function.__name__}() has no option {name!r}; {remedy}")


def spell_out(call: Callable[..., Any], function: Callable[..., Any], options: Callable[..., Any]) -> None:
    """Give `call` the name, signature and documentation of `function`, its last parameter spelled out."""
    assert isinstance(options, type)
    update_wrapper(call, function)
    signature = inspect.signature(function)
    *leading, _ = signature.parameters.values()
    named = inspect.signature(options).parameters.values()
    call.__signature__ = signature.replace(parameters=[*leading, *named])  # type: ignore[attr-defined]
    call.__doc__ = f"{inspect.getdoc(function)}\n\nOptions:\n{textwrap.indent(documentation(options), '    ')}"
    del call.__wrapped__  # type: ignore[attr-defined] # it has no names in its signature
    if inspect.iscoroutinefunction(function) and sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(call)
