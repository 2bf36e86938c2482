"""Speed of a model: prefill and decode timed apart (timing.py), the bytes that a step reads, and the bandwidth of a
copy on the same device. It knows no device and no other engine by name.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from statistics import geometric_mean, median

from ..backends import find_backend
from ..backends.base import Backend, Limits
from ..config import PRESETS, ModelConfig
from ..errors import InvalidRequest
from ..loading.distributed import coordinate
from ..loading.memory import plan_memory, require_fit
from ..loading.plan import ACTIVATION_BYTES, LoadRequest, open_adapters
from ..loading.recommend import derived_bytes, padding_bytes, upcastable_bytes
from ..loading.step_reads import resident_bytes, step_reads
from ..machine import chip, gpu_cores
from ..ranks import Launch, find_launch
from ..weights.adapters import Adapter
from ..weights.checkpoint import CheckpointLike
from ..weights.formats import WRITERS
from ..weights.requantize import Requantized
from ..weights.synthetic import Synthetic
from ..weights.tensor import Weight, Weights
from . import agreement
from .agreement import Agreement
from .chips import ChipBandwidth, published_bandwidth
from .costs import prefill_flops, step_bytes
from .cpu import CpuLimits
from .timing import Case, Drafts, OurEngine, TimedEngine

Log = Callable[[str], None]  # receives a line for each thing that begins


@dataclass(frozen=True)
class Measurement:
    """Medians over the repetitions. Speeds are tokens per second of all sequences together.

    adapter: name of the LoRA adapter that all sequences use; None is the model as it is.
    bytes_per_step: what one decode step must read: every weight except experts and embeddings, the experts that
        `batch` tokens use in expectation, the adapter's factors likewise, one embedding row per token, and the keys
        and values of the context.
    bytes_per_token: the same per token. fraction_of_bound: decode_tok_s * bytes_per_token / copy bandwidth.
    load_s: seconds; for synthetic weights, generating them is included. ratio: our speeds divided by the other
        engine's. None means unknown or not requested. prefill_runs, decode_runs: the speed of each repetition.
    host_ms_per_step: what the host takes to build and submit a decode step, mostly while the device computes.
    drafts: of all repetitions, if tokens were drafted. The bytes and the bound are those of decoding without.
    fraction_of_sgemm: on a CPU, the arithmetic of the prompts a second over numpy's (cpu.py).
    published_bound_tok_s: tokens per second by the bandwidth that Apple publishes for the chip.
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
    prefill_runs: tuple[float, ...] = ()
    decode_runs: tuple[float, ...] = ()
    adapter: str | None = None
    host_ms_per_step: float | None = None
    published_bound_tok_s: float | None = None
    fraction_of_sgemm: float | None = None
    drafts: Drafts | None = None


@dataclass(frozen=True)
class Report:
    """What `bench` returns.

    results: case by case, ours first. ratio: geometric means over all cases; None without another engine.
    launches: of one decoded token by engine, from launches_per_token; empty if they cannot be counted.
    command_buffers: of one decoded token at batch 1 on an Apple GPU, estimated from the launches and from what they
        read, by whose limits; empty without launches. chip: its published bandwidth; None if it is not Apple's.
    cpu: None on a GPU.
    """

    results: tuple[Measurement, ...]
    agreements: tuple[Agreement, ...]
    ratio: dict[str, float] | None
    launches: dict[str, int]
    command_buffers: dict[str, int] = field(default_factory=dict)
    chip: ChipBandwidth | None = None
    cpu: CpuLimits | None = None


class CountedWeights:
    """Weights that record the bytes of each parameter that is read, by name. adapter, kv_bits: timed with them."""

    def __init__(self, source: Weights, adapter: Adapter | None = None, kv_bits: int | None = None) -> None:
        self.adapter, self.kv_bits = adapter, kv_bits
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
class BenchModel:
    """Weights to be timed. size_bytes: in the format `format_name`. request: how other ranks find them, and the only
    adapter, if it has one."""

    weights: CheckpointLike | Requantized
    size_bytes: int
    format_name: str
    request: LoadRequest = field(default_factory=LoadRequest)

    @cached_property
    def adapter(self) -> Adapter | None:
        """The request's adapter. Raises CheckpointError."""
        return next(iter(open_adapters(self.request.adapters or {}, self.weights.config).values()), None)


def load(
    model: BenchModel, cases: Sequence[Case], repeat: int, target: Target, log: Log
) -> tuple[OurEngine, CountedWeights]:
    """Load our model with memory for all cases. Raises DoesNotFit before any weight is read."""
    module, config = target.module, model.weights.config
    context = max(case.length(repeat) for case in cases)
    if context > config.max_position_embeddings:
        max_tokens = config.max_position_embeddings - (context - max(case.context for case in cases))
        raise InvalidRequest(
            f"the model's context ends at {config.max_position_embeddings}; give at most {max_tokens} tokens"
        )
    launch = find_launch()
    if launch is not None:
        return _load_split(model, replace(model.request, max_context=context, slots=_slots(cases)), launch, target, log)
    adapters = () if model.adapter is None else (model.adapter,)
    kv_bits, drafts = model.request.kv_bits, model.request.drafts
    limits = Limits(_slots(cases), context, module.prefill_chunk(target.device), kv_bits=kv_bits, drafts=drafts)
    activation_bytes = ACTIVATION_BYTES[target.dtype]
    derived = upcastable = 0
    if not isinstance(model.weights, Requantized):
        compiled = module.cpu_products(target.device, target.dtype) == "compiled"
        derived = derived_bytes(model.weights, target.backend, compiled=compiled)
        if target.backend == "mlx" and target.name == "cpu" and not compiled:
            upcastable = upcastable_bytes(model.weights, activation_bytes)
    plan = plan_memory(
        config,
        model.size_bytes + derived + padding_bytes(model.weights, target.backend, target.name),
        module.available_memory(target.device),
        activation_bytes=activation_bytes,
        context=context,
        slots=limits.slots,
        chunk=limits.chunk,
        kv_bits=kv_bits,
        drafts=drafts,
        upcastable_bytes=upcastable,
        adapter_bytes=sum(adapter.nbytes(activation_bytes) for adapter in adapters),
    )
    require_fit(plan, "this benchmark", {})
    log(f"loading onto {target.name}, backend {target.backend}")
    limits = replace(limits, upcast=plan.upcast_bytes > 0)
    counted, started = CountedWeights(model.weights, model.adapter, kv_bits), time.perf_counter()
    runner = module.load(counted, device=target.device, dtype=target.dtype, limits=limits, adapters=adapters)
    engine = OurEngine(runner, target.backend, target.name, model.format_name, time.perf_counter() - started)
    engine.adapter = 0 if adapters else None
    return engine, counted


def _load_split(
    model: BenchModel, request: LoadRequest, launch: Launch, target: Target, log: Log
) -> tuple[OurEngine, CountedWeights]:
    """load() on rank 0 of several; counts the weights that this rank holds."""
    log(f"loading onto {target.name}, backend {target.backend}, with {launch.ranks - 1} other ranks")
    started = time.perf_counter()
    plan, start = coordinate(replace(request, device=target.device, dtype=target.dtype), launch)
    counted = CountedWeights(plan.weights, next(iter(plan.adapters.values()), None), request.kv_bits)
    runner = start(partial(replace(plan, weights=counted).load, plan.limits()))
    load_s, name = time.perf_counter() - started, f"mlx-gptoss, {launch.ranks} ranks"
    engine = OurEngine(runner, target.backend, target.name, model.format_name, load_s, name)
    engine.adapter = 0 if plan.adapters else None
    return engine, counted


def _slots(cases: Sequence[Case]) -> int:
    return max(case.batch for case in cases)


@dataclass(frozen=True)
class Target:
    """A backend and one of its devices. name: the device's name. dtype: of the activations, never None."""

    module: Backend
    backend: str
    device: str | None
    name: str
    dtype: str

    @staticmethod
    def find(
        backend: str, device: str | None, dtype: str | None, model: BenchModel | None = None, context: int | None = None
    ) -> Target:
        """model: that will be loaded first, with `context` tokens: the process is then prepared for it."""
        module, chosen = find_backend(backend)
        if model is not None:
            reads = step_reads(model.weights, chosen)
            module.prepare(device, reads, resident_bytes(model.weights, context, 1))
        return Target(module, chosen, device, module.device_name(device), module.dtype_name(device, dtype))


def bench(
    model: BenchModel,
    cases: Sequence[Case],
    target: Target,
    *,
    repeat: int = 3,
    others: Sequence[TimedEngine] = (),
    must_agree: bool = False,
    log: Log = lambda what: None,
) -> Report:
    """Check, load and time our model; `others` are loaded already.

    Before a GPU or a narrow data type is timed, its first layers are compared with float32 on the CPU (agreement.py).
    With must_agree, the other engines' logits must match ours. Raises GptOssError if they do not.
    """
    agreements = []
    if target.name != "cpu" or target.dtype != "float32":
        log(f"comparing {target.name} in {target.dtype} with the CPU in float32")
        batches = sorted({case.batch for case in cases})
        agreements.append(
            agreement.with_cpu_float32(
                target.module, model.weights, target.backend, target.device, target.dtype, batches, model.adapter
            )
        )
    log("measuring the copy bandwidth")
    bandwidth = target.module.copy_bandwidth(target.device)
    limits = CpuLimits.of(target.module, target.device, target.dtype) if target.name == "cpu" else None
    published = None if target.name == "cpu" else published_bandwidth(chip(), gpu_cores())
    ours, counted = load(model, cases, repeat, target, log)
    try:
        for other in others:
            log(f"comparing logits with {_name(other)}")
            agreements.append(
                agreement.with_other_engine(ours, other, target.dtype, model.weights.config, require=must_agree)
            )
        results: list[Measurement] = []
        for case in cases:
            mine, *theirs = _measure([ours, *others], case, repeat, log)
            drafts = sum(ours.drafts[-repeat:], Drafts()) if ours.drafts else None
            steps = case.generate if drafts is None else drafts.steps / repeat
            host = median(ours.host_seconds[-repeat:]) / steps * 1e3
            mine = _bounded(mine, counted, target.dtype, bandwidth, published, limits)
            results += [replace(mine, host_ms_per_step=host, drafts=drafts), *theirs]
    finally:
        ours.close()
    ratios = [result.ratio for result in results if result.ratio]
    overall = {key: geometric_mean(ratio[key] for ratio in ratios) for key in ("prefill", "decode")} if ratios else None
    if find_launch() is not None or model.adapter is not None:  # what is counted is the model as it is
        return Report(tuple(results), tuple(agreements), overall, {}, chip=published, cpu=limits)
    log("counting launches")
    with_mlx_lm = any(other.engine.startswith("mlx-lm") for other in others)
    launches = launches_per_token(target, model, count_mlx_lm=with_mlx_lm)
    buffers = command_buffers(model, launches["mlx-gptoss"], cases[0].context, target) if launches else {}
    return Report(tuple(results), tuple(agreements), overall, launches, buffers, published, limits)


def launches_per_token(target: Target, model: BenchModel, *, count_mlx_lm: bool) -> dict[str, int]:
    """Launches of one decoded token at batch 1 through MLX, ours and optionally mlx-lm's.

    Counted on a tiny model with the same number of layers in the same format, which determine the count. Empty for
    another backend, or a format that cannot be written.
    """
    if target.backend != "mlx" or model.format_name not in WRITERS:
        return {}
    counter, layers = import_module("mlx_gptoss.backends.mlx.launches"), model.weights.config.layer_types
    small = Synthetic(replace(PRESETS["tiny"], num_hidden_layers=len(layers), layer_types=layers), model.format_name)
    found = {"mlx-gptoss": counter.launches_per_token(small)}
    if count_mlx_lm:
        with tempfile.TemporaryDirectory(prefix="mlx-gptoss-bench-") as folder:
            small.write(Path(folder) / "checkpoint")
            found["mlx-lm"] = counter.mlx_lm_launches_per_token(Path(folder) / "checkpoint")
    return found


def command_buffers(model: BenchModel, launches: int, context: int, target: Target) -> dict[str, int]:
    """Command buffers of one decoded token at batch 1 on an Apple GPU, estimated (backends/mlx/command_buffers.py): by
    MLX's limits, and where others are in force or would be chosen on a large Mac of a chip that gains, by those."""
    code = import_module("mlx_gptoss.backends.mlx.command_buffers")
    elements = [code.stored_elements(*read) for read in step_reads(model.weights, target.backend, context)]
    own, other = code.describe_limits(step_reads(model.weights, target.backend))
    found = {"MLX's limits": code.count_buffers(elements, launches, own)}
    return found if other is None else found | {"ours": code.count_buffers(elements, launches, other)}


def _measure(engines: Sequence[TimedEngine], case: Case, repeat: int, log: Log) -> list[Measurement]:
    """Time all engines, ours first, in turns, so that a busy moment of the machine slows all of them."""
    prefills: list[list[float]] = [[] for _ in engines]
    decodes: list[list[float]] = [[] for _ in engines]
    what = f"batch {case.batch}, context {case.context}"
    for engine in engines:
        log(f"{what}: warming up {_name(engine)}")
        engine.begin(case)
    for n in range(repeat):
        for engine, times in zip(engines, prefills, strict=True):
            log(f"{what}: prefill {n + 1} of {repeat}, {_name(engine)}")
            times.append(engine.prefill())
    for engine in engines:
        log(f"{what}: filling the context, {_name(engine)}")
        engine.fill()
    for n in range(repeat):
        for engine, times in zip(engines, decodes, strict=True):
            log(f"{what}: decode {n + 1} of {repeat}, {_name(engine)}")
            times.append(engine.decode())
    found = [_measurement(*entry, case) for entry in zip(engines, prefills, decodes, strict=True)]
    if len(found) > 1:
        ours, other = found[:2]
        ratio = {
            "prefill": ours.prefill_tok_s / other.prefill_tok_s,
            "decode": ours.decode_tok_s / other.decode_tok_s,
        }
        found[0] = replace(ours, ratio=ratio)
    return found


def _name(engine: TimedEngine) -> str:
    return f"{engine.engine} ({engine.backend})"


def _measurement(engine: TimedEngine, prefills: list[float], decodes: list[float], case: Case) -> Measurement:
    return Measurement(
        engine=engine.engine,
        backend=engine.backend,
        device=engine.device,
        format=engine.format,
        batch=case.batch,
        prompt=case.prompt,
        context=case.context,
        generate=case.generate,
        load_s=engine.load_s,
        prefill_tok_s=case.batch * case.prompt / median(prefills),
        decode_tok_s=case.batch * case.generate / median(decodes),
        peak_memory_bytes=engine.peak_memory(),
        prefill_runs=tuple(case.batch * case.prompt / seconds for seconds in prefills),
        decode_runs=tuple(case.batch * case.generate / seconds for seconds in decodes),
    )


def _bounded(
    result: Measurement,
    counted: CountedWeights,
    dtype: str,
    bandwidth: float,
    published: ChipBandwidth | None,
    limits: CpuLimits | None,
) -> Measurement:
    sizes, config, adapter, bits = counted.sizes, counted.config, counted.adapter, counted.kv_bits
    step = step_bytes(sizes, config, result.batch, result.context, ACTIVATION_BYTES[dtype], adapter, bits)
    flops = result.prefill_tok_s / result.prompt * prefill_flops(config, result.prompt)
    return replace(
        result,
        fraction_of_sgemm=None if limits is None else flops / limits.sgemm_gflops / 1e9,
        adapter=None if adapter is None else adapter.name,
        bytes_per_step=step,
        bytes_per_token=step / result.batch,
        bandwidth_gb_s=bandwidth / 1e9,
        fraction_of_bound=result.decode_tok_s * step / result.batch / bandwidth,
        published_bound_tok_s=None if published is None else published.gb_s * 1e9 * result.batch / step,
    )
