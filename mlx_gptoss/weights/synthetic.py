"""Synthetic weights, generated while loading: random values in a preset's shapes, stored as a format stores them.

They are for measuring speed, which depends on the number of values and on their storage, but not on the values.

Codes are random bits and nothing is quantized. Scales and dense values come from tables, chosen so that activations
keep about unit size through all layers and the router uses all experts. The values of a parameter depend only on the
seed and the parameter's name. Generating needs a few MB per core in addition to the weights returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, Final
from zlib import crc32

import ml_dtypes
import numpy as np

from ..config import PRESETS, ModelConfig
from ..errors import InvalidRequest
from ..machine import cores
from . import codecs, quantization
from .convert import Progress, write_checkpoint
from .formats import WRITERS, recipe_of
from .params import Param, Role, parameters
from .tensor import Array, Dense, Quantized, Spec, Weight

BLOCK_BYTES = 1 << 20  # random bytes per stream
GAINS: Final[Mapping[str, float]] = {  # RMS of a matrix's output for input of RMS 1; 1 for matrices not listed
    "attention.o.weight": 0.25,  # so that the residual stream grows by a few percent per layer
    "experts.down.weight": 0.25,
    "lm_head.weight": 2.0,
}
_NORMAL = NormalDist()


@dataclass(frozen=True)
class _Distribution:
    """Maps random bits to the values of one array.

    table: the values, indexed by uint8 or uint16; None if the bits are the values.
    """

    table: Array | None

    def __call__(self, bits: Array) -> Array:
        return bits if self.table is None else self.table.take(bits)


class Synthetic:
    """Random weights with the shapes of `config` in the format `name`, to be used like a Checkpoint.

    Raises CheckpointError if the format cannot be written, or if its groups do not divide the rows of the matrices.
    """

    def __init__(self, config: ModelConfig, name: str, seed: int = 0) -> None:
        writer, recipe = recipe_of(name if name in WRITERS else f"synthetic {name}")
        self.config = config
        self.format = name
        self.params: tuple[Param, ...] = parameters(config)
        self.stop_ids: tuple[int, ...] = config.eos_token_id
        self.size_bytes: int = sum(info.nbytes for unit in writer.units(name, self.params, {}) for info in unit.tensors)
        self._family = writer.family
        self._specs = {role: spec for role, (_, spec) in recipe.items()}
        self._params = {param.name: param for param in self.params}
        self._seed = seed

    def read(self, name: str, rows: range | None = None) -> Weight:
        """As Checkpoint.read; the same values every time. All rows are generated, whichever are asked for."""
        weight = self._generate(self._params[name])
        return weight if rows is None else weight[rows.start : rows.stop]

    def release(self, weight: Weight | None = None) -> None:
        """Do nothing: no weight is kept."""

    def stored_as(self, name: str) -> tuple[Spec | None, str | None]:
        """As Checkpoint.stored_as."""
        spec = self._spec(self._params[name])
        if spec is None:
            return None, None
        return spec, ("F16" if self._is_symmetric else "BF16") if spec.scale in ("float", "none") else None

    def scale_dtype(self, name: str) -> str | None:
        """As Checkpoint.scale_dtype."""
        spec, dtype = self.stored_as(name)
        return dtype if spec is not None and spec.scale == "float" else None

    def unpacked_bytes(self, name: str) -> int:
        """As Checkpoint.unpacked_bytes: none."""
        return 0

    def matrix_bytes(self, role: Role) -> int:
        """As Checkpoint.matrix_bytes."""
        units = recipe_of(self.format)[0].units(self.format, self.params, {})
        of_role = [unit for unit in units if any(param.role == role and param.is_matrix for param in unit.params)]
        return sum(info.nbytes for unit in of_role for info in unit.tensors)

    def fingerprint(self) -> list[list[Any]]:
        """As Checkpoint.fingerprint: everything that the values depend on."""
        return [["synthetic", self.format, self._seed, repr(self.config)]]

    def write(self, folder: Path, progress: Progress | None = None) -> None:
        """Write a checkpoint folder of exactly these weights, without a tokenizer. Errors as in write_checkpoint."""
        write_checkpoint(self, folder, self.format, progress=progress)

    @property
    def _is_symmetric(self) -> bool:
        return self._family == "int4-autoround"

    def _spec(self, param: Param) -> Spec | None:
        """The Spec of a parameter; None if it is dense: the format says so, or groups do not divide its rows."""
        spec = self._specs[param.role] if param.is_matrix else None
        return spec if spec is None or not spec.group or param.shape[-1] % spec.group == 0 else None

    def _generate(self, param: Param) -> Weight:
        if not param.is_matrix:
            return Dense(self._vector(param))
        spec = self._spec(param)
        rms = GAINS.get(param.kind, 1.0) * (1.0 if param.role == "embed" else param.shape[-1] ** -0.5)
        if spec is None:
            return Dense(self._array(param.name, param.shape, np.uint16, _normal(codecs.BFLOAT16.name, rms)))
        return self._quantized(param, spec, rms)

    def _vector(self, param: Param) -> Array:
        """bfloat16 of the parameter's shape: norms around 1, sinks of RMS 1, biases of RMS 0.1.

        All values are multiples of 1/256, which float16 holds, too.
        """
        values = np.random.Generator(self._stream(param.name, 0)).standard_normal(param.shape, np.float32)
        if param.role != "sinks":
            values *= np.float32(0.1)
        if param.role == "norm":
            values += np.float32(1)
        rounded: Array = (np.round(values * 256) / 256).astype(codecs.BFLOAT16)
        return rounded

    def _quantized(self, param: Param, spec: Spec, rms: float) -> Quantized:
        """A matrix whose values have this RMS: the codes are uniform, and the scales' RMS is `rms` over the codes'."""
        name, lead = param.name, param.shape[:-1]
        packed = (*lead, param.shape[-1] * spec.bits // 8)
        codes = self._array(name, packed, np.uint8, _uniform_codes(spec))
        size = rms / _code_rms(spec)
        if spec.scale == "none":
            row_scale = self._array(f"{name} outer", (*lead, 1), np.uint16, _float_scales(size))
            return Quantized(spec, codes, outer=row_scale)
        grouped = (*lead, param.shape[-1] // spec.group)
        if spec.scale == "float":
            dtype = "float16" if self._is_symmetric else codecs.BFLOAT16.name
            scale = self._array(f"{name} scale", grouped, np.uint16, _float_scales(size, dtype, signed=True))
            if self._is_symmetric:
                return Quantized(spec, codes, scale, quantization.symmetric_bias(scale))
            middle = np.float32((1 - 2**spec.bits) / 2)
            return Quantized(spec, codes, scale, (scale.astype(np.float32) * middle).astype(scale.dtype))
        # ModelOpt's second scale keeps e4m3 scales in the middle of their range.
        outer = np.asarray(np.float32(size / 16)) if self._family == "nvfp4" else None
        scale = self._array(f"{name} scale", grouped, np.uint8, _byte_scales(spec.scale, size if outer is None else 16))
        return Quantized(spec, codes, scale, outer=outer)

    def _array(
        self, key: str, shape: tuple[int, ...], bits: type[np.unsignedinteger[Any]], draw: _Distribution
    ) -> Array:
        """An array of random values, generated on all cores. Each block has a random stream of its own."""
        out = np.empty(shape, bits if draw.table is None else draw.table.dtype)
        flat, step = out.reshape(-1), BLOCK_BYTES // np.dtype(bits).itemsize

        def fill(start: int) -> None:
            part = flat[start : start + step]
            words = self._stream(key, start // step).random_raw(-(-part.size * np.dtype(bits).itemsize // 8))
            _as_integers(part)[:] = _as_integers(draw(words.view(bits)[: part.size]))

        with ThreadPoolExecutor(min(cores(), -(-flat.size // step))) as pool:
            for _ in pool.map(fill, range(0, flat.size, step)):
                pass
        return out

    def _stream(self, key: str, block: int) -> np.random.SFC64:
        return np.random.SFC64([self._seed, crc32(key.encode()), block])


def preset(name: str, layers: int | None = None) -> ModelConfig:
    """The config of "20b", "120b" or "tiny". layers: another number of layers; None keeps the preset's.

    Raises InvalidRequest for an unknown name.
    """
    if name not in PRESETS:
        raise InvalidRequest(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    config = PRESETS[name]
    return config if layers is None else replace(config, num_hidden_layers=layers, layer_types=())


def _uniform_codes(spec: Spec) -> _Distribution:
    """All codes with equal probability. The two NaN codes of e4m3 become the largest value."""
    if spec.element != "e4m3":
        return _Distribution(None)
    table = np.arange(256, dtype=np.uint8)
    table[[127, 255]] = [126, 254]
    return _Distribution(table)


@lru_cache
def _code_rms(spec: Spec) -> float:
    """The RMS of uniform codes; for unsigned integers, that of their distance from the middle."""
    if spec.element == "uint":
        return float((((2**spec.bits) ** 2 - 1) / 12) ** 0.5)
    values = codecs.E2M1 if spec.element == "e2m1" else codecs.E4M3[np.isfinite(codecs.E4M3)]
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


@lru_cache
def _normal(dtype: str, rms: float) -> _Distribution:
    """Gaussian values, as 65536 quantiles. None of them is zero."""
    return _Distribution((_quantiles() * rms).astype(_dtype(dtype)))


@lru_cache
def _quantiles() -> Array:
    return np.array([_NORMAL.inv_cdf((n + 0.5) / 65536) for n in range(65536)])


@lru_cache
def _float_scales(rms: float, dtype: str = codecs.BFLOAT16.name, *, signed: bool = False) -> _Distribution:
    """Scales within a factor of 4, log-uniform. signed: half of them are negative."""
    values = np.exp2(np.linspace(-1, 1, 65536))
    if signed:
        values[::2] *= -1
    return _Distribution((values * rms / np.sqrt(np.mean(values**2))).astype(_dtype(dtype)))


@lru_cache
def _byte_scales(kind: str, size: float) -> _Distribution:
    """The codes (e8m0 or e4m3) of positive scales around `size`, within a factor of 2."""
    values = size * np.exp2(np.linspace(-0.5, 0.5, 256))
    if kind == "e8m0":
        return _Distribution((np.round(np.log2(values)) + 127).astype(np.uint8))
    return _Distribution(np.maximum(values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), 1))


def _dtype(name: str) -> np.dtype[Any]:
    return codecs.BFLOAT16 if name == codecs.BFLOAT16.name else np.dtype(name)


def _as_integers(values: Array) -> Array:
    """The same bits as unsigned integers: numpy copies bfloat16 value by value, integers in runs."""
    return values.view(f"u{values.itemsize}")
