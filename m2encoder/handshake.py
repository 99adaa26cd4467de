"""What all ranks tell each other before they compare features: sizes, counts, and what is wrong.

One small exchange per step. It makes unequal batches right, and it turns a mistake on one rank into
the same error on all of them where a collective would hang. Not for the comparison itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m2encoder.collectives import gather_rows
from m2encoder.errors import FeatureError
from m2encoder.grid import Placement

MISSING = -(2**63)
"""The tag of a row that is not there."""
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NO_MATRIX = -1


@dataclass(frozen=True)
class Agreed:
    """What holds on all ranks."""

    scale: float
    batches: list[int]
    """Pairs of each rank; a batch travels padded to the longest."""
    counts: list[list[int]]
    """Of each rank, the pairs that take part in each term."""
    totals: list[int]
    """The same, summed over the world."""


def shake_hands(
    placement: Placement,
    sides: Mapping[str, Tensor],
    pairs: Sequence[tuple[str, str]],
    scale: Tensor,
    tags: Mapping[str, Tensor],
) -> Agreed:
    """Exchange shapes, counts and health; returns what all ranks hold.

    Raises FeatureError, the same one on every rank, naming rank and side: not a (b, d) matrix,
    another shape or dtype than the other sides or ranks, a row that is not finite, a scale that is
    not positive or not the same everywhere. Waits for the device, once.
    """
    with torch.no_grad():
        words = [number for x in sides.values() for number in _describe(x)]
        words += [_count(sides, pair, tags) for pair in pairs]
        words.append(scale.detach().double().reshape(()).view(torch.int64))
        device = next(iter(sides.values())).device
        mine = torch.stack([torch.as_tensor(word, device=device) for word in words])
        world = gather_rows(mine, placement.world_size).cpu()
    told = world.tolist()
    shapes = [[line[4 * s : 4 * s + 4] for s in range(len(sides))] for line in told]
    scales: list[float] = world[:, -1].contiguous().view(torch.float64).tolist()
    _check_shapes(list(sides), shapes)
    _check_scales(scales)
    counts = [line[4 * len(sides) : -1] for line in told]
    return Agreed(
        scale=scales[placement.rank],
        batches=[shape[0][0] for shape in shapes],
        counts=counts,
        totals=[sum(column) for column in zip(*counts, strict=True)],
    )


def _describe(x: Tensor) -> list[int | Tensor]:
    """Return rows, width, dtype, and the first row that is not finite or -1."""
    dtype = DTYPES.index(x.dtype) if x.dtype in DTYPES else len(DTYPES)
    if x.ndim != 2:
        return [NO_MATRIX, x.ndim, dtype, -1]
    if x.numel() == 0:
        return [*x.shape, dtype, -1]
    is_bad = ~x.detach().isfinite().all(dim=1)
    first = torch.where(is_bad.any(), is_bad.int().argmax(), -1)
    return [*x.shape, dtype, first]


def _count(
    sides: Mapping[str, Tensor], pair: tuple[str, str], tags: Mapping[str, Tensor]
) -> int | Tensor:
    present = [tags[side] != MISSING for side in pair if side in tags]
    if not present:
        return len(sides[pair[0]]) if sides[pair[0]].ndim else 0
    return torch.stack(present).all(dim=0).sum()


def _check_shapes(names: list[str], shapes: list[list[list[int]]]) -> None:
    """Raise FeatureError at the first rank and side that differ or are not finite."""
    for rank, sides in enumerate(shapes):
        for name, side in zip(names, sides, strict=True):
            rows, width, dtype, _ = side
            if rows == NO_MATRIX:
                raise FeatureError(f"rank {rank}: {name} has {width} dimensions, expected (b, d)")
            if dtype == len(DTYPES):
                raise FeatureError(f"rank {rank}: {name} are not of a floating dtype")
            if side[:3] != sides[0][:3]:
                raise FeatureError(
                    f"rank {rank}: {names[0]} are {_shown(sides[0])}, {name} {_shown(side)}; "
                    f"expected the same"
                )
        if sides[0][1:3] != shapes[0][0][1:3]:
            raise FeatureError(
                f"rank {rank}: {names[0]} are {_shown(sides[0])}, on rank 0 "
                f"{_shown(shapes[0][0])}; expected the same width and dtype"
            )
    for rank, sides in enumerate(shapes):
        for name, (*_, bad_row) in zip(names, sides, strict=True):
            if bad_row >= 0:
                raise FeatureError(
                    f"rank {rank}: row {bad_row} of {name} is not finite; look at that sample, or "
                    f"lower the learning rate",
                    rank=rank,
                    row=bad_row,
                )


def _shown(side: Sequence[int]) -> str:
    rows, width, dtype, _ = side
    return f"({rows}, {width}) {str(DTYPES[dtype]).removeprefix('torch.')}"


def _check_scales(scales: list[float]) -> None:
    for rank, scale in enumerate(scales):
        if not 0 < scale < float("inf"):
            raise FeatureError(
                f"rank {rank}: logit_scale is {scale:g}, expected a finite number > 0 "
                f"(1 / temperature, not its logarithm)"
            )
        if abs(scale - scales[0]) > 1e-6 * scales[0]:
            raise FeatureError(
                f"rank {rank}: logit_scale is {scale:.9g}, on rank 0 {scales[0]:.9g}; ranks train "
                f"different models"
            )
