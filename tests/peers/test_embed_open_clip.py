"""open_clip's models in several threads give what they give one by one.

Not for these models themselves (test_foreign_open_clip.py).
"""

import numpy as np
import pytest
import torch
from test_foreign_open_clip import KINDS, write
from tiny_pictures import listed

from m2encoder.embed import embed_pictures, embed_texts
from m2encoder.foreign import open_foreign

CLOSE = {"rtol": 0, "atol": 2e-6}  # other batches are summed in another order
TEXTS = ["一只猫", "貓在屋頂上", "ＡＢＣ，全角！", "dog 🐕", "a cat", "a dog " * 200] * 5


@pytest.fixture(scope="module", params=KINDS)
def encoder(request, tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("open_clip") / request.param, request.param)
    return open_foreign(folder, device=torch.device("cpu"))


def test_threads_change_nothing(encoder):
    pictures = listed(30)
    own = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = embed_pictures(encoder, pictures, batch_size=2).vectors
        texts = embed_texts(encoder, TEXTS, batch_size=2)
    finally:
        torch.set_num_threads(own)
    direct = np.concatenate([encoder.encode_image(content) for content in pictures.contents])
    np.testing.assert_allclose(found, direct, **CLOSE)
    direct = np.concatenate([encoder.encode_text(text) for text in TEXTS])
    np.testing.assert_allclose(texts.vectors, direct, **CLOSE)
    assert texts.truncated >= 5  # texts that fill all tokens count too
