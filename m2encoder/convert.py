"""Released checkpoints: open one, turn it into a model folder, and go back bit for bit.

Not for their layout (released.py), nor for how torch files are read (torch_files.py).
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, ConfigError, DataError
from m2encoder.folders import complete_folder
from m2encoder.golden import write_golden
from m2encoder.model.architecture import Architecture
from m2encoder.model.configuration_m2encoder import M2EncoderConfig, Towers
from m2encoder.model.image_processing_m2encoder import M2EncoderImageProcessor
from m2encoder.model_folder import EXTRAS, check_only_ours, read_tensors, save_model_folder
from m2encoder.released import Report, build_model, find_weights, to_released
from m2encoder.released_config import (
    preset_of,
    shape_from_config,
    shape_from_tensors,
    text_positions_of,
)
from m2encoder.released_tokenizer import ReleasedTokenizer
from m2encoder.text_normalization import TextNormalization
from m2encoder.torch_files import read_torch_file

logger = logging.getLogger(__name__)

TOKENIZER = "sp.model"
RELEASED_END_ID = 50_000  # end and padding, where no tokenizer says otherwise


def open_released(
    checkpoint: Path,
    *,
    config: Path | None = None,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    towers: Towers = "both",
    image_size: int | None = None,
) -> tuple[Encoder, dict[str, Tensor], Report]:
    """Open a released checkpoint; returns it, its unused tensors, and what became of each tensor.

    config: its JSON configuration; without one the sizes come from the tensors.
    tokenizer: its sp.model, by default the one beside the checkpoint; without any, texts cannot be
        encoded.
    dtype: of the parameters; None keeps the file's.
    Raises CheckpointError, ConfigError or DataError in one line.
    """
    where = str(checkpoint)
    container, weights = find_weights(read_torch_file(checkpoint), where=where)
    if config is None:
        shape = shape_from_tensors(weights, where=where)
    else:
        text_positions = text_positions_of(weights, where=where)
        shape = shape_from_config(config, text_positions=text_positions)
    text = _open_tokenizer(checkpoint, tokenizer, shape)
    end_id = text.end_id if text else RELEASED_END_ID
    settings = {**asdict(shape), "image_size": image_size or shape.image_size}
    try:
        model_config = M2EncoderConfig(
            **settings, pad_token_id=end_id, eos_token_id=end_id, towers=towers
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    report = Report(container, preset_of(shape))
    model, extras = build_model(weights, model_config, where=where, report=report, dtype=dtype)
    encoder = Encoder(
        model.requires_grad_(False),
        M2EncoderImageProcessor(size_px=settings["image_size"]),
        text.to_fast() if text else None,
        name=report.preset or checkpoint.stem,
    )
    return encoder, extras, report


def _open_tokenizer(
    checkpoint: Path, path: Path | None, shape: Architecture
) -> ReleasedTokenizer | None:
    beside = checkpoint.with_name(TOKENIZER)
    if path is None and not beside.is_file():
        logger.warning(
            "%s: no tokenizer given and no %s beside it; texts cannot be encoded",
            checkpoint.name,
            TOKENIZER,
        )
        return None
    path = path or beside
    if not path.is_file():
        raise CheckpointError(f"{path}: no such tokenizer; give the sp.model of the release")
    try:
        text = ReleasedTokenizer(path.read_bytes(), max_length=shape.max_text_length)
    except DataError as error:
        reason = str(error).split(" (INTERNAL")[0].removesuffix("; train one first")
        raise CheckpointError(f"{path}: {reason}; give the sp.model of the release") from None
    if text.vocab_size > shape.vocab_size:
        raise CheckpointError(
            f"{path}: has {text.vocab_size:,} pieces, the model {shape.vocab_size:,} rows for "
            f"them; give the sp.model that belongs to {checkpoint.name}"
        )
    return text


def convert_released(
    checkpoint: Path,
    out: Path,
    *,
    config: Path | None = None,
    tokenizer: Path | None = None,
    text_normalization: TextNormalization = "none",
) -> Report:
    """Write a released checkpoint as a model folder, complete or not at all.

    The file's precision is kept; golden vectors are computed in float32, for which the model must
    fit in memory. Raises CheckpointError, ConfigError or DataError in one line.
    """
    check_only_ours(out)
    encoder, extras, report = open_released(checkpoint, config=config, tokenizer=tokenizer)
    sp_model = None
    if encoder.tokenizer is not None:
        encoder.text_normalization = text_normalization
        sp_model = (tokenizer or checkpoint.with_name(TOKENIZER)).read_bytes()
    with complete_folder(out, marker="config.json") as folder:
        save_model_folder(encoder, folder, sp_model=sp_model, golden=False)
        contiguous = {name: tensor.contiguous() for name, tensor in extras.items()}
        save_file(contiguous, folder / EXTRAS, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / EXTRAS)
        del extras, contiguous
        encoder.model.float()
        write_golden(encoder, folder)
    return report


def export_released(folder: Path, out: Path) -> list[str]:
    """Write a model folder as one released checkpoint (`state_dict`); returns lines to print.

    Bit for bit what was converted; a model of another origin lacks what inference never uses.
    Raises CheckpointError if the layout has no place for the model.
    """
    if out.exists():
        raise CheckpointError(f"{out}: is there already, and would be lost; choose another name")
    shape = _shape_of(folder)
    extras = load_file(folder / EXTRAS) if (folder / EXTRAS).is_file() else {}
    try:
        released = to_released(read_tensors(folder), extras, shape)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": released}, temporary)
        os.replace(temporary, out)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{out}: cannot be written ({error}); choose another place") from None
    finally:
        temporary.unlink(missing_ok=True)
    lines = [f"{out}: {len(released)} tensors in the released layout"]
    if not extras:
        lines.append(
            f"no {EXTRAS} in {folder}: what inference never uses is left out, or zero (the first "
            f"two rows of position tables); folders that `m2enc convert` wrote have it"
        )
    return lines


def _shape_of(folder: Path) -> Architecture:
    try:
        settings: Mapping[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        kind = settings["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None
    if kind != "m2_encoder":
        raise CheckpointError(
            f"{folder}: not a model folder of ours, expected one with config.json"
        )
    if settings.get("image_tower") or settings.get("text_tower"):
        raise CheckpointError(
            f"{folder}: has a tower of another library, which the released layout cannot hold"
        )
    known = Architecture.__dataclass_fields__
    return Architecture(**{name: settings[name] for name in known if name in settings})
