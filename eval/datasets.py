"""Evaluation data as users have it: pictures with captions, or pictures with labels.

Nothing is downloaded and no picture is opened. Not for comparing with protocols (matching.py).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.annotations import Captions
from m2encoder.eval.caption_sources import Source, open_captions
from m2encoder.eval.label_sources import Labelled, open_labelled
from m2encoder.eval.matching import match
from m2encoder.eval.protocols import CUSTOM, EvalProtocol, MatchedProtocol, get_protocol
from m2encoder.pictures import FilePictures, Pictures, PictureSubset, ShardPictures

OnMissing = Literal["raise", "skip"]
NO_PAIRS = np.zeros((0, 2), np.int64)


class Dropped(NamedTuple):
    """One picture or caption that was left out."""

    name: str
    reason: str


@dataclass(frozen=True)
class Tally:
    """What came in and what was kept: in = kept + dropped."""

    kept: int
    dropped: tuple[Dropped, ...] = ()

    @property
    def by_reason(self) -> dict[str, int]:
        """How many were left out for each reason."""
        return dict(Counter(each.reason for each in self.dropped))

    def facts(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        total = self.kept + len(self.dropped)
        return {"in": total, "kept": self.kept, "dropped": self.by_reason}


@dataclass(frozen=True)
class RetrievalData:
    """Pictures and their captions in one language."""

    pictures: Pictures
    texts: list[str]
    owner: NDArray[np.int64]
    """(T,) picture row of each text; of its first right picture where it has several."""
    language: str
    protocol: MatchedProtocol
    also: NDArray[np.int64] = field(default_factory=lambda: NO_PAIRS)
    """(E, 2) further right (text, picture) pairs; empty but for data such as MUGE."""
    images_tally: Tally | None = None
    texts_tally: Tally | None = None
    path: str = ""

    @property
    def right_pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(P,) picture rows and (P,) text rows: everything that is right for one another."""
        texts = np.arange(len(self.texts))
        return (
            np.concatenate([self.owner, self.also[:, 1]]),
            np.concatenate([texts, self.also[:, 0]]),
        )

    @property
    def captions_per_image(self) -> dict[str, int]:
        """Number of captions to number of pictures that have so many; "0" counts distractors."""
        counts = np.bincount(self.right_pairs[0], minlength=len(self.pictures))
        values, numbers = np.unique(counts, return_counts=True)
        return {str(k): int(n) for k, n in zip(values, numbers, strict=True)}

    def facts(self) -> dict[str, Any]:
        """Return what a result records of the data, as plain values."""
        skipped = [*_dropped(self.images_tally), *_dropped(self.texts_tally)]
        return {
            "path": self.path,
            "images": len(self.pictures),
            "texts": len(self.texts),
            "captions_per_image": self.captions_per_image,
            "skipped": [each._asdict() for each in skipped],
        }


@dataclass(frozen=True)
class LabelledData:
    """Pictures and the class of each."""

    pictures: Pictures
    targets: NDArray[np.int64]
    """(N,) position in `labels`."""
    labels: list[str]
    """What the data calls each class."""
    tally: Tally | None = None
    notes: tuple[str, ...] = ()
    path: str = ""

    def facts(self) -> dict[str, Any]:
        """Return what a result records of the data, as plain values."""
        skipped = [each._asdict() for each in _dropped(self.tally)]
        return {"path": self.path, "images": len(self.pictures), "texts": 0, "skipped": skipped}


def _dropped(tally: Tally | None) -> tuple[Dropped, ...]:
    return tally.dropped if tally else ()


def read_retrieval(
    path: Path,
    *,
    images: Path | None = None,
    language: str | None = None,
    protocol: str | None = None,
    split: str | None = None,
    on_error: OnMissing = "raise",
) -> RetrievalData:
    """Open pictures with captions, and compare them with a protocol.

    path: one of our shard folders, a webdataset tar or a folder of them, a file of captions, or a
    folder with CN-CLIP's `valid_texts.jsonl` and `valid_imgs.tsv`.
    images: folder of the pictures that a file of captions names, by default beside it; or a .tsv.
    language: BCP-47 tag of the captions; needed where neither protocol nor data says it.
    protocol: a name that the data must follow, or `custom`; by default recognised by its captions.
    split: which split, where the data holds several.
    on_error: stop at missing pictures and empty captions, or leave them out and count them.
    Raises DataError where the data is wrong or does not follow the protocol, ConfigError where the
    language must be chosen or is not the protocol's.
    """
    wanted = get_protocol(protocol) if protocol not in (None, CUSTOM) else None
    language = _chosen_language(language, wanted)
    source = open_captions(path, images=images, language=language, split=split)
    found = source.captions
    notes = [*found.notes]
    if wanted and wanted.first_captions:
        notes += _cut(found, wanted.first_captions)
    if not found.texts:
        said = f" in {language}" if language else ""
        raise DataError(f"{path}: no captions{said}, retrieval needs some; check the data")
    try:
        matched = match(protocol, found.texts, found.owner, len(found.images), also=found.also)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    known = wanted or (get_protocol(matched.id) if matched.status != "custom" else None)
    language = language or found.language or (known.language if known else None)
    if language is None:
        raise ConfigError(f"{path}: does not say which language its captions are in; say which")
    return _keep(path, source, language, matched.noted(*notes), on_error)


def _chosen_language(language: str | None, wanted: EvalProtocol | None) -> str | None:
    if wanted and language not in (None, wanted.language):
        raise ConfigError(
            f"{wanted.id} is measured in {wanted.language}, not in {language}; leave the language "
            f"out or name another protocol"
        )
    return wanted.language if wanted else language


def _cut(found: Captions, count: int) -> list[str]:
    """Keep the first captions of each picture, as a protocol asks for; say how many went."""
    seen: Counter[int] = Counter()
    kept: list[int] = []
    for row, image in enumerate(found.owner):
        seen[image] += 1
        if seen[image] <= count:
            kept.append(row)
    gone = len(found.texts) - len(kept)
    found.texts = [found.texts[row] for row in kept]
    found.owner = [found.owner[row] for row in kept]
    return [f"cut to the first {count} captions of each picture, {gone:,} left out"] if gone else []


def _keep(
    path: Path, source: Source, language: str, matched: MatchedProtocol, on_error: OnMissing
) -> RetrievalData:
    """Find the pictures, leave out what is missing or empty, and number the rest anew."""
    found = source.captions
    pictures, missing = source.find_pictures()
    empty = [row for row, text in enumerate(found.texts) if not text.strip()]
    if on_error == "raise":
        _refuse(path, source, missing, empty)
    kept_images = [row for row in range(len(found.images)) if row not in missing]
    if not kept_images:
        raise DataError(f"{path}: none of its {len(found.images):,} pictures is there{source.hint}")
    place = np.full(len(found.images), -1, np.int64)
    place[kept_images] = np.arange(len(kept_images))
    owners = _owners_left(found, place, set(empty))
    texts_dropped = [
        Dropped(f"caption {row} of {found.images[found.owner[row]]}",
                "empty caption" if not found.texts[row].strip() else "its picture is missing")
        for row, left in enumerate(owners) if not left
    ]  # fmt: skip
    images_dropped = [Dropped(found.images[row], "missing picture") for row in sorted(missing)]
    if images_dropped or texts_dropped:
        matched = matched.demoted(
            f"{len(images_dropped):,} of {len(found.images):,} pictures and "
            f"{len(texts_dropped):,} of {len(found.texts):,} captions were left out"
        )
    rows = [row for row, left in enumerate(owners) if left]
    if not rows:
        raise DataError(f"{path}: no caption is left; check the pictures and the captions")
    also = [(new, image) for new, row in enumerate(rows) for image in owners[row][1:]]
    return RetrievalData(
        pictures=_subset(pictures, kept_images),
        texts=[found.texts[row] for row in rows],
        owner=np.asarray([owners[row][0] for row in rows], np.int64),
        language=language,
        protocol=matched,
        also=np.asarray(also, np.int64).reshape(-1, 2),
        images_tally=Tally(len(kept_images), tuple(images_dropped)),
        texts_tally=Tally(len(rows), tuple(texts_dropped)),
        path=str(path),
    )


def _owners_left(found: Captions, place: NDArray[np.int64], empty: set[int]) -> list[list[int]]:
    """Return for each text the new rows of its right pictures; none where it must go."""
    right = [[owner] for owner in found.owner]
    for row, image in found.also:
        right[row].append(image)
    return [
        [] if row in empty else [int(place[image]) for image in of_text if place[image] >= 0]
        for row, of_text in enumerate(right)
    ]


def _refuse(path: Path, source: Source, missing: set[int], empty: Sequence[int]) -> None:
    found = source.captions
    if missing:
        raise DataError(
            f"{path}: {len(missing):,} of {len(found.images):,} pictures are missing, the first is "
            f"{found.images[min(missing)]}{source.hint}"
        )
    if empty:
        raise DataError(
            f"{path}: {len(empty):,} of {len(found.texts):,} captions are empty, the first is of "
            f"{found.images[found.owner[empty[0]]]}; correct them, or leave them out"
        )


def _subset(pictures: Pictures, rows: Iterable[int]) -> Pictures:
    kept = list(rows)
    if len(kept) == len(pictures):
        return pictures
    if isinstance(pictures, FilePictures):
        names, paths = pictures.names, pictures.paths
        return FilePictures([names[row] for row in kept], [paths[row] for row in kept])
    return PictureSubset(pictures, kept)


def read_labelled(
    path: Path,
    *,
    images: Path | None = None,
    label_key: str | None = None,
    labels: Sequence[str] | None = None,
    on_error: OnMissing = "raise",
) -> LabelledData:
    """Open pictures with the class of each.

    path: a folder with a folder for each class, one of our shard folders, a webdataset tar or a
    folder of them (`.cls` members, or JSON), a .jsonl of {"image", "label"}, or CIFAR's binary
    version. Pickles are refused: opening one can run any code.
    images: folder of the pictures that a .jsonl names, by default beside it.
    label_key: the key of a shard's meta, or of JSON, that holds the label.
    labels: the classes in the order that is wanted; by default the data's own, or sorted: by number
    where all are numbers.
    on_error: stop at missing pictures and those without a label, or leave them out and count them.
    In our shards a picture without this label is no mistake: it is left out in any case.
    """
    found = open_labelled(path, images=images, label_key=label_key)
    dropped: list[Dropped] = []
    kept: list[int] = []
    for row, value in enumerate(found.values):
        reason = "missing picture" if row in found.missing else "no label" if value is None else ""
        if reason:
            dropped.append(Dropped(found.pictures.name(row), reason))
        else:
            kept.append(row)
    is_shards = isinstance(found.pictures, ShardPictures)
    wrong = [each for each in dropped if not (is_shards and each.reason == "no label")]
    if wrong and on_error == "raise":
        raise DataError(
            f"{path}: {len(wrong):,} of {len(found.values):,} pictures cannot be used, the first "
            f"is {wrong[0].name} ({wrong[0].reason}); correct the data, or leave them out"
        )
    if not kept:
        about = f" under {label_key!r}" if label_key else ""
        raise DataError(f"{path}: no labelled pictures{about}; check the path and the label")
    values = [str(found.values[row]) for row in kept]
    order = _label_order(path, values, found, labels)
    rows = {label: row for row, label in enumerate(order)}
    return LabelledData(
        pictures=_subset(found.pictures, kept),
        targets=np.asarray([rows[value] for value in values], np.int64),
        labels=order,
        tally=Tally(len(kept), tuple(dropped)),
        notes=found.notes,
        path=str(path),
    )


def _label_order(
    path: Path, values: Sequence[str], found: Labelled, labels: Sequence[str] | None
) -> list[str]:
    if labels is None:
        present = sorted(set(values))
        if all(value.isdecimal() for value in present):
            present.sort(key=int)
        return found.labels or present
    if unknown := sorted(set(values) - set(labels)):
        raise DataError(
            f"{path}: label {unknown[0]!r} is none of the {len(labels):,} classes asked for; "
            f"correct the data or the classes"
        )
    return list(labels)
