"""Stream pictures and texts of a shard folder, a picture folder or a text file through an Encoder.

Not for single items (Encoder.encode_image), nor for search (index.py) and metrics (eval/).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from m2encoder.encoder import BadItem, Encoder, OnError
from m2encoder.errors import DataError
from m2encoder.folders import check_replaceable, complete_folder, write_json, write_jsonl
from m2encoder.images import ImageSource, list_images, open_image
from m2encoder.shards import INDEX_NAME, ShardReader

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class ItemEmbeddings:
    """Named vectors of one kind: the pictures of a folder, or the lines of a file."""

    vectors: Vectors
    """(N, D) float32, unit norm."""
    names: list[str]
    """Path below the folder with forward slashes, or the text itself."""
    skipped: list[BadItem]


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
    show_progress: bool | None = None,
) -> PairEmbeddings:
    """Encode every picture and caption of a shard folder, `batch_size` pairs at a time.

    languages: encode only these captions; by default all. show_progress None: on a terminal only.
    With on_error="skip", unreadable pictures and empty captions are left out and listed.
    Raises DataError on the first of them otherwise, and always on damaged shards.
    """
    images: list[Vectors] = [_no_vectors(encoder)]
    keys: list[str] = []
    metas: list[dict[str, Any]] = []
    captions: dict[str, _Captions] = {}
    skipped: list[BadItem] = []
    with _progress(len(reader), "pairs", show_progress) as bar:
        for start in range(0, len(reader), batch_size):
            pixels: list[NDArray[np.uint8]] = []
            for position in range(start, min(start + batch_size, len(reader))):
                pair = reader[position]
                small = _read(encoder, pair.image, pair.key, position, on_error, skipped)
                if small is None:
                    continue
                for language in pair.captions if languages is None else languages:
                    found = captions.setdefault(language, _Captions(encoder, batch_size))
                    for number, text in enumerate(pair.captions.get(language, ())):
                        if text.strip():
                            found.add(text, owner=len(keys))
                        else:
                            name = f"{pair.key}, {language} caption {number}"
                            _refuse(BadItem(position, name, "empty text"), on_error, skipped)
                pixels.append(small)
                keys.append(pair.key)
                metas.append(pair.meta)
            images.append(_encode_pixels(encoder, pixels, batch_size))
            bar.update(min(batch_size, len(reader) - start))
    texts = {language: found.finish() for language, found in captions.items() if found.texts}
    return PairEmbeddings(np.concatenate(images), texts, keys, metas, skipped)


class _Captions:
    """Captions of one language; encoded whenever a batch is full."""

    def __init__(self, encoder: Encoder, batch_size: int) -> None:
        self.encoder, self.batch_size = encoder, batch_size
        self.texts: list[str] = []
        self.owner: list[int] = []
        self.vectors: list[Vectors] = [_no_vectors(encoder)]
        self.encoded = 0

    def add(self, text: str, *, owner: int) -> None:
        self.texts.append(text)
        self.owner.append(owner)
        if len(self.texts) - self.encoded == self.batch_size:
            self._encode()

    def _encode(self) -> None:
        waiting = self.texts[self.encoded :]
        self.vectors.append(self.encoder.encode_text(waiting, show_progress=False))
        self.encoded = len(self.texts)

    def finish(self) -> TextEmbeddings:
        if self.encoded < len(self.texts):
            self._encode()
        owner = np.asarray(self.owner, np.int64)
        return TextEmbeddings(np.concatenate(self.vectors), owner, self.texts)


def embed_folder(
    encoder: Encoder,
    folder: Path,
    *,
    batch_size: int = 64,
    on_error: OnError = "raise",
    show_progress: bool | None = None,
) -> ItemEmbeddings:
    """Encode every picture below `folder`, turned upright by EXIF, `batch_size` at a time.

    With on_error="skip", unreadable pictures are left out and listed; by default the first raises.
    Raises DataError if the folder is missing or holds no picture.
    """
    paths = list_images(folder)
    if not paths:
        raise DataError(f"{folder}: holds no pictures, expected JPEG, PNG, ...; check the path")
    vectors: list[Vectors] = [_no_vectors(encoder)]
    names: list[str] = []
    skipped: list[BadItem] = []
    with _progress(len(paths), "pictures", show_progress) as bar:
        for start in range(0, len(paths), batch_size):
            pixels: list[NDArray[np.uint8]] = []
            for position, path in enumerate(paths[start : start + batch_size], start):
                name = path.relative_to(folder).as_posix()
                small = _read(encoder, path, name, position, on_error, skipped, upright=True)
                if small is not None:
                    pixels.append(small)
                    names.append(name)
                bar.update()
            vectors.append(_encode_pixels(encoder, pixels, batch_size))
    return ItemEmbeddings(np.concatenate(vectors), names, skipped)


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
    skipped: list[BadItem] = []
    texts: list[str] = []
    for position, line in enumerate(_read_lines(path)):
        if line.strip():
            texts.append(line)
        else:
            bad = BadItem(position, f"{path.name}, line {position + 1}", "empty text")
            _refuse(bad, on_error, skipped)
    if not texts:
        raise DataError(f"{path}: holds no text, expected one per line; check the path")
    vectors = encoder.encode_text(texts, batch_size=batch_size, show_progress=show_progress)
    return ItemEmbeddings(vectors, texts, skipped)


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


def _read(
    encoder: Encoder,
    source: ImageSource,
    name: str,
    position: int,
    on_error: OnError,
    skipped: list[BadItem],
    *,
    upright: bool = False,
) -> NDArray[np.uint8] | None:
    """Open one picture and scale it to the model's size at once, (S, S, 3); None if it was skipped.

    A batch of full-size photographs would take gigabytes. The encoder's own scaling then finds
    nothing left to do: levels k/255 return to k exactly, and same-size resizing copies.
    """
    try:
        picture = open_image(source, name=name, upright=upright)
    except DataError as error:
        reason = str(error).removeprefix(f"{name}: ")
        _refuse(BadItem(position, name, reason), on_error, skipped)
        return None
    pixels = encoder.image_processor.to_pixels(picture)
    return np.rint(pixels * 255).astype(np.uint8).transpose(1, 2, 0)


def _refuse(bad: BadItem, on_error: OnError, skipped: list[BadItem]) -> None:
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}, expected 'raise' or 'skip'")
    if on_error == "raise":
        raise DataError(f"{bad.name}: {bad.reason}")
    logger.debug("skipped %s: %s", bad.name, bad.reason)
    skipped.append(bad)


def _encode_pixels(encoder: Encoder, pixels: list[NDArray[np.uint8]], batch_size: int) -> Vectors:
    if not pixels:
        return _no_vectors(encoder)
    return encoder.encode_image(pixels, batch_size=batch_size, show_progress=False)


def _no_vectors(encoder: Encoder) -> Vectors:
    return np.zeros((0, encoder.dim), np.float32)


def _progress(total: int, unit: str, show: bool | None) -> "tqdm[Any]":
    return tqdm(total=total, unit=f" {unit}", disable=None if show is None else not show)
