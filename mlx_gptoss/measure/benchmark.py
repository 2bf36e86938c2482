"""How fast a model runs: prefill and decode, each timed alone (timing.py), beside the bytes that a step reads and the
speed at which the device copies memory. Nothing here knows a device or another program.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import geometric_mean, median

from ..backends import find_backend
from ..backends.base import Backend, Limits
from ..config import FULL, PRESETS, ModelConfig
from ..errors import InvalidRequest
from ..loading.distributed import coordinate
from ..loading.memory import plan_memory, require_fit
from ..loading.plan import ACTIVATION_BYTES, LoadRequest
from ..loading.recommend import derived_bytes, upcastable_bytes
from ..ranks import Launch, find_launch
from ..weights.checkpoint import CheckpointLike
from ..weights.formats import WRITERS
from ..weights.params import Param, parameters
from ..weights.requantize import Requantized
from ..weights.synthetic import Synthetic
from ..weights.tensor import Weight, Weights
from . import agreement
from .agreement import Agreement
from .timing import Case, Contender, Ours

Tell = Callable[[str], None]  # what is being done, for whoever waits


@dataclass(frozen=True)
class Measurement:
    """Medians over the repetitions. Speeds are tokens a second of all sequences together.

    bytes_per_step: what one decoding step has to read: every weight but the experts' and the embedding table's, the
        experts that `batch` tokens touch in expectation, an embedding row a token, and keys and values of the context.
    bytes_per_token: the same by token. fraction_of_bound: decode_tok_s * bytes_per_token over the copy bandwidth.
    load_s: of synthetic weights, with their making. ratio: our speeds over the other program's.
    None where it is not known or not asked for.
    """

    engine: str
    backend: str
    device: str
    format: str
    batch: int
    prompt: int
    context: int
    generate: int
    load_s: float
    prefill_tok_s: float
    decode_tok_s: float
    peak_memory_bytes: int
    bytes_per_token: float | None = None
    bytes_per_step: float | None = None
    bandwidth_gb_s: float | None = None
    fraction_of_bound: float | None = None
    ratio: dict[str, float] | None = None


@dataclass(frozen=True)
class Report:
    """results: case by case, ours first. ratio: geometric means of all; None if there was no one to compare with.
    launches: of one decoded token by engine, as `launches_per_token` counts them; empty where that cannot be said."""

    results: tuple[Measurement, ...]
    agreements: tuple[Agreement, ...]
    ratio: dict[str, float] | None
    launches: dict[str, int]


class Counted:
    """Weights that note what is taken of them: bytes of each parameter by its name."""

    def __init__(self, source: Weights) -> None:
        self.config: ModelConfig = source.config
        self.sizes: dict[str, int] = {}
        self._source = source

    def read(self, name: str) -> Weight:
        weight = self._source.read(name)
        self.sizes[name] = weight.nbytes
        return weight

    def release(self) -> None:
        self._source.release()


@dataclass(frozen=True)
class Model:
    """Weights to be timed, of `size_bytes` in the format `form`. request: how other ranks find them."""

    weights: CheckpointLike | Requantized
    size_bytes: int
    form: str
    request: LoadRequest = field(default_factory=LoadRequest)


def load(model: Model, cases: Sequence[Case], repeat: int, where: Where, tell: Tell) -> tuple[Ours, Counted]:
    """Our model, with room for all cases. Raises DoesNotFit before anything is loaded."""
    module, config = where.module, model.weights.config
    context = max(case.length(repeat) for case in cases)
    if context > config.max_position_embeddings:
        most = config.max_position_embeddings - (context - max(case.context for case in cases))
        raise InvalidRequest(
            f"the model's context ends at {config.max_position_embeddings}; give at most {most} tokens"
        )
    launch = find_launch()
    if launch is not None:
        return _load_split(model, replace(model.request, max_context=context, slots=_slots(cases)), launch, where, tell)
    limits = Limits(_slots(cases), context, module.prefill_chunk(where.device))
    activation_bytes = ACTIVATION_BYTES[where.dtype]
    made = upcastable = 0
    if not isinstance(model.weights, Requantized):
        made = derived_bytes(model.weights)
        if where.backend == "mlx" and where.name == "cpu":
            upcastable = upcastable_bytes(model.weights, activation_bytes)
    plan = plan_memory(
        config,
        model.size_bytes + made,
        module.available_memory(where.device),
        activation_bytes=activation_bytes,
        context=context,
        slots=limits.slots,
        chunk=limits.chunk,
        upcastable_bytes=upcastable,
    )
    require_fit(plan, "this benchmark", {})
    tell(f"loading onto {where.name}, backend {where.backend}")
    limits = replace(limits, upcast=plan.upcast_bytes > 0)
    counted, started = Counted(model.weights), time.perf_counter()
    runner = module.load(counted, device=where.device, dtype=where.dtype, limits=limits)
    return Ours(runner, where.backend, where.name, model.form, time.perf_counter() - started), counted


def _load_split(model: Model, request: LoadRequest, launch: Launch, where: Where, tell: Tell) -> tuple[Ours, Counted]:
    """On rank 0 of several: the same, with what it holds itself counted."""
    tell(f"loading onto {where.name}, backend {where.backend}, with {launch.ranks - 1} other ranks")
    started = time.perf_counter()
    plan, start = coordinate(replace(request, device=where.device, dtype=where.dtype), launch)
    counted = Counted(plan.weights)
    runner = start(partial(replace(plan, weights=counted).load, plan.limits()))
    engine = f"mlx-gptoss, {launch.ranks} ranks"
    return Ours(runner, where.backend, where.name, model.form, time.perf_counter() - started, engine), counted


def _slots(cases: Sequence[Case]) -> int:
    return max(case.batch for case in cases)


@dataclass(frozen=True)
class Where:
    """A backend and a device of it. name: the device's; dtype: of the activations, never None."""

    module: Backend
    backend: str
    device: str | None
    name: str
    dtype: str

    @staticmethod
    def find(backend: str, device: str | None, dtype: str | None) -> Where:
        module, chosen = find_backend(backend)
        return Where(module, chosen, device, module.device_name(device), module.dtype_name(device, dtype))


def bench(
    model: Model,
    cases: Sequence[Case],
    where: Where,
    *,
    repeat: int = 3,
    others: Sequence[Contender] = (),
    must_agree: bool = False,
    tell: Tell = lambda what: None,
) -> Report:
    """Check, load and time; the others are loaded already.

    Before a GPU or narrow activations are timed, the first layers are held against float32 on the CPU (agreement.py);
    with `must_agree`, the others' logits must be ours too. Raises GptOssError if they are not.
    """
    agreements = []
    if where.name != "cpu" or where.dtype != "float32":
        tell(f"comparing {where.name} in {where.dtype} with the CPU in float32")
        batches = sorted({case.batch for case in cases})
        agreements.append(
            agreement.with_float32(where.module, model.weights, where.backend, where.device, where.dtype, batches)
        )
    tell("measuring the copy bandwidth")
    bandwidth = where.module.copy_bandwidth(where.device)
    ours, counted = load(model, cases, repeat, where, tell)
    try:
        for other in others:
            tell(f"comparing logits with {_name(other)}")
            agreements.append(agreement.of_logits(ours, other, where.dtype, model.weights.config, require=must_agree))
        results: list[Measurement] = []
        for case in cases:
            mine, *theirs = _measure([ours, *others], case, repeat, tell)
            results += [_bounded(mine, counted, where.dtype, bandwidth), *theirs]
    finally:
        ours.close()
    ratios = [result.ratio for result in results if result.ratio]
    overall = {key: geometric_mean(ratio[key] for ratio in ratios) for key in ("prefill", "decode")} if ratios else None
    if find_launch() is not None:
        return Report(tuple(results), tuple(agreements), overall, {})
    tell("counting launches")
    with_mlx_lm = any(other.engine.startswith("mlx-lm") for other in others)
    launches = launches_per_token(where, model, beside_mlx_lm=with_mlx_lm)
    return Report(tuple(results), tuple(agreements), overall, launches)


def launches_per_token(where: Where, model: Model, *, beside_mlx_lm: bool) -> dict[str, int]:
    """Launches of one decoded token at batch 1 through MLX, ours and, if wanted, mlx-lm's, counted on a tiny model with
    as many layers that are stored alike: what they hang on. Empty for another backend, or a format that has no writer.
    """
    if where.backend != "mlx" or model.form not in WRITERS:
        return {}
    counter, layers = import_module("mlx_gptoss.backends.mlx.launches"), model.weights.config.layer_types
    small = Synthetic(replace(PRESETS["tiny"], num_hidden_layers=len(layers), layer_types=layers), model.form)
    found = {"mlx-gptoss": counter.launches_per_token(small)}
    if beside_mlx_lm:
        with tempfile.TemporaryDirectory(prefix="mlx-gptoss-bench-") as folder:
            small.write(Path(folder) / "checkpoint")
            found["mlx-lm"] = counter.mlx_lm_launches_per_token(Path(folder) / "checkpoint")
    return found


def _measure(contenders: Sequence[Contender], case: Case, repeat: int, tell: Tell) -> list[Measurement]:
    """Ours first. Contenders take turns, so that what slows the machine for a while slows them all."""
    prefills: list[list[float]] = [[] for _ in contenders]
    decodes: list[list[float]] = [[] for _ in contenders]
    what = f"batch {case.batch}, context {case.context}"
    for contender in contenders:
        tell(f"{what}: warming up {_name(contender)}")
        contender.begin(case)
    for n in range(repeat):
        for contender, times in zip(contenders, prefills, strict=True):
            tell(f"{what}: prefill {n + 1} of {repeat}, {_name(contender)}")
            times.append(contender.prefill())
    for contender in contenders:
        tell(f"{what}: filling the context, {_name(contender)}")
        contender.fill()
    for n in range(repeat):
        for contender, times in zip(contenders, decodes, strict=True):
            tell(f"{what}: decode {n + 1} of {repeat}, {_name(contender)}")
            times.append(contender.decode())
    found = [_measurement(*entry, case) for entry in zip(contenders, prefills, decodes, strict=True)]
    if len(found) > 1:
        ours, other = found[:2]
        ratio = {
            "prefill": ours.prefill_tok_s / other.prefill_tok_s,
            "decode": ours.decode_tok_s / other.decode_tok_s,
        }
        found[0] = replace(ours, ratio=ratio)
    return found


def _name(contender: Contender) -> str:
    return f"{contender.engine} ({contender.backend})"


def _measurement(contender: Contender, prefills: list[float], decodes: list[float], case: Case) -> Measurement:
    return Measurement(
        engine=contender.engine,
        backend=contender.backend,
        device=contender.device,
        format=contender.format,
        batch=case.batch,
        prompt=case.prompt,
        context=case.context,
        generate=case.generate,
        load_s=contender.load_s,
        prefill_tok_s=case.batch * case.prompt / median(prefills),
        decode_tok_s=case.batch * case.generate / median(decodes),
        peak_memory_bytes=contender.peak_memory(),
    )


def _bounded(result: Measurement, counted: Counted, dtype: str, bandwidth: float) -> Measurement:
    config = counted.config
    step = step_bytes(counted.sizes, config, result.batch, result.context, ACTIVATION_BYTES[dtype])
    return replace(
        result,
        bytes_per_step=step,
        bytes_per_token=step / result.batch,
        bandwidth_gb_s=bandwidth / 1e9,
        fraction_of_bound=result.decode_tok_s * step / result.batch / bandwidth,
    )


def step_bytes(sizes: dict[str, int], config: ModelConfig, batch: int, context: int, activation_bytes: int) -> float:
    """Bytes that one decoding step of `batch` sequences has to read. sizes: of each parameter as stored, by name.

    Experts are chosen as if at random: batch tokens touch E (1 - (1 - A/E)^batch) of a layer's E in expectation.
    """
    E, A = config.num_local_experts, config.num_experts_per_tok
    touched = 1 - (1 - A / E) ** batch  # of the experts

    def read(param: Param) -> float:
        if param.role == "embed":
            return batch * sizes[param.name] / config.vocab_size
        return sizes[param.name] * (touched if param.role == "experts" else 1)

    windows = (context if kind == FULL else min(context, config.sliding_window) for kind in config.layer_types)
    cache = batch * sum(windows) * 2 * config.kv_size * activation_bytes
    return sum(read(param) for param in parameters(config)) + cache
