"""Encode shard folders, picture folders and text files, into memory or into a folder of arrays.

Lists of pictures or texts: embed_lists.py. Not for single items (Encoder.encode_image), nor for
search (index.py) and metrics (eval/).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2encoder.distributed import World
from m2encoder.embed_lists import (
    ItemEmbeddings,
    TextVectors,
    check_on_error,
    embed_pictures,
    embed_texts,
    refuse,
)
from m2encoder.embed_work import Precision
from m2encoder.encoder import BadItem, Encoder, OnError
from m2encoder.errors import DataError
from m2encoder.folders import check_replaceable, complete_folder, write_json, write_jsonl
from m2encoder.pictures import FolderPictures, ShardPictures
from m2encoder.shards import INDEX_NAME, Pair, ShardReader
from m2encoder.vector_store import VectorStore

Vectors = NDArray[np.float32]
META_NAME = "meta.json"
ITEMS_NAME = "items.jsonl"
FORMAT = 1


@dataclass(frozen=True)
class TextEmbeddings:
    """Texts, and which picture each of them describes."""

    vectors: Vectors
    """(M, D) float32, unit norm."""
    owner: NDArray[np.int64]
    """(M,) row of the picture in `PairEmbeddings.image`; never falls from one text to the next."""
    texts: list[str]
    truncated: int = 0
    """How many were longer than the model takes."""


@dataclass(frozen=True)
class PairEmbeddings:
    """The pairs of a shard folder whose picture could be read, in order."""

    image: Vectors
    """(N, D) float32, unit norm."""
    texts: dict[str, TextEmbeddings]
    """Per language (BCP-47 tag) that has any caption."""
    keys: list[str]
    metas: list[dict[str, Any]]
    """`Pair.meta` of each picture."""
    skipped: list[BadItem]
    """Unreadable pictures (their pair is left out) and empty captions."""


class EmbeddedFolder(NamedTuple):
    """What `embed_to_folder` wrote."""

    path: Path
    counts: dict[str, int]
    """Rows of each array."""
    skipped: list[BadItem]


def embed_pairs(
    encoder: Encoder,
    reader: ShardReader,
    *,
    languages: Sequence[str] | None = None,
    batch_size: int = 64,
    on_error: OnError = "raise",
    store: VectorStore | None = None,
    world: World | None = None,
    precision: Precision = "float32",
    show_progress: bool | None = None,
) -> PairEmbeddings:
    """Encode every picture and caption of a shard folder.

    languages: encode only these captions; by default all. Other options as of `embed_pictures`.
    With on_error="skip", unreadable pictures and empty captions are left out and listed.
    Raises DataError on the first of them otherwise, and always on damaged shards.
    """
    pairs = _PairPictures(reader, languages, on_error)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "store": store,
        "world": world,
        "precision": precision,
        "show_progress": show_progress,
    }
    found = embed_pictures(encoder, pairs, on_error=on_error, **options)
    skipped = [*found.skipped]
    captions: dict[str, tuple[list[str], list[int]]] = {}
    metas: list[dict[str, Any]] = []
    for row, position in enumerate(found.kept.tolist()):
        record = pairs.record(position)
        metas.append(record.meta)
        skipped += record.bad
        for language, texts in record.captions.items():
            all_texts, owner = captions.setdefault(language, ([], []))
            all_texts += texts
            owner += [row] * len(texts)
    embedded: dict[str, TextEmbeddings] = {}
    for language, (texts, owner) in captions.items():
        if texts:
            vectors, truncated = embed_texts(encoder, texts, **options)
            rows = np.asarray(owner, np.int64)
            embedded[language] = TextEmbeddings(vectors, rows, texts, truncated)
    return PairEmbeddings(found.vectors, embedded, found.names, metas, sorted(skipped))


class _Record(NamedTuple):
    """A pair without its picture."""

    captions: dict[str, list[str]]
    """Of the languages asked for, those that are not empty."""
    bad: list[BadItem]
    meta: dict[str, Any]


class _PairPictures(ShardPictures):
    """A shard folder's pictures; remembers the captions that come past with them."""

    def __init__(
        self, reader: ShardReader, languages: Sequence[str] | None, on_error: OnError
    ) -> None:
        super().__init__(reader)
        self._languages = languages
        self._on_error: OnError = on_error
        self._records: dict[int, _Record] = {}

    def read(self, position: int) -> bytes:
        """Return the encoded picture. With on_error="raise", an empty caption raises."""
        pair = self.reader[position]
        self._records[position] = self._taken_from(pair, position)
        return pair.image

    def record(self, position: int) -> _Record:
        """Return the rest of a pair, reading it if its picture was not."""
        if position not in self._records:  # its vector was stored, or is another rank's work
            self._records[position] = self._taken_from(self.reader[position], position)
        return self._records[position]

    def _taken_from(self, pair: Pair, position: int) -> _Record:
        captions: dict[str, list[str]] = {}
        bad: list[BadItem] = []
        for language in pair.captions if self._languages is None else self._languages:
            captions[language] = []
            for number, text in enumerate(pair.captions.get(language, ())):
                if text.strip():
                    captions[language].append(text)
                else:
                    name = f"{pair.key}, {language} caption {number}"
                    refuse(BadItem(position, name, "empty text"), self._on_error, bad)
        return _Record(captions, bad, pair.meta)


def embed_folder(
    encoder: Encoder,
    folder: Path,
    *,
    batch_size: int = 64,
    on_error: OnError = "raise",
    store: VectorStore | None = None,
    show_progress: bool | None = None,
) -> ItemEmbeddings:
    """Encode every picture below `folder`, turned upright by EXIF.

    With on_error="skip", unreadable pictures are left out and listed; by default the first raises.
    Raises DataError if the folder is missing or holds no picture.
    """
    pictures = FolderPictures(folder)
    if not len(pictures):
        raise DataError(f"{folder}: holds no pictures, expected JPEG, PNG, ...; check the path")
    return embed_pictures(
        encoder,
        pictures,
        batch_size=batch_size,
        on_error=on_error,
        store=store,
        upright=True,
        show_progress=show_progress,
    )


def embed_text_file(
    encoder: Encoder,
    path: Path,
    *,
    batch_size: int = 64,
    on_error: OnError = "raise",
    show_progress: bool | None = None,
) -> ItemEmbeddings:
    """Encode a UTF-8 file, one text per line; blank lines are bad items, named by their number.

    Raises DataError if the file is missing, empty or not UTF-8.
    """
    check_on_error(on_error)
    skipped: list[BadItem] = []
    kept: list[int] = []
    lines = _read_lines(path)
    for position, line in enumerate(lines):
        if line.strip():
            kept.append(position)
        else:
            bad = BadItem(position, f"{path.name}, line {position + 1}", "empty text")
            refuse(bad, on_error, skipped)
    if not kept:
        raise DataError(f"{path}: holds no text, expected one per line; check the path")
    texts = [lines[position] for position in kept]
    found: TextVectors = embed_texts(
        encoder, texts, batch_size=batch_size, show_progress=show_progress
    )
    return ItemEmbeddings(found.vectors, texts, skipped, np.asarray(kept, np.int64))


def _read_lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file, expected one text per line; check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 at byte {error.start:,} ({error.reason}); convert it, for example "
            f"with: iconv -f GB18030 -t UTF-8"
        ) from None
    # Not str.splitlines: it also breaks at characters that belong to a text, such as U+2028.
    lines = [line.removesuffix("\r") for line in content.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def embed_to_folder(
    encoder: Encoder,
    source: Path,
    out_dir: Path,
    *,
    batch_size: int = 64,
    on_error: OnError = "raise",
    show_progress: bool | None = None,
) -> EmbeddedFolder:
    """Encode a shard folder, a picture folder or a .txt file into `out_dir`, all of it or nothing.

    `image.npy`, `text.npy`: float32, unit norm, where the source has any. `items.jsonl`: one line
    per row of image.npy, then of text.npy. `meta.json`: model, fingerprint, counts, what was left
    out and why.
    Raises DataError on an unusable source, or if `out_dir` holds something else.
    """
    check_replaceable(out_dir, marker=META_NAME)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "on_error": on_error,
        "show_progress": show_progress,
    }
    arrays, items, skipped = _embed_source(encoder, source, options)
    counts = {name: len(array) for name, array in arrays.items()}
    meta = {
        "format": FORMAT,
        "model": encoder.name,
        "fingerprint": encoder.fingerprint,
        "dim": encoder.dim,
        "dtype": "float32",
        "source": str(source),
        "kept": counts,
        "skipped": [{"name": bad.name, "reason": bad.reason} for bad in skipped],
    }
    with complete_folder(out_dir, marker=META_NAME) as folder:
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        write_jsonl(folder / ITEMS_NAME, items)
        write_json(folder / META_NAME, meta)
    return EmbeddedFolder(out_dir, counts, skipped)


def _embed_source(
    encoder: Encoder, source: Path, options: dict[str, Any]
) -> tuple[dict[str, Vectors], list[dict[str, Any]], list[BadItem]]:
    """Return the arrays by name, one item per row in the same order, and what was skipped."""
    if (source / INDEX_NAME).is_file():
        pairs = embed_pairs(encoder, ShardReader(source), **options)
        items = [{"array": "image", "row": i, "key": key} for i, key in enumerate(pairs.keys)]
        arrays = {"image": pairs.image}
        if pairs.texts:
            arrays["text"] = np.concatenate([texts.vectors for texts in pairs.texts.values()])
        return arrays, items + _caption_items(pairs), pairs.skipped
    if source.is_dir():
        found = embed_folder(encoder, source, **options)
        items = [{"array": "image", "row": i, "name": name} for i, name in enumerate(found.names)]
        return {"image": found.vectors}, items, found.skipped
    if source.suffix.lower() == ".txt":
        found = embed_text_file(encoder, source, **options)
        items = [{"array": "text", "row": i, "text": text} for i, text in enumerate(found.names)]
        return {"text": found.vectors}, items, found.skipped
    raise DataError(
        f"{source}: expected a folder of pictures, a shard folder or a .txt file; check the path"
    )


def _caption_items(pairs: PairEmbeddings) -> list[dict[str, Any]]:
    rows = [
        {"key": pairs.keys[owner], "language": language, "text": text}
        for language, texts in pairs.texts.items()
        for owner, text in zip(texts.owner, texts.texts, strict=True)
    ]
    return [{"array": "text", "row": i} | row for i, row in enumerate(rows)]
