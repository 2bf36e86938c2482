"""mx.fast.metal_kernel on a CPU: the same arguments, the same generated function around the same text, compiled by a
C++ compiler with metal.h beside this file in place of Metal's own headers."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

HEADER = Path(__file__).parent / "metal.h"
FLAGS = (
    *(
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-U_FORTIFY_SOURCE",
        "-fno-strict-aliasing",
    ),
    *("-Wall", "-Wextra", "-Werror", "-Wno-attributes", "-Wno-unknown-pragmas", "-Wno-unused-parameter"),
    *("-Wno-sign-compare", "-Wno-clobbered", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"),
)
TRAP = {"g++": "-fsanitize-undefined-trap-on-error", "clang++": "-fsanitize-trap=undefined"}
ERRORS = {
    1: "threads of one simdgroup or threadgroup wait at different places, or some have ended: not all of them reach an "
    "operation or a barrier",
    2: "reads or writes outside its arrays",
    3: "undefined behaviour: an index outside an array, a misaligned pointer, an overflow or a shift that is too far",
    4: "the grid is empty or no multiple of the threadgroup, or the threadgroup is no multiple of 32 up to 1024",
}
TYPES = {  # how MLX writes a dtype, and its numpy type of the same bits
    mx.float32: ("float", np.float32),
    mx.float16: ("float16_t", np.uint16),
    mx.bfloat16: ("bfloat16_t", np.uint16),
    mx.int32: ("int32_t", np.int32),
    mx.uint8: ("uint8_t", np.uint8),
    mx.uint32: ("uint32_t", np.uint32),
}
ATTRIBUTES = {  # those of MLX's list that metal.h knows, in MLX's order: type, value
    "simdgroup_index_in_threadgroup": ("uint", "emulator::current().index / 32"),
    "simdgroups_per_threadgroup": ("uint", "threads.x * threads.y * threads.z / 32"),
    "thread_index_in_simdgroup": ("uint", "emulator::current().index % 32"),
    "thread_index_in_threadgroup": ("uint", "emulator::current().index"),
    "thread_position_in_grid": ("uint3", "emulator::current().in_grid"),
    "thread_position_in_threadgroup": ("uint3", "emulator::current().in_threadgroup"),
    "threadgroup_position_in_grid": ("uint3", "emulator::group_position()"),
    "threadgroups_per_grid": ("uint3", "{grid.x / threads.x, grid.y / threads.y, grid.z / threads.z}"),
    "threads_per_threadgroup": ("uint3", "threads"),
}
SMALL = 8  # inputs of fewer elements are in the constant address space

Template = Sequence[tuple[str, Any]]


def compiler() -> str | None:
    """The C++ compiler to use, or None."""
    return shutil.which("g++") or shutil.which("clang++")


def clang() -> list[str] | None:
    """The command of a clang, which can tell address spaces apart, or None."""
    if found := shutil.which("clang++"):
        return [found]
    return [sys.executable, "-m", "ziglang", "clang"] if importlib.util.find_spec("ziglang") else None


class Emulator:
    """metal_kernel() as in mx.fast. descending: the order of a threadgroup's threads. folder: for compiled kernels.
    launches: the names of the kernels launched so far. sources: of everything that was compiled, by its name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._libraries: dict[str, Any] = {}
        self.descending = False
        self.launches: list[str] = []
        self.sources: dict[str, str] = {}

    def metal_kernel(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
    ) -> Callable[..., list[mx.array]]:
        assert ensure_row_contiguous, "strides are not emulated"

        def launch(
            *,
            inputs: Sequence[mx.array],
            output_shapes: Sequence[Sequence[int]],
            output_dtypes: Sequence[mx.Dtype],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            template: Template = (),
            stream: Any = None,
        ) -> list[mx.array]:
            assert (len(inputs), len(output_shapes)) == (len(input_names), len(output_names)) and all(inputs_ok(inputs))
            text = written(name, input_names, inputs, output_names, output_dtypes, source, header, template)
            buffers = []
            for array, input_name in zip(inputs, input_names, strict=True):
                buffers.append(to_numpy(array))
                if f"{input_name}_shape" in source:
                    buffers.append(np.array(array.shape, np.int32))
            self.launches.append(name)
            arrays = self._run(name, text, buffers, output_shapes, output_dtypes, grid, threadgroup)
            return [of_numpy(a, dtype) for a, dtype in zip(arrays, output_dtypes, strict=True)]

        return launch

    def _run(
        self,
        name: str,
        text: str,
        buffers: list[np.ndarray],
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threads: Sequence[int],
    ) -> list[np.ndarray]:
        outputs = [np.empty(tuple(shape), TYPES[dtype][1]) for shape, dtype in zip(shapes, dtypes, strict=True)]
        error = self._library(name, text).run(
            *_addresses(buffers), *_addresses(outputs), (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*threads),
            int(self.descending),
        )  # fmt: skip
        if error:
            raise RuntimeError(f"{name} {ERRORS[error]}")
        return outputs

    def _library(self, name: str, text: str) -> Any:
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if key not in self._libraries:
            source = self._folder / f"{name}-{key}.cpp"
            source.write_text(text)
            self._compile(["-shared", "-o", source.with_suffix(".so"), source, self._runtime()])
            self.sources[source.stem] = text
            self._libraries[key] = ctypes.CDLL(str(source.with_suffix(".so")))
        return self._libraries[key]

    def _runtime(self) -> Path:
        """runtime.cpp, compiled"""
        path = self._folder / "runtime.o"
        if not path.exists():
            self._compile(["-c", "-o", path, HEADER.with_name("runtime.cpp")])
        return path

    def _compile(self, words: list[str | Path]) -> None:
        program = compiler()
        assert program is not None
        flags = [TRAP.get(Path(program).name, flag) if flag == TRAP["g++"] else flag for flag in FLAGS]
        out = subprocess.run([program, *flags, f"-I{HEADER.parent}", *words], capture_output=True, text=True)
        if out.returncode:
            raise RuntimeError(f"{words[-1]} does not compile:\n{out.stderr[:4000]}")


def inputs_ok(inputs: Sequence[mx.array]) -> list[bool]:
    return [isinstance(array, mx.array) and array.ndim > 0 and array.size > 0 for array in inputs]


def written(
    name: str,
    input_names: Sequence[str],
    inputs: Sequence[mx.array],
    output_names: Sequence[str],
    output_dtypes: Sequence[mx.Dtype],
    source: str,
    header: str,
    template: Template,
) -> str:
    """The C++ text: the function as write_signature in mlx/backend/common/metal_kernel.cpp makes it, and a call."""
    parameters, arguments = [], []

    def add(kind: str, parameter: str) -> None:
        arguments.append(f"({kind})arrays[{len(arguments)}]")
        parameters.append(f"  {kind} {parameter} [[buffer({len(parameters)})]]")

    for input_name, array in zip(input_names, inputs, strict=True):
        space = "constant" if array.size < SMALL else "device"
        add(f"const {space} {TYPES[array.dtype][0]}*", input_name)
        if f"{input_name}_shape" in source:
            add("const constant int*", f"{input_name}_shape")
        assert f"{input_name}_strides" not in source and f"{input_name}_ndim" not in source
    for output_name, dtype in zip(output_names, output_dtypes, strict=True):
        add(f"device {TYPES[dtype][0]}*", output_name)
    for attribute, (kind, value) in ATTRIBUTES.items():
        if attribute in source:
            parameters.append(f"  {kind} {attribute} [[{attribute}]]")
            arguments.append(value)
    kinds = {bool: "bool", int: "int"}
    declared = ", ".join(f"{kinds.get(type(value), 'typename')} {key}" for key, value in template)
    given = ", ".join(_template_argument(value) for _, value in template)
    head = f"template <{declared}>\n" if template else ""
    call = f"custom_kernel_{name}" + (f"<{given}>" if template else "")
    return (
        f'#include "metal.h"\n{header}{head}[[kernel]] void custom_kernel_{name}(\n'
        + ",\n".join(parameters)
        + f") {{\n{source}\n}}\n"
        + f"#ifdef ADDRESS_SPACES\nauto instantiated = &{call};\n#else\n"
        + "void emulator::call(void* const* arrays, uint3 grid, uint3 threads) {\n"
        + f"  {call}({', '.join(arguments)});\n}}\n#endif\n"
    )


def check_address_spaces(text: str, folder: Path) -> str:
    """What a clang says of the text when Metal's address spaces are types of their own; empty if it is content."""
    command = clang()
    assert command is not None
    source = folder / "address_spaces.cpp"
    source.write_text(text)
    words = [*command, "-x", "c++", "-std=c++20", "-ffreestanding", "-fsyntax-only", "-DADDRESS_SPACES", "-w"]
    out = subprocess.run([*words, f"-I{HEADER.parent}", str(source)], capture_output=True, text=True)
    return out.stderr if out.returncode else ""


def to_numpy(array: mx.array) -> np.ndarray:
    """The array's bits, row by row"""
    mx.eval(array)
    bits = array.view(mx.uint16) if TYPES[array.dtype][1] == np.uint16 else array
    return np.ascontiguousarray(np.array(bits))


def of_numpy(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    bits = mx.array(array)
    return bits.view(dtype) if TYPES[dtype][1] == np.uint16 else bits


def _template_argument(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else TYPES[value][0]


def _addresses(arrays: Sequence[np.ndarray]) -> tuple[Any, Any, int]:
    pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    sizes = (ctypes.c_size_t * len(arrays))(*(array.nbytes for array in arrays))
    return pointers, sizes, len(arrays)
