"""Lists of pictures and texts to vectors: from a cache, from this process, from others beside it.

What is done to a batch is in embed_work.py. Not for single items (Encoder.encode_image), nor for
folders and files (embed.py).
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import numpy as np
import PIL
from numpy.typing import NDArray
from tqdm import tqdm

from m2encoder.distributed import World
from m2encoder.embed_work import PictureWork, Precision, TextWork
from m2encoder.encoder import BadItem, Encoder, OnError
from m2encoder.errors import DataError
from m2encoder.pictures import Pictures, content_hash
from m2encoder.vector_store import VectorKey, VectorStore
from m2encoder.vector_table import VectorTable
from m2encoder.vector_work import fill

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class ItemEmbeddings:
    """Named vectors of one kind: pictures, or the lines of a file."""

    vectors: Vectors
    """(N, D) float32, unit norm."""
    names: list[str]
    """Path below the folder with forward slashes, key in a shard folder, or the text itself."""
    skipped: list[BadItem]
    kept: NDArray[np.int64]
    """(N,) position of each row in the list that was given, rising; bad items are missing."""


class TextVectors(NamedTuple):
    """Vectors of a list of texts."""

    vectors: Vectors
    """(M, D) float32, unit norm, in the order of the texts."""
    truncated: int
    """How many were longer than the model takes and lost their end (or start)."""


def embed_pictures(
    encoder: Encoder,
    pictures: Pictures,
    *,
    batch_size: int = 64,
    on_error: OnError = "raise",
    store: VectorStore | None = None,
    workers: int | None = None,
    world: World | None = None,
    upright: bool = False,
    precision: Precision = "float32",
    show_progress: bool | None = None,
) -> ItemEmbeddings:
    """Encode a list of pictures; while a batch is computed, the next ones are read and scaled.

    batch_size: most pictures at a time; on CPUs each core takes smaller ones of its own.
    store: keeps the vectors, bad pictures included, and gives them back next time.
    workers: threads that read and scale; None for one per core.
    world: processes that share the work; all get all vectors, those that one process gives.
    upright: turn pictures by their EXIF orientation. show_progress None: on a terminal only.
    Raises DataError at the first picture that cannot be read; with on_error="skip" it is left out
    and listed. Always raises on a damaged source, such as a shard.
    """
    check_on_error(on_error)
    _check_precision(precision)
    world = World() if world is None else world
    table = VectorTable(len(pictures), encoder.dim)
    work = PictureWork(encoder, pictures, table, batch_size, on_error, upright, precision, workers)
    stored = None
    if store is not None:
        settings = encoder.image_processor
        steps = [settings.size_px, settings.resize_mode, upright, f"Pillow {PIL.__version__}"]
        content = pictures.content_key()
        stored = store.open(_key(encoder, "pictures", steps, precision, content, table))
    with _progress(len(table), "pictures", show_progress, world) as bar:
        fill(table, work.spans(), work, stored=stored, world=world, bar=bar)
    skipped: list[BadItem] = []
    for row, reason in sorted(table.reasons.items()):  # the store knows some from an earlier run
        refuse(BadItem(row, pictures.name(row), reason), on_error, skipped)
    kept = table.kept
    vectors = table.vectors[kept] if skipped else table.vectors
    return ItemEmbeddings(vectors, [pictures.name(row) for row in kept.tolist()], skipped, kept)


def embed_texts(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    store: VectorStore | None = None,
    world: World | None = None,
    precision: Precision = "float32",
    show_progress: bool | None = None,
) -> TextVectors:
    """Encode a list of texts, those of about the same length together.

    Options as of `embed_pictures`. Raises DataError at a text that is empty.
    """
    if isinstance(texts, str):
        raise TypeError("texts is one str, expected a list of them")
    _check_precision(precision)
    world = World() if world is None else world
    table = VectorTable(len(texts), encoder.dim)
    work = TextWork(encoder, texts, table, batch_size, precision)
    stored = None
    if store is not None:
        content = content_hash("texts", *texts)
        stored = store.open(_key(encoder, "texts", [], precision, content, table))
    with _progress(len(table), "texts", show_progress, world) as bar:
        fill(table, work.spans(), work, stored=stored, world=world, bar=bar)
    if (count := table.truncated) and world.is_first:
        limit = encoder.needed_tokenizer().model_max_length
        logger.warning("%d of %d texts have more than %d tokens; the rest is not seen", count,
                       len(texts), limit)  # fmt: skip
    return TextVectors(table.vectors, count)


def _key(
    encoder: Encoder,
    kind: Any,
    preprocessing: list[Any],
    precision: Precision,
    content: str,
    table: VectorTable,
) -> VectorKey:
    count, dim = table.vectors.shape
    steps = json.dumps(preprocessing)
    return VectorKey(kind, encoder.fingerprint, steps, precision, content, count, dim)


def check_on_error(on_error: OnError) -> None:
    """Raise ValueError if it is none of the two."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}, expected 'raise' or 'skip'")


def _check_precision(precision: Precision) -> None:
    if precision not in (known := get_args(Precision)):
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(known)}")


def refuse(bad: BadItem, on_error: OnError, skipped: list[BadItem]) -> None:
    """Raise DataError for a bad item, or add it to the list. Logs at level debug: they are many."""
    if on_error == "raise":
        raise DataError(f"{bad.name}: {bad.reason}")
    logger.debug("skipped %s: %s", bad.name, bad.reason)
    skipped.append(bad)


def _progress(total: int, unit: str, show: bool | None, world: World) -> "tqdm[Any]":
    hide = None if show is None else not show
    return tqdm(total=total, unit=f" {unit}", disable=hide if world.is_first else True)
