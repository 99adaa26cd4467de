"""Pictures, vectors and models that the tests of the index share."""

import copy
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m2encoder.encoder import Encoder
from m2encoder.index import VectorMaker
from m2encoder.shards import ShardReader

MAKER = VectorMaker("made", "f" * 64, 24)


def write_photos(folder: Path, shards: Path, count: int = 12) -> Path:
    """Write pictures, every third in a folder below, and one file that is no picture."""
    (folder / "旅行").mkdir(parents=True)
    reader = ShardReader(shards)
    for i in range(count):
        below = folder / "旅行" if i % 3 == 0 else folder
        (below / f"图 {i:02d}.png").write_bytes(reader[i].image)
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def changed_encoder(encoder: Encoder) -> Encoder:
    """Return the same model with one weight changed."""
    model = copy.deepcopy(encoder.model)
    model.logit_scale.data += 1
    return Encoder(model, encoder.image_processor, encoder.tokenizer, name="other")


def clustered(
    count: int, *, dim: int = 24, centres: int = 20, seed: int = 0
) -> NDArray[np.float32]:
    """Return unit vectors around random centres, which do not depend on `seed`."""
    middle = np.random.default_rng(99).normal(size=(centres, dim))
    rng = np.random.default_rng(seed)
    found = middle[rng.integers(0, centres, count)] + 0.4 * rng.normal(size=(count, dim))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
