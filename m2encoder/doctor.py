"""A self-test of the contrastive loss where it will run: every placement against one plain matrix.

For users, on their own processes and devices. Not the project's tests (tests/test_loss_grid.py),
which look at far more, nor its benchmarks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m2encoder.distributed import World
from m2encoder.loss import MISSING, ContrastiveLoss, make_loss
from m2encoder.measure import SentBytes, peak_allocated_bytes

TOLERANCE = 1e-9
"""Largest relative error in float64 that passes; rounding leaves about 1e-15."""
BATCH, DIM, SCALE, BIAS = 64, 256, 1 / 0.07, -10.0
CAPTIONS = ("image-zh", "image-en", "zh-en")


@dataclass(frozen=True)
class LossCheck:
    """What one placement of the loss gave."""

    kind: str
    grid: str
    group_ranks: int
    """Ranks that share negatives."""
    error: float
    """Largest relative error of losses and gradients of features, of any rank."""
    scale_ratio: float
    """Mean over ranks of the gradient of logit_scale, by the right one; expected 1."""
    sent_bytes: int
    """Bytes that this rank sends in a step of BATCH float32 pairs of width DIM."""
    peak_bytes: int
    """Memory that such a step takes at most, beside the features."""

    @property
    def is_right(self) -> bool:
        """Whether the placement computes what one process would."""
        return self.error < TOLERANCE and abs(self.scale_ratio - 1) < TOLERANCE


def check_loss(world: World) -> Iterator[LossCheck]:
    """Try every grid of the world, every group size and both kinds; all ranks call this.

    Every placement compares pictures with captions in two languages, and those with each other;
    some captions are missing and some occur twice.
    """
    sizes = [g for g in range(world.size, 0, -1) if world.size % g == 0]
    shapes = [f"{r}x{world.size // r}" for r in sizes]
    plans = [(shape, world.size) for shape in shapes] + [("auto", g) for g in sizes if g > 1]
    for kind in ("infonce", "sigmoid"):
        for grid, group in plans:
            if grid == "auto" and group == world.size:
                continue  # one of the shapes
            loss = make_loss(
                rank=world.rank, world_size=world.size, kind=kind, grid=grid, group_ranks=group
            )
            yield _check(world, loss, kind, group)


def _check(world: World, loss: ContrastiveLoss, kind: str, group: int) -> LossCheck:
    place = loss.placement
    error, ratio = _compare_with_dense(world, loss, kind, group)
    image, text = (
        torch.randn(BATCH, DIM, device=world.device, requires_grad=True) for _ in range(2)
    )

    def step() -> None:
        loss(image, text, SCALE, BIAS if kind == "sigmoid" else None).backward()

    with SentBytes() as sent:
        step()
    peak = peak_allocated_bytes(step, world.device)
    shape = f"{place.rows}x{place.columns}"
    return LossCheck(kind, shape, group, error, ratio, sent.total, peak)


def _compare_with_dense(
    world: World, loss: ContrastiveLoss, kind: str, group: int
) -> tuple[float, float]:
    """Return the largest relative error and the ratio of the gradients of logit_scale."""
    pairs = [(first, second) for first, second in (name.split("-") for name in CAPTIONS)]
    sides, tags = _make_batch(world)
    scale, bias = (torch.tensor(x, dtype=torch.float64, device=world.device) for x in (SCALE, BIAS))
    own_bias = bias if kind == "sigmoid" else None
    expected = _dense(sides, tags, pairs, scale, own_bias, world.size // group)
    here = slice(world.rank * BATCH, (world.rank + 1) * BATCH)
    mine = {name: x[here].clone().requires_grad_() for name, x in sides.items()}
    own_scale = scale.clone().requires_grad_()
    own_tags = {name: tag[here] for name, tag in tags.items()}
    found = loss.terms(mine, pairs, own_scale, own_bias, own_tags).losses
    gradients = torch.autograd.grad(found.sum(), [*mine.values(), own_scale])
    errors = [_relative(found.detach(), expected[0])]
    for gradient, reference in zip(gradients[:-1], expected[1:-1], strict=True):
        errors.append(_relative(gradient / world.size, reference[here]))
    gathered = world.concatenated([(max(errors), gradients[-1].item())])
    mean = sum(d_scale for _, d_scale in gathered) / world.size
    return max(error for error, _ in gathered), mean / expected[-1].item()


def _make_batch(world: World) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the whole world's features (float64) and tags, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    count = BATCH * world.size
    sides, tags = {}, {}
    for name in ("image", "zh", "en"):
        x = torch.randn(count, DIM, generator=generator, dtype=torch.float64)
        sides[name] = F.normalize(x, dim=1).to(world.device)
    for name in ("zh", "en"):
        key = torch.randint(0, 10 * count, (count,), generator=generator)
        is_missing = torch.rand(count, generator=generator) < 0.2
        key[::7] = key[0]  # a caption that occurs often
        tags[name] = key.masked_fill(is_missing, MISSING).to(world.device)
    return sides, tags


def _dense(
    sides: dict[str, Tensor],
    tags: dict[str, Tensor],
    pairs: list[tuple[str, str]],
    scale: Tensor,
    bias: Tensor | None,
    groups: int,
) -> list[Tensor]:
    """Return the losses (T,) and the gradients of their sum: of each side, and of the scale."""
    leaves = {name: x.clone().requires_grad_() for name, x in sides.items()}
    scale = scale.clone().requires_grad_()
    terms = []
    for first, second in pairs:
        keys = [tags[side] for side in (first, second) if side in tags]
        terms.append(_dense_term(leaves[first], leaves[second], keys, scale, bias, groups))
    losses = torch.stack(terms)
    gradients = torch.autograd.grad(losses.sum(), [*leaves.values(), scale])
    return [losses.detach(), *gradients]


def _dense_term(
    rows: Tensor,
    columns: Tensor,
    keys: list[Tensor],
    scale: Tensor,
    bias: Tensor | None,
    groups: int,
) -> Tensor:
    """Return one term of the plain loss: all similarities of a group at once."""
    total, queries = rows.new_zeros(()), 0
    for places in torch.arange(len(rows), device=rows.device).chunk(groups):
        places = places[torch.stack([key[places] != MISSING for key in keys]).all(dim=0)]
        partner = torch.eye(len(places), dtype=torch.bool, device=rows.device)
        same = torch.stack([key[places, None] == key[None, places] for key in keys]).any(dim=0)
        sim = scale * rows[places] @ columns[places].T
        if bias is None:
            sim = sim.masked_fill(same & ~partner, -torch.inf)
            total = total + (sim.logsumexp(0) + sim.logsumexp(1) - 2 * sim.diagonal()).sum()
            queries += 2 * len(places)
        else:
            terms = F.softplus(torch.where(partner, -1, 1) * (sim + bias), threshold=1e9)
            total = total + terms.masked_fill(same & ~partner, 0).sum()
            queries += len(places)
    return total / queries


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
