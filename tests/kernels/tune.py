"""Time the products of a decoding step with other tiles than those of kernels/tiles.py, on this machine's GPU.

python tests/kernels/tune.py [--preset 20b] [--format mxfp4 mlx-4bit] [--rows 1 8 32 64] [--context 1024 131072]
                             [--case experts qkv ...] [--tiles N]

For each product (qkv, attention's output with the norm after it, router, experts, lm_head) it tries the tile in use
("in use") and then every candidate. It checks the result against torch in float32 on the same random weights. Then it
prints the median time over several layers' weights, which together exceed the GPU's cache, and the bandwidth as a
fraction of a copy's. Last it times the whole step as a CUDA graph.

Without a GPU it runs the tiny preset in Triton's interpreter (set TRITON_INTERPRET=1): every result is checked, and the
times mean nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from triton.errors import TritonError

from mlx_gptoss.backends import cuda
from mlx_gptoss.backends.base import Row
from mlx_gptoss.backends.cuda.cache import Cache
from mlx_gptoss.backends.cuda.decode import Buffers, Decoder
from mlx_gptoss.backends.cuda.kernels import attention, linear, moe, norm, qkv, routing, tiles
from mlx_gptoss.backends.cuda.kernels.fused import Fused
from mlx_gptoss.backends.cuda.kernels.tiles import Tile
from mlx_gptoss.backends.cuda.load import load_model
from mlx_gptoss.backends.cuda.matrices import DenseMatrix, Matrix
from mlx_gptoss.backends.cuda.model import Block, GptOss, Norm
from mlx_gptoss.backends.cuda.plain import TorchOperations
from mlx_gptoss.config import PRESETS
from mlx_gptoss.weights.synthetic import Synthetic

LAYERS, REPEAT = 4, 15
HEAD = 64  # rows of the qkv matrix in a head
CANDIDATES = [Tile(BN, BK, warps, stages, SPLIT) for BN, BK, warps, SPLIT in
         ((16, 128, 1, 2), (16, 128, 4, 4), (16, 64, 4, 4), (4, 128, 1, 2), (16, 128, 1, 1), (16, 256, 1, 1),
          (32, 128, 2, 1), (32, 64, 4, 2), (64, 128, 2, 1), (64, 128, 4, 1), (64, 64, 4, 1))
         for stages in (2, 3, 4)]  # fmt: skip
PARTS = [(Tile(64, 128, 4, stages), parts) for stages in (2, 3) for parts in (2, 4, 8)]
PARTS += [(Tile(64, 128, 2, 3), parts) for parts in (4, 8)] + [(Tile(32, 128, 4, 3, 2), parts) for parts in (2, 4)]
CHOICES = ("linear_tile", "gate_up_one_token_tile", "down_one_token_tile", "grouped_tile")
CASES = ("qkv", "out", "router", "experts", "lm_head")
PLAIN = TorchOperations(threads=1)


@dataclass(frozen=True)
class Case:
    """One product of a step: run(block) computes it, result() returns what it wrote, oracle(block) what is expected."""

    name: str
    run: Callable[[Block], None]
    result: Callable[[], torch.Tensor]
    oracle: Callable[[Block], torch.Tensor]
    size: int  # bytes read for one block
    whole: bool = False  # the product is the model's, not a block's


def cases(model: GptOss, b: Buffers, cache: Cache, positions: torch.Tensor) -> Iterator[Case]:
    """The products of a step of len(b.x) rows at `positions`, int32 [B]."""
    c, i, rows = model.config, b.inputs, len(b.x)
    rotation = model.rotary.rotation(positions[:, None].long())
    table = tuple(
        t[0, 0].contiguous() for t in vars(model.rotary.rotation(torch.arange(4096, device=b.x.device)[None])).values()
    )
    routed = b.routes[c.num_local_experts]
    x = b.x.clone()
    fused = rows == 1

    def normed(gain: Norm) -> tuple:
        if fused:
            return x, gain.weight, gain.eps
        norm.rms_norm(x, gain.weight, gain.eps, b.normed)
        return b.normed, None, 0.0

    def reference(gain: Norm) -> torch.Tensor:
        return replace(gain, weight=gain.weight.float())(x.float())

    def product(y: torch.Tensor, layer) -> torch.Tensor:
        done = torch.cat([PLAIN.product(y.float(), matrix) for matrix in layer.matrices], dim=-1)
        return done if layer.bias is None else done + layer.bias.float()

    def project(block: Block) -> None:
        y, gain, eps = normed(block.attention_norm)
        at, layer = block.attention.qkv, cache.layers[0]
        qkv.project_qkv(y, at.matrices, at.bias, table, i.slots, i.positions, b.q, layer.keys, layer.values,
                           norm=gain, eps=eps)  # fmt: skip

    def q_oracle(block: Block) -> torch.Tensor:
        y = product(reference(block.attention_norm), block.attention.qkv)[:, None, : c.q_size]
        return PLAIN.rotate(y, rotation)[:, :, 0]

    def out(block: Block) -> None:
        """With the norm after it, which adds K's parts up."""
        at, gain = block.attention.out, block.mlp_norm
        _, parts = tiles.split_k(rows, at.matrices[0], b.x.dtype)
        b.x.copy_(x)
        if parts > 1:
            partial = b.x.new_empty((parts, *b.x.shape), dtype=torch.float32)
            linear.split_linear(b.y, at.matrices[0], partial)
            norm.rms_norm(b.x, gain.weight, gain.eps, b.normed, partial=partial, bias=at.bias)
        else:
            linear.linear(b.y, at.matrices[0], b.x, bias=at.bias, residual=b.x)
            norm.rms_norm(b.x, gain.weight, gain.eps, b.normed)

    def route(block: Block) -> None:
        y, gain, eps = normed(block.mlp_norm)
        routing.router(y, block.mlp.router.matrices[0], block.mlp.router.bias, routed.scores, norm=gain, eps=eps)

    def experts(block: Block) -> None:
        route(block)
        b.x.copy_(x)
        if fused:
            moe.forward_one_token(
                b.x, routed.scores, block.mlp.experts, b.hidden, block.mlp_norm.weight, block.mlp_norm.eps
            )
        else:
            routing.sort_pairs(routed.scores, i.positions, c.num_experts_per_tok, routed.groups)
            moe.forward_grouped(b.x, b.normed, routed.groups, block.mlp.experts, b.hidden, b.parts, b.x, i.positions)

    def mixed(block: Block) -> torch.Tensor:
        y, layer = reference(block.mlp_norm), block.mlp.experts
        wide = replace(
            layer, **{n: replace(getattr(layer, n), bias=getattr(layer, n).bias.float()) for n in ("gate_up", "down")}
        )
        return x.float() + PLAIN.mixture(y, product(y, block.mlp.router), wide)

    def head(block: Block) -> None:
        y, gain, eps = normed(model.norm)
        linear.linear(y, model.lm_head.matrices[0], b.logits, norm=gain, eps=eps)

    block = model.blocks[0]
    touched = len(product(reference(block.mlp_norm), block.mlp.router).topk(c.num_experts_per_tok).indices.unique())
    bank = sum(nbytes(m) for layer in (block.mlp.experts.gate_up, block.mlp.experts.down) for m in layer.matrices)
    yield Case("qkv", project, lambda: b.q, q_oracle, sum(map(nbytes, block.attention.qkv.matrices)))
    yield Case("out", out, lambda: b.x, lambda k: x.float() + product(b.y, k.attention.out),
               nbytes(block.attention.out.matrices[0]))  # fmt: skip
    yield Case("router", route, lambda: routed.scores, lambda k: product(reference(k.mlp_norm), k.mlp.router),
               nbytes(block.mlp.router.matrices[0]))  # fmt: skip
    yield Case("experts", experts, lambda: b.x, mixed, bank * touched // c.num_local_experts)
    yield Case("lm_head", head, lambda: b.logits, lambda k: product(reference(model.norm), model.lm_head),
               nbytes(model.lm_head.matrices[0]), whole=True)  # fmt: skip


def nbytes(matrix: Matrix) -> int:
    """Bytes of a matrix as it is stored."""
    parts = [matrix.weight] if isinstance(matrix, DenseMatrix) else [matrix.codes, matrix.scale, matrix.bias]
    return sum(part.nbytes for part in parts if part is not None)


@contextmanager
def with_tile(tile: Tile | None, parts: int = 1) -> Iterator[None]:
    """Use `tile` for all products, with attention's output in so many parts; None is the tiles in use."""
    if tile is None:
        yield
        return
    with _choosing(lambda choose, *args: tile), _choosing(lambda choose, *args: (tile, parts), ["split_k"]):
        yield


@contextmanager
def with_stages(stages: int) -> Iterator[None]:
    """Use the tiles in use, but with another number of pipeline stages."""

    def split(choose: Callable[..., tuple[Tile, int]], *args: object) -> tuple[Tile, int]:
        tile, parts = choose(*args)
        return replace(tile, num_stages=stages), parts

    with _choosing(lambda choose, *args: replace(choose(*args), num_stages=stages)), _choosing(split, ["split_k"]):
        yield


@contextmanager
def _choosing(instead: Callable[..., Any], choices: Sequence[str] = CHOICES) -> Iterator[None]:
    """Call `instead` with each function of tiles.py that chooses a tile, and its arguments."""
    kept = {name: getattr(tiles, name) for name in choices}
    for name, choose in kept.items():
        setattr(tiles, name, partial(instead, choose))
    try:
        yield
    finally:
        for name, choose in kept.items():
            setattr(tiles, name, choose)


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Median seconds of a call, from the GPU's own clock if there is one."""
    seconds = []
    for _ in range(REPEAT if device.type == "cuda" else 1):
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            first.record()
            run()
            last.record()
            last.synchronize()
            seconds.append(first.elapsed_time(last) / 1e3)
        else:
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def try_tile(case: Case, tile: Tile | None, parts: int, model: GptOss, device: torch.device, copy: float) -> str:
    """Check and time a product with a tile; one line of results. copy: the copy bandwidth, bytes per second."""
    blocks = model.blocks[:1] if case.whole else model.blocks
    with with_tile(tile, parts):
        case.run(blocks[-1])
        got, wanted = case.result().float(), case.oracle(blocks[-1]).float()
        error = float((got - wanted).abs().max() / wanted.abs().max())
        assert error < 0.03, f"{case.name} {tile}: relative error {error:.2g}"  # NaN, too

        def all_blocks() -> None:
            for block in blocks:
                case.run(block)

        seconds = timed(all_blocks, device) / len(blocks)
    rate = case.size / seconds
    return f"{seconds * 1e6:9.1f} us {rate / 1e9:7.0f} GB/s {rate / copy:6.1%} of a copy, error {error:.1e}"


def tune(
    preset: str,
    form: str,
    counts: list[int],
    contexts: list[int],
    candidates: list[Tile],
    device: torch.device,
    chosen: Sequence[str] = CASES,
) -> None:
    """Print a line for each of the chosen products and each tile of one format, and one for each whole step.
    counts: rows of a step."""
    config = PRESETS[preset]
    layers = min(LAYERS, config.num_hidden_layers)
    config = replace(config, num_hidden_layers=layers, layer_types=config.layer_types[:layers])
    copy = cuda.copy_bandwidth(str(device))
    print(f"{preset} {form} on {cuda.device_name(str(device))}, which copies {copy / 1e9:.0f} GB/s", flush=True)
    model = load_model(Synthetic(config, form), torch.bfloat16, device, Fused())
    for rows in counts:
        cache = Cache(config, rows, 4096, torch.bfloat16, device, whole=True)
        b = Buffers(model, rows, 4096, device)
        b.inputs.slots.copy_(torch.arange(rows))
        b.inputs.positions.fill_(1000)
        b.x.normal_()
        b.y.normal_()
        for case in (case for case in cases(model, b, cache, b.inputs.positions) if case.name in chosen):
            whole = [(tile, 1) for tile in [None, *candidates]]
            split = PARTS[: len(candidates)] if case.name == "out" and rows > 1 else []
            split = [(tile, parts) for tile, parts in split if config.q_size % (parts * tile.SPLIT * tile.BK) == 0]
            for tile, parts in [*whole, *split]:
                if case.name == "router" and tile is not None:
                    continue  # the router has no tile
                if case.name == "qkv" and tile is not None and tile.BN > HEAD:
                    continue  # a program of this kernel rotates pairs of one head
                try:
                    found = try_tile(case, tile, parts, model, device, copy)
                except (RuntimeError, ValueError, TritonError) as error:  # such as too much shared memory
                    found = f"cannot run: {str(error).splitlines()[0][:60]}"
                name = "in use" if tile is None else str(vars(tile) | ({"parts": parts} if parts > 1 else {}))
                print(f"{rows:3} rows {case.name:8} {name:48} {found}", flush=True)
        for context in contexts:
            time_step(model, rows, context, device)


def time_step(model: GptOss, rows: int, context: int, device: torch.device) -> None:
    """Time the whole step of the model's few layers with the tiles in use, and a full layer's attention alone."""
    cache = Cache(model.config, rows, context, model.dtype, device, whole=True)
    decoder = Decoder(model, cache, torch.zeros(rows, dtype=torch.int64, device=device), context)
    feed = [Row(slot, context - 1, None) for slot in range(rows)]
    b = decoder.step(feed, [0] * rows, [1.0] * rows)
    seconds = timed(lambda: decoder.step(feed, [0] * rows, [1.0] * rows), device)
    full = cache.layers[1]
    at = model.blocks[1].attention

    def attend() -> None:
        attention.decode_attention(b.q, full.keys, full.values, b.inputs.slots, b.inputs.positions, at.sinks, at.scale,
                                   b.y, b.attention, window=None)  # fmt: skip

    alone = timed(attend, device)
    rate = rows * context * 4 * model.config.kv_size / alone / 1e9
    print(f"{rows:3} rows step of {len(model.blocks)} layers at {context}: {seconds * 1e6:.1f} us; "
          f"a full layer's attention {alone * 1e6:.1f} us, {rate:.0f} GB/s", flush=True)  # fmt: skip


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="20b" if on_gpu else "tiny", choices=PRESETS)
    parser.add_argument("--format", nargs="+", default=["mxfp4", "mlx-4bit"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 64] if on_gpu else [1, 2])
    parser.add_argument("--context", nargs="*", type=int, default=[1024, 131072] if on_gpu else [64])
    parser.add_argument(
        "--tiles", type=int, default=len(CANDIDATES) if on_gpu else 1, help="Try only the first N candidates."
    )
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES, help="Time only these products.")
    options = parser.parse_args()
    with torch.inference_mode():
        for form in options.format:
            device = torch.device("cuda" if on_gpu else "cpu")
            tiles_tried = CANDIDATES[: options.tiles]
            tune(options.preset, form, options.rows, options.context, tiles_tried, device, options.case)


if __name__ == "__main__":
    main()
