"""Folders of tiny, randomly initialised dual encoders as transformers' hub repositories are."""

import json
from pathlib import Path
from typing import Any

import tiny_models
from tiny_models import wordpiece
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    MetaClip2Config,
    MetaClip2Model,
    SiglipConfig,
    SiglipModel,
)

VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 90, "max_position_embeddings": 24,
}  # fmt: skip
CROP: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32}, "do_resize": True, "do_center_crop": True,
    "do_rescale": True, "do_normalize": True, "resample": 3, "do_convert_rgb": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.27, 0.26, 0.28],
}  # fmt: skip


def write(folder: Path, model: Any, pictures: dict[str, Any], *, pad_id: int = 0) -> Path:
    """Write a folder as the hub has them: weights, tokenizer and picture settings."""
    tiny_models.save(folder, model, wordpiece(pad_id=pad_id))
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return folder


def clip(folder: Path) -> Path:
    text = {**TEXT, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return write(folder, CLIPModel(config), CROP, pad_id=2)


def chinese_clip(folder: Path) -> Path:
    """Its processor squashes pictures; the tokenizer is one vocab.txt."""
    config = ChineseCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    squash = {"image_processor_type": "ChineseCLIPImageProcessor", "do_center_crop": False}
    size = {"size": {"height": 32, "width": 32}}
    write(folder, ChineseCLIPModel(config), {**CROP, **squash, **size})
    pieces = sorted(wordpiece().get_vocab().items(), key=lambda item: item[1])
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "vocab.txt").write_text("\n".join(piece for piece, _ in pieces), encoding="utf-8")
    return folder


SQUASH: dict[str, Any] = {
    "image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32},
    "do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip


def siglip(folder: Path) -> Path:
    config = SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=VISION)
    return write(folder, SiglipModel(config), SQUASH)


def altclip(folder: Path) -> Path:
    """Its text tower is of RoBERTa's kind: of 24 positions, 22 hold tokens."""
    text = {**TEXT, "pad_token_id": 1, "project_dim": 32}
    config = AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return write(folder, AltCLIPModel(config), CROP, pad_id=1)


def metaclip_2(folder: Path) -> Path:
    text = {**TEXT, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2}
    config = MetaClip2Config(text_config=text, vision_config=VISION, projection_dim=16)
    return write(folder, MetaClip2Model(config), CROP, pad_id=2)
