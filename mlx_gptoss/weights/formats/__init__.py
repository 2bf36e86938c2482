"""The table of formats, and what follows from it: which one a checkpoint has, and which can be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import CheckpointError
from ..params import Param
from ..safetensors import TensorInfo
from . import autoround, bf16, fp8, gguf, mlx, modelopt, mxfp4, original
from .base import HF_DENSE, CheckpointHeaders, ExpectedTensor, Format, Recipe, Source, hf_name

# Asked in this order where a parameter lies; bf16 is last as it also takes what is plain, and autoround before mlx as
# both name tensors `.scales`.
FORMATS: tuple[Format, ...] = (
    original.FORMAT,
    gguf.FORMAT,
    autoround.FORMAT,
    fp8.FORMAT,
    mlx.FORMAT,
    mxfp4.FORMAT,
    modelopt.FORMAT,
    bf16.FORMAT,
)
WRITERS: Mapping[str, Format] = {name: fmt for fmt in FORMATS if fmt.writes for name in fmt.recipes}

# Names that a known tool writes by mistake or that are not read: (what a name contains or ends in, why)
_REFUSED_NAMES = (
    (
        "$",
        "names that end in $ come from a transformers 5.14 bug (loading mxfp4, then saving); the tensors are lost "
        "behind them: save again with another release, or use the original checkpoint",
    ),
)


@dataclass(frozen=True)
class Binding:
    """Where every parameter lies in one checkpoint, the name of its format, and what is to be known of it."""

    name: str
    sources: Mapping[str, Source]  # by canonical name
    note: str


def bind(headers: CheckpointHeaders, params: Sequence[Param]) -> Binding:
    """Find every parameter and account for every tensor, from headers alone.

    Raises CheckpointError that lists what is missing, unknown, or of a wrong shape or dtype.
    """
    for ending, why in _REFUSED_NAMES:
        names = [name for name in headers.tensors if name.endswith(ending)]
        if names:
            raise CheckpointError(f"{_first_names(names)}: {why}")
    sources: dict[str, Source] = {}
    problems: dict[str, list[str]] = {"missing": [], "of a wrong shape": [], "of a wrong dtype": [], "unknown": []}
    used: set[str] = set()
    for param in params:
        source = next(filter(None, (fmt.find(param, headers) for fmt in FORMATS)), None)
        if source is None:
            problems["missing"].append(hf_name(param))
            continue
        sources[param.name] = source
        group = source.spec.group if source.spec else 0
        if group and param.shape[-1] % group:
            wrong = f"{source.expected[0].name} (rows of {param.shape[-1]} in groups of {group})"
            problems["of a wrong shape"].append(wrong)
        for expected in source.expected:
            if expected.name not in used:
                used.add(expected.name)
                _check_tensor(expected, headers.tensors.get(expected.name), problems)
    problems["unknown"] = sorted(set(headers.tensors) - used)
    if any(problems.values()):
        what = "; ".join(f"{len(names)} {kind}: {_first_names(names)}" for kind, names in problems.items() if names)
        raise CheckpointError(f"the tensors do not make a gpt-oss model of config.json's sizes: {what}")
    note = "; ".join(sorted({source.note for source in sources.values()} - {""}))
    return Binding(_format_name(sources, params), sources, note)


def recipe_of(name: str, search: str | None = None) -> tuple[Format, Recipe]:
    """The writer of a format name; search: "mse" for one that looks for better scales (search.py).

    Raises CheckpointError that lists the names there are.
    """
    if name not in WRITERS:
        read_only = any(name in fmt.recipes for fmt in FORMATS)
        why = "is only read, not written" if read_only else "is not a format"
        raise CheckpointError(f"{name!r} {why}; choose one of {', '.join(sorted(WRITERS))}")
    if search is None:
        return WRITERS[name], WRITERS[name].recipes[name]
    if search != "mse" or name not in mlx.SEARCHABLE:
        raise CheckpointError(
            f"search {search!r} cannot be had for {name}; search 'mse' can, for {' and '.join(mlx.SEARCHABLE)}"
        )
    return mlx.SEARCH_FORMAT, mlx.SEARCH_FORMAT.recipes[name]


def _check_tensor(expected: ExpectedTensor, info: TensorInfo | None, problems: dict[str, list[str]]) -> None:
    if info is None:
        problems["missing"].append(expected.name)
    elif info.shape != expected.shape:
        problems["of a wrong shape"].append(f"{expected.name} {list(info.shape)} instead of {list(expected.shape)}")
    elif info.dtype not in expected.dtypes:
        problems["of a wrong dtype"].append(f"{expected.name} {info.dtype} instead of {' or '.join(expected.dtypes)}")


def _first_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _format_name(sources: Mapping[str, Source], params: Sequence[Param]) -> str:
    """The name whose recipe every matrix follows. Else the only family that quantizes or, when none
    does, that keeps experts its own way; else `mixed`."""
    matrices = [param for param in params if param.is_matrix]
    for fmt in FORMATS:
        for name, recipe in fmt.recipes.items():
            if all(_matches(sources[param.name], recipe, param) for param in matrices):
                return name
    found = [sources[param.name] for param in matrices]
    families = {source.family for source in found if source.spec is not None}
    families = families or {source.family for source in found} - {HF_DENSE}
    return families.pop() if len(families) == 1 else "mixed"


def _matches(source: Source, recipe: Recipe, param: Param) -> bool:
    family, spec = recipe[param.role]
    if family == "mlx" and param.role == "router" and source.family in ("mlx", HF_DENSE):
        return True  # mlx-lm's releases differ in the router's bits
    if spec is not None and spec.group and param.shape[-1] % spec.group:
        return source.spec is None and source.family in (family, HF_DENSE)
    return (source.family, source.spec) == (family, spec)
