"""The autograd function behind the loss: gather, compare in tiles, exchange what is small, return.

Not for options and checks (loss.py, handshake.py).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from m2encoder.collectives import Axis, Ready, reduce_scatter_together, sum_over_world
from m2encoder.grid import Placement
from m2encoder.handshake import MISSING, Agreed
from m2encoder.tiles import (
    CPU_TILE,
    GPU_TILE,
    Block,
    Extent,
    add_sigmoid_gradients,
    add_softmax_gradients,
    sigmoid_extents,
    softmax_extents,
)


@dataclass(frozen=True)
class Job:
    """One comparison of a batch: everything but the tensors that take gradients."""

    kind: str
    placement: Placement
    axes: tuple[Axis, Axis]
    """This rank's row and column."""
    tile: int | None
    wire_dtype: torch.dtype
    names: tuple[str, ...]
    """The sides, in the order in which they are given."""
    pairs: tuple[tuple[str, str], ...]
    tags: dict[str, Tensor]
    agreed: Agreed
    accuracy: bool


Places = tuple[Tensor | None, Tensor | None]
"""Where a block's rows and columns lie among what was gathered; None: all, in order."""


class Term(NamedTuple):
    """What backward needs of one term."""

    block: Block
    places: Places
    lse: tuple[Tensor, Tensor]
    """Over negatives and positive, of rows (N,) and columns (M,); InfoNCE only."""
    positive_gradient: Tensor
    """(count,), of the own pairs' similarities."""
    queries: int
    """What the sum over all of them is divided by."""


class Contrast(torch.autograd.Function):
    """(job, scale, bias, *sides) to losses (T,) and accuracies (T,)."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, job: Job, scale: Tensor, bias: Tensor, *sides: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(sides[0].device.type, enabled=False):
            dtype = torch.promote_types(sides[0].dtype, torch.float32)
            own_bias, bias = bias, bias.detach().to(dtype).reshape(())
            gathered = _gather(job, dict(zip(job.names, sides, strict=True)))
            terms, sums = [], []
            for t in range(len(job.pairs)):
                term, loss_and_hits = _compare(job, t, gathered, bias)
                terms.append(term)
                sums.append(loss_and_hits)
            total = sum_over_world(torch.stack(sums), job.placement.world_size)
        ctx.job = job
        ctx.like = [(x.shape, x.dtype) for x in (scale, own_bias, *sides)]
        # saved the official way, so that autograd frees the tensors as soon as they were used
        leaves, ctx.structure = tree_flatten((terms, gathered, bias))
        ctx.plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        ctx.save_for_backward(*(leaves[i] for i in ctx.where))
        queries = total.new_tensor([term.queries for term in terms])
        both_ways = total.new_tensor([max(1, 2 * n) for n in job.agreed.totals])
        losses, accuracies = (total[:, 0] / queries).to(dtype), (total[:, 1] / both_ways).float()
        ctx.mark_non_differentiable(accuracies)
        return losses, accuracies

    @staticmethod
    @once_differentiable  # a second derivative is an error, not silently without its share
    def backward(ctx: Any, d_losses: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        leaves = list(ctx.plain)
        for i, tensor in zip(ctx.where, ctx.saved_tensors, strict=True):
            leaves[i] = tensor
        terms, gathered, bias = tree_unflatten(leaves, ctx.structure)
        with torch.autocast(d_losses.device.type, enabled=False):
            found = _backward(ctx.job, terms, gathered, bias, d_losses)
        return None, *(
            (x * ctx.job.placement.world_size).to(dtype).view(shape)
            for x, (shape, dtype) in zip(found, ctx.like, strict=True)
        )


Gathered = dict[tuple[int, str], Tensor]
"""(axis, side) to the features of that axis, (size * padded batch, d)."""


def _gather(job: Job, sides: dict[str, Tensor]) -> Gathered:
    """Collect row sides along the row and column sides along the column, all at once."""
    padded = max(job.agreed.batches)
    on_wire = {name: _on_wire(job, x, padded) for name, x in sides.items()}
    started: dict[tuple[int, str], Ready] = {}
    for pair in job.pairs:
        for axis, name in enumerate(pair):
            if (axis, name) not in started:
                started[axis, name] = job.axes[axis].start_all_gather(on_wire[name])
    some = next(iter(sides.values()))
    dtype = torch.promote_types(some.dtype, torch.float32)
    keep_half = some.is_cuda and dtype == torch.float32  # its matrix units take it exactly
    gathered = {key: ready() for key, ready in started.items()}
    return gathered if keep_half else {key: x.to(dtype) for key, x in gathered.items()}


def _on_wire(job: Job, x: Tensor, padded: int) -> Tensor:
    """Return features as they travel: padded to the longest batch, rounded if that was asked."""
    x = x.detach()
    is_alone = job.placement.group_ranks == 1
    if not is_alone and x.element_size() > job.wire_dtype.itemsize < 4:
        x = x.to(job.wire_dtype)
    return x if len(x) == padded else F.pad(x, (0, 0, 0, padded - len(x)))


def _compare(job: Job, t: int, gathered: Gathered, bias: Tensor) -> tuple[Term, Tensor]:
    """Compute term t; returns what backward needs, and this rank's (loss sum, hits)."""
    block, places = _make_block(job, t, gathered)
    counts = [[job.agreed.counts[rank][t] for rank in axis.ranks] for axis in job.axes]
    if job.kind == "sigmoid":
        return _compare_sigmoid(job, t, block, places, counts, bias)
    row, column, positives = softmax_extents(block)
    loss = hits = bias.new_zeros((), dtype=torch.float64)
    gradient, lse = torch.zeros_like(positives), []
    for axis, extent, n in zip(job.axes, (row, column), counts, strict=True):
        parts = _to_owners(axis, torch.stack((extent.lse, extent.largest.double()), dim=1), n)
        negatives = Extent(parts[..., 0].logsumexp(0), parts[..., 1].amax(0))
        lead = positives - negatives.lse
        loss = loss - F.logsigmoid(lead).sum(dtype=torch.float64)
        hits = hits + (positives > negatives.largest).sum()
        gradient -= torch.sigmoid(-lead)
        lse.append(_to_axis(axis, torch.logaddexp(negatives.lse, positives), n))
    queries = max(1, 2 * job.agreed.totals[t])
    return Term(block, places, (lse[0], lse[1]), gradient, queries), torch.stack([loss, hits])


def _compare_sigmoid(
    job: Job, t: int, block: Block, places: Places, counts: list[list[int]], bias: Tensor
) -> tuple[Term, Tensor]:
    """The same for the sigmoid loss, which only exchanges what accuracy needs."""
    row, column, positives = sigmoid_extents(block, bias)
    lead = positives + bias
    loss = row.lse.sum(dtype=torch.float64) - F.logsigmoid(lead).sum(dtype=torch.float64)
    hits = torch.zeros_like(loss)
    if job.accuracy:
        for axis, extent, n in zip(job.axes, (row, column), counts, strict=True):
            largest = _to_owners(axis, extent.largest[:, None], n)
            hits = hits + (positives > largest[..., 0].amax(0)).sum()
    queries = max(1, job.agreed.totals[t])
    term = Term(block, places, (row.lse, column.lse), -torch.sigmoid(-lead), queries)
    return term, torch.stack([loss, hits])


def _make_block(job: Job, t: int, gathered: Gathered) -> tuple[Block, Places]:
    """Return the block of term t without the rows that are missing, and where those left lie."""
    features, places, keys, starts = [], [], [], []
    padded, rank = max(job.agreed.batches), job.placement.rank
    for axis_idx, (axis, name) in enumerate(zip(job.axes, job.pairs[t], strict=True)):
        counts = [job.agreed.counts[member][t] for member in axis.ranks]
        x = gathered[axis_idx, name]
        tags = [job.tags[side] for side in job.pairs[t] if side in job.tags]
        place = key = None
        if tags:
            local = torch.stack([F.pad(tag, (0, padded - len(tag)), value=MISSING) for tag in tags])
            key = axis.start_all_gather(local.T.contiguous())().T
        if sum(counts) < len(x):
            is_there = (
                (key != MISSING).all(dim=0) if key is not None else _within(job, axis, x.device)
            )
            # those that are there, in order; how many is known, so the device need not be asked
            place = (~is_there).to(torch.int8).argsort(stable=True)[: sum(counts)]
            x, key = x[place], None if key is None else key[:, place]
        features.append(x)
        places.append(place)
        keys.append(key)
        starts.append(sum(counts[: axis.index]))
    tile = job.tile or (GPU_TILE if features[0].is_cuda else CPU_TILE)
    own = (starts[0], starts[1], job.agreed.counts[rank][t])
    block = Block(features[0], features[1], job.agreed.scale, own, keys[0], keys[1], tile)
    return block, (places[0], places[1])


def _within(job: Job, axis: Axis, device: torch.device) -> Tensor:
    """Return which rows of a gathered axis are pairs and not padding."""
    place = torch.arange(max(job.agreed.batches), device=device)
    lengths = torch.tensor([job.agreed.batches[rank] for rank in axis.ranks], device=device)
    return (place < lengths[:, None]).flatten()


def _to_owners(axis: Axis, parts: Tensor, counts: list[int]) -> Tensor:
    """parts (N, k) of all rows of the axis; returns (size, count, k), every rank's of my own."""
    mine = counts[axis.index]
    return axis.exchange(parts, send=counts, receive=[mine] * axis.size).view(
        axis.size, mine, parts.shape[1]
    )


def _to_axis(axis: Axis, mine: Tensor, counts: list[int]) -> Tensor:
    """mine (count,) of my own rows; returns (N,), of all rows of the axis."""
    sent = mine if axis.size == 1 else mine.repeat(axis.size)
    return axis.exchange(sent, send=[len(mine)] * axis.size, receive=counts)


def _backward(
    job: Job, terms: list[Term], gathered: Gathered, bias: Tensor, d_losses: Tensor
) -> list[Tensor]:
    """Return the gradients of scale, bias and sides (float32 or float64) of the world's loss."""
    gradients = {key: torch.zeros_like(x, dtype=bias.dtype) for key, x in gathered.items()}
    d_bias = torch.zeros_like(bias)
    for term, pair, d_loss in zip(terms, job.pairs, d_losses.tolist(), strict=True):  # a sync
        wholes = gradients[0, pair[0]], gradients[1, pair[1]]
        d_bias += _add_gradients(job.kind, term, bias, d_loss / term.queries, wholes)
    d_scale = torch.zeros_like(bias, dtype=torch.float64)
    for (axis_idx, name), x in gathered.items():
        if axis_idx == 0:  # scale multiplies each similarity, and so each row
            d_scale += _inner_product(x, gradients[axis_idx, name]) / job.agreed.scale
    keys = list(gradients)
    parts = reduce_scatter_together(
        [(job.axes[axis], gradients[axis, name]) for axis, name in keys]
    )
    results = [d_scale, d_bias]
    batch, width = job.agreed.batches[job.placement.rank], next(iter(gathered.values())).shape[1]
    for name in job.names:
        mine = [p[:batch] for (_, owner), p in zip(keys, parts, strict=True) if owner == name]
        results.append(sum(mine[1:], start=mine[0]) if mine else bias.new_zeros(batch, width))
    return results


def _add_gradients(
    kind: str, term: Term, bias: Tensor, weight: float, wholes: tuple[Tensor, Tensor]
) -> Tensor:
    """Add one term's gradients to those of all gathered rows and columns; returns the bias's."""
    block, places = term.block, term.places
    parts = [
        whole if place is None else whole.new_zeros(len(place), whole.shape[1])
        for whole, place in zip(wholes, places, strict=True)
    ]
    out = parts[0], parts[1]
    if kind == "sigmoid":
        d_bias = add_sigmoid_gradients(block, bias, weight, out)
        d_bias += weight * term.positive_gradient.sum()
    else:
        add_softmax_gradients(block, *term.lse, weight, out)
        d_bias = torch.zeros_like(bias)  # it moves all logits alike
    first_row, first_column, count = block.own
    rows, columns = slice(first_row, first_row + count), slice(first_column, first_column + count)
    value = weight * block.scale
    own = term.positive_gradient[:, None]
    out[0][rows].addcmul_(block.columns_MD[columns].to(own.dtype), own, value=value)
    out[1][columns].addcmul_(block.rows_ND[rows].to(own.dtype), own, value=value)
    for whole, part, place in zip(wholes, parts, places, strict=True):
        if place is not None:
            whole.index_add_(0, place, part)
    return d_bias


def _inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of a * b, added up in float64, without a copy of either."""
    total = b.new_zeros((), dtype=torch.float64)
    for x, y in zip(a.split(GPU_TILE), b.split(GPU_TILE), strict=True):
        total += torch.dot(x.reshape(-1).to(y.dtype), y.reshape(-1))
    return total
