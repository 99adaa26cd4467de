"""What a training checkpoint holds, by flat names, whole or in shards; copied out, and put back.

Names: model/NAME, optimizer/NAME/exp_avg, ema/NAME. Not for files (checkpoint_files.py).
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from m2encoder.checkpoint_files import Piece, damaged
from m2encoder.ema import Ema
from m2encoder.errors import CheckpointError


@dataclass(frozen=True)
class TrainState:
    """What a step changes. The optimizer holds the model's parameters, sharded or not."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor there is by its name in a checkpoint; no copies.

        In the same order on all ranks: who writes a piece follows from it.
        """
        found = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in sorted(self.optimizer.state.get(parameter, {}).items()):
                found[f"optimizer/{name}/{key}"] = value
        for name, tensor in (self.ema.tensors if self.ema else {}).items():
            found[f"ema/{name}"] = tensor
        return {name: tensor.detach() for name, tensor in found.items()}


class Staging:
    """Memory on the CPU that tensors are copied to before they are written; kept and used again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(
        self, tensors: Mapping[str, Tensor], *, rank: int, world_size: int
    ) -> dict[str, Piece]:
        """Return copies of the pieces that this rank writes.

        Each piece that several ranks hold is written by one of them, chosen so that all write about
        as much; every rank finds the same choice by itself.
        """
        chosen = _share_of_rank(tensors, rank, world_size)
        pieces, device = {}, torch.device("cpu")
        for item in create_default_local_save_plan(chosen, is_coordinator=False).items:
            assert item.tensor_data is not None
            name, tensor = item.index.fqn, chosen[item.index.fqn]
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if not local.numel() and tensor.numel():
                continue  # fewer rows than ranks
            device = local.device if local.device.type != "cpu" else device
            buffer = self._buffer(name, local)
            buffer.copy_(local, non_blocking=True)
            pieces[name] = Piece(buffer, tuple(item.tensor_data.chunk.offsets))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return pieces

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        found = self._buffers.get(name)
        if found is None or (found.shape, found.dtype) != (like.shape, like.dtype):
            pin = like.device.type == "cuda"
            found = torch.empty(like.shape, dtype=like.dtype, pin_memory=pin)
            self._buffers[name] = found
        return found


def _share_of_rank(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """The tensors of which this rank writes its piece; with n copies each to the least loaded."""
    chosen = {}
    loads: dict[int, list[int]] = {}
    for name, tensor in tensors.items():
        copies, own = world_size, rank
        if isinstance(tensor, DTensor):
            copies, own = 1, 0
            coordinate = tensor.device_mesh.get_coordinate()
            assert coordinate is not None
            for dim, placement in enumerate(tensor.placements):
                if placement.is_replicate():
                    own = own * tensor.device_mesh.size(dim) + coordinate[dim]
                    copies *= tensor.device_mesh.size(dim)
        load = loads.setdefault(copies, [0] * copies)
        writer = load.index(min(load))
        load[writer] += tensor.numel() * tensor.element_size()
        if writer == own:
            chosen[name] = tensor
    return chosen


def load_tensors(path: Path, state: TrainState) -> bool:
    """Put a checkpoint's tensors in place, whatever their sharding there and here.

    Returns whether it held an average (Ema); without one, state.ema restarts at its weights. The
    optimizer's state becomes the checkpoint's: parameters that had none have none. Raises
    CheckpointError, before anything is changed, if it is damaged or of another model.
    """
    try:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata()
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise damaged(path, str(error)) from None
    found: dict[str, TensorStorageMetadata] = metadata.state_dict_metadata  # pyright: ignore[reportAssignmentType]
    for name, tensor in found.items():
        if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
            raise damaged(path, f"a piece of {name!r} is missing")
    _check_against_model(path, state, found)
    has_average = any(name.startswith("ema/") for name in found)
    _shape_optimizer_state(state, found)
    targets = {name: tensor for name, tensor in state.tensors().items() if name in found}
    try:
        with warnings.catch_warnings():
            # each rank reads what it needs and asks nobody: that is meant, and DCP warns of it
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            reader = HuggingFaceStorageReader(str(path))
            dcp.load(_detached(targets), storage_reader=reader, no_dist=True)
    except (OSError, SafetensorError, ValueError, dcp.api.CheckpointException) as error:
        raise damaged(path, str(error)) from None
    if state.ema and not has_average:
        state.ema.restart()
    return has_average


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _check_against_model(
    path: Path, state: TrainState, found: Mapping[str, TensorStorageMetadata]
) -> None:
    """Names and shapes of the weights, then of what belongs to them."""
    weights = {name: tensor.shape for name, tensor in state.model.state_dict().items()}
    expected = {f"model/{name}": shape for name, shape in weights.items()}
    if any(name.startswith("ema/") for name in found):
        expected |= {f"ema/{name}": shape for name, shape in weights.items()}
    for name in found:
        kind, _, rest = name.partition("/")
        owner, _, key = rest.rpartition("/")
        if kind == "optimizer" and owner in weights:
            expected[name] = torch.Size([]) if key == "step" else weights[owner]
    sizes = {name: tensor.size for name, tensor in found.items()}
    for name in sorted(
        expected.keys() | sizes.keys(), key=lambda name: (name[:6] != "model/", name)
    ):
        there, here = sizes.get(name), expected.get(name)
        if there != here:
            raise CheckpointError(
                f"{path}: {name.partition('/')[2]!r} is {_shown(there, 'missing')}, the model "
                f"expects {_shown(here, 'no such tensor')}; was this run started with another "
                f"configuration?"
            )


def _shown(shape: torch.Size | None, absent: str) -> str:
    return absent if shape is None else str(tuple(shape))


def _shape_optimizer_state(state: TrainState, found: Mapping[str, TensorStorageMetadata]) -> None:
    """Make room for the state that a checkpoint holds of each parameter, and for no other."""
    fast = {
        parameter: bool(group.get("fused") or group.get("capturable"))
        for group in state.optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in state.model.named_parameters():
        prefix = f"optimizer/{name}/"
        keys = {n.removeprefix(prefix) for n in found if n.startswith(prefix)}
        if not keys or parameter not in fast:
            state.optimizer.state.pop(parameter, None)
            continue
        there = state.optimizer.state[parameter]
        for key in sorted(keys - there.keys()):
            meta = found[prefix + key]
            if meta.size == parameter.shape and key != "step":
                there[key] = torch.zeros_like(parameter, dtype=meta.properties.dtype)
            else:
                device = parameter.device if fast[parameter] else torch.device("cpu")
                there[key] = torch.zeros(meta.size, dtype=meta.properties.dtype, device=device)
        for key in there.keys() - keys:
            del there[key]
