"""The CUDA backend, in torch, which also runs on a CPU: `load(checkpoint, ...) -> CudaRunner`. Read model.py first."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Sequence

# Read by OpenMP when torch is loaded: threads that wait asleep. Those that spin wait for each other's turn on a busy
# machine, where a small model was 6 times as slow.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from ...errors import BackendUnavailable, CheckpointError, InvalidRequest
from ...machine import ram_copy_bandwidth, system_available
from ...weights.adapters import Adapter
from ...weights.split import RankShard
from ...weights.tensor import Weights
from ..base import Limits, MatMul, Read
from .layers import Operations
from .load import load_model
from .matmul import matmul_on
from .plain import TorchOperations
from .ranks import Ranks
from .runner import CudaRunner

NAME = "cuda"
GPU_CHUNK, CPU_CHUNK = 4096, 1024
LEAST_CAPABILITY = (8, 0)  # bfloat16 tensor cores
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_log = logging.getLogger(__name__)


def load(
    checkpoint: Weights,
    *,
    device: str | None,
    dtype: str | None,
    limits: Limits,
    shard: RankShard | None = None,
    adapters: Sequence[Adapter] = (),
    kernels: bool | None = None,
) -> CudaRunner:
    """Load onto `device` ("cpu", "cuda", "cuda:1" or None for a GPU where there is one) with activations of `dtype`;
    both as below. shard: of the model that `checkpoint` is a part of, whose other parts other ranks load at the same
    time; None is all. adapters: those that rows may use. kernels: whether Triton's kernels compute (None: on a GPU),
    or torch alone, their oracle."""
    where = pick_device(device)
    kernels = where.type == "cuda" if kernels is None else kernels
    if not kernels and where.type == "cpu":
        _log.info(
            "PyTorch computes on this CPU as the reference of the CUDA kernels; --backend mlx is the fast one here"
        )
    if where.type == "cuda":
        torch.cuda.set_device(where)  # of this thread, which is the runner's: Triton launches there
        torch.cuda.reset_peak_memory_stats(where)
    ops = _fused(checkpoint) if kernels else TorchOperations(torch.get_num_threads() if where.type == "cpu" else 1)
    try:
        ranks = None if shard is None else Ranks.join(shard, where)
        with torch.inference_mode():
            model = load_model(checkpoint, DTYPES[dtype_name(device, dtype)], where, ops, ranks, adapters)
        if kernels and any(len(block.mlp.experts.gate_up.matrices) > 1 for block in model.blocks):
            raise CheckpointError(
                "gate and up of some experts are stored differently, and the CUDA kernels take them as one matrix; use "
                "--device cpu, or --quantize mlx-4bit"
            )
        return CudaRunner(model, limits, where, kernels=kernels)
    except BaseException:
        ops.close()
        raise


def _fused(checkpoint: Weights) -> Operations:
    try:
        from .kernels.fused import Fused
    except ImportError as error:
        raise BackendUnavailable(f"the kernels need triton ({error}): pip install 'mlx-gptoss[cuda]'") from error
    Fused.check(checkpoint.config)
    return Fused()


def prepare(device: str | None, reads: Sequence[Read], resident_bytes: int) -> None:
    """As Backend.prepare: nothing."""


def dtype_name(device: str | None, dtype: str | None) -> str:
    """The activations' dtype. None is bfloat16 on a GPU and float32 on a CPU, where narrow products are slower."""
    name = dtype or ("bfloat16" if pick_device(device).type == "cuda" else "float32")
    if name not in DTYPES:
        raise InvalidRequest(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    return name


def custom_kernels(device: str | None) -> dict[str, str]:
    """None that depend on a check: the Triton kernels are the way in which this backend computes on a GPU."""
    return {}


def prefill_chunk(device: str | None) -> int:
    """Tokens of one prefill step: enough for each decoded expert to serve many."""
    return GPU_CHUNK if pick_device(device).type == "cuda" else CPU_CHUNK


def available_memory(device: str | None) -> int:
    """Bytes that a model may take: the free memory of the GPU but for 4% of the whole, or the RAM.

    That part is for what is in no plan: cuBLAS's workspaces, the graphs' own memory, and fragments."""
    where = pick_device(device)
    if where.type == "cpu":
        return system_available()
    free, total = torch.cuda.mem_get_info(where)
    return max(0, free - total // 25)


def device_name(device: str | None) -> str:
    """The name of the GPU, or "cpu" for any CPU."""
    where = pick_device(device)
    return "cpu" if where.type == "cpu" else torch.cuda.get_device_name(where)


def cpu_products(device: str | None, dtype: str | None) -> str:
    """As Backend: PyTorch multiplies decoded matrices, for comparison with the kernels."""
    return "reference" if pick_device(device).type == "cpu" else ""


def matmul(device: str | None) -> MatMul:
    """As Backend.matmul."""
    return matmul_on(pick_device(device))


def copy_bandwidth(device: str | None) -> float:
    """Bytes per second, reads and writes counted: the best of ten copies of 1 GiB on a GPU; RAM's on a CPU."""
    where = pick_device(device)
    if where.type == "cpu":
        return ram_copy_bandwidth()
    source = torch.ones(1 << 30, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize(where)
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(where)
        best = min(best, time.perf_counter() - started)
    size = source.numel()
    del source, target
    torch.cuda.empty_cache()
    return 2 * size / best


def has_gpu() -> bool:
    """Whether this torch finds a CUDA device."""
    return torch.cuda.is_available()


def pick_device(device: str | None) -> torch.device:
    if device == "cpu" or (device is None and not has_gpu()):
        return torch.device("cpu")
    name = "cuda" if device in (None, "gpu") else str(device)
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise InvalidRequest(f"device must be cpu, cuda or cuda:N for the cuda backend, not {device!r}")
    found = torch.cuda.device_count() if has_gpu() else 0
    index = int(name.partition(":")[2] or os.environ.get("LOCAL_RANK", "0"))  # torchrun's: a GPU for each rank
    if index >= found:
        raise BackendUnavailable(
            f"torch {torch.__version__} finds {found or 'no'} CUDA device{'s' * (found > 1)} here; leave --device out, "
            "use --device cpu, or install a torch built for your driver (pip install 'mlx-gptoss[cuda]')"
        )
    _check_device(index)
    return torch.device("cuda", index)


def _check_device(index: int) -> None:
    """Raise BackendUnavailable for a GPU that the kernels are not compiled for."""
    name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    if getattr(torch.version, "hip", None):
        raise BackendUnavailable(
            f"{name} is an AMD GPU (torch for ROCm), and the cuda backend's kernels are for NVIDIA's; use --device cpu"
        )
    if (major, minor) < LEAST_CAPABILITY:
        raise BackendUnavailable(
            f"{name} has compute capability {major}.{minor}, and the cuda backend needs 8.0 (Ampere, 2020) or newer; "
            "use --device cpu"
        )
