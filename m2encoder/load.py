"""Open a model folder as an Encoder, and write one.

Not for what an Encoder does (encoder.py), nor for training checkpoints (checkpoint.py).
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError
from m2encoder.model.configuration_m2encoder import Towers
from m2encoder.model.image_processing_m2encoder import M2EncoderImageProcessor
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.model.processing_m2encoder import M2EncoderProcessor
from m2encoder.presets import list_presets
from m2encoder.tokenizer import write_tokenizer_class


def load_model(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    towers: Towers = "both",
    image_size: int | None = None,
) -> Encoder:
    """Open a model folder (as `m2enc pretrain` exports it) for embedding.

    device: `auto` takes a GPU if there is one. towers: `image` or `text` loads that tower alone.
    image_size: pixels; another size than the model's resizes its position table.
    Raises CheckpointError if the folder is missing, damaged or holds another kind of model.
    """
    folder = Path(path)
    _check_folder(folder, str(path))
    model = _load_weights(folder, dtype, towers)
    try:
        processor = M2EncoderImageProcessor.from_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: cannot read its preprocessing ({error})") from None
    assert isinstance(processor, M2EncoderImageProcessor)
    if image_size is not None:
        model.set_image_size(image_size)
        processor.size_px = image_size
    chosen = torch.device(_best_device() if device == "auto" else device)
    model.requires_grad_(False).to(chosen)  # pyright: ignore[reportArgumentType]
    return Encoder(model, processor, tokenizer, name=folder.resolve().name, folder=folder)


def _check_folder(folder: Path, asked: str) -> None:
    if not folder.exists() and asked in list_presets():
        raise CheckpointError(
            f"{asked} is a preset without weights here; give the path of a model folder, or "
            f"train one with: m2enc pretrain"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{asked}: no such model folder; check the path")
    for name in ("config.json", "model.safetensors", "processor_config.json", "tokenizer.json"):
        sharded = name == "model.safetensors" and (folder / (name + ".index.json")).is_file()
        if not (folder / name).is_file() and not sharded:
            raise CheckpointError(
                f"{folder}: no {name}, expected a model folder as `m2enc pretrain` exports it"
            )
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder}/config.json: damaged ({error})") from None
    if kind != "m2_encoder":
        raise CheckpointError(f"{folder}: model_type is {kind!r}, expected 'm2_encoder'")


def _load_weights(folder: Path, dtype: str, towers: Towers) -> M2Encoder:
    try:
        with _no_bars():
            model, info = cast(Any, M2Encoder.from_pretrained)(
                folder, dtype=getattr(torch, dtype), towers=towers, output_loading_info=True
            )
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: cannot load its weights ({reason})") from None
    except Exception as error:  # safetensors' own error type has no public name
        if type(error).__name__ != "SafetensorError":
            raise
        raise CheckpointError(f"{folder}/model.safetensors: damaged file ({error})") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[kind])):
            raise CheckpointError(
                f"{folder}: {kind.replace('_', ' ')} in its weights: {', '.join(keys[:3])}"
                f"{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
            )
    return model


@contextmanager
def _no_bars() -> Iterator[None]:
    """Silence transformers' own progress bars; a local folder opens at once."""
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def save_model_folder(encoder: Encoder, folder: Path, *, sp_model: bytes | None = None) -> None:
    """Write all that `load_model` and transformers need; sp_model serves further training."""
    folder.mkdir(parents=True, exist_ok=True)
    with _no_bars():
        encoder.model.save_pretrained(folder)
    M2EncoderProcessor(encoder.image_processor, encoder.tokenizer).save_pretrained(folder)
    write_tokenizer_class(folder)
    if sp_model is not None:
        (folder / "sp.model").write_bytes(sp_model)
