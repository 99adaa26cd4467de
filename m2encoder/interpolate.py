"""Weights between two models of the same shape (WiSE-FT, arXiv 2109.01903).

A fine-tuned model mixed with the one it started from keeps more of what that one knew. Not for
running means of weights while training (ema.py).
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from m2encoder.errors import CheckpointError, ConfigError
from m2encoder.load import load_model
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.model_folder import check_only_ours, save_model_folder


def interpolate(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Return start + share x (end - start) of every tensor, computed in float32, in end's dtype.

    share: 0 gives start, 1 gives end, both to the bit. Whole numbers are end's.
    Raises ConfigError on a share outside [0, 1], CheckpointError where names or shapes differ.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share must lie in [0, 1], got {share}")
    alone = sorted(start.keys() ^ end.keys())
    if alone:
        raise CheckpointError(
            f"the models have different tensors: {alone[0]} is in one alone"
            + (f", and {len(alone) - 1} more are" if len(alone) > 1 else "")
            + "; interpolate models of the same shape"
        )
    mixed: dict[str, Tensor] = {}
    for name, after in end.items():
        before = start[name]
        if before.shape != after.shape:
            raise CheckpointError(
                f"{name} is {tuple(before.shape)} in the first model and {tuple(after.shape)} in "
                f"the second; interpolate models of the same shape"
            )
        if after.is_floating_point():
            after, dtype = after.float(), after.dtype
            # lerp is exact at both ends
            mixed[name] = torch.lerp(before.to(after), after, share).to(dtype)
        else:
            mixed[name] = after.clone()
    return mixed


def write_interpolated(
    start: str | os.PathLike[str], end: str | os.PathLike[str], out: Path, *, share: float
) -> None:
    """Write the model folder between two models that load_model opens.

    Preprocessing is the second's. Raises ConfigError and CheckpointError as `interpolate` does, and
    when tokenizers differ or a model is of another family; DataError if `out` cannot be written.
    """
    if not 0 <= share <= 1:  # before reading gigabytes
        raise ConfigError(f"share must lie in [0, 1], got {share}")
    check_only_ours(out)
    first, second = (load_model(where, device="cpu") for where in (start, end))
    for encoder, where in ((first, start), (second, end)):
        if not isinstance(encoder.model, M2Encoder):
            raise CheckpointError(f"{where}: a model of another family, expected one of ours")
    vocabularies = [e.tokenizer and e.tokenizer.get_vocab() for e in (first, second)]
    if vocabularies[0] != vocabularies[1]:
        raise CheckpointError(
            f"{start} and {end} have different tokenizers, so that the same row of their "
            f"embeddings means different pieces; interpolate a model with the one it started from"
        )
    mixed = interpolate(first.model.state_dict(), second.model.state_dict(), share)
    second.model.load_state_dict(mixed)
    # Not the second's figures, extras and calibration: they are of other weights.
    folder, second.folder, second.name = second.folder, None, out.resolve().name
    sp_model = folder / "sp.model" if folder else None
    found = sp_model.read_bytes() if sp_model and sp_model.is_file() else None
    save_model_folder(second, out, sp_model=found)
