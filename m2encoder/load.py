"""Open a model by whatever names it: a model folder, a preset, a released checkpoint.

Not for what an Encoder does (encoder.py), nor for how folders are laid out (model_folder.py).
"""

import logging
import os
from pathlib import Path
from typing import Literal, get_args

import torch

from m2encoder.convert import open_released
from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, ConfigError
from m2encoder.foreign import is_foreign, open_foreign
from m2encoder.foreign_open_clip import open_open_clip
from m2encoder.hub import fetch_hub
from m2encoder.model.configuration_m2encoder import Towers
from m2encoder.model_folder import open_folder
from m2encoder.presets import list_presets
from m2encoder.sources import fetch, read_table

logger = logging.getLogger(__name__)

OPEN_CLIP = "open-clip:"
Dtype = Literal["float32", "float16", "bfloat16"]


def load_model(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: Dtype = "float32",
    towers: Towers = "both",
    image_size: int | None = None,
    config: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Encoder:
    """Open a model for embedding.

    path: a model folder of ours; the name of a released model (`m2-encoder-0.4b`; downloaded and
        converted once, list_models() names them); a released checkpoint file; `hf:ORG/NAME` or
        `modelscope:ORG/NAME`; a transformers dual encoder (CLIP, ChineseCLIP, SigLIP, ...) or an
        open_clip folder; `open-clip:NAME[/PRETRAINED]`.
    device: `auto` takes a GPU if there is one. towers: `image` or `text` loads that tower alone.
    image_size: pixels; another size than the model's resizes its position table.
    config, tokenizer: of a released checkpoint: its JSON configuration (released sizes need none)
        and its sp.model (by default the one beside it).
    Raises CheckpointError if the model is missing, damaged or of an unknown kind, ConfigError on an
    unknown device, dtype or towers.
    """
    for given, known in ((dtype, get_args(Dtype)), (towers, get_args(Towers))):
        if given not in known:
            raise ConfigError(f"{given!r} is unknown, expected one of {', '.join(known)}")
    chosen, asked = _device(device), os.fspath(path)
    if (config or tokenizer) and not Path(asked).is_file():
        if not Path(asked).exists():
            raise CheckpointError(f"{asked}: no such checkpoint file; check the path")
        raise ConfigError(f"{asked}: config and tokenizer serve a checkpoint file, this is none")
    if asked.startswith(OPEN_CLIP):
        _check_whole(asked, towers, image_size)
        return open_open_clip(asked, device=chosen, dtype=getattr(torch, dtype))
    folder = _find(asked)
    if folder.is_file():
        encoder, _, report = open_released(
            folder,
            config=Path(config) if config else None,
            tokenizer=Path(tokenizer) if tokenizer else None,
            dtype=getattr(torch, dtype),
            towers=towers,
            image_size=image_size,
        )
        for line in report.lines():
            logger.info("%s", line)
        encoder.model.to(chosen)
        return encoder
    if is_foreign(folder):
        _check_whole(asked, towers, image_size)
        return open_foreign(folder, device=chosen, dtype=dtype)
    return open_folder(folder, device=chosen, dtype=dtype, towers=towers, image_size=image_size)


def _check_whole(asked: str, towers: Towers, image_size: int | None) -> None:
    if towers != "both" or image_size is not None:
        raise ConfigError(
            f"{asked}: a model of another family, which is loaded whole and at its own picture "
            f"size; leave out towers and image_size"
        )


def _find(asked: str) -> Path:
    """Return the folder or file that `asked` names, downloaded if need be."""
    if asked.startswith(("hf:", "modelscope:")):
        return fetch_hub(asked)
    if (path := Path(asked)).exists():
        return path
    if asked in read_table():
        return fetch(asked)
    names = ", ".join(read_table())
    if asked in list_presets():
        raise CheckpointError(
            f"{asked} is a preset without weights; give the path of a model folder, train one "
            f"with m2enc pretrain, or name a released model ({names})"
        )
    raise CheckpointError(
        f"{asked}: no such model folder or checkpoint; check the path, or name a released model "
        f"({names}) or a repository (hf:ORG/NAME)"
    )


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
