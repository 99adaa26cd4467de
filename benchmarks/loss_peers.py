"""What benchmarks/loss.py compares: our losses, open_clip's, a restated one, dense references.

And what one rank measures of them: the functions that take a Worker run on all ranks at once. Not
for networks and processes (loss_nodes.py), nor for tables (loss.py).
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from loss_nodes import Worker
from torch import Tensor, nn

from m2encoder.collectives import Axis, reduce_scatter_together
from m2encoder.compat import import_open_clip
from m2encoder.loss import make_loss
from m2encoder.measure import SentBytes, peak_allocated_bytes

LossFn = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(image features, text features, logit scale, logit bias or None) to a scalar."""
SCALE = 1 / 0.07  # CLIP's at the start
BIAS = -10.0  # SigLIP's
CHECK_PAIRS = 4096
"""The most pairs of the world in a check of gradients: the reference holds their whole matrix."""


class Loss(NamedTuple):
    """One row of the tables."""

    make: Callable[[int, int], Any]
    """(rank, world_size) to a LossFn."""
    kind: str = "infonce"
    groups: int = 1
    """Groups of ranks that keep to themselves, and so does their reference."""
    is_peer: bool = True
    """Needs open_clip."""


def _ours(**options: Any) -> Callable[[int, int], LossFn]:
    def make(rank: int, world_size: int) -> LossFn:
        fitted: dict[str, Any] = {
            name: value(world_size) if callable(value) else value for name, value in options.items()
        }
        return make_loss(rank=rank, world_size=world_size, **fitted)

    return make


def _clip(*, local: bool, grad: bool) -> Callable[[int, int], LossFn]:
    return lambda rank, world_size: import_open_clip().ClipLoss(
        local_loss=local,
        gather_with_grad=grad,
        cache_labels=True,  # as open_clip trains
        rank=rank,
        world_size=world_size,
    )


def _siglip(dist_impl: str) -> Callable[[int, int], LossFn]:
    return lambda rank, world_size: import_open_clip().loss.SigLipLoss(
        rank=rank, world_size=world_size, dist_impl=dist_impl
    )


def clip_lines(
    image: Tensor, text: Tensor, scale: Tensor, all_image: Tensor, all_text: Tensor, first: int = 0
) -> Tensor:
    """Compute the loss that ClipLoss computes, line for line, of features that are gathered."""
    logits_per_image = scale * image @ all_text.T
    logits_per_text = scale * text @ all_image.T
    labels = torch.arange(first, first + len(image), device=image.device)
    per_image, per_text = (F.cross_entropy(x, labels) for x in (logits_per_image, logits_per_text))
    return (per_image + per_text) / 2


class RingTwoSided:
    """ClipLoss's local_loss + gather_with_grad on the collectives that our loss uses.

    open_clip 3.3.0 gathers with torch.distributed.nn.all_gather, whose backward on gloo is a slow
    scatter per rank. This sends the same bytes by rings and is therefore the baseline for time.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.axis = Axis(tuple(range(world_size)), rank, dist.group.WORLD)

    def __call__(self, image: Tensor, text: Tensor, scale: Tensor, _: Tensor | None) -> Tensor:
        """Return the loss of this rank's queries against all candidates."""
        gathered: Any = _GatherBoth.apply(self.axis, image, text)
        return clip_lines(image, text, scale, *gathered, first=self.axis.index * len(image))


class _GatherBoth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.axis = axis
        image_ready, text_ready = axis.start_all_gather(image), axis.start_all_gather(text)
        return image_ready(), text_ready()

    @staticmethod
    def backward(ctx: Any, d_image: Tensor, d_text: Tensor) -> tuple[None, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = [(ctx.axis, d_image.contiguous()), (ctx.axis, d_text.contiguous())]
        image, text = reduce_scatter_together(grads)
        return None, image, text


OURS, BASELINE = "ours, grid", "two-sided, rings"
CLIP, SIGLIP = "open_clip, local, grad", "open_clip SigLIP, bidir"
LOSSES = {
    OURS: Loss(_ours(), is_peer=False),
    "ours, grid, bfloat16 wire": Loss(_ours(wire_dtype="bfloat16"), is_peer=False),
    "ours, one-sided": Loss(_ours(grid="{}x1".format), is_peer=False),
    "ours, groups of W/2": Loss(
        _ours(group_ranks=lambda world_size: world_size // 2), groups=2, is_peer=False
    ),
    BASELINE: Loss(RingTwoSided, is_peer=False),
    "open_clip, global": Loss(_clip(local=False, grad=False)),
    "open_clip, global, grad": Loss(_clip(local=False, grad=True)),
    "open_clip, local": Loss(_clip(local=True, grad=False)),
    CLIP: Loss(_clip(local=True, grad=True)),
    "ours, sigmoid, grid": Loss(_ours(kind="sigmoid"), kind="sigmoid", is_peer=False),
    SIGLIP: Loss(_siglip("bidir"), kind="sigmoid"),
    "open_clip SigLIP, shift": Loss(_siglip("shift"), kind="sigmoid"),
    "open_clip SigLIP, gather": Loss(_siglip("gather"), kind="sigmoid"),
    "open_clip SigLIP, reduce": Loss(_siglip("reduce"), kind="sigmoid"),
}


def dense_loss(loss: Loss, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return the loss of all pairs from the whole matrix, the obvious way."""
    total = scale.new_zeros(())
    for rows, columns in zip(image.chunk(loss.groups), text.chunk(loss.groups), strict=True):
        sim = scale * rows @ columns.T
        if loss.kind == "sigmoid":
            signs = 2 * torch.eye(len(sim), dtype=sim.dtype, device=sim.device) - 1
            part = -F.logsigmoid(signs * (sim + bias)).sum() / len(sim)
        else:
            labels = torch.arange(len(sim), device=sim.device)
            part = (F.cross_entropy(sim, labels) + F.cross_entropy(sim.T, labels)) / 2
        total = total + part / loss.groups
    return total


class Inputs(NamedTuple):
    """The leaves of one step."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor


def make_inputs(
    pairs: int, dim: int, dtype: torch.dtype, device: str = "cpu", rows: slice = slice(None)
) -> Inputs:
    """Return pairs of cosine 0.5, the same everywhere; of them `rows`."""
    noise = torch.Generator(device).manual_seed(0)
    image, other = (torch.randn(pairs, dim, generator=noise, device=device) for _ in range(2))
    text = F.normalize(image, dim=1) + 3**0.5 * F.normalize(other, dim=1)
    image, text = (F.normalize(x, dim=1).to(dtype)[rows].clone() for x in (image, text))
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    scale, bias = (torch.tensor(x, dtype=exact, device=device) for x in (SCALE, BIAS))
    return Inputs(*(x.requires_grad_() for x in (image, text, scale, bias)))


def step(loss_fn: LossFn, kind: str, inputs: Inputs) -> None:
    """Compute a loss and its gradients."""
    image, text, scale, bias = inputs
    loss_fn(image, text, scale, bias if kind == "sigmoid" else None).backward()


# What ranks run. The first argument is theirs, the others are those of Pool.run.


def prepare(worker: Worker, names: list[str]) -> None:
    """Make the losses, in the same order everywhere: that makes process groups."""
    for name in names:
        worker.cached(name, lambda name=name: LOSSES[name].make(worker.rank, worker.world_size))


def _own_step(
    worker: Worker, name: str, batch: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Inputs, Callable[[], None]]:
    rows = slice(worker.rank * batch, (worker.rank + 1) * batch)
    key = batch, dim, dtype
    fresh = worker.cached(
        key, lambda: make_inputs(worker.world_size * batch, dim, dtype, rows=rows)
    )
    inputs = Inputs(*(x.detach().clone().requires_grad_() for x in fresh))
    return inputs, lambda: step(worker.kept[name], LOSSES[name].kind, inputs)


def peak_bytes(worker: Worker, name: str, batch: int, dim: int) -> int:
    """Return the peak memory of a step beside its inputs."""
    _, work = _own_step(worker, name, batch, dim)
    return peak_allocated_bytes(work)


def sent_bytes(worker: Worker, name: str, batch: int, dim: int) -> int:
    """Return the bytes that a step sends, counted at its collectives."""
    _, work = _own_step(worker, name, batch, dim)
    with SentBytes() as sent:
        work()
    return sent.total


def seconds(worker: Worker, name: str, batch: int, dim: int) -> float:
    """Return what a step takes from when all ranks are ready."""
    _, work = _own_step(worker, name, batch, dim)
    dist.barrier()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Check(NamedTuple):
    """Gradients of all ranks beside those of the dense loss in one process, in float64."""

    error: float
    """Of the features, relative, after the best rescaling."""
    ratio: float
    """Length and direction of the features' over W times the reference's; 1 is right."""
    scale_ratio: float
    """The mean over ranks of logit_scale's, over the reference's; 1 is right."""


def check_gradients(worker: Worker, name: str, batch: int, dim: int) -> Check:
    """Compare a step's gradients with those of the dense loss."""
    batch = min(batch, CHECK_PAIRS // worker.world_size)
    loss = LOSSES[name]
    reference, d_scale = worker.cached(
        ("reference", loss.kind, loss.groups, batch, dim),
        lambda: _reference(worker, loss, batch, dim),
    )
    inputs, work = _own_step(worker, name, batch, dim, torch.float64)
    work()
    found = torch.stack([inputs.image.grad, inputs.text.grad])  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert inputs.scale.grad is not None
    sums = torch.stack([(found * reference).sum(), reference.square().sum(), inputs.scale.grad])
    dist.all_reduce(sums)
    ratio = sums[0] / sums[1]
    residual = (found / ratio - reference).square().sum()
    dist.all_reduce(residual)
    world_size = worker.world_size
    return Check(
        error=float((residual / sums[1]).sqrt()),
        ratio=float(ratio) / world_size,
        scale_ratio=float(sums[2]) / world_size / d_scale,
    )


def _reference(worker: Worker, loss: Loss, batch: int, dim: int) -> tuple[Tensor, float]:
    """Return this rank's rows of the dense gradients, (2, b, d), and that of logit_scale.

    Rank 0 computes them for all.
    """
    flat = torch.empty(2 * worker.world_size * batch * dim + 1, dtype=torch.float64)
    if worker.rank == 0:
        inputs = make_inputs(worker.world_size * batch, dim, torch.float64)
        dense_loss(loss, *inputs).backward()
        image, text, scale, _ = (x.grad for x in inputs)
        torch.cat([x.reshape(-1) for x in (image, text, scale) if x is not None], out=flat)
    dist.broadcast(flat, src=0)
    whole = flat[:-1].view(2, worker.world_size, batch, dim)
    return whole[:, worker.rank].clone(), float(flat[-1])


# A whole training step of two small towers.

TOKENS, INPUT_DIM, WIDTH = 8, 32, 64


class Tower(nn.Module):
    """One transformer block over TOKENS vectors, pooled and projected to unit norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embed = nn.Linear(INPUT_DIM, WIDTH)
        self.block = nn.TransformerEncoderLayer(
            WIDTH, nhead=4, dim_feedforward=4 * WIDTH, dropout=0.0, batch_first=True
        )
        self.project = nn.Linear(WIDTH, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, TOKENS, INPUT_DIM) to (b, dim)."""
        return F.normalize(self.project(self.block(self.embed(x)).mean(dim=1)), dim=1)


class Towers(nn.Module):
    """Both towers, the scale and, for a sigmoid loss, the bias."""

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        self.image, self.text = Tower(dim), Tower(dim)
        self.log_scale = nn.Parameter(torch.tensor(SCALE).log())
        self.bias = nn.Parameter(torch.tensor(BIAS)) if kind == "sigmoid" else None

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return what a loss takes."""
        return self.image(image), self.text(text), self.log_scale.exp(), self.bias


def train_seconds(worker: Worker, name: str, batch: int, dim: int) -> float:
    """Return what a training step takes: towers, loss, gradients averaged by DDP, optimiser."""
    model, optimizer, image, text = worker.cached(
        ("towers", name, batch, dim), lambda: _make_towers(worker, LOSSES[name].kind, batch, dim)
    )
    dist.barrier()
    began = time.perf_counter()
    optimizer.zero_grad()
    worker.kept[name](*model(image, text)).backward()
    optimizer.step()
    return time.perf_counter() - began


def _make_towers(worker: Worker, kind: str, batch: int, dim: int) -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Towers(dim, kind))
    torch.manual_seed(worker.rank)
    image, text = torch.randn(2, batch, TOKENS, INPUT_DIM)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4), image, text
