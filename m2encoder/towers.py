"""Build an encoder to be trained whose towers start from a timm or a transformers text model.

The result is an M2Encoder like any other: it trains, saves and opens offline. Not for using whole
models of other families (foreign.py).
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from m2encoder.compat import import_timm
from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, ConfigError
from m2encoder.model.architecture import Architecture
from m2encoder.model.configuration_m2encoder import M2EncoderConfig
from m2encoder.model.image_processing_m2encoder import M2EncoderImageProcessor, ResizeMode
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.model.towers import create_timm_model, text_config, without_pooler
from m2encoder.quiet import first_line, quiet_transformers
from m2encoder.transformers_files import read_model, read_tokenizer, text_positions

Pooling = Literal["cls", "mean", "last"]
LONGEST_TEXT = 512
"""Tokens per text where neither a text model nor its tokenizer says."""
SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
NOT_IN_FOLDERS = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype")


class _Part(NamedTuple):
    """One tower from elsewhere."""

    weights: Mapping[str, Tensor]
    shape: dict[str, Any]  # fields of Architecture that it decides
    config: dict[str, Any]  # other fields of M2EncoderConfig


def build_encoder(
    *,
    image: str | Architecture,
    text: str | os.PathLike[str] | Architecture,
    projection_dim: int = 512,
    tokenizer: PreTrainedTokenizerFast | None = None,
    text_pooling: Pooling = "cls",
    image_options: Mapping[str, Any] | None = None,
    pretrained: bool = True,
    resize_mode: ResizeMode = "squash",
    device: str | torch.device = "cpu",
) -> Encoder:
    """Return an encoder with another library's image tower, text tower or both, to be trained.

    image: `timm:NAME`, or the shape of our own tower. text: `hf:REPO` or the folder of a
    transformers text model with its fast tokenizer, or the shape of our own tower, which needs
    `tokenizer`. projection_dim: width of the vectors; both projections start at random.
    text_pooling: what stands for a text: its first token, the mean of all, or its last one.
    image_options: arguments of timm.create_model, such as img_size. pretrained: timm's weights,
    which timm downloads, instead of random ones. Pictures are scaled as resize_mode says, not by
    timm's own transform; mean and standard deviation are timm's.
    Raises ConfigError on sizes and options that do not fit, CheckpointError if a model or its
    tokenizer cannot be read, MissingExtraError without timm.
    """
    own = next((given for given in (image, text) if isinstance(given, Architecture)), None)
    if isinstance(image, Architecture) and isinstance(text, Architecture):
        raise ConfigError("both towers are our own, expected one of another library at least")
    parts: dict[str, _Part] = {}
    if isinstance(text, Architecture):
        if tokenizer is None:
            raise ConfigError("our own text tower needs its tokenizer; give tokenizer=...")
        parts["own text"] = _Part({}, {"vocab_size": len(tokenizer)}, {})
    else:
        parts["text"], tokenizer = _text_part(str(text), text_pooling)
    if isinstance(image, str):
        parts["image"] = _image_part(image, dict(image_options or {}), pretrained)
    values = {key: value for part in parts.values() for key, value in part.config.items()}
    fields = {key: value for part in parts.values() for key, value in part.shape.items()}
    try:
        shape = replace(
            own or Architecture(shared_layers=0), projection_dim=projection_dim, **fields
        )
        model = M2Encoder(
            M2EncoderConfig(
                **asdict(shape),
                **values,
                pad_token_id=cast(int, tokenizer.pad_token_id),
                eos_token_id=_end_token(tokenizer),
                truncation_side=cast(Any, tokenizer.truncation_side),
            )
        )
    except ValueError as error:
        raise ConfigError(first_line(error)) from None
    for name in parts.keys() & {"image", "text"}:
        cast(Any, getattr(model, name)).model.load_state_dict(parts[name].weights)
    processor = M2EncoderImageProcessor(shape.image_size, resize_mode)
    model.to(device)  # pyright: ignore[reportArgumentType]
    return Encoder(model, processor, tokenizer)


def _image_part(image: str, options: dict[str, Any], pretrained: bool) -> _Part:
    name = image.removeprefix("timm:")
    if name == image:
        raise ConfigError(f"image tower {image!r} is unknown, expected timm:NAME or a shape")
    timm = import_timm()
    try:
        with quiet_transformers():
            model = create_timm_model(name, options, pretrained=pretrained)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{image}: timm cannot load its weights ({first_line(error)}); connect to the network, "
            f"or start from random ones with pretrained=False"
        ) from None
    except ValueError as error:
        raise ConfigError(first_line(error)) from None
    data = timm.data.resolve_model_data_config(model)
    size = options.get("img_size", data["input_size"][1])
    if size != options.get("img_size", data["input_size"][2]) or not isinstance(size, int):
        raise ConfigError(f"{image} takes pictures of {data['input_size']}, expected square ones")
    # The sizes of our own tower do not count; these fit any picture size.
    shape = {"image_size": size, "patch_size": 1, "patch_stem": "linear"}
    config = {
        "image_mean": list(data["mean"]),
        "image_std": list(data["std"]),
        "image_tower": {"library": "timm", "name": name, "options": options},
    }
    return _Part(model.state_dict(), shape, config)


def _text_part(where: str, pooling: str) -> tuple[_Part, PreTrainedTokenizerFast]:
    path = where.removeprefix("hf:")
    if path == where and not Path(path).is_dir():
        raise CheckpointError(f"{where}: no such folder; a model of the hub is written hf:REPO")
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(path)
            text_config(config.to_diff_dict())
            model = read_model(path, dtype=torch.float32, **without_pooler(config))
            tokenizer = _plain(read_tokenizer(path))
    except Exception as error:  # a damaged file may raise anything
        raise CheckpointError(
            f"{where}: no transformers text model with its tokenizer ({first_line(error)})"
        ) from None
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer has {len(tokenizer):,} pieces, the model {config.vocab_size:,}"
        )
    positions = text_positions(model) or LONGEST_TEXT
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    values = {k: v for k, v in config.to_diff_dict().items() if k not in NOT_IN_FOLDERS}
    shape = {
        "vocab_size": config.vocab_size,
        "text_positions": positions,
        "max_text_length": tokenizer.model_max_length,
    }
    tower = {"library": "transformers", "config": values, "pooling": pooling}
    return _Part(model.state_dict(), shape, {"text_tower": tower}), tokenizer


def _plain(tokenizer: Any) -> PreTrainedTokenizerFast:
    """Return the same tokenizer as the class that every model folder names, padding right."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"its tokenizer is a slow {type(tokenizer).__name__}, expected one with tokenizer.json"
        )
    given = {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        **{name: token for name, token in given.items() if token is not None},
        model_max_length=tokenizer.model_max_length,
        truncation_side=tokenizer.truncation_side,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )
    if plain.pad_token is None:
        if plain.eos_token is None:
            raise ValueError("its tokenizer has neither a padding nor an end token")
        plain.pad_token = plain.eos_token
    return plain


def _end_token(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return the special token that ends every text, if there is one."""
    last = tokenizer("a")["input_ids"][-1]  # pyright: ignore[reportIndexIssue]
    return last if last in tokenizer.all_special_ids else None
