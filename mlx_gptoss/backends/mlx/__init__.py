"""The MLX backend: `load(checkpoint, ...) -> MlxRunner`. Read model.py first."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import mlx.core as mx

from ...errors import BackendUnavailable, InvalidRequest
from ...machine import ram_copy_bandwidth, system_available
from ...weights.adapters import Adapter
from ...weights.split import RankShard
from ...weights.tensor import Weights
from ..base import Limits, MatMul, Read
from . import command_buffers, host, wiring
from .cpu.products import Products, compiles
from .elementwise import UNCOMPILED, compiled
from .kernels.choose import chooser, verdicts_of
from .layers import takes_global_scale
from .load import load_model
from .matmul import matmul_on
from .model import GptOss
from .ranks import Ranks
from .runner import MlxRunner
from .streams import CpuStreams, check_process

NAME = "mlx"
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
# Attention scores at once. On Metal, so that no kernel runs for a second: macOS may end one that holds up the display.
# Elsewhere MLX does not fuse attention with sinks, and they are in memory: 2 MB on a CPU, some twenty times over.
MAX_SCORES_METAL, MAX_SCORES_GPU, MAX_SCORES_CPU = 1 << 32, 1 << 28, 1 << 19


def load(
    checkpoint: Weights,
    *,
    device: str | None,
    dtype: str | None,
    limits: Limits,
    shard: RankShard | None = None,
    adapters: Sequence[Adapter] = (),
) -> MlxRunner:
    """Load onto `device` ("cpu", "gpu" or None for MLX's default) with activations of `dtype`. shard: the part of the
    model that `checkpoint` holds, while other ranks load the others; None is the whole model. adapters: those that rows
    may use."""
    check_process()
    gpu, streams = _on_gpu(device), CpuStreams()
    where = pick_device(device) if gpu else streams.make_default()
    kind = DTYPES[dtype_name(device, dtype)]
    # Ranks choose the same experts only if all of them compute alike.
    with_kernels = limits.custom_kernels and shard is None
    products = Products() if host.enabled(on_cpu=not gpu, dtype=kind) else None
    try:
        with mx.stream(where):
            model = load_model(
                checkpoint,
                kind,
                compiled() if gpu else UNCOMPILED if products is None else host.ELEMENTWISE,
                max_scores(gpu=gpu),
                limits.resident_vocab,
                upcast=limits.upcast,
                on_cpu=not gpu,
                ranks=None if shard is None else Ranks.join(shard),
                streams=streams,
                adapters=adapters,
                global_scales=takes_global_scale,
                chooser=chooser(checkpoint.config, kind, limits.kv_bits, pick_device(device)) if with_kernels else None,
                products=products,
            )
            if not (gpu and mx.metal.is_available()):
                if products is None:
                    return MlxRunner(model, limits, where, streams)
                held = products.held_bytes
                return MlxRunner(model, limits, where, streams, on_close=products.close, host_bytes=held)
            architecture = str(mx.device_info(pick_device(device))["architecture"])
            return metal_runner(model, limits, where, streams, architecture, available_memory(device), wiring.PROCESS)
    except BaseException:
        streams.close()
        if products is not None:
            products.close()
        raise


def max_scores(*, gpu: bool) -> int:
    """As of model.Attention."""
    if not gpu:
        return MAX_SCORES_CPU
    return MAX_SCORES_METAL if mx.metal.is_available() else MAX_SCORES_GPU


def dtype_name(device: str | None, dtype: str | None) -> str:
    """The activations' dtype. None is bfloat16 on a GPU and float32 on a CPU, where bfloat16 products are slower and
    less accurate."""
    name = dtype or ("bfloat16" if _on_gpu(device) else "float32")
    if name not in DTYPES:
        raise InvalidRequest(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    return name


def custom_kernels(device: str | None) -> dict[str, str]:
    """As of Backend."""
    where = pick_device(device)
    return verdicts_of(where).all() if where.type == mx.gpu and mx.metal.is_available() else {}


def prefill_chunk(device: str | None) -> int:
    """Maximum tokens of one prefill step: enough rows for a GPU's matrix units; a CPU gains nothing from more."""
    return 2048 if _on_gpu(device) else 512


def available_memory(device: str | None) -> int:
    """Bytes that a model may take: Metal's recommended working set, or the free memory of a CUDA device or the RAM."""
    if not _on_gpu(device):
        return system_available()
    info = mx.device_info(pick_device(device))
    return int(info.get("max_recommended_working_set_size") or info.get("free_memory") or info["memory_size"])


def device_name(device: str | None) -> str:
    """The GPU's name, or "cpu" for any CPU."""
    if not _on_gpu(device):
        return "cpu"
    return str(mx.device_info(pick_device(device)).get("device_name", "gpu"))


def metal_runner(
    model: GptOss,
    limits: Limits,
    where: mx.Device | mx.Stream,
    streams: CpuStreams,
    architecture: str,
    recommended: int,
    wired: wiring.Wiring,
) -> MlxRunner:
    """The runner of a model that a Mac's GPU has loaded. architecture: Metal's name of it. recommended: bytes of its
    recommended working set."""
    in_force = command_buffers.limits_in_force(architecture)
    in_turn = command_buffers.must_take_turns(command_buffers.loaded_elements(model), in_force)
    runner = MlxRunner(model, limits, where, streams, in_turn=in_turn, on_close=wired.remove)
    wired.add(recommended)
    return runner


def prepare(device: str | None, reads: Sequence[Read], resident_bytes: int) -> None:
    """As Backend.prepare: the limits on command buffers, if a Mac's GPU computes."""
    is_default = device is None and mx.default_device() == mx.Device(mx.gpu)
    # Not pick_device(): it uses the device, which has to be used first with the variables set.
    if sys.platform == "darwin" and (is_default or device in ("gpu", "metal")):
        command_buffers.prepare(reads, resident_bytes)


def cpu_products(device: str | None, dtype: str | None) -> str:
    """As Backend."""
    if not host.enabled(on_cpu=not _on_gpu(device), dtype=DTYPES[dtype_name(device, dtype)]):
        return ""
    return "compiled" if compiles() else "numpy"


def matmul(device: str | None) -> MatMul:
    """As Backend.matmul."""
    return matmul_on(pick_device(device))


def copy_bandwidth(device: str | None) -> float:
    """Bytes per second, reads and writes counted: the best of ten passes over 256 MB on a GPU; on a CPU, of the RAM."""
    if not _on_gpu(device):
        return ram_copy_bandwidth()
    best = float("inf")
    with mx.stream(pick_device(device)):
        source = mx.ones(64 << 20, dtype=mx.float32)
        mx.eval(source)
        for _ in range(10):
            started = time.perf_counter()
            mx.eval(mx.negative(source))
            best = min(best, time.perf_counter() - started)
    size = source.nbytes
    del source
    mx.clear_cache()
    mx.reset_peak_memory()
    return 2 * size / best


def _on_gpu(device: str | None) -> bool:
    return bool(pick_device(device).type == mx.gpu)


def pick_device(device: str | None) -> mx.Device:
    if device is None:
        return mx.default_device()
    if device == "cpu":
        return mx.Device(mx.cpu)
    if device in ("gpu", "metal"):
        if not mx.is_available(mx.Device(mx.gpu)):
            raise BackendUnavailable("MLX finds no GPU here; leave --device out, or use --device cpu")
        return mx.Device(mx.gpu)
    raise InvalidRequest(f"device must be cpu or gpu for the mlx backend, not {device!r}")
