"""The shape of a released checkpoint: from its configuration file, or from its tensors alone.

Source: the configuration keys of alipay/Ant-Multi-Modal-Framework, prj/M2_Encoder. Not for the
tensors' names (released.py).
"""

import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from m2encoder.errors import CheckpointError, ConfigError
from m2encoder.model.architecture import Architecture
from m2encoder.presets import list_presets, preset
from m2encoder.released import UNUSED_POSITIONS

VERSIONS = {"base": "m2-encoder-0.4b", "large": "m2-encoder-1b", "huge": "m2-encoder-10b"}
"""`beit_version` of a released configuration -> the preset whose sizes its other keys override."""
KEYS = {
    "encoder_embed_dim": "width",
    "out_embed_dim": "projection_dim",
    "encoder_attention_heads": "num_heads",
    "beit3_vl_layers": "shared_layers",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "vocab_size": "vocab_size",
    "max_text_len": "max_text_length",
}


def preset_of(shape: Architecture) -> str | None:
    """Return the name of the preset with this shape; picture size and text length aside."""
    for name in list_presets():
        known = preset(name)
        same = replace(known, image_size=shape.image_size, max_text_length=shape.max_text_length)
        if same == shape:
            return name
    return None


def shape_from_config(path: Path, *, text_positions: int) -> Architecture:
    """Return the shape that a released-style JSON configuration describes.

    text_positions: from the checkpoint, as the configuration does not say. Raises ConfigError.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); give the released configuration") from None
    version = settings.get("beit_version") if isinstance(settings, dict) else None
    if version not in VERSIONS:
        raise ConfigError(
            f"{path}: beit_version is {version!r}, expected one of {', '.join(VERSIONS)}, as in a "
            f"configuration that came with the released weights"
        )
    for key in settings:
        if (meant := _meant(key)) not in (None, key):
            raise ConfigError(f"{path}: unknown key {key!r}; did you mean {meant!r}?")
    changes = {ours: settings[theirs] for theirs, ours in KEYS.items() if theirs in settings}
    if "encoder_layers" in settings:
        changes |= dict.fromkeys(("image_layers", "text_layers"), settings["encoder_layers"])
    for name, value in changes.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{path}: {name} is {value!r}, expected a whole number")
    try:
        return replace(preset(VERSIONS[version]), text_positions=text_positions, **changes)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def shape_from_tensors(weights: Mapping[str, Tensor], *, where: str) -> Architecture:
    """Infer the shape; the number of heads, which no tensor shows, is the preset's.

    Raises CheckpointError if it is no preset's: then only a configuration can tell.
    """
    pictures = _size(weights, "backbone.encoder.embed_positions.A.weight", where)[0]
    grid = math.isqrt(max(0, pictures - UNUSED_POSITIONS - 1))
    vocab_size, width = _size(weights, "backbone.text_embed.weight", where)
    patch_size = _size(weights, "backbone.vision_embed.proj.weight", where)[-1]
    layers = _count_layers(weights, "backbone.encoder")
    sizes: dict[str, Any] = {
        "width": width,
        "image_layers": layers,
        "text_layers": layers,
        "shared_layers": _count_layers(weights, "backbone_vl"),
        "projection_dim": _size(weights, "itc_vl_image_proj.fc.weight", where)[0],
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "vocab_size": vocab_size,
        "text_positions": text_positions_of(weights, where=where),
    }
    for name in VERSIONS.values():
        candidate = replace(preset(name), image_size=sizes["image_size"] or patch_size)
        if all(getattr(candidate, key) == value for key, value in sizes.items()):
            return candidate
    raise CheckpointError(
        f"{where}: its tensors (width {width}, {layers} + {sizes['shared_layers']} layers, "
        f"{vocab_size:,} pieces) are no released size, and they do not show the number of heads; "
        f"give the configuration that belongs to it (config=, or m2enc convert --config)"
    )


def _meant(key: str) -> str | None:
    """Return the key that `key` must be a typing error of; released files have many other keys."""
    return next(iter(difflib.get_close_matches(key, [*KEYS, "encoder_layers"], 1, 0.88)), None)


def text_positions_of(weights: Mapping[str, Tensor], *, where: str) -> int:
    """Return how many text positions the checkpoint has."""
    rows = _size(weights, "backbone.encoder.embed_positions.B.weight", where)[0]
    return rows - UNUSED_POSITIONS


def _size(weights: Mapping[str, Tensor], name: str, where: str) -> tuple[int, ...]:
    if name not in weights or weights[name].ndim < 2:
        raise CheckpointError(
            f"{where}: lacks {name}, which the model needs; is this file complete?"
        )
    return tuple(weights[name].shape)


def _count_layers(weights: Mapping[str, Tensor], encoder: str) -> int:
    pattern = re.compile(rf"{re.escape(encoder)}\.layers\.(\d+)\.")
    return len({found[1] for name in weights if (found := pattern.match(name))})
