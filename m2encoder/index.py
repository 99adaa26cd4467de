"""Search pictures by vector: an index of a picture folder, shards or embeddings, kept up to date.

Not for encoding queries (index_query.py), nor for deciding when to build one (cli/search.py). How
it is stored: index_files.py. How it is searched: index_reader.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2encoder import index_update
from m2encoder.encoder import Encoder, OnError
from m2encoder.index_files import is_index
from m2encoder.index_meta import IndexMeta, IndexSettings, Maker, VectorMaker
from m2encoder.index_reader import Hit, ImageIndex, is_finished, read_meta
from m2encoder.index_sources import VectorSource, source_stamp
from m2encoder.index_update import Changes, Work

__all__ = [
    "Changes",
    "Hit",
    "ImageIndex",
    "IndexMeta",
    "IndexSettings",
    "VectorMaker",
    "add_pictures",
    "build_index",
    "index_vectors",
    "is_finished",
    "is_index",
    "read_meta",
    "remove_pictures",
    "source_stamp",
    "update_index",
]


def build_index(
    encoder: Encoder,
    source: Path,
    out_dir: Path,
    *,
    settings: IndexSettings | None = None,
    batch_size: int = 64,
    on_error: OnError = "skip",
    show_progress: bool | None = None,
) -> ImageIndex:
    """Index a folder of pictures (turned upright), shards, or what `m2enc embed` wrote of them.

    An index that lies at `out_dir` already stays in use until the new one is complete. After a kill
    the same call goes on where it stopped. Unreadable pictures are left out and listed in
    `.skipped`; on_error="raise" stops at the first.
    Raises DataError if there is no readable picture, if the embeddings are another model's, or if
    `out_dir` holds something else.
    """
    work = Work(batch_size, on_error, show_progress)
    index_update.build(encoder, source, out_dir, settings or IndexSettings(), work)
    return ImageIndex.open(out_dir, encoder=encoder)


def index_vectors(
    maker: Maker,
    vectors: NDArray[np.float32],
    names: Sequence[str],
    out_dir: Path,
    *,
    metas: Sequence[dict[str, Any]] | None = None,
    settings: IndexSettings | None = None,
) -> ImageIndex:
    """Index unit vectors (N, D) float32 of your own under unique names.

    maker: who made them: an Encoder or a VectorMaker. metas: JSON values, for conditions.
    """
    source = VectorSource(vectors, names, metas=metas, path=out_dir)
    index_update.build_vectors(maker, source, out_dir, settings or IndexSettings())
    return ImageIndex.open(out_dir, encoder=maker)


def update_index(
    encoder: Encoder,
    folder: Path,
    *,
    batch_size: int = 64,
    on_error: OnError = "skip",
    show_progress: bool | None = None,
) -> Changes:
    """Embed what is new or changed in an index's source, and drop what is gone.

    Pictures that were moved or copied are recognised by their bytes. Killed at any moment, the
    index is as before or as after; the next call goes on with what was embedded.
    Raises DataError on another model's index, one that can only be read, or a source that is gone.
    """
    return index_update.update(encoder, folder, Work(batch_size, on_error, show_progress))


def add_pictures(
    encoder: Encoder, folder: Path, paths: Sequence[Path], *, on_error: OnError = "skip"
) -> Changes:
    """Embed pictures of the indexed folder, or all in a folder below it; also removed ones again.

    Raises DataError on a path outside, or if the index is not one of a picture folder.
    """
    return index_update.add(encoder, folder, paths, Work(on_error=on_error))


def remove_pictures(folder: Path, patterns: Sequence[str]) -> Changes:
    """Take pictures out by name or glob pattern; updates leave them out until they are added.

    Raises DataError on a pattern that matches nothing, or an index that can only be read.
    """
    return index_update.remove(folder, patterns)
