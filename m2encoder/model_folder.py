"""A model folder: open one as an Encoder, write one.

Not for names, released checkpoints and other families (load.py), nor for training checkpoints
(checkpoint.py).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError
from m2encoder.model.configuration_m2encoder import Towers
from m2encoder.model.image_processing_m2encoder import M2EncoderImageProcessor
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.model.processing_m2encoder import M2EncoderProcessor
from m2encoder.tokenizer import write_tokenizer_class

FILES = (
    "config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""What a model folder holds at least; the weights may also come in several files."""


def open_folder(folder: Path, *, device: torch.device, dtype: str, towers: Towers) -> Encoder:
    """Open a model folder. Raises CheckpointError if it is damaged or holds another model."""
    _check_folder(folder)
    model = _load_weights(folder, dtype, towers)
    processor, tokenizer = _load_preprocessing(folder)
    if processor.size_px != (size := model.config.image_size):
        raise CheckpointError(
            f"{folder}: processor_config.json makes pictures of {processor.size_px} pixels, "
            f"config.json expects {size}; were they saved together?"
        )
    model.requires_grad_(False).to(device)  # pyright: ignore[reportArgumentType]
    return Encoder(model, processor, tokenizer, name=folder.resolve().name, folder=folder)


def _check_folder(folder: Path) -> None:
    for name in FILES:
        sharded = name == "model.safetensors" and (folder / (name + ".index.json")).is_file()
        if not (folder / name).is_file() and not sharded:
            raise CheckpointError(
                f"{folder}: no {name}, expected a model folder as `m2enc pretrain` exports it"
            )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder}/config.json: damaged ({error})") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "m2_encoder":
        raise CheckpointError(f"{folder}: model_type is {kind!r}, expected 'm2_encoder'")


def _load_weights(folder: Path, dtype: str, towers: Towers) -> M2Encoder:
    try:
        with _quiet():
            model, info = cast(Any, M2Encoder.from_pretrained)(
                folder,
                dtype=getattr(torch, dtype),
                towers=towers,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # named below, with both shapes
            )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: cannot load its weights ({_line(error)})") from None
    except Exception as error:  # safetensors' own error type has no public name
        if type(error).__name__ != "SafetensorError":
            raise
        raise CheckpointError(f"{folder}/model.safetensors: damaged file ({error})") from None
    shapes = model.state_dict()
    wrong_shapes = []
    for entry in info["mismatched_keys"]:  # names; since transformers 5 with both shapes
        name, found = (entry, "another") if isinstance(entry, str) else (entry[0], tuple(entry[1]))
        wrong_shapes.append(f"{name} has shape {found}, expected {tuple(shapes[name].shape)}")
    for what, items in (
        ("lacks", info["missing_keys"]),
        ("has unexpected", info["unexpected_keys"]),
        ("does not fit config.json:", wrong_shapes),
    ):
        if names := sorted(map(str, items)):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{folder}/model.safetensors {what} {', '.join(names[:3])}{more}; was it saved "
                f"by another model?"
            )
    return model


def _load_preprocessing(folder: Path) -> tuple[M2EncoderImageProcessor, PreTrainedTokenizerFast]:
    try:
        processor = M2EncoderImageProcessor.from_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # a damaged file may raise anything, from KeyError to Rust's own
        raise CheckpointError(f"{folder}: cannot read its preprocessing ({_line(error)})") from None
    assert isinstance(processor, M2EncoderImageProcessor)
    return processor, tokenizer


def _line(error: Exception) -> str:
    """Return the first line of what an error says, else its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and reports; load_model says itself what is wrong."""
    had_bars, verbosity = (
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.get_verbosity(),
    )
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def save_model_folder(encoder: Encoder, folder: Path, *, sp_model: bytes | None = None) -> None:
    """Write all that `load_model` and transformers need; sp_model serves further training."""
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet():
        encoder.model.save_pretrained(folder)
    M2EncoderProcessor(encoder.image_processor, encoder.tokenizer).save_pretrained(folder)
    write_tokenizer_class(folder)
    if sp_model is not None:
        (folder / "sp.model").write_bytes(sp_model)
