"""Patch dropout: which patches of a training picture the image tower sees.

Source: FLIP (arXiv 2212.00794), which drops patches at random and ends with a stretch of whole
pictures. A picture's patches depend on (seed, its position in the global stream) alone, so every
world size, micro-batch, second pass and resumed run sees the same ones.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)  # of SplitMix64
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def num_kept(num_patches: int, share: float) -> int:
    """Return how many patches stay when `share` of them is dropped; at least one."""
    return max(1, round((1 - share) * num_patches))


def kept_patches(positions: Tensor, *, num_patches: int, share: float, seed: int) -> Tensor | None:
    """Return the patches that stay, (B, K) int64, ascending; None where share drops none.

    positions: (B,) int64, places in the global stream. share: of patches to drop, in [0, 1); at
    least one patch stays.
    """
    count = num_kept(num_patches, share)
    if count == num_patches:
        return None
    patches = torch.arange(num_patches, device=positions.device)
    start = _mix(torch.tensor(seed, device=positions.device) + _GOLDEN)
    order = _mix(_mix(positions[:, None] + start) + (patches + 1) * _GOLDEN).argsort(dim=1)
    return order[:, :count].sort(dim=1).values


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014) on wrapping int64."""
    for shift, factor in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical; >> of a signed number keeps the sign
