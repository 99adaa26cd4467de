"""The contrastive loss, exact on any number of ranks: InfoNCE or sigmoid, never a whole matrix.

Ranks form an R x C grid (grid.py). Images travel along a row of C ranks, texts along a column of R,
and each rank compares its C batches of images with its R batches of texts in tiles (tiles.py), so
that all W batches meet. A rank sends about 2 (R + C - 2) b d s bytes per step (b pairs per rank, d
numbers of s bytes each), features forward and their gradients back; gathering both sides everywhere
and sending gradients back, the usual exact way, takes 4 (W - 1) b d s. At R = C = sqrt(W) that is
4 (sqrt(W) - 1) b d s: what groups of sqrt(W) ranks cost that gather both sides, but exact. The
layout is that of SUMMA (van de Geijn and Watts, 1997); we know of no earlier open implementation
for contrastive learning.

`group_ranks` is the paper's grouped aggregation (M2-Encoder, arXiv 2401.15896): negatives come from
a group of ranks alone. That approximates the loss, with fewer negatives, and sends least. It
composes with the grid, which then fills each group.

When it pays: where features are a good part of what the fabric carries (slow links, small or
heavily masked towers, accumulation with one exchange per step). With a large tower on a fast fabric
any exact loss is a few percent of a step. benchmarks/RESULTS.md has what was measured.

Gradients, everywhere: after data-parallel averaging, parameters have the gradient of the full-batch
loss in one process. So a rank's own features receive W times that loss's gradient, and the mean
over ranks of the gradients of logit_scale and logit_bias is that loss's. Every rank returns the
same value, the loss of all pairs of the world (with groups: each query against its group's
candidates).

Not for what is compared with what (objectives.py).
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from m2encoder.collectives import make_axes
from m2encoder.errors import PlacementError
from m2encoder.grid import place
from m2encoder.handshake import shake_hands
from m2encoder.loss_function import MISSING, Contrast, Job

Kind = Literal["infonce", "sigmoid"]
WireDtype = Literal["float32", "float16", "bfloat16"]

__all__ = ["MISSING", "ContrastiveLoss", "TermLosses", "make_loss"]


class TermLosses(NamedTuple):
    """What several comparisons of one batch gave, in the order in which they were asked for."""

    losses: Tensor
    """(T,), with gradient; 0 for a term without pairs."""
    accuracies: Tensor
    """(T,), share of queries whose nearest candidate is their partner; ties count as wrong."""
    counts: list[int]
    """Pairs of the world that took part in each term."""


class ContrastiveLoss:
    """A loss for one rank; call it at the same time on every rank. Made by `make_loss`."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        kind: Kind,
        grid: str,
        group_ranks: int | None,
        tile: int | None,
        wire_dtype: WireDtype,
    ) -> None:
        self.placement = place(rank, world_size, grid=grid, group_ranks=group_ranks)
        self.kind: Kind = kind
        self.tile = tile
        self.wire_dtype: torch.dtype = getattr(torch, wire_dtype)
        self.row, self.column = make_axes(self.placement, grid=grid, group_ranks=group_ranks)

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of all ranks' pairs, a scalar (float32; float64 for float64 features).

        image_features, text_features: (b, d) of this rank, row i of one matches row i of the other;
        normally of unit norm. b may differ between ranks.
        logit_scale: > 0, 1 / temperature, not its logarithm. logit_bias: sigmoid only, None for 0.
        Raises FeatureError on every rank when any rank's shapes, dtypes, scale or values do not
        fit.
        """
        sides = {"image_features": image_features, "text_features": text_features}
        pairs = [("image_features", "text_features")]
        return self._compare(sides, pairs, logit_scale, logit_bias, {}, accuracy=False).losses[0]

    def terms(
        self,
        sides: Mapping[str, Tensor],
        pairs: Sequence[tuple[str, str]],
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        tags: Mapping[str, Tensor] | None = None,
    ) -> TermLosses:
        """Compare several sides of one batch, each gathered once.

        sides: name to features (b, d), all of the same pairs.
        pairs: (row side, column side) of each term; row sides travel along rows, the others along
        columns.
        tags: side to (b,) int64. MISSING takes a row out of every term of that side: rows, columns
        and the mean. Rows that share any other tag are not negatives of each other; leave a side
        out where everything is there and nothing is shared.
        Raises FeatureError as above.
        """
        return self._compare(sides, pairs, logit_scale, logit_bias, tags or {}, accuracy=True)

    def _compare(
        self,
        sides: Mapping[str, Tensor],
        pairs: Sequence[tuple[str, str]],
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        tags: Mapping[str, Tensor],
        *,
        accuracy: bool,
    ) -> TermLosses:
        some = next(iter(sides.values()))
        scale = _as_tensor(logit_scale, some.device)
        bias = _as_tensor(0.0 if logit_bias is None else logit_bias, some.device)
        agreed = shake_hands(self.placement, sides, pairs, scale, tags)
        job = Job(
            kind=self.kind,
            placement=self.placement,
            axes=(self.row, self.column),
            tile=self.tile,
            wire_dtype=self.wire_dtype,
            names=tuple(sides),
            pairs=tuple(pairs),
            tags=dict(tags),
            agreed=agreed,
            accuracy=accuracy,
        )
        losses, accuracies = Contrast.apply(job, scale, bias, *sides.values())  # pyright: ignore[reportGeneralTypeIssues]
        return TermLosses(losses, accuracies, agreed.totals)


def make_loss(
    *,
    rank: int,
    world_size: int,
    kind: str = "infonce",
    grid: str = "auto",
    group_ranks: int | str | None = None,
    tile: int | str | None = None,
    wire_dtype: str = "float32",
) -> ContrastiveLoss:
    """Return loss_fn(image_features, text_features, logit_scale, logit_bias=None) -> scalar.

    Call it on every rank at the same time: it makes the process groups. A world of one needs none.
    kind: infonce (CLIP, arXiv 2103.00020) or sigmoid (SigLIP, arXiv 2303.15343).
    grid: auto, or RxC, for example 2x4: exact, whatever the shape; auto sends least between nodes.
    group_ranks: consecutive ranks that share negatives (an approximation); None means all.
    tile: height and width of a tile; None chooses by device. Nothing but speed and memory depends
    on it.
    wire_dtype: float16 or bfloat16 halve what the features send and round them; gradients stay
    float32. float32 sends features as they are.
    Options may be strings, as they come from a command line. Raises PlacementError when they do not
    fit the world or are unknown.
    """
    for name, value, known in (
        ("kind", kind, ("infonce", "sigmoid")),
        ("wire_dtype", wire_dtype, ("float32", "float16", "bfloat16")),
    ):
        if value not in known:
            raise PlacementError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    return ContrastiveLoss(
        rank=int(rank),
        world_size=int(world_size),
        kind=kind,  # pyright: ignore[reportArgumentType]
        grid=str(grid),
        group_ranks=_whole_number("group_ranks", group_ranks),
        tile=_whole_number("tile", tile),
        wire_dtype=wire_dtype,  # pyright: ignore[reportArgumentType]
    )


def _as_tensor(number: Tensor | float, device: torch.device) -> Tensor:
    """Return a scalar on the device; a Python number keeps its float64 digits."""
    dtype = None if isinstance(number, Tensor) else torch.float64
    return torch.as_tensor(number, dtype=dtype, device=device)


def _whole_number(name: str, value: int | str | None) -> int | None:
    if value is None or str(value).strip().lower() in ("none", "null", ""):
        return None
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise PlacementError(f"{name} is {value!r}, expected a whole number of at least 1")
    return number
