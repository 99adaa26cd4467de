"""The terms of the training loss, by name: model and batch in, one number per term out.

The paper's masked objectives (CMLM, CMIM) will join this list.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m2encoder.batch import Batch, Captions
from m2encoder.config import Objective
from m2encoder.loss import in_batch_accuracy, info_nce
from m2encoder.model.modeling_m2encoder import M2Encoder

LENGTH_GROUPS = 4
MIN_GROUP = 32


@dataclass
class Losses:
    """The weighted sum to minimise, and what each term contributed."""

    total: Tensor
    """Scalar with gradient."""
    terms: dict[str, Tensor]
    """`loss/image-zh`, `accuracy/image-zh`, ...: detached scalars."""


def languages_of(objectives: Sequence[Objective]) -> tuple[str, ...]:
    """Return the BCP-47 tags that these objectives read, in their order."""
    return tuple(dict.fromkeys(objective.name.removeprefix("image-") for objective in objectives))


def compute_losses(model: M2Encoder, batch: Batch, objectives: Sequence[Objective]) -> Losses:
    """Encode the batch once and compare it by every objective.

    A picture without a caption in a language takes no part in that language's term; a term with
    fewer than two captions is left out of this step.
    """
    languages = languages_of(objectives)
    if all(len(batch.captions[language].rows) < 2 for language in languages):
        return Losses(0.0 * model.logit_scale, {})  # also a batch whose pairs were all dropped
    image = model.encode_image(batch.pixels.float() / 255)
    texts = _encode_captions(model, [batch.captions[language] for language in languages])
    by_language = dict(zip(languages, texts, strict=True))
    scale = model.logit_scale.exp()
    total = torch.zeros_like(scale)
    terms: dict[str, Tensor] = {}
    for objective in objectives:
        language = objective.name.removeprefix("image-")
        rows, text = batch.captions[language].rows, by_language[language]
        if len(rows) < 2:
            continue
        loss = info_nce(image[rows], text, scale)
        total = total + objective.weight * loss
        terms[f"loss/{objective.name}"] = loss.detach()
        terms[f"accuracy/{objective.name}"] = in_batch_accuracy(image[rows], text)
    return Losses(total, terms)


def _encode_captions(model: M2Encoder, captions: Sequence[Captions]) -> list[Tensor]:
    """Encode the captions of several languages together; returns (M, P) per language."""
    length = max(caption.ids.shape[1] for caption in captions)
    ids = torch.cat([F.pad(c.ids, (0, length - c.ids.shape[1])) for c in captions])
    mask = torch.cat([F.pad(c.mask, (0, length - c.mask.shape[1])) for c in captions])
    vectors = encode_by_length(model, ids, mask)
    return list(vectors.split([len(caption.ids) for caption in captions]))


def encode_by_length(model: M2Encoder, ids: Tensor, mask: Tensor) -> Tensor:
    """Return model.encode_text(ids, mask), (M, P), computed in groups of similar length.

    Captions differ much in length; without this most of the text tower's work is padding.
    """
    lengths = mask.sum(dim=1)
    order = lengths.argsort(stable=True)
    vectors = [
        model.encode_text(ids[rows, :longest], mask[rows, :longest])
        for rows in order.chunk(max(1, min(LENGTH_GROUPS, len(order) // MIN_GROUP)))
        for longest in [int(lengths[rows[-1]])]  # a sync on GPUs, once per group
    ]
    return torch.cat(vectors)[order.argsort()]
