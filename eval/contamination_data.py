"""What a contamination check goes through: training data as a stream, a test set as a list.

Captions of every language are taken alike. Not for measuring (datasets.py) or training.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.annotations import LINES_SUFFIXES, TEXTS_SUFFIX
from m2encoder.eval.caption_sources import open_captions
from m2encoder.eval.foreign_tars import Sample, TarPictures, read_samples
from m2encoder.eval.matching import match
from m2encoder.eval.protocols import MatchedProtocol, get_protocol
from m2encoder.images import list_images
from m2encoder.pictures import FolderPictures, Pictures, ShardPictures
from m2encoder.shards import INDEX_NAME, ShardReader
from m2encoder.tar_members import list_tars


class TrainItem(NamedTuple):
    """One picture with its captions in any language."""

    key: str
    image: bytes
    captions: list[str]


class TrainItems:
    """A shard folder, webdataset tars or a folder of pictures; nothing of it is kept.

    Raises DataError if it is none of these; while going through it, on damaged shards and tars.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = ShardReader(path) if (path / INDEX_NAME).is_file() else None
        self._tars = [] if self._reader or not path.exists() else list_tars(path)
        self._pictures = [] if self._reader or self._tars else list_images(path)
        if not (self._reader or self._tars or self._pictures):
            raise DataError(
                f"{path}: holds neither shards nor tars nor pictures, expected training data; "
                f"check the path"
            )

    @property
    def count(self) -> int | None:
        """How many items there are; None where only going through them would tell."""
        return len(self._reader) if self._reader else len(self._pictures) or None

    def __iter__(self) -> Iterator[TrainItem]:
        if self._reader:
            for pair in self._reader:
                captions = [text for texts in pair.captions.values() for text in texts]
                yield TrainItem(pair.key, pair.image, captions)
        for tar in self._tars:
            for sample in read_samples(tar):
                image = sample.image.read() if sample.image else b""
                yield TrainItem(sample.key, image, _sample_captions(sample))
        for path in self._pictures:
            yield TrainItem(path.relative_to(self.path).as_posix(), _bytes_of(path), [])


def total(sources: Sequence[TrainItems]) -> int | None:
    """Return how many items all sources have; None where one does not know."""
    counts = [source.count for source in sources]
    return None if None in counts else sum(count or 0 for count in counts)


def _sample_captions(sample: Sample) -> list[str]:
    """Return the captions of a webdataset sample in any language: of its JSON, and its text."""
    record = sample.record()
    values = [record.get("caption"), record.get("captions")]
    if "txt" in sample.others:
        values += sample.text("txt").split("\n")
    return [text for text in _strings(values) if text.strip()]


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for each in value for text in _strings(each)] if isinstance(value, list) else []


def _bytes_of(path: Path) -> bytes:
    """Return the bytes, none where they cannot be read: it will be counted as a bad picture."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


@dataclass(frozen=True)
class TestSet:
    """Pictures, and captions in any language."""

    __test__ = False  # pytest would take it for a class of tests

    pictures: Pictures
    texts: list[str]
    owner: NDArray[np.int64]
    """(T,) picture row of each text."""
    path: str = ""
    protocol: MatchedProtocol | None = None
    """None where there are no captions to recognise it by."""
    missing: frozenset[int] = frozenset()
    """Rows of pictures that are not there; their captions are checked all the same."""

    @property
    def known_overlaps(self) -> tuple[str, ...]:
        """What is known of training sets that hold this test."""
        if self.protocol is None or self.protocol.status == "custom":
            return ()
        return get_protocol(self.protocol.id).overlaps


def open_test(
    path: Path, *, images: Path | None = None, language: str | None = None, split: str | None = None
) -> TestSet:
    """Open a shard folder, webdataset tars, a file of captions or a folder of pictures.

    images: the pictures that a file of captions names, by default beside it. language: of captions,
    where a file has several. Its protocol is recognised by the captions.
    Raises DataError, or ConfigError where a language or split must be chosen.
    """
    if (path / INDEX_NAME).is_file():
        return _open_shards(path)
    if _has_captions(path):
        source = open_captions(path, images=images, language=language, split=split)
        found = source.captions
        pictures, missing = source.find_pictures()
        matched = match(None, found.texts, found.owner, len(found.images), also=found.also)
        owner = np.asarray(found.owner, np.int64)
        return TestSet(pictures, found.texts, owner, str(path), matched, frozenset(missing))
    if images is not None:
        raise ConfigError(f"{path}: no file of captions, so --images has no use; leave it out")
    if tars := list_tars(path) if path.exists() else []:
        samples = [each for tar in tars for each in read_samples(tar) if each.image is not None]
        captions = [_sample_captions(sample) for sample in samples]
        return _test_set(path, TarPictures(samples), captions)
    pictures = FolderPictures(path)
    if not len(pictures):
        raise DataError(f"{path}: holds no pictures and no captions; check the path")
    return TestSet(pictures, [], np.zeros(0, np.int64), str(path))


def _has_captions(path: Path) -> bool:
    """Say whether a path is a file of captions, or a folder with one of the known layouts."""
    if path.is_dir():
        files = [child for child in path.iterdir() if child.is_file()]
        if any(file.name.endswith(TEXTS_SUFFIX) for file in files):
            return True
        kinds = [file for file in files if file.suffix.lower() in (".jsonl", ".json", ".token")]
        return len(kinds) == 1 and not list_tars(path)
    return path.suffix.lower() in LINES_SUFFIXES | {".jsonl", ".json"}


def _open_shards(folder: Path) -> TestSet:
    """All captions are checked; a protocol is recognised by those of one language."""
    reader = ShardReader(folder)
    captions = [pair.captions for pair in reader]
    for language in reader.index.captions:
        of_language = [found.get(language, []) for found in captions]
        if (one := _test_set(folder, ShardPictures(reader), of_language).protocol) is None:
            continue
        if one.status != "custom":
            break
    else:
        one = None
    flat = [[text for texts in found.values() for text in texts] for found in captions]
    whole = _test_set(folder, ShardPictures(reader), flat)
    return replace(whole, protocol=one or whole.protocol)


def _test_set(path: Path, pictures: Pictures, captions: Sequence[Sequence[str]]) -> TestSet:
    texts = [text for of_picture in captions for text in of_picture]
    owner = [row for row, of_picture in enumerate(captions) for _ in of_picture]
    matched = match(None, texts, owner, len(pictures)) if texts else None
    return TestSet(pictures, texts, np.asarray(owner, np.int64), str(path), matched)
