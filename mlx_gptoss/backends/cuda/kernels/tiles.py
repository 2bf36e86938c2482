"""The tile of every matrix product: how much a program computes at once, with how many warps and pipeline stages.

A product with a weight matrix [N, K] runs one program for each BN output rows and BT tokens. The program walks over K
in steps of BK columns, with the loads of `num_stages` steps in flight. Attention walks over keys: M query rows by N
keys.

How the sizes were chosen: by counting, for an H200 with 132 multiprocessors, on the shapes of gpt-oss. None has been
timed on a GPU yet. Three counts decide:

- programs: enough for every multiprocessor. A small N takes narrow tiles. They are not too narrow either, because each
  program reads all of its tokens.
- bytes in flight: BN * BK weights times `num_stages`, for all programs that run at once.
- instructions per weight: up to 3.7 per 4-bit weight keep up with an H200's memory.

`python tests/kernels/report.py` compiles every kernel and prints its programs, registers and instructions;
`python tests/kernels/tune.py` times other tiles on a GPU. To change a tile, edit the table and run both.

Legend: T tokens, N output rows, K columns; H query heads, KV key heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton

from ..layers import DenseMatrix, Matrix

WIDE = 16384  # output rows that make more programs than a GPU runs at once: lm_head
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
PREFILL_TOKENS = 64  # the most tokens of a decoding step; with more, arithmetic limits the experts, with fewer memory


@dataclass(frozen=True)
class Tile:
    """A product's BN output rows by BK columns, `num_warps` warps a program, `num_stages` steps of loads in flight."""

    BN: int
    BK: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """The fields as keyword arguments of a launch."""
        return vars(self).copy()


@dataclass(frozen=True)
class AttentionTile:
    """Attention's M query rows by N keys; warps and stages as in Tile."""

    M: int
    N: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """The fields as keyword arguments of a launch."""
        return vars(self).copy()


FLOAT32 = Tile(16, 64, 4, 2)  # float32 activations: no tensor cores
#                      1 token              2 to 16 tokens       more tokens
TILES = {
    "quantized":      (Tile(16, 256, 1, 3), Tile(32, 128, 2, 3), Tile(64, 64, 4, 3)),
    "dense":          (Tile(16, 256, 1, 4), Tile(16, 128, 1, 4), Tile(32, 128, 2, 4)),
    "dense and wide": (Tile(16, 256, 1, 4), Tile(32, 128, 2, 4), Tile(64, 64, 4, 4)),
}  # fmt: skip
DOWN_ONE_TOKEN = Tile(16, 128, 4, 3)  # BN rows of each of the A experts: A * BN rows in one program
PREFILL_EXPERTS = Tile(128, 64, 8, 3)


def linear_tile(tokens: int, matrix: Matrix, dtype: torch.dtype) -> Tile:
    """The tile of a product of `tokens` activations of `dtype` with a matrix [..., N, K]."""
    if dtype == torch.float32:
        return FLOAT32
    if not isinstance(matrix, DenseMatrix):
        row = TILES["quantized"]
    else:
        row = TILES["dense" if matrix.shape[-2] < WIDE else "dense and wide"]
    return _safe(row[0 if tokens == 1 else 1 if tokens <= 16 else 2], matrix)


def grouped_tile(tokens: int, matrix: Matrix, dtype: torch.dtype) -> Tile:
    """The tile of an expert product of several tokens, grouped by expert."""
    if tokens > PREFILL_TOKENS and dtype != torch.float32:
        return _safe(PREFILL_EXPERTS, matrix)
    return linear_tile(tokens, matrix, dtype)


@cache
def capability(device: torch.device) -> int:
    """The compute capability of a device, 90 for 9.0; 0 without a GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _safe(tile: Tile, matrix: Matrix) -> Tile:
    """The tile as this Triton compiles it right. Before Triton 3.9, wgmma on sm_90 with a left operand that a pipelined
    loop decodes reads registers that the next step has overwritten (triton-lang/triton#9433): one stage instead."""
    wgmma = tile.BN >= 64 and tile.num_warps >= 4
    if wgmma and TRITON < (3, 9) and not isinstance(matrix, DenseMatrix) and capability(matrix.codes.device) == 90:
        return replace(tile, num_stages=1)
    return tile


def down_one_token_tile(dtype: torch.dtype) -> Tile:
    """The tile of one token's down projection, which takes BN rows of each of the token's experts."""
    return FLOAT32 if dtype == torch.float32 else DOWN_ONE_TOKEN


def token_block(tokens: int, dtype: torch.dtype) -> int:
    """BT of a dense product: 1 for one token, else a power of two from 16 (the least that tl.dot takes) to 64."""
    return 1 if tokens == 1 else _power_of_two(tokens, 16, 16 if dtype == torch.float32 else 64)


def grouped_token_block(tokens: int, dtype: torch.dtype) -> int:
    """BT of an expert product of several tokens: a power of two from 16 to 128."""
    return _power_of_two(tokens, 16, 16 if dtype == torch.float32 else 128)


def decode_attention_tile(heads: int, dtype: torch.dtype) -> AttentionTile:
    """The tile of one new token's `heads` = H / KV query heads: 8 KB of keys at a time."""
    return AttentionTile(max(16, triton.next_power_of_2(heads)), 128 // dtype.itemsize, 4, 4)


def prefill_attention_tile(heads: int, dtype: torch.dtype) -> AttentionTile:
    """The tile of many new tokens: M rows are M / heads queries times `heads` = H / KV heads, a power of two."""
    if dtype == torch.float32:
        return AttentionTile(max(32, heads), 32, 4, 3)
    return AttentionTile(max(128, heads), 64, 8, 3)


def _power_of_two(count: int, least: int, most: int) -> int:
    return min(most, max(least, 1 << (count - 1).bit_length()))
