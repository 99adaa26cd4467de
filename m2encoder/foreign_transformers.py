"""Dual encoders of transformers behind the Encoder: CLIP, Chinese-CLIP, SigLIP and their kin.

Preprocessing is the model's own, on Pillow: torchvision's gives other pixels. Not for NaFlex models
(siglip2), whose pictures are no squares.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, PreTrainedTokenizerFast
from transformers import __version__ as transformers_version

from m2encoder.encoder import Encoder, tokenizer_definition
from m2encoder.errors import CheckpointError
from m2encoder.quiet import first_line, quiet_transformers
from m2encoder.tokenizer import write_tokenizer_class
from m2encoder.transformers_files import read_model, read_tokenizer, text_positions

FAMILIES = ("clip", "chinese_clip", "siglip", "altclip", "metaclip_2")
"""model_type of what can be opened."""
PILLOW = {"use_fast": False} if transformers_version.startswith("4.") else {"backend": "pil"}
PICTURE_SETTINGS = ("size", "crop_size", "resample", "rescale_factor")
TOWER_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size")
"""Of a tower's configuration, what no shape of a weight shows."""


class TransformersModel(nn.Module):
    """One of transformers' dual encoders; normalises pixels with its processor's statistics."""

    def __init__(self, inner: Any, kind: str, processor: Any) -> None:
        super().__init__()
        self.inner = inner
        self.kind = kind
        shift = bool(processor.do_normalize)
        self.mean = list(processor.image_mean) if shift else [0.0] * 3
        self.std = list(processor.image_std) if shift else [1.0] * 3

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of what cosines are multiplied with."""
        return self.inner.logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        """What is added to the scaled cosine in front of a sigmoid; SigLIP alone has it."""
        return getattr(self.inner, "logit_bias", None)

    @property
    def dim(self) -> int:
        """Width P of the vectors."""
        config = self.inner.config
        return config.vision_config.hidden_size if self.kind == "siglip" else config.projection_dim

    @property
    def vector_settings(self) -> list[Any]:
        """What decides the vectors beside weights, tokenizer and picture size."""
        config = self.inner.config
        towers = [
            {name: getattr(tower, name, None) for name in TOWER_SETTINGS}
            for tower in (config.vision_config, config.text_config)
        ]
        return [self.kind, self.mean, self.std, *towers]

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values: (B, 3, S, S) in 0..1. Returns (B, P) float32, unit norm."""
        mean = pixel_values.new_tensor(self.mean)[:, None, None]
        std = pixel_values.new_tensor(self.std)[:, None, None]
        pixels = ((pixel_values - mean) / std).to(self.inner.dtype)
        return unit_norm(_features(self.inner.get_image_features(pixel_values=pixels)))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask: (M, L) int64. Returns (M, P) float32, unit norm."""
        if self.kind == "siglip":  # trained on padding as on any token
            return unit_norm(_features(self.inner.get_text_features(input_ids=input_ids)))
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.kind == "chinese_clip":  # some versions of get_text_features miss the CLS token
            hidden = self.inner.text_model(**given).last_hidden_state
            return unit_norm(self.inner.text_projection(hidden[:, 0]))
        return unit_norm(_features(self.inner.get_text_features(**given)))


def _features(found: Any) -> Tensor:
    """transformers 4.57 returns the features, 5 an output whose pooled state they are."""
    return found if isinstance(found, Tensor) else found.pooler_output


def unit_norm(features: Tensor) -> Tensor:
    """(N, P) -> (N, P) float32 of length 1."""
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)


class TransformersPixels:
    """A model's own image processor on Pillow, up to the division by 255."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        settings = {
            name: value
            for name, value in processor.to_dict().items()
            if value and (name.startswith("do_") or name in PICTURE_SETTINGS)
        }
        self.resize_mode = json.dumps(settings, sort_keys=True)
        self.size_px = self.to_pixels(Image.new("RGB", (64, 48))).shape[-1]

    def to_pixels(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """Return one RGB picture as (3, S, S) float32 in 0..1. EXIF is ignored, as there."""
        given = self.processor(images=image, do_normalize=False, return_tensors="np")
        return np.asarray(given["pixel_values"][0], dtype=np.float32)


class TransformersTexts:
    """A tokenizer whose calls need options: SigLIP's padding, or a slow one."""

    def __init__(self, inner: Any, *, padding: bool | str, max_length: int) -> None:
        self.inner = inner
        self.padding = padding
        self.model_max_length = max_length
        self.truncation_side: str = inner.truncation_side

    def __call__(self, texts: list[str], **_: Any) -> Any:
        """Return {"input_ids", "attention_mask"}: (M, L) int64 tensors."""
        return self.inner(
            texts,
            padding=self.padding,
            truncation=True,
            max_length=self.model_max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )

    def definition(self) -> bytes:
        """Return what decides the ids."""
        about = (self.padding, self.inner.padding_side, type(self.inner).__name__)
        return repr(about).encode() + vocabulary_of(self.inner)


def vocabulary_of(tokenizer: Any) -> bytes:
    """Return what decides the ids of one of transformers' tokenizers, fast or slow."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer_definition(tokenizer)
    with TemporaryDirectory() as folder:
        files = sorted(tokenizer.save_vocabulary(folder))
        return b"".join(Path(file).read_bytes() for file in files)


def open_transformers(
    folder: Path, kind: str, *, device: torch.device, dtype: torch.dtype
) -> Encoder:
    """Open one of FAMILIES. Raises CheckpointError if anything is missing or damaged."""
    try:
        with quiet_transformers():
            processor = AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **PILLOW
            )
            pixels = TransformersPixels(processor)
            tokenizer = read_tokenizer(str(folder))
            inner: Any = read_model(str(folder), dtype=dtype, local_files_only=True)
    except Exception as error:  # a damaged file may raise anything
        if isinstance(error, ImportError) and "protobuf" in str(error):
            raise CheckpointError(
                f"{folder}: transformers reads its tokenizer with protobuf, which is not "
                f"installed; install it with: pip install protobuf"
            ) from None
        raise CheckpointError(
            f"{folder}: cannot open this {kind} model ({first_line(error)})"
        ) from None
    if pixels.size_px != (size := inner.config.vision_config.image_size):
        raise CheckpointError(
            f"{folder}: its image processor makes pictures of {pixels.size_px} pixels, config.json "
            f"expects {size}; were they saved together?"
        )
    positions = text_positions(inner.text_model) or tokenizer.model_max_length
    limit = min(tokenizer.model_max_length, positions)
    texts: Any = tokenizer
    if kind == "siglip" or not isinstance(tokenizer, PreTrainedTokenizerFast):
        padding = "max_length" if kind == "siglip" else True
        texts = TransformersTexts(tokenizer, padding=padding, max_length=limit)
    tokenizer.model_max_length = limit
    model = TransformersModel(inner, kind, processor).requires_grad_(False).to(device)
    return Encoder(model, pixels, texts, name=folder.resolve().name, folder=folder)


def save_transformers(encoder: Encoder, folder: Path) -> None:
    """Write what transformers itself opens: weights, configuration, both preprocessors."""
    with quiet_transformers():
        encoder.model.inner.save_pretrained(folder)
        encoder.image_processor.processor.save_pretrained(folder)
        tokenizer = getattr(encoder.tokenizer, "inner", encoder.tokenizer)
        tokenizer.save_pretrained(folder)
    if type(tokenizer) is PreTrainedTokenizerFast:
        write_tokenizer_class(folder)
