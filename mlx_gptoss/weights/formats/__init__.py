"""The table of formats, and what follows from it: recognizing a checkpoint's format, and finding a format's writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...errors import CheckpointError
from ..params import Param
from ..safetensors import TensorInfo
from ..tensor import Dense
from . import autoround, bf16, bitsandbytes, fp8, gguf, gptq, mlx, modelopt, mxfp4, original, quark, torchao
from .base import CheckpointHeaders, ExpectedTensor, Format, Recipe, Source
from .hf_layout import HF_DENSE, hf_name
from .tools import refusal

# Each parameter is looked up in this order. bf16 is last because it also takes every dense tensor, and gptq and
# autoround come before mlx because all have tensors called `.scales`.
FORMATS: tuple[Format, ...] = (
    original.FORMAT,
    gguf.FORMAT,
    bitsandbytes.FORMAT,
    gptq.FORMAT,
    autoround.FORMAT,
    quark.FORMAT,
    torchao.FORMAT,
    fp8.FORMAT,
    mlx.FORMAT,
    mxfp4.FORMAT,
    modelopt.FORMAT,
    bf16.FORMAT,
)
WRITERS: Mapping[str, Format] = {name: fmt for fmt in FORMATS if fmt.writes for name in fmt.recipes}
CONVERTERS: Mapping[str, Format] = {**WRITERS, **dict.fromkeys(gguf.GGUF_NAMES, gguf.FORMAT)}  # values of --to

_UNUSED_NAMES = (  # frequencies, and scales of FP8 caches
    ".rotary_emb.inv_freq",
    *(f".{x}_scale" for x in "qkv"),
    *(f".{x}_proj.output_scale" for x in "qkv"),  # Quark's
)
_UNUSED_MODULES = ("v_head.", "value_head.", "score.")  # heads that trainers put on top
_REFUSED_NAMES = (  # (what a tensor name ends in, why the checkpoint is refused)
    (
        "$",
        "names ending in $ come from a bug in transformers 5.14 (loading mxfp4, then saving), which loses the tensors "
        "behind them; save the model again with another release, or use the original checkpoint",
    ),
)


@dataclass(frozen=True)
class Binding:
    """How one checkpoint stores the network.

    name: the name of its format.
    sources: where each parameter is stored, by canonical name.
    note: one line that the user should know, or "".
    """

    name: str
    sources: Mapping[str, Source]
    note: str


def bind(headers: CheckpointHeaders, params: Sequence[Param]) -> Binding:
    """Find every parameter and account for every stored tensor, from headers alone.

    Raises CheckpointError that lists which tensors are missing, unknown, or of a wrong shape or dtype.
    """
    for ending, why in _REFUSED_NAMES:
        names = [name for name in headers.tensors if name.endswith(ending)]
        if names:
            raise CheckpointError(f"{_first_names(names)}: {why}")
    unused = {n for n in headers.tensors if n.endswith(_UNUSED_NAMES) or n.startswith(_UNUSED_MODULES)}
    headers = replace(headers, tensors={name: t for name, t in headers.tensors.items() if name not in unused})
    sources: dict[str, Source] = {}
    problems: dict[str, list[str]] = {"missing": [], "of a wrong shape": [], "of a wrong dtype": [], "unknown": []}
    used: set[str] = set()
    for param in params:
        try:
            source = _left_out(param, headers) or _find(param, headers)
        except CheckpointError as error:
            raise CheckpointError(f"{reason} ({error})" if (reason := refusal(headers)) else str(error)) from error
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
        listed = "; ".join(f"{len(names)} {kind}: {_first_names(names)}" for kind, names in problems.items() if names)
        mismatch = f"the tensors do not match a gpt-oss model of the sizes in config.json: {listed}"
        raise CheckpointError(f"{reason} ({mismatch})" if (reason := refusal(headers)) else mismatch)
    note = "; ".join(sorted({source.note for source in sources.values()} - {""}))
    heads = sorted(name for name in unused if name.startswith(_UNUSED_MODULES))
    if heads:
        note = "; ".join(filter(None, (note, f"not used, as they are no part of gpt-oss: {_first_names(heads)}")))
    return Binding(_format_name(sources, params), sources, note)


def _find(param: Param, headers: CheckpointHeaders) -> Source | None:
    """Where a parameter is stored, or None."""
    return next(filter(None, (fmt.find(param, headers) for fmt in FORMATS)), None)


def _left_out(param: Param, headers: CheckpointHeaders) -> Source | None:
    """The source of a parameter that config.json says is not stored: lm_head with tie_word_embeddings, which is the
    embedding table, and the biases of attention with `attention_bias: false`, which are zero. None if it is stored."""
    if param.role == "lm_head" and headers.raw.get("tie_word_embeddings") is True:
        source = _find(param, headers)
        if source is None or not headers.has(*(expected.name for expected in source.expected)):
            return _find(replace(param, name="embed.weight", role="embed"), headers)
    if param.role == "attention" and param.kind.endswith(".bias") and headers.raw.get("attention_bias") is False:
        source = _find(param, headers)
        if source is None or not headers.has(*(expected.name for expected in source.expected)):
            zeros = np.zeros(param.shape, np.float32)
            return Source(HF_DENSE, None, (), lambda get: Dense(zeros))
        raise CheckpointError(
            f"{source.expected[0].name} is stored, but config.json's attention_bias is false: one of the two was edited"
        )
    return None


def recipe_of(name: str, search: str | None = None) -> tuple[Format, Recipe]:
    """The writer and the recipe of a format.

    search: "mse" selects the writer that searches for better scales (search.py); None the ordinary one.
    Raises CheckpointError, with the valid names, for an unknown name or search.
    """
    if name not in CONVERTERS:
        read_only = any(name in fmt.recipes for fmt in FORMATS)
        why = "is read but not written" if read_only else "is not a format"
        raise CheckpointError(f"{name!r} {why}; choose one of {', '.join(sorted(CONVERTERS))}")
    if search is None:
        writer = CONVERTERS[name]
        return writer, writer.recipes.get(name, writer.recipes[next(iter(writer.recipes))])
    if search != "mse" or name not in mlx.SEARCHABLE:
        raise CheckpointError(
            f"search {search!r} is not available for {name}; search 'mse' is, for {' and '.join(mlx.SEARCHABLE)}"
        )
    return mlx.SEARCH_FORMAT, mlx.SEARCH_FORMAT.recipes[name]


def _check_tensor(expected: ExpectedTensor, info: TensorInfo | None, problems: dict[str, list[str]]) -> None:
    """Add what is wrong with a stored tensor to `problems`."""
    if info is None:
        problems["missing"].append(expected.name)
    elif info.shape != expected.shape:
        problems["of a wrong shape"].append(f"{expected.name} {list(info.shape)} instead of {list(expected.shape)}")
    elif info.dtype not in expected.dtypes:
        problems["of a wrong dtype"].append(f"{expected.name} {info.dtype} instead of {' or '.join(expected.dtypes)}")


def _first_names(names: Sequence[str]) -> str:
    """The first four names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _format_name(sources: Mapping[str, Source], params: Sequence[Param]) -> str:
    """The format whose recipe every matrix matches.

    Without one, the only family among the quantized matrices or, if none is quantized, among all of them (HF_DENSE
    aside); "mixed" if there are several.
    """
    matrices = [param for param in params if param.is_matrix]
    for fmt in FORMATS:
        for name, recipe in fmt.recipes.items():
            if all(_matches(sources[param.name], recipe, param) for param in matrices):
                return name
    found = [sources[param.name] for param in matrices]
    families = {source.family for source in found if source.spec is not None or source.stored_name}
    families = families or {source.family for source in found} - {HF_DENSE}
    return families.pop() if len(families) == 1 else "mixed"


def _matches(source: Source, recipe: Recipe, param: Param) -> bool:
    """Whether a matrix is stored as the recipe says."""
    family, spec = recipe[param.role]
    if family == "mlx" and param.role == "router" and source.family in ("mlx", HF_DENSE):
        return True  # the router's bits differ between releases of mlx-lm
    if spec is not None and spec.group and param.shape[-1] % spec.group:
        return source.spec is None and source.family in (family, HF_DENSE)
    return (source.family, source.spec) == (family, spec)
