"""What the released models' authors published for one picture: the only anchor for real weights.

Not for golden vectors (golden.py), which say whether a folder still gives what it gave.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from m2encoder.encoder import Encoder
from m2encoder.images import ImageSource
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.presets import preset

LABELS = ("杰尼龟", "妙蛙种子", "小火龙", "皮卡丘")
PUBLISHED = {
    "m2-encoder-0.4b": (3.375e-7, 7.24e-8, 2.478e-7, 0.99999928),
    "m2-encoder-1b": (1.555e-6, 4.33e-7, 7.56e-7, 0.99999726),
    "m2-encoder-10b": (6.24e-5, 2.75e-5, 6.30e-5, 0.99984705),
}
"""Softmax over scale x cosine of `pics/pokemon.jpeg` and the bare labels, as the authors' README
prints it (alipay/Ant-Multi-Modal-Framework, prj/M2_Encoder). Their precision is not stated."""
LARGE, LARGE_TOLERANCE, SMALL_FACTOR = 0.01, 1e-4, 2.0
"""A probability over LARGE must agree within LARGE_TOLERANCE, a smaller one within this factor:
half precision moves a logit by a few hundredths, another picture or model by whole units."""


@dataclass(frozen=True)
class AnchorReport:
    """How far a released model is from its published probabilities."""

    model: str
    found: dict[str, float]
    """By label."""
    published: dict[str, float]
    off: list[str]
    """Labels that do not agree."""

    @property
    def ok(self) -> bool:
        """True if every label agrees."""
        return not self.off

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "ok": self.ok}


def released_name(encoder: Encoder) -> str | None:
    """Return the released model that has this shape and vocabulary, or None."""
    if not isinstance(encoder.model, M2Encoder):
        return None
    shape = asdict(encoder.model.config.architecture)
    free = {"max_text_length", "position_init_std"}  # they say nothing about the weights
    for name in PUBLISHED:
        wanted = asdict(preset(name))
        if all(shape[key] == value for key, value in wanted.items() if key not in free):
            return name
    return None


def check_anchor(encoder: Encoder, image: ImageSource, name: str) -> AnchorReport:
    """Classify the authors' picture and compare with what they published for model `name`."""
    vectors = encoder.encode_text(list(LABELS), show_progress=False)
    cosines = encoder.similarity(encoder.encode_image(image), vectors)[0].astype(np.float64)
    odds = np.exp(encoder.logit_scale * (cosines - cosines.max()))
    return compare(name, (odds / odds.sum()).tolist())


def compare(name: str, found: Sequence[float]) -> AnchorReport:
    """Compare probabilities, in the order of LABELS, with the published ones of model `name`."""
    published = PUBLISHED[name]
    off = [
        label
        for label, have, want in zip(LABELS, found, published, strict=True)
        if not _agrees(have, want)
    ]
    return AnchorReport(
        name,
        dict(zip(LABELS, found, strict=True)),
        dict(zip(LABELS, published, strict=True)),
        off,
    )


def _agrees(found: float, published: float) -> bool:
    if published > LARGE:
        return abs(found - published) <= LARGE_TOLERANCE
    return found > 0 and abs(math.log(found / published)) <= math.log(SMALL_FACTOR)
