"""What an Encoder needs of its parts, so that models of other families can stand in for ours.

Not for training, which needs an M2Encoder.
"""

from typing import Any, Protocol

import numpy as np
from torch import Tensor


class DualModel(Protocol):
    """What an Encoder needs of a model, a torch module: M2Encoder has it, so has foreign.py's.

    A model trained with a sigmoid also has `logit_bias`, what is added to the scaled cosine.
    """

    logit_scale: Any
    """Scalar tensor: the logarithm of what cosines are multiplied with."""

    @property
    def dim(self) -> int:
        """Width P of the vectors."""
        ...

    @property
    def vector_settings(self) -> list[Any]:
        """What decides the vectors beside weights, tokenizer and picture size; plain values."""
        ...

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values: (B, 3, S, S) in 0..1. Returns (B, P) float32, unit norm."""
        ...

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask: (M, L) int64. Returns (M, P) float32, unit norm."""
        ...


class PixelMaker(Protocol):
    """What an Encoder needs of an image processor."""

    size_px: int
    resize_mode: Any

    def to_pixels(self, image: Any) -> np.ndarray[Any, Any]:
        """Return one RGB Pillow image as (3, S, S) float32 in 0..1."""
        ...


class TextEncoding(Protocol):
    """What an Encoder needs of a tokenizer that is none of transformers' fast ones."""

    truncation_side: str
    model_max_length: int

    def __call__(self, texts: list[str], **options: Any) -> Any:
        """Return {"input_ids", "attention_mask"}: (M, L) int64 tensors, truncated and padded."""
        ...

    def definition(self) -> bytes:
        """Return what decides the ids, for fingerprints."""
        ...
