"""Open a model by whatever names it: a model folder, a preset, a released checkpoint.

Not for what an Encoder does (encoder.py), nor for how folders are laid out (model_folder.py).
"""

import os
from pathlib import Path
from typing import Literal, get_args

import torch

from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, ConfigError
from m2encoder.model.configuration_m2encoder import Towers
from m2encoder.model_folder import open_folder
from m2encoder.presets import list_presets

Dtype = Literal["float32", "float16", "bfloat16"]


def load_model(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: Dtype = "float32",
    towers: Towers = "both",
    image_size: int | None = None,
) -> Encoder:
    """Open a model folder (as `m2enc pretrain` exports it) for embedding.

    device: `auto` takes a GPU if there is one. towers: `image` or `text` loads that tower alone.
    image_size: pixels; another size than the model's resizes its position table.
    Raises CheckpointError if the folder is missing, damaged or holds another kind of model,
    ConfigError on an unknown device, dtype or towers.
    """
    for given, known in ((dtype, get_args(Dtype)), (towers, get_args(Towers))):
        if given not in known:
            raise ConfigError(f"{given!r} is unknown, expected one of {', '.join(known)}")
    chosen = _device(device)
    encoder = open_folder(_find(str(path)), device=chosen, dtype=dtype, towers=towers)
    if image_size is not None:
        encoder.model.set_image_size(image_size)
        encoder.image_processor.size_px = image_size
    return encoder


def _find(asked: str) -> Path:
    folder = Path(asked)
    if not folder.exists() and asked in list_presets():
        raise CheckpointError(
            f"{asked} is a preset without weights here; give the path of a model folder, or "
            f"train one with: m2enc pretrain"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{asked}: no such model folder; check the path")
    return folder


def _device(name: str) -> torch.device:
    """Return the device, tried once, so that an absent one is named before weights are read."""
    if name == "auto":
        best = "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device("cuda" if torch.cuda.is_available() else best)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"device {name!r} cannot be used ({reason}); try auto or cpu") from None
    return device
