"""The losses in their plainest form: one process, one matrix; what the fast ones are held to.

Also the unit vectors that those are tried on, and how far two results are apart.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def unit_rows(rows: int, width: int, *, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return (rows, width) random vectors of length one."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return F.normalize(vectors, dim=1).to(dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected|; the plain difference where nothing is expected."""
    size = expected.double().norm()
    difference = (found.double() - expected.double()).norm()
    return (difference / size if size > 0 else difference).item()


def info_nce(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE of (N, D) and (N, D): mean over the 2 N queries."""
    logits = scale * image @ text.T
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def info_nce_by_leads(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """Compute the same from how far each partner leads: right to the last digit near a loss of 0.

    There cross_entropy subtracts numbers that agree in all their digits.
    """
    logits = scale * image @ text.T
    others = logits.masked_fill(torch.eye(len(image), dtype=torch.bool), -torch.inf)
    leads = [logits.diagonal() - others.logsumexp(dim) for dim in (0, 1)]
    return -F.logsigmoid(torch.stack(leads)).mean()


def sigmoid(image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """SigLIP's loss: sum over all N x N entries, by N."""
    labels = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(labels * (scale * image @ text.T + bias)).sum() / len(image)


def masked(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor | float,
    *,
    present: Tensor,
    same: Tensor,
    groups: int = 1,
    bias: Tensor | float | None = None,
) -> Tensor:
    """Either loss (sigmoid with a bias) where pairs are missing and some are no negatives.

    present: (N,) bool, pairs that take part. same: (N, N) bool, entries that are no negatives.
    groups: equal, consecutive; each query meets its own group. Every query counts the same.
    """
    total = rows.new_zeros(())
    queries = 0
    for places in torch.arange(len(rows)).chunk(groups):
        places = places[present[places]]
        logits = scale * rows[places] @ columns[places].T
        partner = torch.eye(len(places), dtype=torch.bool)
        no_negative = same[places][:, places] & ~partner
        if bias is None:
            logits = logits.masked_fill(no_negative, -torch.inf)
            for side in (logits, logits.T):
                total = total + (side.logsumexp(1) - side.diagonal()).sum()
            queries += 2 * len(places)
        else:
            terms = -F.logsigmoid((2 * partner.to(rows.dtype) - 1) * (logits + bias))
            total = total + terms.masked_fill(no_negative, 0).sum()
            queries += len(places)
    return total / max(1, queries)


def accuracy(
    rows: Tensor, columns: Tensor, *, present: Tensor, same: Tensor, groups: int = 1
) -> float:
    """Return the share of queries, rows and columns, that are nearest to their partner alone.

    Arguments as in `masked`.
    """
    hits = queries = 0
    for places in torch.arange(len(rows)).chunk(groups):
        places = places[present[places]]
        sim = rows[places] @ columns[places].T
        for side, no_negative in (
            (sim, same[places][:, places]),
            (sim.T, same[places][:, places].T),
        ):
            others = side.masked_fill(no_negative, -torch.inf).fill_diagonal_(-torch.inf)
            if len(places):
                hits += (side.diagonal() > others.amax(1)).sum().item()
            queries += len(places)
    return hits / max(1, queries)
