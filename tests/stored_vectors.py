"""What tests of stored vectors share: a key, the files of a store, whether results are equal."""

import numpy as np

from m2encoder.vector_store import VectorKey

KEY = VectorKey("pictures", "model", "[]", "float32", "content", count=10, dim=4)


def parts(store):
    return sorted(store.folder.glob("*/*.part"))


def same(a, b):
    np.testing.assert_array_equal(a.vectors, b.vectors)
    assert a.names == b.names
    assert a.kept.tolist() == b.kept.tolist()
    assert a.skipped == b.skipped
