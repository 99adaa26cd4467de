"""Models of other families behind the Encoder, for evaluation: CLIP's kin and open_clip's own.

They stay in the formats of their own libraries: nothing is converted, so nothing can differ. Not
for training, nor for single towers inside our own model (towers.py).
"""

import json
from pathlib import Path

import torch

from m2encoder.calibration import keep_calibration
from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, DataError
from m2encoder.folders import complete_folder
from m2encoder.foreign_open_clip import CONFIG_NAME as OPEN_CLIP_CONFIG
from m2encoder.foreign_open_clip import OpenClipModel, open_open_clip_folder, save_open_clip
from m2encoder.foreign_transformers import (
    FAMILIES,
    TransformersModel,
    open_transformers,
    save_transformers,
)


def is_foreign(folder: Path) -> bool:
    """Say whether `open_foreign` would try a folder: another model_type, or open_clip's file."""
    kind = _model_type(folder)
    return (kind is not None and kind != "m2_encoder") or (folder / OPEN_CLIP_CONFIG).is_file()


def open_foreign(folder: Path, *, device: torch.device, dtype: str = "float32") -> Encoder:
    """Open a folder of transformers (CLIP and its kin) or of open_clip, without network.

    Vectors equal those libraries' own at unit norm, for pictures and texts prepared their way; too
    long texts are always truncated. A folder that serves both is read by transformers.
    Raises CheckpointError on another kind of model and on what is damaged or missing,
    MissingExtraError where open_clip is needed and absent.
    """
    kind = _model_type(folder)
    if kind in FAMILIES:
        return open_transformers(folder, kind, device=device, dtype=getattr(torch, dtype))
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return open_open_clip_folder(folder, device=device, dtype=getattr(torch, dtype))
    if kind is None:
        raise CheckpointError(
            f"{folder}: neither config.json with a model_type nor {OPEN_CLIP_CONFIG}, expected a "
            f"model of transformers or open_clip"
        )
    raise CheckpointError(
        f"{folder}: model_type is {kind!r}, expected m2_encoder or one of {', '.join(FAMILIES)}"
    )


def save_foreign(encoder: Encoder, folder: Path) -> None:
    """Write a new folder that opens offline, here and in the model's own library, or nothing.

    Raises DataError if the folder holds files, CheckpointError if it is none of the models that
    `open_foreign` opens, or cannot be opened offline.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder}: holds files, expected a new folder; choose another name")
    if isinstance(encoder.model, TransformersModel):
        save, marker = save_transformers, "config.json"
    elif isinstance(encoder.model, OpenClipModel):
        save, marker = save_open_clip, OPEN_CLIP_CONFIG
    else:
        raise CheckpointError(f"{encoder.name}: {type(encoder.model).__name__} is our own model")
    with complete_folder(folder, marker=marker) as new:
        save(encoder, new)
        keep_calibration(encoder, new)


def _model_type(folder: Path) -> str | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    return config.get("model_type") if isinstance(config, dict) else None
