"""The optimizer: which parameters decay, and the learning rate of every step."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from m2encoder.config import Optim

NEVER_DECAYED = ("positions", "cls_token", "logit_scale")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters in decayed and not decayed (norms, biases, NEVER_DECAYED)."""
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_other = parameter.ndim < 2 or name.endswith(NEVER_DECAYED)
            (others if is_other else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, settings: Optim) -> torch.optim.AdamW:
    """Return AdamW over the model's trainable parameters; `lr` is set anew for every step."""
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def learning_rate(step: int, *, total_steps: int, settings: Optim) -> float:
    """Return the rate of optimizer step `step` (from 0): linear warmup, then a cosine to zero."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
    return settings.lr * (1 + math.cos(math.pi * min(1.0, progress))) / 2
