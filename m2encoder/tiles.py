"""One rank's block of the similarity matrix, in tiles: what a loss needs of it, never the matrix.

Forward reduces every tile to numbers per row and per column, backward computes each tile again and
multiplies it away, so memory is O(tile^2) for any batch. The positives are not in here: their
entries count as minus infinity, and the loss adds them (loss_function.py): a softmax near 1 then
never cancels with the 1 that is subtracted from it.
Not for communication. Letters: N rows of the block, M columns, D width.
"""

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_TILE, GPU_TILE = 512, 8192


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


class Extent(NamedTuple):
    """Of the negatives of each row or column: log-sum-exp and largest, -inf where there is none."""

    lse: Tensor
    """float64: near 100, float32 has too few digits left for what a loss subtracts from it."""
    largest: Tensor


def tiles(block: Block, positives: Tensor | None = None) -> Iterator[Tile]:
    """Yield every tile, in float32 (float64 for float64), in the same memory each time.

    positives: filled with the similarities (count,) of the own pairs on the way.
    """
    rows, columns, t = block.rows_ND, block.columns_MD, block.tile
    dtype = torch.promote_types(rows.dtype, torch.float32)
    memory = rows.new_empty(min(t, len(rows)) * min(t, len(columns)), dtype=dtype)
    for i in _steps(len(rows), t):
        for j in _steps(len(columns), t):
            a, b = rows[i], columns[j]
            sim = memory[: len(a) * len(b)].view(len(a), len(b))
            _multiply(a, b.T, sim, beta=0, alpha=block.scale)
            _mask(sim, block, i, j, positives)
            yield Tile(i, j, sim)


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
    for i, j, sim in tiles(block, positives):
        known = [
            (largest[x], total[x]) for x, (largest, total) in zip((i, j), extents, strict=True)
        ]
        if fused := fused_kernels(sim):
            fused.add_extents(sim, *known)
        else:
            _add_extents(sim, known)
    row, column = (
        Extent(total.double().log_().add_(largest), largest) for largest, total in extents
    )
    return row, column, positives


def _add_extents(sim: Tensor, known: list[tuple[Tensor, Tensor]]) -> None:
    """Add a tile to (largest, sum of exponentials below it) of its rows and of its columns."""
    for dim, (largest, total) in zip((1, 0), known, strict=True):
        now = torch.maximum(largest, sim.amax(dim))
        base = now.masked_fill(now == -torch.inf, 0)  # -inf minus itself is no number
        new = (sim - base.unsqueeze(dim)).exp_().sum(dim)
        total.mul_((largest - base).exp_()).add_(new)
        largest.copy_(now)


def fused_kernels(sim: Tensor) -> ModuleType | None:
    """Return tiles_triton where it can do this tile's element-wise work."""
    if sim.is_cuda and sim.dtype == torch.float32 and find_spec("triton") is not None:
        return import_module("m2encoder.tiles_triton")
    return None


def sigmoid_extents(block: Block, bias: Tensor) -> tuple[Extent, Extent, Tensor]:
    """Return the extents of the rows and columns, and the positives (count,), without bias.

    Here `lse` is the loss summed over the negatives of a row, softplus(similarity + bias); that of
    the columns is zero, because a pair counts once.
    """
    rows, columns = block.rows_ND, block.columns_MD
    dtype = torch.promote_types(rows.dtype, torch.float32)
    positives = rows.new_empty(block.own[2], dtype=dtype)
    row, column = (
        Extent(rows.new_zeros(n, dtype=torch.float64), rows.new_full((n,), -torch.inf, dtype=dtype))
        for n in (len(rows), len(columns))
    )
    for i, j, sim in tiles(block, positives):
        row.largest[i] = torch.maximum(row.largest[i], sim.amax(1))
        column.largest[j] = torch.maximum(column.largest[j], sim.amax(0))
        row.lse[i] -= F.logsigmoid(-(sim + bias)).sum(1)  # softplus, exact for large arguments
    return row, column, positives


def add_softmax_gradients(
    block: Block, row_lse: Tensor, column_lse: Tensor, weight: float, out: tuple[Tensor, Tensor]
) -> None:
    """Add to out, (N, D) and (M, D), the gradients of weight * (all row and column terms).

    Of the negatives alone: entry (i, j) has softmax over row i plus softmax over column j.
    row_lse, column_lse: (N,) and (M,) float64, over negatives and positive.
    """
    dtype = torch.promote_types(block.rows_ND.dtype, torch.float32)
    (row, row_rest), (column, column_rest) = (_split(x, dtype) for x in (row_lse, column_lse))
    for i, j, sim in tiles(block):
        if fused := fused_kernels(sim):
            d_sim = fused.softmax_gradient(sim, row[i], column[j], block.rows_ND.dtype)
        else:
            by_column = (sim - column[None, j]).exp_()
            d_sim = sim.sub_(row[i, None]).exp_().mul_(row_rest[i, None])
            d_sim.addcmul_(by_column, column_rest[None, j])
        _multiply_back(block, i, j, d_sim, weight, out)


def _split(lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return lse rounded to a dtype, and the factor that makes up in exp(x - lse) for that."""
    rounded = lse.to(dtype)
    return rounded, (rounded - lse).exp_().to(dtype)


def add_sigmoid_gradients(
    block: Block, bias: Tensor, weight: float, out: tuple[Tensor, Tensor]
) -> Tensor:
    """Add to out as above, with sigmoid(entry + bias) in entry (i, j).

    Returns the gradient of the bias from these entries.
    """
    d_bias = torch.zeros_like(bias)
    for i, j, sim in tiles(block):
        sim.add_(bias).sigmoid_()
        d_bias += weight * sim.sum()
        _multiply_back(block, i, j, sim, weight, out)
    return d_bias


def _multiply_back(
    block: Block, i: slice, j: slice, d_sim: Tensor, weight: float, out: tuple[Tensor, Tensor]
) -> None:
    """Add the gradients of rows i and columns j from that of their similarities.

    In half precision the products round what they multiply, as the features are rounded; their sums
    stay float32.
    """
    (d_rows, d_columns), alpha = out, weight * block.scale
    a, b = block.rows_ND[i], block.columns_MD[j]
    d_sim = d_sim.to(a.dtype)
    _multiply(d_sim, b, d_rows[i], beta=1, alpha=alpha)
    _multiply(d_sim.T, a, d_columns[j], beta=1, alpha=alpha)


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, beta: int, alpha: float) -> None:
    """Set out to beta * out + alpha * a @ b; half precision is added up in out's float32."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    else:  # on GPUs alone
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
