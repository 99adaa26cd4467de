"""Gradients of one batch: run the towers, compare, go back; at once or in micro-batches.

In micro-batches (`accumulate`) it is GradCache's two passes (arXiv 2101.06983): features of the
whole batch without activations, one loss and one exchange between processes, then each micro-batch
again with activations, fed the gradient of its features. Both passes see the same random numbers.
Not for the optimizer (train.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from m2encoder.batch import Batch
from m2encoder.config import Objective
from m2encoder.loss import ContrastiveLoss
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.objectives import Losses, compare
from m2encoder.patch_dropout import kept_patches

LENGTH_GROUPS = 4
MIN_GROUP = 32


class ImagePiece(NamedTuple):
    """Some of a batch's pictures."""

    pixels: Tensor  # (B, 3, S, S) uint8
    kept: Tensor | None  # (B, K) int64, the patches that are seen
    random_key: int


class TextPiece(NamedTuple):
    """Some of a batch's captions, of similar length, whatever their language."""

    ids: Tensor  # (M, L) int64
    mask: Tensor  # (M, L) int64
    random_key: int


class Features(NamedTuple):
    """What the towers give; scale and bias too, so that wrappers see every parameter take part."""

    image: Tensor | None  # (B, P)
    texts: list[Tensor]  # (M, P) of each piece
    scale: Tensor
    bias: Tensor | None


class Towers(nn.Module):
    """A model as training runs it; the module to wrap in DistributedDataParallel or to shard.

    fully_shard (FSDP2) takes no scalar parameters: give it logit_scale and logit_bias as
    ignored_params and average their gradients.
    """

    def __init__(self, model: M2Encoder, *, bfloat16: bool = False) -> None:
        super().__init__()
        self.model = model
        self.in_bfloat16 = bfloat16
        """Whether matrix products are computed in bfloat16 (autocast)."""

    def forward(self, image: ImagePiece | None, texts: Sequence[TextPiece]) -> Features:
        """Encode one piece of the pictures and any of the captions."""
        with torch.autocast(
            self.model.logit_scale.device.type, torch.bfloat16, enabled=self.in_bfloat16
        ):
            return self._encode(image, texts)

    def _encode(self, image: ImagePiece | None, texts: Sequence[TextPiece]) -> Features:
        vectors = None
        if image is not None:
            with seeded(image.random_key, image.pixels.device):
                vectors = self.model.encode_image(image.pixels.float() / 255, image.kept)
        encoded = []
        for text in texts:
            with seeded(text.random_key, text.ids.device):
                encoded.append(self.model.encode_text(text.ids, text.mask))
        bias = self.model.logit_bias
        return Features(vectors, encoded, self.model.logit_scale.exp(), bias)


@contextmanager
def seeded(key: int, device: torch.device) -> Iterator[None]:
    """Let dropout and the like draw from `key`, and leave the generators as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        # not torch.manual_seed, which also queues a call for every other kind of device
        torch.default_generator.manual_seed(key)
        if devices:
            torch.cuda.manual_seed(key)
        yield


@dataclass(frozen=True)
class StepSettings:
    """What decides the gradients of a batch beside model and data."""

    objectives: Sequence[Objective]
    loss: ContrastiveLoss
    duplicates: Literal["mask", "keep"] = "mask"
    accumulate: int = 1
    """Micro-batches."""
    patch_dropout: float = 0.0
    """Share of patches left out."""
    seed: int = 0


def backward_step(towers: nn.Module, batch: Batch, settings: StepSettings) -> Losses:
    """Add the gradients of one batch to the parameters' `grad` and return its losses.

    towers: a Towers, as it is or wrapped for data parallelism; then called on all ranks at the same
    time, each with its share of the batch. Raises FeatureError (see ContrastiveLoss).
    """
    if settings.accumulate > 1:
        return _backward_in_two_passes(towers, batch, settings)
    pieces = cut(batch, towers, settings)
    features: Features = towers(pieces.images[0], pieces.texts)
    assert features.image is not None
    losses = _compare(features.image, features.texts, pieces, batch, features[2:], settings)
    losses.total.backward()
    return losses


def _backward_in_two_passes(towers: nn.Module, batch: Batch, settings: StepSettings) -> Losses:
    pieces = cut(batch, towers, settings)
    with torch.no_grad():
        images = [towers(image, []).image for image in pieces.images]
        texts = [vectors for text in pieces.texts for vectors in towers(None, [text]).texts]
        *_, scale, bias = towers(None, [])
    images, texts = ([x.requires_grad_() for x in side] for side in (images, texts))
    numbers = [None if x is None else x.detach().requires_grad_() for x in (scale, bias)]
    losses = _compare(torch.cat(images), texts, pieces, batch, numbers, settings)
    losses.total.backward()
    with gradients_stay_here(towers):
        for image, vectors in zip(pieces.images[:-1], images[:-1], strict=True):
            towers(image, []).image.backward(vectors.grad)
        for text, vectors in zip(pieces.texts[:-1], texts[:-1], strict=True):
            towers(None, [text]).texts[0].backward(vectors.grad)
    # The last pieces go back together with scale and bias: one pass that every parameter takes part
    # in, after which a wrapper averages what has been added up.
    last: Features = towers(pieces.images[-1], pieces.texts[-1:])
    ends = [last.image, last.texts[0], last.scale, last.bias]
    starts = [images[-1], texts[-1], *numbers]
    torch.autograd.backward(
        [end for end in ends if end is not None],
        [start.grad for start in starts if start is not None],
    )
    return losses


def gradients_stay_here(towers: nn.Module) -> AbstractContextManager[Any]:
    """Let gradients add up without being averaged over the ranks."""
    if hasattr(towers, "no_sync"):  # DistributedDataParallel
        return towers.no_sync()  # pyright: ignore[reportCallIssue]
    if hasattr(towers, "set_requires_gradient_sync"):  # FSDP2
        return _without_gradient_sync(towers)
    return nullcontext()


@contextmanager
def _without_gradient_sync(towers: Any) -> Iterator[None]:
    towers.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        towers.set_requires_gradient_sync(True)


class Pieces(NamedTuple):
    """A batch cut up, on the model's device."""

    images: list[ImagePiece]
    texts: list[TextPiece]
    place: Tensor
    """(M,) int64: caption m, in the order of batch.captions, is row place[m] of all pieces."""


def cut(batch: Batch, towers: nn.Module, settings: StepSettings) -> Pieces:
    """Cut a batch into micro-batches: pictures in order, captions of all languages by length.

    Captions differ much in length; sorted, little of the text tower's work is padding. The number
    of pieces does not depend on what is missing, so that all ranks run the towers equally often.
    """
    device = next(towers.parameters()).device
    model = next(module for module in towers.modules() if isinstance(module, M2Encoder))
    k = settings.accumulate
    first = int(batch.positions[0]) if len(batch.positions) else -1
    kept = kept_patches(
        batch.positions,
        num_patches=model.config.architecture.grid**2,
        share=settings.patch_dropout,
        seed=settings.seed,
    )
    images = [
        ImagePiece(
            batch.pixels[rows].to(device, non_blocking=True),
            None if kept is None else kept[rows].to(device),
            _random_key(settings.seed, first, "image", i),
        )
        for i, rows in enumerate(torch.arange(len(batch.pixels)).tensor_split(k))
    ]
    length = max([1, *(c.ids.shape[1] for c in batch.captions.values())])  # 1: no captions at all
    ids, mask = (
        torch.cat([F.pad(c[i], (0, length - c[i].shape[1])) for c in batch.captions.values()])
        for i in (0, 1)
    )
    lengths = mask.sum(dim=1)
    order = lengths.argsort(stable=True)
    captions = (len(batch.keys) + len(batch.dropped)) * len(batch.captions)
    groups = text_pieces(captions, k, is_sharded=isinstance(towers, FSDPModule))
    texts = []
    for i, rows in enumerate(order.tensor_split(groups)):
        longest = int(lengths[rows[-1]]) if len(rows) else 1
        key = _random_key(settings.seed, first, "text", i)
        piece = ids[rows, :longest].to(device), mask[rows, :longest].to(device)
        texts.append(TextPiece(*piece, key))
    return Pieces(images, texts, order.argsort().to(device))


def text_pieces(captions: int, accumulate: int, *, is_sharded: bool) -> int:
    """Return how many pieces a batch's captions are cut in, by length.

    Sharded towers gather their weights anew for each, which costs more than padding. In two passes
    each piece is a call of the towers, so their number must not depend on a rank's share.
    """
    if is_sharded:
        return accumulate
    if accumulate > 1:
        return max(accumulate, LENGTH_GROUPS)
    return max(1, min(LENGTH_GROUPS, captions // MIN_GROUP))


def _random_key(*what: object) -> int:
    return int.from_bytes(blake2b(repr(what).encode(), digest_size=8).digest(), "big") >> 1


def _compare(
    image: Tensor,
    texts: Sequence[Tensor],
    pieces: Pieces,
    batch: Batch,
    numbers: Sequence[Tensor | None],
    settings: StepSettings,
) -> Losses:
    scale, bias = numbers
    assert scale is not None
    vectors = torch.cat(list(texts))[pieces.place]
    sizes = [len(captions.ids) for captions in batch.captions.values()]
    return compare(
        image,
        dict(zip(batch.captions, vectors.split(sizes), strict=True)),
        batch,
        settings.objectives,
        settings.loss,
        scale=scale,
        bias=bias,
        duplicates=settings.duplicates,
    )
