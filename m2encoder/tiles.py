"""One rank's block of the similarity matrix, in tiles: what a loss needs of it, never the matrix.

Forward reduces every tile to numbers per row and per column, backward computes each tile again and
multiplies it away, so memory is O(tile^2) for any batch. The positives are not in here: their
entries count as minus infinity, and the loss adds them (loss_function.py): a softmax near 1 then
never cancels with the 1 that is subtracted from it.
Not for communication. Letters: N rows of the block, M columns, D width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_TILE, GPU_TILE = 512, 4096


class Block(NamedTuple):
    """Features of the rows and columns of a block, and which entries are no negatives."""

    rows_ND: Tensor
    columns_MD: Tensor
    scale: float
    """The matrix is scale * rows @ columns.T."""
    own: tuple[int, int, int]
    """(first row, first column, count) of this rank's own pairs; their entries are positives."""
    row_keys: Tensor | None = None  # (K, N) int64
    column_keys: Tensor | None = None  # (K, M) int64; any of the K keys equal: no negative
    tile: int = CPU_TILE


class Tile(NamedTuple):
    """Similarities of rows i and columns j."""

    i: slice
    j: slice
    sim: Tensor
    """(n, m); entries that are no negatives are -inf."""
    scratch: Tensor
    """(n, m), anything."""


class Extent(NamedTuple):
    """Of the negatives of each row or column: log-sum-exp and largest, -inf where there is none."""

    lse: Tensor
    largest: Tensor


def tiles(block: Block, positives: Tensor | None = None) -> Iterator[Tile]:
    """Yield every tile, in float32 (float64 for float64), in the same memory each time.

    positives: filled with the similarities (count,) of the own pairs on the way.
    """
    rows, columns, t = block.rows_ND, block.columns_MD, block.tile
    dtype = torch.promote_types(rows.dtype, torch.float32)
    memory = rows.new_empty(2, min(t, len(rows)) * min(t, len(columns)), dtype=dtype)
    for i in _steps(len(rows), t):
        for j in _steps(len(columns), t):
            a, b = rows[i], columns[j]
            sim, scratch = (m[: len(a) * len(b)].view(len(a), len(b)) for m in memory)
            if a.dtype == dtype:
                torch.addmm(sim, a, b.T, beta=0, alpha=block.scale, out=sim)
            else:  # half precision on a GPU: exact products, added up in float32
                torch.mm(a, b.T, out_dtype=dtype, out=sim)
                sim.mul_(block.scale)
            _mask(sim, block, i, j, positives)
            yield Tile(i, j, sim, scratch)


def _steps(length: int, tile: int) -> Iterator[slice]:
    return (slice(at, min(at + tile, length)) for at in range(0, length, tile))


def _mask(sim: Tensor, block: Block, i: slice, j: slice, positives: Tensor | None) -> None:
    """Set to -inf what is no negative: the own pairs, and pairs that share a key."""
    first_row, first_column, count = block.own
    low = max(i.start - first_row, j.start - first_column, 0)
    high = min(i.stop - first_row, j.stop - first_column, count)
    if low < high:
        place = sim[first_row + low - i.start :, first_column + low - j.start :]
        diagonal = place.diagonal()[: high - low]
        if positives is not None:
            positives[low:high] = diagonal
        diagonal.fill_(-torch.inf)
    if block.row_keys is not None and block.column_keys is not None:
        for row_key, column_key in zip(block.row_keys, block.column_keys, strict=True):
            sim.masked_fill_(row_key[i, None] == column_key[None, j], -torch.inf)


def softmax_extents(block: Block) -> tuple[Extent, Extent, Tensor]:
    """Return the extents of the rows (N,) and columns (M,), and the positives (count,)."""
    rows, columns = block.rows_ND, block.columns_MD
    dtype = torch.promote_types(rows.dtype, torch.float32)
    positives = rows.new_empty(block.own[2], dtype=dtype)
    extents = [
        (rows.new_full((n,), -torch.inf, dtype=dtype), rows.new_zeros(n, dtype=dtype))
        for n in (len(rows), len(columns))
    ]
    for i, j, sim, scratch in tiles(block, positives):
        for dim, where, (largest, total) in ((1, i, extents[0]), (0, j, extents[1])):
            before = largest[where]
            now = torch.maximum(before, sim.amax(dim))
            base = now.masked_fill(now == -torch.inf, 0)  # -inf minus itself is no number
            torch.sub(sim, base.unsqueeze(dim), out=scratch)
            total[where] = total[where] * (before - base).exp() + scratch.exp_().sum(dim)
            largest[where] = now
    row, column = (Extent(total.log().add_(largest), largest) for largest, total in extents)
    return row, column, positives


def sigmoid_extents(block: Block, bias: Tensor) -> tuple[Extent, Extent, Tensor]:
    """Return the extents of the rows and columns, and the positives (count,), without bias.

    Here `lse` is the loss summed over the negatives of a row, softplus(similarity + bias); that of
    the columns is zero, because a pair counts once.
    """
    rows, columns = block.rows_ND, block.columns_MD
    dtype = torch.promote_types(rows.dtype, torch.float32)
    positives = rows.new_empty(block.own[2], dtype=dtype)
    row, column = (
        Extent(rows.new_zeros(n, dtype=dtype), rows.new_full((n,), -torch.inf, dtype=dtype))
        for n in (len(rows), len(columns))
    )
    for i, j, sim, scratch in tiles(block, positives):
        row.largest[i] = torch.maximum(row.largest[i], sim.amax(1))
        column.largest[j] = torch.maximum(column.largest[j], sim.amax(0))
        torch.add(sim, bias, out=scratch)
        row.lse[i] -= F.logsigmoid(scratch.neg_()).sum(1)  # softplus, exact for large arguments
    return row, column, positives


def add_softmax_gradients(
    block: Block, row_lse: Tensor, column_lse: Tensor, weight: float, out: tuple[Tensor, Tensor]
) -> None:
    """Add to out, (N, D) and (M, D), the gradients of weight * (all row and column terms).

    Of the negatives alone: entry (i, j) has softmax over row i plus softmax over column j.
    row_lse, column_lse: (N,) and (M,), over negatives and positive.
    """
    for i, j, sim, scratch in tiles(block):
        torch.sub(sim, column_lse[None, j], out=scratch).exp_()
        sim.sub_(row_lse[i, None]).exp_().add_(scratch)
        _multiply_back(block, i, j, sim, weight, out)


def add_sigmoid_gradients(
    block: Block, bias: Tensor, weight: float, out: tuple[Tensor, Tensor]
) -> Tensor:
    """Add to out as above, with sigmoid(entry + bias) in entry (i, j).

    Returns the gradient of the bias from these entries.
    """
    d_bias = torch.zeros_like(bias)
    for i, j, sim, _ in tiles(block):
        sim.add_(bias).sigmoid_()
        d_bias += weight * sim.sum()
        _multiply_back(block, i, j, sim, weight, out)
    return d_bias


def _multiply_back(
    block: Block, i: slice, j: slice, d_sim: Tensor, weight: float, out: tuple[Tensor, Tensor]
) -> None:
    """Add the gradients of rows i and columns j from that of their similarities."""
    (d_rows, d_columns), alpha = out, weight * block.scale
    a, b = block.rows_ND[i], block.columns_MD[j]
    if a.dtype == d_sim.dtype:
        d_rows[i].addmm_(d_sim, b, alpha=alpha)
        d_columns[j].addmm_(d_sim.T, a, alpha=alpha)
    else:  # half-precision features have gradients of half precision
        half = d_sim.to(a.dtype)
        d_rows[i].add_(torch.mm(half, b, out_dtype=d_sim.dtype), alpha=alpha)
        d_columns[j].add_(torch.mm(half.T, a, out_dtype=d_sim.dtype), alpha=alpha)
