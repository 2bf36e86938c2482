"""The tile of every matrix product: how much a program computes at once, with how many warps and pipeline stages.

A product with a weight matrix [N, K] runs one program for each BN output rows and BT tokens. The program walks over K
in steps of SPLIT * BK columns, with the loads of `num_stages` steps in flight. Attention walks over keys: M query rows
by N keys.

How the sizes were chosen: by counting, for an H200 with 132 multiprocessors, on the shapes of gpt-oss. None has been
timed on a GPU yet. Four counts decide:

- programs: enough for every multiprocessor. A small N takes narrow tiles, and then SPLIT gives each program work for
  four warps. They are not too narrow either, because each program reads all of its tokens. Where neither is possible,
  K is split among programs.
- bytes in flight: BN * SPLIT * BK weights times `num_stages`, for all programs that run at once.
- instructions per weight: up to 3.7 per 4-bit weight keep up with an H200's memory.
- loads that wait: a step of scales is copied while earlier ones are computed only if it is whole words, so BK is at
  least the columns of a word.

`python tests/kernels/report.py` compiles every kernel and prints its programs, registers and instructions;
`python tests/kernels/tune.py` times other tiles on a GPU. To change a tile, edit the table and run both.

Legend: T tokens, N output rows, K columns, P parts of them; H query heads, KV key heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton

from ..matrices import DenseMatrix, Matrix, PackedMatrix

WIDE = 16384  # output rows that make more programs than a GPU runs at once: lm_head
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
PREFILL_TOKENS = 256  # with more, arithmetic limits a product, with fewer memory


@dataclass(frozen=True)
class Tile:
    """A product's BN output rows by SPLIT * BK columns, `num_warps` warps a program, `num_stages` steps of loads in
    flight. SPLIT: see `multiply` in linear.py."""

    BN: int
    BK: int
    num_warps: int
    num_stages: int
    SPLIT: int = 1

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


FLOAT32 = Tile(16, 128, 4, 2)  # float32 activations: no tensor cores
COLUMNS = (1, 16, 32)  # the most tokens of the first three columns
TILES = {
    #                     1 token                   2 to 16 tokens            17 to 32                  more
    "quantized":         (Tile(16, 128, 4, 3, 4), Tile(16, 128, 4, 3, 4), Tile(32, 128, 4, 2, 2), Tile(64, 128, 4, 3)),
    "quantized and wide": (Tile(16, 128, 1, 3, 2), Tile(64, 128, 2, 3), Tile(64, 128, 4, 3), Tile(64, 128, 4, 3)),
    "dense":             (Tile(16, 128, 4, 3, 4), Tile(16, 64, 4, 4, 4), Tile(32, 64, 4, 3, 2), Tile(32, 64, 4, 3, 2)),
    "dense and wide":    (Tile(16, 256, 1, 4), Tile(32, 128, 2, 4), Tile(64, 64, 4, 4), Tile(64, 64, 4, 4)),
}  # fmt: skip
# Attention's output, [2880, 4096] in gpt-oss, for more than SPLIT_FROM tokens: tile and P up to 16 tokens, and more.
# Few programs leave multiprocessors idle, and narrow ones read all tokens too often. In parts of K neither happens, and
# no kernel is added: the norm that follows adds the parts up. Estimated for an H200, in microseconds: reading from its
# L2 cache at 5.5 TB/s, and issuing the instructions that report.py counts, with a lone warp in half of the cycles.
#
#     tokens          16 rows a program    64 rows a program    64 rows, K in parts, which are written and read
#                     180 programs         45 programs          360 programs of 2 warps; 180 for more than 16 tokens
#     4-bit, 16        5.5, 2.5             2.3, 11.5            2.8, 1.4
#     4-bit, 32        9.8, 3.1             3.3, 11.5            3.9, 2.9
#     4-bit, 64       18.4                  5.5, 12.8            6.6, 3.2
#     bfloat16, 32    12.9                  6.4                  6.9
#
# With 8 tokens it is 3.3 against 2.0, but the norm has 8 programs then, which take as much longer to read the parts.
# qkv has 80 programs for 64 tokens, which issue for 9.1 us. In parts it would read for 6.9, and for 1.4 the parts, with
# one more kernel for its rotation and its cache. One token has programs enough for both. A program of the router starts
# all its loads at once.
SPLIT_FROM = 8
SPLIT_K = {
    "quantized": ((Tile(64, 128, 2, 3), 8), (Tile(64, 128, 4, 3), 4)),
    "dense": ((Tile(64, 64, 4, 4), 4), (Tile(64, 64, 4, 4), 4)),
}
GATE_UP_ONE_TOKEN = {"quantized": Tile(16, 128, 1, 3, 2), "dense": Tile(16, 256, 1, 4)}
DOWN_ONE_TOKEN = {"quantized": Tile(4, 128, 1, 3, 2), "dense": Tile(4, 128, 1, 4, 2)}  # BN rows of each of A experts
GROUPED = {"quantized": Tile(64, 128, 2, 3), "dense": Tile(32, 128, 2, 4)}  # experts with few tokens each
PREFILL = {"quantized": Tile(128, 128, 8, 2), "dense": Tile(128, 64, 8, 3)}


def linear_tile(tokens: int, matrix: Matrix, dtype: torch.dtype) -> Tile:
    """The tile of a product of `tokens` activations of `dtype` with a matrix [N, K]."""
    if dtype == torch.float32:
        return FLOAT32
    kind = _kind(matrix)
    if tokens > PREFILL_TOKENS and kind == "quantized":
        return _fitting(PREFILL[kind], matrix)
    row = TILES[kind if matrix.shape[-2] < WIDE else f"{kind} and wide"]
    return _fitting(row[sum(tokens > most for most in COLUMNS)], matrix)


def split_k(tokens: int, matrix: Matrix, dtype: torch.dtype) -> tuple[Tile, int]:
    """The tile of attention's output projection and P, the parts of its columns that are computed by programs of their
    own and added by the norm after it; 1 if K is not split."""
    if tokens <= SPLIT_FROM:
        return linear_tile(tokens, matrix, dtype), 1
    tile, parts = SPLIT_K[_kind(matrix)][tokens > 16]
    tile = FLOAT32 if dtype == torch.float32 else _fitting(tile, matrix)
    while parts > 1 and matrix.shape[-1] % (parts * tile.SPLIT * tile.BK):  # not whole steps
        parts //= 2
    return (tile, parts) if parts > 1 else (linear_tile(tokens, matrix, dtype), 1)


def token_block(tokens: int, matrix: Matrix, dtype: torch.dtype) -> int:
    """BT of a product with a matrix [N, K]: 1 for one token, else a power of two from 16, the least that tl.dot takes,
    to 64 in a decoding step and 128 in a long prefill."""
    if tokens == 1:
        return 1
    if dtype == torch.float32:
        return 16
    if tokens > PREFILL_TOKENS and _kind(matrix) == "quantized":
        return 128
    return min(64, max(16, 1 << (tokens - 1).bit_length()))


def gate_up_one_token_tile(matrix: Matrix, dtype: torch.dtype) -> Tile:
    """The tile of one token's gate and up projections with a matrix [E, 2 I, K]."""
    return FLOAT32 if dtype == torch.float32 else _fitting(GATE_UP_ONE_TOKEN[_kind(matrix)], matrix)


def down_one_token_tile(matrix: Matrix, dtype: torch.dtype) -> Tile:
    """The tile of one token's down projection, which takes BN rows of each of the token's experts."""
    return FLOAT32 if dtype == torch.float32 else _fitting(DOWN_ONE_TOKEN[_kind(matrix)], matrix)


def grouped_token_block(pairs: int, experts: int, matrix: Matrix, dtype: torch.dtype) -> int:
    """BT of an expert product of several tokens, with `pairs` of them and an expert for `experts`: 16 where decoding
    weights takes most of the time, so that few columns are computed for nothing, up to 256 where products do."""
    average = pairs // experts
    if dtype == torch.float32 or average <= 8:
        return 16
    if average <= 32:
        return 64
    largest = isinstance(matrix, PackedMatrix) and matrix.spec.bits == 4 and capability(matrix.codes.device) == 90
    return 256 if average >= 256 and largest else 128


def grouped_tile(BT: int, matrix: Matrix, dtype: torch.dtype) -> Tile:
    """The tile of an expert product of blocks of BT tokens, grouped by expert."""
    if dtype == torch.float32:
        return FLOAT32
    return _fitting((GROUPED if BT == 16 else PREFILL)[_kind(matrix)], matrix)


def _kind(matrix: Matrix) -> str:
    return "dense" if isinstance(matrix, DenseMatrix) else "quantized"


def _fitting(tile: Tile, matrix: Matrix) -> Tile:
    """The tile with a BK of whole words of scales, and as this Triton compiles it right. Before Triton 3.9, wgmma on
    sm_90 with a left operand that a pipelined loop decodes reads registers that the next step has overwritten
    (triton-lang/triton#9433): one stage instead."""
    if isinstance(matrix, DenseMatrix):
        return tile
    columns = matrix.spec.group * 4 // matrix.scale.itemsize if matrix.scale is not None else 0
    if columns > tile.BK:
        tile = replace(tile, BK=columns, num_stages=min(2, tile.num_stages))
    wgmma = tile.BN >= 64 and tile.num_warps >= 4
    if wgmma and TRITON < (3, 9) and capability(matrix.codes.device) == 90:
        return replace(tile, num_stages=1)
    return tile


@cache
def capability(device: torch.device) -> int:
    """The compute capability of a device, 90 for 9.0; 0 without a GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def decode_attention_tile(heads: int, dtype: torch.dtype) -> AttentionTile:
    """The tile of one new token's `heads` = H / KV query heads: 8 KB of keys at a time."""
    return AttentionTile(max(16, triton.next_power_of_2(heads)), 128 // dtype.itemsize, 4, 4)


def prefill_attention_tile(heads: int, dtype: torch.dtype) -> AttentionTile:
    """The tile of many new tokens: M rows are M / heads queries times `heads` = H / KV heads, a power of two."""
    if dtype == torch.float32:
        return AttentionTile(max(32, heads), 32, 4, 3)
    return AttentionTile(max(128, heads), 64, 8, 3)
