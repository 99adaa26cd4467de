"""How training runs a block: compiled, and with fewer activations kept for the backward pass.

Neither changes names of parameters or values beyond rounding. Not for sharding (sharding.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from m2encoder.model.layers import Block
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.model.towers import TimmImageTower, TransformersTextTower

CheckpointActivations = Literal["none", "selective", "full"]
COMPILED_VARIANTS = 64
"""Of a block: picture or text, fixed or any length, with or without gradients, training or not."""
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Matrix products and attention: nearly all of a block's work, half of its activations."""


def prepare_blocks(
    model: M2Encoder, *, compile: bool, checkpoint_activations: CheckpointActivations
) -> None:
    """Set up the blocks of both towers, in place; before sharding.

    checkpoint_activations: `full` keeps what enters a block and computes the rest again: least
    memory, a third more work. `selective` keeps results of matrix products and attention too and
    computes only norms, GELU and sums again: half the memory for some per cent of time. Chosen over
    leaving every second block alone, which for half the memory repeats a sixth of all work.
    Towers of other libraries have a switch of their own, which is `full`, and are compiled whole.
    """
    run = {"none": None, "selective": _run_selective, "full": _run_full}[checkpoint_activations]
    if compile:
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, COMPILED_VARIANTS)
    for module in model.modules():
        if isinstance(module, Block):
            module.checkpointed = run
            if compile:
                # One block after the other, not the model: the blocks are alike, so each variant is
                # compiled once, in seconds. Lengths that change become symbols the second time.
                module.compile()
    for tower in (model.image, model.text):
        if isinstance(tower, TimmImageTower | TransformersTextTower):
            _prepare_foreign(tower, compile, checkpoint_activations != "none")


def _prepare_foreign(
    tower: TimmImageTower | TransformersTextTower, compile: bool, checkpointed: bool
) -> None:
    if isinstance(tower, TimmImageTower):
        if checkpointed:
            tower.gradient_checkpointing = True
    elif checkpointed:
        model: Any = tower.model
        enable = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.2x
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if compile:
        inner: nn.Module = tower.model
        inner.compile()


def _run_full(layers: Callable[..., Tensor], *args: Any) -> Any:
    return checkpoint(layers, *args, use_reentrant=False)


def _run_selective(layers: Callable[..., Tensor], *args: Any) -> Any:
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(layers, *args, use_reentrant=False, context_fn=contexts)


def _policy(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    if operator in _KEPT:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
