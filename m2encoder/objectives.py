"""The terms of the training loss, by name: features of one batch in, one number per term out.

The paper's masked objectives (CMLM, CMIM) will join this list. Not for how terms are compared
across processes (loss.py), nor for running the towers (training_step.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from m2encoder.batch import Batch
from m2encoder.config import Objective
from m2encoder.loss import MISSING, ContrastiveLoss


@dataclass
class Losses:
    """The weighted sum to minimise, and what each term contributed; the same on every rank."""

    total: Tensor
    """Scalar with gradient."""
    terms: dict[str, Tensor]
    """`loss/image-zh`, `accuracy/image-zh`, ...: detached scalars. A term with fewer than two pairs
    in the whole batch has nothing to compare and is left out."""


def sides_of(objective: Objective) -> tuple[str, str]:
    """Return what a term compares: ("image", "zh"), ("zh", "en"), ..."""
    first, second = objective.name.split("-")
    return first, second


def languages_of(objectives: Sequence[Objective]) -> tuple[str, ...]:
    """Return the BCP-47 tags that these objectives read, in their order."""
    sides = [side for objective in objectives for side in sides_of(objective)]
    return tuple(dict.fromkeys(side for side in sides if side != "image"))


def compare(
    image: Tensor,
    texts: Mapping[str, Tensor],
    batch: Batch,
    objectives: Sequence[Objective],
    loss: ContrastiveLoss,
    *,
    scale: Tensor,
    bias: Tensor | None,
    duplicates: Literal["mask", "keep"],
) -> Losses:
    """Compare a batch by every objective, with all ranks' batches.

    image: (B, P); texts: BCP-47 tag to (M, P), vectors of batch.captions. A picture without a
    caption in a language takes no part in that language's terms.
    """
    sides, tags = {"image": image}, {}
    for language, vectors in texts.items():
        captions = batch.captions[language]
        rows = captions.rows.to(image.device)
        keys = captions.keys if duplicates == "mask" else batch.positions[captions.rows]
        sides[language] = image.new_zeros(image.shape).index_copy(0, rows, vectors)
        tags[language] = torch.full((len(image),), MISSING, device=image.device).index_copy(
            0, rows, keys.to(image.device)
        )
    found = loss.terms(sides, [sides_of(o) for o in objectives], scale, bias, tags)
    total = 0.0 * found.losses.sum()  # with a gradient even where nothing is compared
    terms: dict[str, Tensor] = {}
    for i, objective in enumerate(objectives):
        if found.counts[i] >= 2:
            total = total + objective.weight * found.losses[i]
            terms[f"loss/{objective.name}"] = found.losses[i].detach()
            terms[f"accuracy/{objective.name}"] = found.accuracies[i]
    return Losses(total, terms)
