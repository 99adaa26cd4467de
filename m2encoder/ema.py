"""The exponential moving average of a model's weights, kept where the weights are kept.

Source: Polyak and Juditsky 1992, as CLIP-like models use it. Not for averaging two models
(interpolate.py).
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Ema:
    """A second set of weights, each step moved by 1 - decay towards the model's.

    Make it after the model is sharded (sharding.py): its tensors are placed as the model's, so that
    an update needs no communication. Raises ValueError if decay is not in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}, expected 0 <= decay < 1")
        self.model, self.decay = model, decay
        self.tensors: dict[str, Tensor] = {
            name: tensor.detach().clone() for name, tensor in model.state_dict().items()
        }
        """By name, parameters and saved buffers; shapes, types and placements of the model's."""

    @torch.no_grad()
    def update(self) -> None:
        """Move every parameter towards the model's; buffers become the model's."""
        parameters = dict(self.model.named_parameters())
        averages = [_local(self.tensors[name]) for name in parameters]
        torch._foreach_lerp_(averages, [_local(p) for p in parameters.values()], 1 - self.decay)
        for name, buffer in self.model.named_buffers():
            if name in self.tensors:
                self.tensors[name].copy_(buffer)

    @torch.no_grad()
    def restart(self) -> None:
        """Take the model's weights as they are."""
        for name, tensor in self.model.state_dict().items():
            _local(self.tensors[name]).copy_(_local(tensor))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
