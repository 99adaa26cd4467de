"""How much a training step computes, and what share of a GPU's best that is (MFU).

Counted from shapes, as PaLM does (arXiv 2204.02311, appendix B): matrix products alone, each once
forward and twice backward, whatever is computed again to save memory. Not for measured time.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from m2encoder.model.architecture import Architecture
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.model.towers import TimmImageTower, TransformersTextTower

PEAK_FLOPS_PER_S = (
    # NVIDIA's and AMD's data sheets: bfloat16 matrix products, dense, float32 sums. The first name
    # that is a word of the device's counts.
    ("GB200", 2.5e15), ("B200", 2.25e15), ("H200", 989e12), ("GH200", 989e12),
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H800", 989e12),
    ("H20", 148e12), ("A100", 312e12), ("A800", 312e12), ("A40", 149.7e12), ("A30", 165e12),
    ("A10", 125e12), ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12),
    ("RTX 6000 Ada", 364.2e12), ("RTX A6000", 154.8e12), ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12), ("RTX 3090", 71e12), ("MI300X", 1307e12), ("MI250X", 191.5e12),
)  # fmt: skip


def peak_flops_per_s(device_name: str) -> float | None:
    """Return a GPU's best in bfloat16, by the name that torch.cuda.get_device_name gives."""
    found = (peak for name, peak in PEAK_FLOPS_PER_S if re.search(rf"\b{name}\b", device_name))
    return next(found, None)


def mfu(pairs_per_s: float, flops_per_pair: float, device_name: str) -> float | None:
    """Return the share of one GPU's best that so many pairs per second on it are; None if unknown.

    flops_per_pair: training_flops.
    """
    peak = peak_flops_per_s(device_name)
    return None if peak is None else pairs_per_s * flops_per_pair / peak


def training_flops(
    model: M2Encoder, *, text_lengths: Sequence[float], kept_patches: int | None = None
) -> float:
    """Return what training on one pair computes: forward, backward, for weights that train.

    text_lengths: tokens of each of a pair's captions, means where they differ; both languages of a
    bilingual pair count. kept_patches: patches that are seen, None for all. Locked parts cost no
    gradients of their weights, and none at all where nothing below them trains.
    """
    image, text = (image_flops(model, kept_patches), text_flops(model, text_lengths))
    shared_image, shared_text = shared_flops(model, text_lengths, kept_patches)
    trains = {part: _trains(getattr(model, part)) for part in ("image", "text", "shared")}
    total = image * (3 if trains["image"] else 1) + text * (3 if trains["text"] else 1)
    for flops, tower in ((shared_image, "image"), (shared_text, "text")):
        total += flops * (1 + trains["shared"] + (trains["shared"] or trains[tower]))
    return total


def _trains(module: nn.Module | None) -> bool:
    return module is not None and any(p.requires_grad for p in module.parameters())


def image_flops(model: M2Encoder, kept_patches: int | None = None) -> float:
    """Return what one picture costs forward, without shared layers. Patches are all embedded."""
    shape = model.config.architecture
    projection = 2 * model.image_projection.weight.numel()
    if isinstance(model.image, TimmImageTower):
        settings = json.dumps(model.config.image_tower, sort_keys=True)
        return projection + _timm_flops(settings, model.config.image_size)
    stem = 0 if model.image is None else _stem_flops(model.image.patch_embed, shape)
    length = 1 + (shape.grid**2 if kept_patches is None else kept_patches)
    return projection + stem + shape.image_layers * _block_flops(shape, length)


def text_flops(model: M2Encoder, text_lengths: Iterable[float]) -> float:
    """Return what captions of these lengths cost forward, without shared layers."""
    shape = model.config.architecture
    projection = 2 * model.text_projection.weight.numel()
    total = 0.0
    for length in text_lengths:
        if isinstance(model.text, TransformersTextTower):
            total += projection + _transformers_flops(model.text.model, length)
        else:
            total += projection + shape.text_layers * _block_flops(shape, length)
    return total


def shared_flops(
    model: M2Encoder, text_lengths: Iterable[float], kept_patches: int | None = None
) -> tuple[float, float]:
    """Return what the shared layers cost forward for one picture, and for its captions."""
    shape = model.config.architecture
    length = 1 + (shape.grid**2 if kept_patches is None else kept_patches)
    texts = sum(_block_flops(shape, n) for n in text_lengths)
    return shape.shared_layers * _block_flops(shape, length), shape.shared_layers * texts


def _block_flops(shape: Architecture, length: float) -> float:
    """q, k, v and output 8 D^2 per token, feed-forward 16 D^2, scores and their sum 4 L D."""
    return length * (24 * shape.width**2 + 4 * length * shape.width)


def _stem_flops(stem: nn.Module, shape: Architecture) -> float:
    """Every output of a convolution sums over its kernel; sizes shrink by the strides."""
    size, total = shape.image_size, 0.0
    for part in stem.modules():
        if isinstance(part, nn.Conv2d):
            size //= part.stride[0]
            total += 2 * part.weight.numel() * size**2
    return total


def _transformers_flops(model: Any, length: float) -> float:
    """Every matrix but embeddings multiplies each token; attention as in our own blocks."""
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in tables)
    attention = 4 * length * model.config.hidden_size * model.config.num_hidden_layers
    return length * (2 * matrices + attention)


@cache
@torch.no_grad()
def _timm_flops(settings: str, image_size: int) -> float:
    """Run such a tower once without memory, on the meta device, and count."""
    tower = TimmImageTower(json.loads(settings), image_size=image_size).eval().to("meta")
    with FlopCounterMode(display=False) as counter:
        tower(torch.empty((1, 3, image_size, image_size), device="meta"))
    return float(counter.get_total_flops())
