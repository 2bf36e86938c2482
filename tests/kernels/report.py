"""Compile every kernel that a model launches, for any GPU, and print its registers, spills and instructions.

python tests/kernels/report.py [--preset 20b ...] [--format mxfp4 ...] [--arch 90 ...] [--rows 1 ...] [--dtype NAME]

No GPU is needed. One decoding step for each number of rows and one prefill run on torch's meta device, which has shapes
and no values. Their launches are recorded instead of started, and each different one is compiled to a cubin.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from itertools import product
from types import SimpleNamespace

import torch
import triton
from sass import Cubin
from shapes import META, meta_model
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mlx_gptoss.backends.cuda.cache import Cache, Span
from mlx_gptoss.backends.cuda.decode import Decoder
from mlx_gptoss.backends.cuda.kernels import tiles
from mlx_gptoss.backends.cuda.kernels.fused import Fused
from mlx_gptoss.config import PRESETS

CONTEXT, CHUNK = 131072, 4096
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "uint8": "u8", "int32": "i32", "int64": "i64"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "launch_pdl")


@dataclass(frozen=True)
class Launch:
    """One specialization of a kernel.

    module, name: of the kernel. what: the format and the step that launch it
    signature: each argument's type. constants: arguments that are compiled in. aligned: arguments divisible by 16
    options: of the compiler. programs: of the grid
    """

    module: str
    name: str
    what: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, object], ...]
    programs: int


def specialize(kernel: JITFunction, what: str, grid: tuple[int, ...], args: tuple, options: dict) -> Launch:
    """The specialization that Triton makes for these arguments."""
    names = [param.name for param in kernel.params]
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
    signature, constants, aligned = {}, {}, []
    for param in kernel.params:
        value = values[param.name]
        specialized = not param.do_not_specialize
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1 and specialized):
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = "*" + TYPES[str(value.dtype).removeprefix("torch.")]
            aligned += [param.name] if value.storage_offset() * value.element_size() % 16 == 0 else []
        elif isinstance(value, int):
            signature[param.name] = "i32"
            aligned += [param.name] if specialized and value % 16 == 0 else []
        else:
            signature[param.name] = "fp32"
    kept = tuple((name, options[name]) for name in OPTIONS if name in options)
    programs = int(torch.tensor(grid).prod())
    fixed = tuple(signature.items()), tuple(constants.items()), tuple(aligned), kept
    return Launch(kernel.__module__, kernel.__name__, what, *fixed, programs)


def record(
    preset: str, form: str, rows: list[int], dtype: torch.dtype = torch.bfloat16, arch: int = 90
) -> dict[Launch, int]:
    """The different launches of a decoding step for each of `rows` and of a prefill chunk, on a GPU of compute
    capability `arch`, and how often each happens: with keys and values as they are, and in 8 bits with drafts.

    The model has two layers, a sliding and a full one.
    """
    config = PRESETS[preset]
    config = replace(config, num_hidden_layers=2, layer_types=config.layer_types[:2])
    model = meta_model(config, form, dtype)
    what = ""
    with recording(arch, lambda: what) as found:
        for pack, slack, bits in ((None, 0, ""), (Fused().pack, 3, ", 8-bit K/V")):
            cache = Cache(config, max(rows), CONTEXT, dtype, META, whole=True, pack=pack, slack=slack)
            decoder = Decoder(model, cache, torch.zeros(max(rows), dtype=torch.int64, device=META), CONTEXT)
            for count in rows:
                what = f"{form}, {count} row{'s' * (count > 1)}{bits}"
                decoder._run(decoder._ready(count), ())
            what = f"{form}, prefill{bits}"
            ids = torch.zeros((1, CHUNK), dtype=torch.int64, device=META)
            model(ids, cache, Span.of([0], [CHUNK], CHUNK, META))
    return found


@contextmanager
def recording(arch: int = 90, what: Callable[[], str] = str) -> Iterator[dict[Launch, int]]:
    """The different launches inside, with how often each happens, as on a GPU of compute capability `arch`; none runs.
    what: names the step under way."""
    found: dict[Launch, int] = {}

    def run(kernel: JITFunction, *args: object, grid: tuple[int, ...], warmup: bool = False, **options: object) -> None:
        launch = specialize(kernel, what(), grid, args, options)
        found[launch] = found.get(launch, 0) + 1

    original, JITFunction.run = JITFunction.run, run
    capability, tiles.capability = tiles.capability, lambda device: arch
    try:
        yield found
    finally:
        JITFunction.run, tiles.capability = original, capability


ROW = "{:<19}{:<33}{:>5}{:>10}{:>7}{:>8}{:>11}{:>8}{:>8}{:>14}{:>7}{:>12}{:>7}{:>13}{:>11}{:>7}"


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel. registers: of a thread. spills: bytes of local memory of a thread. shared: bytes of a program.
    loop: instructions in the body of the longest loop; 0 if the compiler unrolled it all. per_weight: of a product,
    instructions of the loop for each weight. waits: those that load from global memory into registers, so that the
    program waits for each. late_writes, in_flight: see sass.py; late writes are wrong results. early: accesses to
    global memory before the kernel waits for the one before it; None if it does not wait."""

    kernel: str
    what: str
    arch: int
    programs: int
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    instructions: int
    loop: int
    per_weight: float
    waits: int
    late_writes: int
    in_flight: int
    early: int | None


def build(launch: Launch, arch: int) -> Compiled:
    """Compile a launch for one GPU. arch: compute capability, 90 for sm_90."""
    place = {name: (i,) for i, (name, _) in enumerate(launch.signature)}
    source = ASTSource(
        getattr(import_module(launch.module), launch.name),
        dict(launch.signature),
        {place[name]: value for name, value in launch.constants},
        {place[name]: [["tt.divisibility", 16]] for name in launch.aligned},
    )
    target = GPUTarget("cuda", arch, 32)
    driver.set_active(SimpleNamespace(get_current_target=lambda: target))  # of which kernels ask the capability
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    cubin = Cubin.read(compiled.asm["cubin"])
    early = cubin.code.before_inputs()
    c = dict(launch.constants)
    rows = c.get("BN", 0) * (c["A"] if "down_one_token" in launch.name else 1)
    weights = rows * c["SPLIT"] * c["BK"] if "SPLIT" in c else 0  # of a step
    return Compiled(
        launch.name.strip("_").removesuffix("_kernel"),
        launch.what,
        arch,
        launch.programs,
        compiled.metadata.num_warps,
        compiled.metadata.num_stages,
        cubin.registers,
        cubin.spills,
        compiled.metadata.shared,
        len(cubin.code.instructions),
        len(cubin.code.longest_loop),
        round(32 * compiled.metadata.num_warps * len(cubin.code.longest_loop) / weights, 2) if weights else 0.0,
        cubin.code.count("LDG."),
        len(cubin.code.late_writes()),
        cubin.code.in_flight,
        None if early is None else len(early),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["20b"], choices=PRESETS)
    parser.add_argument("--format", nargs="+", default=["mxfp4", "mlx-4bit"])
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90, 120])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of activations"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    launches: dict[tuple[Launch, int], Launch] = {}
    if not options.json:
        print(ROW.format(*(field.name for field in fields(Compiled))))
    for preset, form, arch in product(options.preset, options.format, options.arch):
        for launch in record(preset, form, options.rows, getattr(torch, options.dtype), arch):
            launches.setdefault((replace(launch, what="", programs=0), arch), launch)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(build, launch, arch) for (_, arch), launch in launches.items()]
        done = []
        for job in as_completed(jobs):
            done.append(job.result())
            if not options.json:
                print(ROW.format(*map(str, asdict(done[-1]).values())), flush=True)
    if options.json:
        print(json.dumps([asdict(compiled) for compiled in done]))


if __name__ == "__main__":
    main()
