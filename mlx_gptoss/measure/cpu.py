"""What a CPU can do at most, apart from its memory's bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from ..backends.base import Backend
from ..machine import cores, sgemm_flops


@dataclass(frozen=True)
class CpuLimits:
    """threads: that compute. products: as of Backend.cpu_products. sgemm_gflops: of numpy's float32 product, 10^9 a
    second, in the same run."""

    threads: int
    products: str
    sgemm_gflops: float

    @staticmethod
    def of(module: Backend, device: str | None, dtype: str | None) -> CpuLimits:
        return CpuLimits(cores(), module.cpu_products(device, dtype) or "the library's", sgemm_flops() / 1e9)
