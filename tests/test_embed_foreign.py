"""Models of other families in several threads give what they give one by one.

Not for these models themselves (test_foreign.py), nor for open_clip's (peers/).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_duals import altclip, chinese_clip, clip, metaclip_2, siglip
from tiny_pictures import listed

from m2encoder.embed import embed_pictures, embed_texts
from m2encoder.encoder import Encoder
from m2encoder.foreign import open_foreign

CLOSE = {"rtol": 0, "atol": 2e-6}  # other batches are summed in another order
TEXTS = [
    "一只猫",
    "貓在屋頂上",
    "ＡＢＣ，全角！",
    "dog 🐕",
    "a cat",
    "a dog " * 200,
    "猫" * 30_000,
] * 5
FAMILIES: dict[str, Callable[[Path], Path]] = {
    function.__name__: function for function in (clip, chinese_clip, siglip, altclip, metaclip_2)
}


@pytest.fixture(scope="module", params=FAMILIES)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = FAMILIES[request.param](tmp_path_factory.mktemp("foreign") / request.param)
    return open_foreign(folder, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _four_threads():
    own = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(own)


def test_pictures_equal_those_encoded_one_by_one(encoder):
    pictures = listed(30)
    found = embed_pictures(encoder, pictures, batch_size=2)
    direct = np.concatenate([encoder.encode_image(content) for content in pictures.contents])
    np.testing.assert_allclose(found.vectors, direct, **CLOSE)


def test_texts_equal_those_encoded_one_by_one(encoder):
    """Cut and padded as each family wants it; the two long ones are counted."""
    found = embed_texts(encoder, TEXTS, batch_size=2)
    direct = np.concatenate([encoder.encode_text(text) for text in TEXTS])
    np.testing.assert_allclose(found.vectors, direct, **CLOSE)
    assert found.truncated == 2 * 5
