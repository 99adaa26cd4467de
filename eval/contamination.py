"""Look for test pictures and captions in training data: by copy, by embedding, by caption.

What is found is reported, nothing is removed. Not for reading either side (contamination_data.py).
"""

# I test pictures   T test captions   D width of an embedding

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from m2encoder.embed import embed_pictures
from m2encoder.encoder import BadItem, Encoder
from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.caption_overlap import CaptionIndex
from m2encoder.eval.contamination_data import TestSet, TrainItem
from m2encoder.eval.metric import Metric, TaskOutput, undefined
from m2encoder.image_hash import CopyFinder, Thumbprint, thumbprint
from m2encoder.images import ImageSource
from m2encoder.pictures import ListedBytes

BATCH = 256
"""Training items in memory at once."""
KEPT_MATCHES = 20
"""Named for each test item; all are counted."""
SAMPLE = 2000
"""Test pictures whose cosines with each other say what the threshold is worth."""
IMAGE_KINDS = ("file", "copy", "embedding")
CAPTION_KINDS = ("same", "near")
SURE = frozenset({"file", "copy", "same"})
"""What makes a test item contaminated; the other kinds are for people to look at."""


@dataclass(frozen=True)
class Ways:
    """What to look for beside equal files, copies and equal captions."""

    encoder: Encoder | None = None
    """Finds pictures whose vectors are alike: crops and colour changes beyond what a hash sees."""
    min_cosine: float = 0.95
    near_captions: float | None = None
    """Share of common character triples that makes two captions nearly the same; None: only equal
    ones count."""

    def __post_init__(self) -> None:
        if not -1 <= self.min_cosine <= 1:
            raise ConfigError(f"cosine is {self.min_cosine}, expected -1 to 1")
        if self.near_captions is not None and not 0 < self.near_captions <= 1:
            raise ConfigError(
                f"near-captions is {self.near_captions}, expected a share above 0, at most 1"
            )


class Match(NamedTuple):
    """Training data that a test picture or caption was found in."""

    key: str
    kind: str
    """Of IMAGE_KINDS or CAPTION_KINDS."""
    score: float
    """1 less the residual of a copy; the cosine; the share of common triples."""


@dataclass
class Found:
    """Which of some test items were found, in which ways, and where first."""

    counts: dict[str, NDArray[np.int64]]
    """Per kind (N,) matches of each test item."""
    matches: dict[int, list[Match]] = field(default_factory=dict)

    def add(self, row: int, match: Match) -> None:
        """Count a match, and keep it if few are kept yet."""
        self.counts[match.kind][row] += 1
        kept = self.matches.setdefault(row, [])
        if len(kept) < KEPT_MATCHES:
            kept.append(match)

    @property
    def sure(self) -> NDArray[np.bool_]:
        """(N,) which items are surely in the training data."""
        return np.any([count > 0 for kind, count in self.counts.items() if kind in SURE], axis=0)

    def mask(self, kind: str) -> NDArray[np.bool_]:
        """Return (N,) which items were found in this way."""
        return self.counts[kind] > 0


@dataclass(frozen=True)
class Contamination:
    """What of a test set lies in training data."""

    images: Found
    """Of the test set's I pictures."""
    captions: Found
    """Of its T captions."""
    unread: tuple[BadItem, ...]
    """Test pictures that could not be compared."""
    details: dict[str, Any]

    @property
    def image_mask(self) -> NDArray[np.bool_]:
        """(I,) pictures to leave out for clean metrics."""
        return self.images.sure

    @property
    def caption_mask(self) -> NDArray[np.bool_]:
        """(T,) captions to leave out, beside those of the pictures."""
        return self.captions.sure

    def facts(self) -> dict[str, Any]:
        """Return what other results of the same test set say under `contamination`."""
        return {
            "checked": True,
            "hits": int(self.image_mask.sum()),
            "caption_hits": int(self.caption_mask.sum()),
            "images": len(self.image_mask),
            "captions": len(self.caption_mask),
            "train": self.details["train"]["paths"],
        }

    def output(self) -> TaskOutput:
        """Return shares, the list of what was found, and under `ranks` a mask of each kind.

        `image_share` and `caption_share` are of what is surely there: files, copies, same captions.
        """
        metrics: dict[str, Metric] = {}
        ranks: dict[str, NDArray[np.generic]] = {}
        read = len(self.image_mask) - len(self.unread)
        sides = ("image", self.images, read), ("caption", self.captions, len(self.caption_mask))
        for name, found, n in sides:
            masks = {f"{name}_{kind}": found.mask(kind) for kind in found.counts}
            ranks |= {f"{label}_found": mask for label, mask in masks.items()}
            ranks[f"{name}_found"] = found.sure
            for label, mask in ({name: found.sure} | masks).items():
                metrics[f"{label}_share"] = Metric(float(mask.sum() / n), n) if n else undefined()
        return TaskOutput(metrics, self.details, ranks)


def check_contamination(
    train: Iterable[TrainItem],
    test: TestSet,
    ways: Ways = Ways(),
    *,
    train_paths: Sequence[str] = (),
    total: int | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    show_progress: bool | None = None,
) -> Contamination:
    """Go through training data once and note which test pictures and captions lie in it.

    Memory grows with the test set (9 KB a picture, and its vector), not with the training data.
    Pictures that cannot be read are counted by reason. train_paths, total: for the report and the
    progress bar. workers: threads that decode; None for one per core.
    Where no test picture can be read, its captions alone are looked for. Raises DataError if there
    are none either, no test picture is listed, or there is no training item at all.
    """
    if not len(test.pictures):
        raise DataError(f"{test.path}: no pictures, expected a test set; check the path")
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        prints, rows, unread = _test_prints(test, pool)
        check = _Check(test, ways, prints, rows, batch_size)
        hide = None if show_progress is None else not show_progress
        with tqdm(total=total, unit=" training pairs", disable=hide) as bar:
            for batch in _batches(train):
                check.add(batch, pool)
                bar.update(len(batch))
    if not check.seen["pairs"]:
        raise DataError("no training pairs, expected at least one; check the training data")
    return check.finish(unread, train_paths)


def _batches(items: Iterable[TrainItem]) -> Iterator[list[TrainItem]]:
    stream = iter(items)
    while batch := list(islice(stream, BATCH)):
        yield batch


def _test_prints(
    test: TestSet, pool: ThreadPoolExecutor
) -> tuple[list[Thumbprint], NDArray[np.int64], list[BadItem]]:
    """Return the thumbprints of the test pictures that can be read, their rows, and the others."""
    unread: list[BadItem] = []
    prints: list[Thumbprint] = []
    rows: list[int] = []
    count = len(test.pictures)
    names = [test.pictures.name(row) for row in range(count)]
    sources = (test.pictures.read(row) if row not in test.missing else b"" for row in range(count))
    for row, found in enumerate(_in_order(pool, sources, names)):
        if isinstance(found, str):
            reason = "missing picture" if row in test.missing else found
            unread.append(BadItem(row, names[row], reason))
        else:
            prints.append(found)
            rows.append(row)
    if not prints and not test.texts:
        raise DataError(
            f"{test.path}: none of its {count:,} pictures can be read, the first is "
            f"{unread[0].name}: {unread[0].reason}"
        )
    return prints, np.asarray(rows, np.int64), unread


def _in_order(
    pool: ThreadPoolExecutor, sources: Iterable[ImageSource], names: Sequence[str]
) -> Iterator[Thumbprint | str]:
    """Yield each picture's thumbprint, or why it cannot be read; few are opened ahead."""
    pairs = zip(sources, names, strict=True)
    while part := list(islice(pairs, BATCH)):
        yield from pool.map(_print_or_reason, part)


def _print_or_reason(named: tuple[Any, str]) -> Thumbprint | str:
    source, name = named
    try:
        return thumbprint(source, name=name)
    except DataError as error:
        return str(error).removeprefix(f"{name}: ")


class _Check:
    """The test set's side of the comparison, and what was found so far."""

    def __init__(
        self,
        test: TestSet,
        ways: Ways,
        prints: Sequence[Thumbprint],
        rows: NDArray[np.int64],
        batch_size: int,
    ) -> None:
        self.test, self.ways, self.rows = test, ways, rows
        self.finder = CopyFinder(prints)
        self.index = CaptionIndex(test.texts, near=ways.near_captions)
        self.alike = _Alike(ways, test, rows, batch_size) if ways.encoder and prints else None
        image_kinds = IMAGE_KINDS if ways.encoder else IMAGE_KINDS[:2]
        caption_kinds = CAPTION_KINDS if ways.near_captions else CAPTION_KINDS[:1]
        self.images = _nothing(image_kinds, len(test.pictures))
        self.captions = _nothing(caption_kinds, len(test.texts))
        self.seen: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()

    def add(self, batch: list[TrainItem], pool: ThreadPoolExecutor) -> None:
        """Compare some training items with the whole test set."""
        self.seen["pairs"] += len(batch)
        prints: list[Thumbprint] = []
        keys: list[str] = []
        readable: list[bytes] = []
        images, names = [item.image for item in batch], [item.key for item in batch]
        for item, found in zip(batch, _in_order(pool, images, names), strict=True):
            if isinstance(found, str):
                self.bad[_kind_of_reason(found)] += 1
            else:
                prints.append(found)
                keys.append(item.key)
                readable.append(item.image)
        self.seen["pictures"] += len(prints)
        for key, copies in zip(keys, self.finder.find(prints), strict=True):
            for row, kind, residual in copies:
                self.images.add(int(self.rows[row]), Match(key, kind, 1 - residual))
        if self.alike and readable:
            for row, match in self.alike.find(readable, keys):
                self.images.add(row, match)
        for item in batch:
            self.seen["captions"] += len(item.captions)
            for text in dict.fromkeys(item.captions):
                for row, kind, similarity in self.index.find(text):
                    self.captions.add(row, Match(item.key, kind, similarity))

    def finish(self, unread: Sequence[BadItem], train_paths: Sequence[str]) -> Contamination:
        """Return everything that was found."""
        pictures, texts = self.test.pictures, self.test.texts
        details: dict[str, Any] = {
            "train": {"paths": list(train_paths), **self.seen, "unread": dict(self.bad)},
            "test": {
                "pictures": len(pictures),
                "captions": len(texts),
                "unread": dict(Counter(_kind_of_reason(bad.reason) for bad in unread)),
                "too_plain_for_copies": int(self.finder.plain.sum()),
            },
            "known_overlaps": list(self.test.known_overlaps),
            "images": _listed(self.images, [pictures.name(row) for row in range(len(pictures))]),
            "captions": _listed(self.captions, texts),
        }
        if self.alike:
            details["embedding"] = self.alike.facts()
        return Contamination(self.images, self.captions, tuple(unread), details)


def _nothing(kinds: Sequence[str], count: int) -> Found:
    return Found({kind: np.zeros(count, np.int64) for kind in kinds})


def _kind_of_reason(reason: str) -> str:
    """Return a reason without what is this picture's own, so that equal ones are counted."""
    return re.sub(r"\d[\d,x]*", "N", reason.split(" (")[0].split(";")[0])


def _listed(found: Found, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the items that were found, with their matches: the surest kind first."""
    order = {kind: place for place, kind in enumerate(found.counts)}
    rows: list[dict[str, Any]] = []
    for row, matches in sorted(found.matches.items()):
        best = sorted(matches, key=lambda match: (order[match.kind], -match.score, match.key))
        count = int(sum(counts[row] for counts in found.counts.values()))
        shown = [{"key": m.key, "kind": m.kind, "score": round(m.score, 4)} for m in best]
        rows.append({"row": row, "name": names[row], "count": count, "matches": shown})
    return rows


class _Alike:
    """Test pictures by the cosine of a model's vectors; the training side streams past."""

    def __init__(self, ways: Ways, test: TestSet, rows: NDArray[np.int64], batch_size: int) -> None:
        assert ways.encoder is not None
        self.encoder, self.min_cosine, self.batch_size = ways.encoder, ways.min_cosine, batch_size
        embedded = embed_pictures(
            self.encoder, test.pictures, batch_size=batch_size, on_error="skip", upright=True
        )
        readable = np.isin(embedded.kept, rows)
        self.rows = embedded.kept[readable]
        self.vectors_ID = embedded.vectors[readable]
        self.nearest = np.full(len(self.rows), -1.0, np.float32)

    def find(self, images: Sequence[bytes], keys: Sequence[str]) -> Iterator[tuple[int, Match]]:
        """Yield the row of each test picture that one of these is like, and the match."""
        found = embed_pictures(
            self.encoder, ListedBytes(keys, images), batch_size=self.batch_size,
            on_error="skip", upright=True, show_progress=False,
        )  # fmt: skip
        scores = found.vectors @ self.vectors_ID.T
        np.maximum(self.nearest, scores.max(axis=0, initial=-1.0), out=self.nearest)
        for position, place in np.argwhere(scores > self.min_cosine):
            score = float(scores[position, place])
            yield int(self.rows[place]), Match(found.names[position], "embedding", score)

    def facts(self) -> Mapping[str, Any]:
        """Return the threshold and what it is worth."""
        quantiles = np.quantile(self.nearest, (0.5, 0.9, 0.99, 1))
        sample_SD = self.vectors_ID[:: -(-len(self.vectors_ID) // SAMPLE)]
        above = np.triu(sample_SD @ sample_SD.T > self.min_cosine, k=1).sum()
        pairs = len(sample_SD) * (len(sample_SD) - 1) // 2
        return {
            "model": self.encoder.name,
            "min_cosine": self.min_cosine,
            "test_pairs_above": float(above / pairs) if pairs else None,
            "nearest_cosine": dict(
                zip(("p50", "p90", "p99", "max"), map(float, quantiles), strict=True)
            ),
        }
