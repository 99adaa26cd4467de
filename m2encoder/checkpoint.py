"""Training checkpoints: weights and optimizer as safetensors, progress as JSON; no pickle.

A checkpoint is written under a temporary name and renamed, so what has a name is complete. Not for
model folders (load.py).
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from m2encoder.errors import CheckpointError

FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int
    """Optimizer steps done."""
    samples: int
    """Pairs consumed, the whole state of the stream."""
    dropped: int
    """Of these, pairs that could not be used."""
    seconds: float
    """Training time so far, evaluation left out."""
    steps_per_epoch: int
    """Of the data this run trains on; another number means other data."""
    format: int = FORMAT


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, keep: int
) -> Path:
    """Write `folder/step-00000042`, then delete all but the newest `keep`; returns its path.

    Raises CheckpointError when the disk refuses; earlier checkpoints then stand.
    """
    path = folder / f"step-{progress.step:08d}"
    temporary = folder / f".{path.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(_contiguous(model.state_dict()), temporary / "model.safetensors")
        save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
        (temporary / "progress.json").write_text(json.dumps(asdict(progress), indent=2) + "\n")
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{path}: cannot write ({error}); earlier checkpoints stand, free space and run again"
        ) from None
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a checkpoint's weights and optimizer state in place, to the bit.

    Raises CheckpointError if it is damaged or of another model.
    """
    try:
        raw = json.loads((path / "progress.json").read_text())
        if raw.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: checkpoint format {raw.get('format')}, this version reads {FORMAT}; "
                f"go on with the version that wrote it, or choose another --out"
            )
        progress = Progress(**raw)
        weights = load_file(path / "model.safetensors")
        state = load_file(path / "optimizer.safetensors")
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: damaged checkpoint ({error}); delete it to go on from an earlier one"
        ) from None
    _check_shapes(path, model.state_dict(), weights)
    model.load_state_dict(weights)
    for name, parameter in model.named_parameters():
        found = {
            key.removeprefix(f"{name}//"): value.to(parameter.device)
            for key, value in state.items()
            if key.startswith(f"{name}//")
        }
        if found:
            optimizer.state[parameter] = found
    return progress


def _check_shapes(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name in sorted(expected.keys() | found.keys()):
        shapes = [tuple(t[name].shape) if name in t else None for t in (found, expected)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{path}: {name!r} is {shapes[0] or 'missing'}, the model expects "
                f"{shapes[1] or 'no such tensor'}; was this run started with another configuration?"
            )


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return _contiguous(
        {
            f"{name}//{key}": value
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
    )


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
