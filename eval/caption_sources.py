"""Find out what a path holds, and open it as captions with a way to their pictures.

Not for the formats themselves (annotations.py, foreign_tars.py, picture_sources.py).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from m2encoder.errors import DataError
from m2encoder.eval.annotations import (
    NAMES_FILE,
    TEXTS_SUFFIX,
    Captions,
    captions_of,
    read_annotations,
)
from m2encoder.eval.foreign_tars import Sample, TarPictures, read_samples
from m2encoder.eval.picture_sources import TsvPictures
from m2encoder.pictures import FilePictures, Pictures, ShardPictures
from m2encoder.shards import INDEX_NAME, ShardReader
from m2encoder.tar_members import list_tars

IMAGES_SUFFIX = "_imgs.tsv"


class Found(NamedTuple):
    """A picture for each of the captions' pictures, and the rows of those that are not there."""

    pictures: Pictures
    missing: set[int]


@dataclass(frozen=True)
class Source:
    """Captions, and how to get at their pictures."""

    captions: Captions
    find_pictures: Callable[[], Found]
    hint: str = "; check the path"
    """What to do where pictures are missing."""


def open_captions(
    path: Path, *, images: Path | None, language: str | None, split: str | None
) -> Source:
    """Open what a path holds; see datasets.read_retrieval. Raises DataError, ConfigError."""
    if path.is_dir():
        if (path / INDEX_NAME).is_file():
            return _shards(path, language)
        if texts := _texts_file(path, split):
            return _cn_clip(texts, images)
        if list_tars(path):
            return _tars(path, language)
        path = _only_annotation(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder, expected captions; check the path")
    if path.suffix.lower() == ".tar":
        return _tars(path, language)
    if path.name.endswith((".tar.gz", ".tgz", ".zip")):
        raise DataError(f"{path}: compressed, and so not readable in place; unpack it first")
    if path.name.endswith(TEXTS_SUFFIX) or (images and images.suffix.lower() == ".tsv"):
        return _cn_clip(path, images)
    captions = read_annotations(path, language=language, split=split)
    folder = images or path.parent
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected the pictures; check the path")
    return Source(
        captions,
        lambda: find_files(captions.images, folder),
        f" below {folder}; name the folder of the pictures",
    )


def _shards(folder: Path, language: str | None) -> Source:
    reader = ShardReader(folder)
    held = reader.index.captions
    if language is None and len(held) == 1:
        language = next(iter(held))
    if not held.get(language or ""):
        known = ", ".join(f"{tag} ({count:,})" for tag, count in held.items()) or "none"
        what = f"no captions in {language}" if language else "say which language"
        raise DataError(f"{folder}: {what}; it has captions in {known}")
    found = Captions(language=language)
    for shard in reader.index.shards:
        with (folder / shard.name).open("rb") as file:
            for entry in shard.pairs:
                offset, size = entry["json"]
                file.seek(offset)
                where = f"{folder / shard.name}, {entry['key']}"
                found.add(entry["key"], _shard_captions(where, file.read(size), language))
    return Source(found, lambda: Found(ShardPictures(reader), set()))


def _shard_captions(where: str, raw: bytes, language: str | None) -> list[str]:
    try:
        captions = json.loads(raw)["captions"]
        return list(captions.get(language, ()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{where}: damaged, not what the index says; restore the file") from None


def _tars(path: Path, language: str | None) -> Source:
    samples = read_samples(path)
    found = Captions()
    for sample in samples:
        if sample.image is None:
            kinds = ", ".join(sample.others) or "nothing"
            raise DataError(
                f"{path}: sample {sample.key!r} has {kinds} but no picture; remove it, or write "
                f"the tars again"
            )
        found.add(sample.key, _tar_captions(path, sample, language))
    return Source(found.finished(), lambda: Found(TarPictures(samples), set()))


def _tar_captions(path: Path, sample: Sample, language: str | None) -> list[str]:
    """Captions of a sample: from its JSON if it has some, else the lines of its text."""
    record = sample.record()
    if "captions" in record or "caption" in record:
        return captions_of(f"{path}, sample {sample.key}", record, language)
    if "txt" in sample.others:
        return [line for line in sample.text("txt").split("\n") if line.strip()]
    return []


def _texts_file(folder: Path, split: str | None) -> Path | None:
    """Return the file of texts of CN-CLIP's layout, or None where the folder is none."""
    files = sorted(folder.glob("*" + TEXTS_SUFFIX))
    names = [file.name.removesuffix(TEXTS_SUFFIX) for file in files]
    if split is None:
        if len(files) > 1:
            raise DataError(f"{folder}: has splits {', '.join(names)}; say which one")
        return files[0] if files else None
    if files and split not in names:
        raise DataError(f"{folder}: has no split {split!r}, only {', '.join(names)}")
    return folder / (split + TEXTS_SUFFIX) if files else None


def _cn_clip(texts: Path, images: Path | None) -> Source:
    """Open CN-CLIP's pair of files; every picture of the table is a candidate."""
    table = images or texts.with_name(texts.name.removesuffix(TEXTS_SUFFIX) + IMAGES_SUFFIX)
    if not table.is_file():
        raise DataError(f"{table}: no such file, expected the pictures of {texts}; name the .tsv")
    pictures = TsvPictures(table)
    read = read_annotations(texts)
    found = Captions(texts=read.texts)
    for name in pictures.ids:
        found.image_row(name)
    absent = [name for name in read.images if name not in pictures.rows]
    if absent:
        raise DataError(
            f"{table}: {len(absent):,} pictures that {texts.name} names are missing, the first is "
            f"{absent[0]}; are both files of the same split?"
        )
    rows = [pictures.rows[name] for name in read.images]
    found.owner = [rows[image] for image in read.owner]
    found.also = [(text, rows[image]) for text, image in read.also]
    return Source(found, lambda: Found(pictures, set()))


def _only_annotation(folder: Path) -> Path:
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in (".jsonl", ".json", ".token") and path.is_file()
    )
    if len(files) == 1:
        return files[0]
    what = ", ".join(path.name for path in files[:5]) if files else "no file of captions"
    raise DataError(
        f"{folder}: {what}; expected a shard folder, webdataset tars, CN-CLIP's files, or one file "
        f"of captions (for XTD name its test_1kcaptions file beside {NAMES_FILE})"
    )


def find_files(names: Sequence[str], folder: Path) -> Found:
    """Find the named pictures below a folder, whose layout may lack the leading parts of names.

    Raises DataError if two names would be the same file.
    """
    paths: list[Path] = []
    missing: set[int] = set()
    owners: dict[Path, str] = {}
    for row, name in enumerate(names):
        parts = Path(name).parts
        places = (folder.joinpath(*parts[start:]) for start in range(len(parts)))
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            missing.add(row)
        elif owners.setdefault(path, name) != name:
            raise DataError(
                f"{path}: both {owners[path]} and {name} would be this file; keep the folders that "
                f"the names have"
            )
        paths.append(path or folder / name)
    return Found(FilePictures(names, paths), missing)
