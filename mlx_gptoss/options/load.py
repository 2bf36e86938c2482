"""The options of load()."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from ..errors import InvalidRequest
from . import check
from .declare import Flag, Options, check_names, documented, option, spell_out

MAX_SLOTS = 4096
MAX_ADAPTERS = 64
ADAPTER_NAME = re.compile(r"[\w.@+-]{1,100}", re.ASCII)

Fields = ParamSpec("Fields")
Loaded = TypeVar("Loaded", covariant=True)


@documented
@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How to load a checkpoint. JSON can hold it, so that one rank can tell it to the others."""

    backend: str = option(
        "auto",
        '"mlx", "cuda" (PyTorch, on a CPU too) or "auto": cuda where torch is installed and finds an NVIDIA GPU, '
        "otherwise mlx.",
        Flag("auto|mlx|cuda"),
    )
    device: str | None = option(
        None, '"cpu", "gpu" or, with the cuda backend, "cuda:N". Default: the best there is.', Flag("cpu|gpu|cuda:N")
    )
    dtype: str | None = option(
        None,
        'Data type of activations and KV cache: "float32", "bfloat16" or "float16". Default: bfloat16 on a GPU, '
        "float32 on a CPU.",
        Flag("NAME"),
    )
    max_context: int | None = option(
        None,
        "Maximum tokens of a sequence, prompt and answer together. Default: the model's maximum, or what fits into "
        "memory.",
        Flag("N", minimum=1),
    )
    slots: int = option(1, "Sequences generated at once; further requests wait.", Flag("N", minimum=1))
    quantize: str | None = option(
        None,
        'Quantize while loading: an MLX format such as "mlx-4bit", or "rest-8bit" or "rest-4bit", which keep experts '
        "and router as stored. Default: run all weights as stored.",
        Flag("NAME"),
    )
    kv_bits: int | None = option(
        None,
        "8 keeps keys and values of the full-attention layers in 8 bits, 9/16 of their memory in bfloat16.",
        Flag(choices=("8",)),
    )
    speculate: bool = option(
        False,
        "Draft up to 3 tokens by prompt lookup and verify them in one step. The text stays the same, up to rounding.",
        Flag(),
    )
    custom_kernels: bool = option(
        True,
        "Use the custom Metal kernels that passed their check on this machine (mlx on a Mac's GPU).",
        Flag(),
    )
    max_waiting: int | None = option(
        None,
        "Requests that may wait for a slot; more are refused (Busy). Default: no limit.",
        Flag("N", minimum=0),
    )
    prefix_cache: int | None = option(
        None,
        "Memory for prompts computed earlier, from which prompts with the same beginning continue: bytes in Python, MB "
        "on the command line; 0 turns it off. Default: half of the memory left, 2 GB at most.",
        Flag("MB", minimum=0, unit=10**6),
    )
    prompt_cache: str | Path | None = option(
        None, "A folder that keeps the prefix cache in files, for the next start.", Flag("DIR")
    )

    adapters: Mapping[str, str | Path] | None = option(
        None,
        "LoRA adapters of PEFT or mlx-lm, by the names that requests choose them by: folders or hub ids. They are "
        "applied at run time, and the weights stay as they are stored.",
        Flag("NAME=PATH", repeatable=True),
    )

    def __post_init__(self) -> None:
        """Raise InvalidRequest for a value of another type or out of range. Names are checked where they are looked
        up."""
        check.kind("backend", self.backend, str, "a string")
        for name in ("device", "dtype", "quantize"):
            check.name_or_none(name, getattr(self, name))
        check.integer("slots", self.slots, 1, MAX_SLOTS)
        for name, low, high in (("max_context", 1, 2**31), ("max_waiting", 0, None), ("prefix_cache", 0, 2**48)):
            if getattr(self, name) is not None:
                check.integer(name, getattr(self, name), low, high)
        if self.kv_bits is not None:
            check.one_of("kv_bits", self.kv_bits, (8,))
        check.kind("speculate", self.speculate, bool, "True or False")
        check.kind("custom_kernels", self.custom_kernels, bool, "True or False")
        _check_adapters(self.adapters)
        check.kind("prompt_cache", self.prompt_cache, (str, Path, type(None)), "a folder or None")


def _check_adapters(adapters: object) -> None:
    check.kind("adapters", adapters, (Mapping, type(None)), 'a dict, {"name": "folder or hub id"}')
    if not isinstance(adapters, Mapping):
        return
    if len(adapters) > MAX_ADAPTERS:
        raise InvalidRequest(f"adapters has {len(adapters)} entries; at most {MAX_ADAPTERS} can be loaded")
    for name, path in adapters.items():
        if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
            raise InvalidRequest(f"an adapter's name is made of letters, digits and . _ @ + -, not {check.shown(name)}")
        check.kind(f"adapters[{name!r}]", path, (str, Path), "a folder or a hub id")


class Loads(Protocol[Fields, Loaded]):
    """The type of load(): a model's name, then options by name."""

    def __call__(
        self, path_or_repo_id: str | Path | None = None, *args: Fields.args, **options: Fields.kwargs
    ) -> Loaded: ...


def loads(
    options: Callable[Fields, Options],
) -> Callable[[Callable[[str | Path | None, Options], Loaded]], Loads[Fields, Loaded]]:
    """As declare.takes, for a function whose one argument before the options is a model's name and may be left out."""

    def decorate(function: Callable[[str | Path | None, Options], Loaded]) -> Loads[Fields, Loaded]:
        def call(path_or_repo_id: str | Path | None = None, *args: Fields.args, **named: Fields.kwargs) -> Loaded:
            check_names(call, named)
            check.kind("path_or_repo_id", path_or_repo_id, (str, Path, type(None)), "a path, a hub id or None")
            return function(path_or_repo_id, options(*args, **named))

        spell_out(call, function, options)
        return call

    return decorate
