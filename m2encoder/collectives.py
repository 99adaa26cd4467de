"""Collectives along one row or column of the grid of ranks, each by what its backend does best.

Not for where ranks stand (grid.py). Nothing here takes part in autograd: the loss calls each one
where it belongs. Every rank of an axis must call the same functions in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m2encoder.errors import PlacementError
from m2encoder.grid import Placement, place

# torch 2.13 renamed them
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Ready = Callable[[], Tensor]
"""Waits for a collective that was started, and returns its result."""


@dataclass(frozen=True)
class Axis:
    """Ranks that share a row or a column, in ring order; alone, everything is free of charge."""

    ranks: tuple[int, ...]
    index: int
    """The place of this rank among them."""
    group: Any = None
    """Their process group; None for one rank alone."""

    @property
    def size(self) -> int:
        """How many ranks share it."""
        return len(self.ranks)

    def start_all_gather(self, x: Tensor) -> Ready:
        """Start to collect x (b, ...) of every rank, in order; gives (size * b, ...).

        All ranks must bring the same shape and dtype.
        """
        if self.size == 1:
            return lambda: x
        gathered = x.new_empty(self.size * len(x), *x.shape[1:])
        # bytes are bytes: not every gloo knows the half precisions
        raw = torch.uint8 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        args = gathered.view(raw), x.contiguous().view(raw)
        work = _all_gather(*args, group=self.group, async_op=True)

        def ready() -> Tensor:
            assert work is not None
            work.wait()
            return gathered

        return ready

    def exchange(self, x: Tensor, *, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send send[q] rows of x, in order, to rank q; returns receive[q] rows from each rank q."""
        if self.size == 1:
            return x
        received = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(
            received, x.contiguous(), list(receive), list(send), group=self.group
        )
        return received


def reduce_scatter_together(parts: Sequence[tuple[Axis, Tensor]]) -> list[Tensor]:
    """For each axis and x (size * b, ...): add up every rank's x, return rows q b .. on rank q.

    All at once, so that rows and columns share no waiting. Each x is used as workspace. On gloo
    rings of sends: its own reduce-scatter is an all-reduce, which puts twice the bytes on the wire
    (torch 2.13).
    """
    busy = [(axis, x.view(axis.size, -1, *x.shape[1:])) for axis, x in parts]
    if any(axis.size > 1 and dist.get_backend(axis.group) != "gloo" for axis, _ in parts):
        return _reduce_scatter_by_backend(busy)
    rings = [(axis, chunks, torch.empty_like(chunks[0])) for axis, chunks in busy if axis.size > 1]
    for step in range(max((axis.size for axis, *_ in rings), default=1) - 1):
        turning = [ring for ring in rings if step < ring[0].size - 1]
        works = [_send_on(axis, chunks, arriving, step) for axis, chunks, arriving in turning]
        for (axis, chunks, arriving), (sending, receiving) in zip(turning, works, strict=True):
            receiving.wait()
            chunks[(axis.index - step - 2) % axis.size] += arriving
            sending.wait()
    return [chunks[axis.index] for axis, chunks in busy]


def _send_on(axis: Axis, chunks: Tensor, arriving: Tensor, step: int) -> tuple[Any, Any]:
    """Start to pass one chunk to the next rank of the ring, and to take one from the last."""
    after, before = (axis.ranks[(axis.index + turn) % axis.size] for turn in (1, -1))
    leaving = chunks[(axis.index - step - 1) % axis.size]
    return (
        dist.isend(leaving, after, group=axis.group),
        dist.irecv(arriving, before, group=axis.group),
    )


def _reduce_scatter_by_backend(busy: Sequence[tuple[Axis, Tensor]]) -> list[Tensor]:
    results, works = [], []
    for axis, chunks in busy:
        results.append(chunks[0] if axis.size == 1 else torch.empty_like(chunks[0]))
        if axis.size > 1:
            flat = chunks.flatten(0, 1)
            works.append(_reduce_scatter(results[-1], flat, group=axis.group, async_op=True))
    for work in works:
        work.wait()
    return results


def make_axes(placement: Placement, *, grid: str, group_ranks: int | None) -> tuple[Axis, Axis]:
    """Return this rank's row and column with their process groups.

    Every rank of the world must call this at the same time; a world of one needs no process group.
    Raises PlacementError when torch.distributed runs another world or none.
    """
    rank, world_size = placement.rank, placement.world_size
    if world_size > 1:
        _check_world(rank, world_size)
    groups: dict[tuple[int, ...], Any] = {}
    everyone = [
        place(other, world_size, grid=grid, group_ranks=group_ranks) for other in range(world_size)
    ]
    for ranks in dict.fromkeys(r for p in everyone for r in (p.row_ranks, p.column_ranks)):
        if len(ranks) > 1:
            is_world = len(ranks) == world_size
            groups[ranks] = dist.group.WORLD if is_world else dist.new_group(list(ranks))
    row, column = placement.row_ranks, placement.column_ranks
    return (
        Axis(row, row.index(rank), groups.get(row)),
        Axis(column, column.index(rank), groups.get(column)),
    )


def _check_world(rank: int, world_size: int) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise PlacementError(
            f"world_size is {world_size}, but torch.distributed is not initialised; call "
            f"torch.distributed.init_process_group first, or start the program with torchrun"
        )
    found = dist.get_rank(), dist.get_world_size()
    if found != (rank, world_size):
        raise PlacementError(
            f"rank {rank} of world_size {world_size} asked for, but torch.distributed runs as rank "
            f"{found[0]} of {found[1]}"
        )


def gather_rows(x: Tensor, world_size: int) -> Tensor:
    """Return x (n,) of every rank of the world as (world_size, n)."""
    if world_size == 1:
        return x[None]
    gathered = x.new_empty(world_size * len(x))
    _all_gather(gathered, x)
    return gathered.view(world_size, -1)


def sum_over_world(x: Tensor, world_size: int) -> Tensor:
    """Return the sum of x over all ranks, in place."""
    if world_size > 1:
        dist.all_reduce(x)
    return x
