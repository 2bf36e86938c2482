"""Which custom kernels a model uses: those that compile here and agree with their twins.

A kernel is checked for the sizes and dtypes of the model, when the first layer that could use it is loaded. The verdict
is remembered (verdicts.py). A kernel that fails is left out, and the layer computes with MLX's own operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import mlx.core as mx

from ....config import ModelConfig
from ....machine import cache_folder
from ....weights.tensor import storage_name
from .attention import Attend, can_attend
from .check import LIMITS, Case, attention_cases, expert_cases, norm_cases, router_cases
from .experts import ExpertLayer, Experts, can_mix
from .norm import AddNorm
from .router import Router, can_route, route
from .verdicts import UNFINISHED, Verdicts, machine_key

Kernel = TypeVar("Kernel")


@dataclass(frozen=True)
class LayerKernels:
    """The custom kernels of one layer; None where MLX's own operations compute.

    experts: also None where adapters add to the experts' outputs. mixture: the weights that it reads. add_norm: where
    the output projection cannot add to the residual."""

    router: Router | None = None
    experts: Experts | None = None
    mixture: ExpertLayer | None = None
    attend: Attend | None = None
    add_norm: AddNorm | None = None

    def mix(
        self, x: mx.array, residual: mx.array, logits: mx.array, active: int, next_bias: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        """x, residual [T, D] and the router's logits [T, E] through the experts, as experts.mixture."""
        assert self.experts is not None and self.mixture is not None
        chosen, weights = (self.router or route)(logits, active)
        return self.experts(x, residual, chosen, weights, self.mixture, next_bias)


PLAIN = LayerKernels()


@dataclass
class Chooser:
    """Chooses the kernels of one model's layers. dtype: of activations and KV cache. factor: on attention's scores.
    kv_bits: of full-attention layers; None is the dtype's.

    repeat: check again what is remembered. reasons: why each check's kernel is not used. cases: of the checks that ran,
    by their check."""

    config: ModelConfig
    dtype: mx.Dtype
    factor: float
    kv_bits: int | None
    verdicts: Verdicts
    repeat: bool = False
    reasons: dict[str, str] = field(default_factory=dict)
    cases: list[tuple[str, Case]] = field(default_factory=list)
    _settled: dict[str, Any] = field(default_factory=dict)

    def layer(self, number: int, mixture: ExpertLayer | None, *, norm_apart: bool) -> LayerKernels:
        """The kernels of a layer. mixture: its experts, if the kernels read how they are stored. norm_apart: whether
        the output projection leaves the residual to the norm."""
        c = self.config
        return LayerKernels(
            None if mixture is None else self._router(c.experts[number], c.num_experts_per_tok),
            None if mixture is None else self._experts(mixture, c.num_experts_per_tok),
            mixture,
            self._attend(c.windows[number]),
            self._add_norm(c.hidden_size) if norm_apart else None,
        )

    def _router(self, experts: int, active: int) -> Router | None:
        def cases(kernel: Router) -> Iterator[Case]:
            return router_cases(kernel, experts, active, self.dtype)

        check = f"router, {active} of {experts} experts"
        return self._use(check, can_route(experts, active), Router, cases)

    def _experts(self, layer: ExpertLayer, active: int) -> Experts | None:
        def cases(kernel: Experts) -> Iterator[Case]:
            return expert_cases(kernel, layer, active, self.dtype)

        stored = " and ".join(
            f"{storage_name(matrix.spec)} with scales in {_name(matrix.scales.dtype)}"
            for matrix in (layer.gate_up, layer.down)
        )
        check = f"experts, {active} active, {self.config.hidden_size} by {self.config.intermediate_size}, {stored}"
        return self._use(check, can_mix(active), lambda: Experts(layer.limit, layer.alpha), cases)

    def _attend(self, window: int | None) -> Attend | None:
        c, bits = self.config, 8 if self.kv_bits == 8 and window is None else 16
        heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)

        def cases(kernel: Attend) -> Iterator[Case]:
            return attention_cases(kernel, *heads, window, bits, self.factor, self.dtype)

        kind = "full" if window is None else f"window {window}"
        check = f"attention, {kind}, {heads[0]} heads of {heads[2]}, {heads[1]} for keys{' in 8 bits' * (bits == 8)}"
        return self._use(check, can_attend(*heads), lambda: Attend(self.factor), cases)

    def _add_norm(self, width: int) -> AddNorm | None:
        def cases(kernel: AddNorm) -> Iterator[Case]:
            return norm_cases(kernel, width, self.config.rms_norm_eps, self.dtype)

        return self._use(f"norm, {width}", True, lambda: AddNorm(self.config.rms_norm_eps), cases)

    def _use(
        self, check: str, supported: bool, make: Callable[[], Kernel], cases: Callable[[Kernel], Iterator[Case]]
    ) -> Kernel | None:
        """The kernel, if it has passed the check of this name."""
        check = f"{check}, {_name(self.dtype)}"
        if check not in self._settled:
            kernel, reason = self._settle(check, make, cases) if supported else (None, "no kernel for these sizes")
            self._settled[check] = kernel
            if reason is not None:
                self.reasons[check] = reason
        found: Kernel | None = self._settled[check]
        return found

    def _settle(
        self, check: str, make: Callable[[], Kernel], cases: Callable[[Kernel], Iterator[Case]]
    ) -> tuple[Kernel, None] | tuple[None, str]:
        """The kernel, or why there is none."""
        known = None if self.repeat else self.verdicts.find(check)
        if known is not None:
            return (None, known) if known else (make(), None)
        self.verdicts.put(check, UNFINISHED)
        settled = self._checked(check, make, cases)
        self.verdicts.put(check, settled[1] or "")
        return settled

    def _checked(
        self, check: str, make: Callable[[], Kernel], cases: Callable[[Kernel], Iterator[Case]]
    ) -> tuple[Kernel, None] | tuple[None, str]:
        """As _settle, by running the cases."""
        try:
            kernel = make()
            found = list(cases(kernel))
        except Exception as error:  # a text that does not compile, a launch that the GPU refuses
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = f"it does not run: {lines[0][:300]}"
            self.cases.append((check, Case(reason, float("inf"), LIMITS[self.dtype])))
            return None, reason
        self.cases += [(check, case) for case in found]
        for case in found:
            if not case.error <= case.limit:
                how = f"{case.name}: error {case.error:.2g}, limit {case.limit:.2g}"
                return None, f"it differs from MLX's own operations ({how})"
        return kernel, None


def score_factor(config: ModelConfig) -> float:
    """The factor on attention's scores: 1/sqrt(64) times the squared YaRN concentration, which applies to q and k."""
    return float(config.head_dim**-0.5 * config.yarn.concentration**2)


def chooser(
    config: ModelConfig, dtype: mx.Dtype, kv_bits: int | None, device: mx.Device, *, repeat: bool = False
) -> Chooser | None:
    """The chooser of a model on this device; None if it is no Metal GPU. repeat: as of Chooser."""
    if device.type != mx.gpu or not mx.metal.is_available():
        return None
    return Chooser(config, dtype, score_factor(config), kv_bits, verdicts_of(device), repeat)


def verdicts_of(device: mx.Device) -> Verdicts:
    """What is remembered of this device."""
    return Verdicts(cache_folder(), machine_key(device))


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]
