"""Training augmentation with Pillow: pictures to uint8 arrays of the model's size.

Not for evaluation (model/image_processing_m2encoder.py). Every draw comes from the generator given.
"""

import math
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from m2encoder.config import Augment


def augment(
    picture: Image.Image, size_px: int, settings: Augment, rng: np.random.Generator
) -> np.ndarray[Any, Any]:
    """Return (3, size_px, size_px) uint8: a random resized crop, turned, mirrored, recoloured."""
    if settings.rotate_degrees:
        picture = _rotate(picture, rng.uniform(-1, 1) * settings.rotate_degrees)
    box = random_crop_box(picture.width, picture.height, settings, rng)
    picture = picture.resize((size_px, size_px), Image.Resampling.BICUBIC, box=box)
    if settings.flip and rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if settings.color_jitter:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            factor = 1 + rng.uniform(-1, 1) * settings.color_jitter
            picture = enhance(picture).enhance(factor)
    return np.asarray(picture, dtype=np.uint8).transpose(2, 0, 1)


def random_crop_box(
    width: int, height: int, settings: Augment, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) in pixels: a crop of random area, stretch and place."""
    scale = rng.uniform(settings.crop_scale_min, 1)
    stretch = math.exp(rng.uniform(-1, 1) * math.log(settings.crop_ratio_max))
    crop_width = min(width, width * math.sqrt(scale * stretch))
    crop_height = min(height, height * math.sqrt(scale / stretch))
    left = rng.uniform(0, width - crop_width)
    top = rng.uniform(0, height - crop_height)
    # Sums of floats may pass the edge by one ulp, which Pillow refuses.
    return left, top, min(width, left + crop_width), min(height, top + crop_height)


def _rotate(picture: Image.Image, degrees: float) -> Image.Image:
    pixels = np.asarray(picture)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = (int(value) for value in edge.mean(axis=0))
    return picture.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=(red, green, blue))
