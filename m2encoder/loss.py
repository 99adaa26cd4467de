"""The contrastive loss in its plain form: one process, one matrix.

Not for what a batch is compared on (objectives.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE: each row must find its partner among all rows, both ways.

    image, text: (B, P), unit norm, row i of one matches row i of the other.
    logit_scale: scalar, 1 / temperature (not its logarithm).
    Returns a scalar, the mean over the 2 B queries, computed in float32 (float64 for float64
    input). Raises ValueError when the shapes differ.

    Source: CLIP (arXiv 2103.00020, section 2.3), after van den Oord et al. (arXiv 1807.03748).
    """
    if image.shape != text.shape:
        raise ValueError(
            f"image is {tuple(image.shape)}, text {tuple(text.shape)}; expected the same"
        )
    dtype = torch.promote_types(image.dtype, torch.float32)
    logits = logit_scale.to(dtype) * image.to(dtype) @ text.to(dtype).T
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def in_batch_accuracy(image: Tensor, text: Tensor) -> Tensor:
    """Share of the 2 B queries whose nearest row is their partner, a scalar float32."""
    sim = image @ text.T
    target = torch.arange(len(image), device=image.device)
    hits = (sim.argmax(dim=1) == target).float() + (sim.argmax(dim=0) == target).float()
    return hits.mean() / 2
