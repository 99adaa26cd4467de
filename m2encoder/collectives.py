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
        # Two bytes are two bytes: not every gloo knows bfloat16.
        raw = torch.int16 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        args = gathered.view(raw), x.contiguous().view(raw)
        work = dist.all_gather_into_tensor(*args, group=self.group, async_op=True)

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

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Add up x (size * b, ...) of every rank and return rows q b .. (q+1) b on rank q.

        x is used as workspace. On gloo a ring of sends: its own reduce-scatter is an all-reduce,
        which puts twice the bytes on the wire (torch 2.13).
        """
        if self.size == 1:
            return x
        chunks = x.view(self.size, -1, *x.shape[1:])
        if dist.get_backend(self.group) != "gloo":
            mine = torch.empty_like(chunks[0])
            dist.reduce_scatter_tensor(mine, x, group=self.group)
            return mine
        after, before = (self.ranks[(self.index + step) % self.size] for step in (1, -1))
        arriving = torch.empty_like(chunks[0])
        for step in range(self.size - 1):
            leaving = chunks[(self.index - step - 1) % self.size]
            sending = dist.isend(leaving, after, group=self.group)
            receiving = dist.irecv(arriving, before, group=self.group)
            assert sending is not None
            assert receiving is not None
            receiving.wait()
            chunks[(self.index - step - 2) % self.size] += arriving
            sending.wait()
        return chunks[self.index].clone()


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
    dist.all_gather_into_tensor(gathered, x)
    return gathered.view(world_size, -1)


def sum_over_world(x: Tensor, world_size: int) -> Tensor:
    """Return the sum of x over all ranks, in place."""
    if world_size > 1:
        dist.all_reduce(x)
    return x
