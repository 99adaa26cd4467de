# pyright: reportMissingImports=false, reportIndexIssue=false
"""The element-wise work on a tile in one pass over it, for NVIDIA GPUs; the products stay cuBLAS's.

tiles.py does the same in plain PyTorch, in several passes, and this is held to it. Needs Triton,
which PyTorch's CUDA builds bring along. float32 tiles only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, MERGED = 64, 128


@triton.jit
def _block_extents(
    sim, row_largest, row_total, column_largest, column_total, n, m, block: tl.constexpr
):  # fmt: skip
    """Largest, and sum of exponentials below it, of each row and column of one block."""
    at_row, at_column = tl.program_id(0), tl.program_id(1)
    i = at_row * block + tl.arange(0, block)
    j = at_column * block + tl.arange(0, block)
    is_in = (i[:, None] < n) & (j[None, :] < m)
    place = i[:, None].to(tl.int64) * m + j[None, :]
    x = tl.load(sim + place, mask=is_in, other=float("-inf"))
    largest = tl.max(x, axis=1)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(x - base[:, None]), axis=1)
    tl.store(row_largest + at_column * n + i, largest, mask=i < n)
    tl.store(row_total + at_column * n + i, total, mask=i < n)
    largest = tl.max(x, axis=0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(x - base[None, :]), axis=0)
    tl.store(column_largest + at_row * m + j, largest, mask=j < m)
    tl.store(column_total + at_row * m + j, total, mask=j < m)


@triton.jit
def _merge_extents(largest_parts, total_parts, largest, total, n, parts, block: tl.constexpr):
    """Add parts (parts, n) to the extents (n,)."""
    i = tl.program_id(0) * block + tl.arange(0, block)
    now = tl.load(largest + i, mask=i < n, other=float("-inf"))
    sum_now = tl.load(total + i, mask=i < n, other=0.0)
    for part in range(parts):
        new = tl.load(largest_parts + part * n + i, mask=i < n, other=float("-inf"))
        sum_new = tl.load(total_parts + part * n + i, mask=i < n, other=0.0)
        top = tl.maximum(now, new)
        base = tl.where(top == float("-inf"), 0.0, top)  # -inf minus itself is no number
        sum_now = sum_now * tl.exp(now - base) + sum_new * tl.exp(new - base)
        now = top
    tl.store(largest + i, now, mask=i < n)
    tl.store(total + i, sum_now, mask=i < n)


@triton.jit
def _softmax_gradient(sim, row_lse, column_lse, out, n, m, block: tl.constexpr):
    """exp(sim - row_lse) + exp(sim - column_lse), in the dtype of out."""
    i = tl.program_id(0) * block + tl.arange(0, block)
    j = tl.program_id(1) * block + tl.arange(0, block)
    is_in = (i[:, None] < n) & (j[None, :] < m)
    place = i[:, None].to(tl.int64) * m + j[None, :]
    x = tl.load(sim + place, mask=is_in, other=float("-inf"))
    row = tl.load(row_lse + i, mask=i < n, other=0.0)
    column = tl.load(column_lse + j, mask=j < m, other=0.0)
    gradient = tl.exp(x - row[:, None]) + tl.exp(x - column[None, :])
    tl.store(out + place, gradient.to(out.dtype.element_ty), mask=is_in)


def add_extents(sim: Tensor, row: tuple[Tensor, Tensor], column: tuple[Tensor, Tensor]) -> None:
    """Add a tile to what is known of its rows and columns.

    sim: (n, m) float32, contiguous, on a GPU; -inf takes no part. row, column: largest so far and
    the sum of exponentials below it, each (n,) or (m,) float32, contiguous; changed in place.
    """
    n, m = sim.shape
    grid = triton.cdiv(n, BLOCK), triton.cdiv(m, BLOCK)
    rows, columns = sim.new_empty(2, grid[1], n), sim.new_empty(2, grid[0], m)
    _block_extents[grid](sim, rows[0], rows[1], columns[0], columns[1], n, m, block=BLOCK)
    for parts, (largest, total), length in ((rows, row, n), (columns, column, m)):
        _merge_extents[(triton.cdiv(length, MERGED),)](
            parts[0], parts[1], largest, total, length, parts.shape[1], block=MERGED
        )


def softmax_gradient(
    sim: Tensor, row_lse: Tensor, column_lse: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return exp(sim - row_lse) + exp(sim - column_lse), (n, m) in dtype; sim may be its memory."""
    n, m = sim.shape
    out = sim if dtype == sim.dtype else torch.empty_like(sim, dtype=dtype)
    grid = triton.cdiv(n, BLOCK), triton.cdiv(m, BLOCK)
    _softmax_gradient[grid](sim, row_lse, column_lse, out, n, m, block=BLOCK)
    return out
