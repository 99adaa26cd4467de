"""The optimizer: which parameters decay, each layer's share of the rate, the rate of every step.

Not for which parameters train at all: locked.py.
"""

import math
import re
from typing import Any

import torch
from torch import nn

from m2encoder.compat import import_timm
from m2encoder.config import Optim
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.model.towers import TimmImageTower

NEVER_DECAYED = (
    *("positions", "cls_token"),  # ours; then those of other libraries' towers
    *("pos_embed", "reg_token", "position_embeddings.weight", "relative_attention_bias.weight"),
)
"""Endings of the names of parameters that look like matrices and do not decay."""


def make_optimizer(model: nn.Module, settings: Optim) -> torch.optim.AdamW:
    """Return AdamW over all parameters of the model; set_learning_rate gives each step its rate.

    model: a shard of it after sharding, or the whole one. A locked parameter is in its group too:
    it has no gradient, so AdamW passes over it.
    """
    return torch.optim.AdamW(
        parameter_groups(model, settings),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def parameter_groups(model: nn.Module, settings: Optim) -> list[dict[str, Any]]:
    """Return groups of parameters that share `weight_decay` and `lr_scale`, a factor on the rate.

    Norms, biases and NEVER_DECAYED do not decay. Scalars stand apart, because sharding leaves them
    whole and AdamW computes all of a group at once.
    """
    scales = lr_scales(model, settings)
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and not name.endswith(NEVER_DECAYED)
        decay, scale = settings.weight_decay if decays else 0.0, scales[name]
        group = groups.setdefault(
            (decay, scale, parameter.ndim == 0),
            {"params": [], "weight_decay": decay, "lr_scale": scale},
        )
        group["params"].append(parameter)
    return list(groups.values())


def lr_scales(model: nn.Module, settings: Optim) -> dict[str, float]:
    """Return the factor on the rate of each parameter by name: its layer's, then its tower's.

    The rate falls by layer_decay for every layer below the projections (ELECTRA, arXiv 2003.10555;
    BEiT, arXiv 2106.08254). Each tower counts its own layers and the shared ones above them.
    """
    found = {name: 1.0 for name, _ in model.named_parameters()}
    inner = next((module for module in model.modules() if isinstance(module, M2Encoder)), None)
    if inner is None:
        return found
    prefix = next(name for name, module in model.named_modules() if module is inner)
    depths = layer_depths(inner)
    for name, depth in depths.items():
        tower = name.partition(".")[0]
        factor = {"image": settings.image_lr, "text": settings.text_lr}.get(tower, 1.0)
        found[f"{prefix}.{name}" if prefix else name] = settings.layer_decay**depth * factor
    return found


def layer_depths(model: M2Encoder) -> dict[str, int]:
    """Return how many layers below the projections each parameter lies, by name.

    Projections and scale: 0. The last block, with the norm that closes it: 1. Patches, tokens and
    positions lie below the lowest block of their tower.
    """
    names = [name for name, _ in model.named_parameters()]
    num_shared = len(model.shared.blocks)
    layers = {  # of each part, counted from its embeddings, which are 0
        "shared": _numbered([name for name in names if name.startswith("shared.")], first=0),
        "text": _numbered([name for name in names if name.startswith("text.")], first=1),
        "image": _timm_layers(model.image)
        if isinstance(model.image, TimmImageTower)
        else _numbered([name for name in names if name.startswith("image.")], first=1),
    }
    depths = dict.fromkeys(names, 0)
    for part, found in layers.items():
        top = max(found.values(), default=0)
        above = 0 if part == "shared" else num_shared
        depths |= {name: above + top - layer + 1 for name, layer in found.items()}
    return depths


def _numbered(names: list[str], *, first: int) -> dict[str, int]:
    """Return the layer of each parameter from the number in its name, as in `blocks.3.`.

    The lowest block is layer `first`. What has no number belongs to the embeddings, layer 0, if it
    comes before the blocks, else (a closing norm) to the last block.
    """
    found: dict[str, int] = {}
    layer = 0
    for name in names:
        # a patch stem of several convolutions is numbered too, and is no block
        number = None if ".patch_embed." in name else re.search(r"\.(\d+)\.", name)
        layer = first + int(number[1]) if number else layer
        found[name] = layer
    return found


def _timm_layers(tower: TimmImageTower) -> dict[str, int]:
    """Return the layer of each parameter as timm counts them."""
    found = import_timm().models.group_parameters(
        tower.model,
        tower.model.group_matcher(coarse=False),  # pyright: ignore[reportCallIssue]
        reverse=True,
    )
    return {f"image.model.{name}": layer for name, layer in found.items()}


def learning_rate(step: int, *, total_steps: int, settings: Optim) -> float:
    """Return the rate of optimizer step `step` (from 0): linear warmup, then the schedule."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        # Hägele et al. (arXiv 2405.18392): as good as a cosine, and a run can be made longer.
        cooldown_steps = max(1, round(settings.cooldown * total_steps))
        return settings.lr * min(1.0, max(0, total_steps - step) / cooldown_steps)
    progress = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
    return settings.lr * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate `lr` times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
