"""Bring an index to the state of its source: embed what is new or changed, drop what is gone.

Not for how that is stored (index_writer.py).
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
from tqdm import tqdm

from m2encoder.embed import embed_pictures
from m2encoder.encoder import BadItem, Encoder, OnError
from m2encoder.errors import DataError
from m2encoder.images import list_images
from m2encoder.index_damage import other_model
from m2encoder.index_files import map_vectors
from m2encoder.index_items import ItemRecord
from m2encoder.index_meta import FORMAT, IndexMeta, IndexSettings, Maker, VectorMaker, path_from
from m2encoder.index_search import Vectors
from m2encoder.index_sources import PictureSource, Source, VectorSource, open_source
from m2encoder.index_writer import IndexWriter, Words, open_writer
from m2encoder.pictures import PictureSubset

logger = logging.getLogger(__name__)

STAGE_ROWS = 2048
"""Pictures that are embedded before their vectors are written; a kill loses at most these."""
VECTOR_ROWS = 65_536
WORDS = (
    "猫", "一只狗", "日落", "雪山", "海边的沙滩", "城市夜景", "红色的汽车", "一碗面条", "生日蛋糕",
    "婚礼", "孩子在公园里玩", "森林里的小路", "樱花", "两个人在笑", "足球比赛", "书架", "老房子",
    "地铁站", "下雨的街道", "手写的笔记", "截图", "飞机", "草地上的马", "厨房", "乐队演出",
    "天空中的云", "菜单", "自行车", "湖", "电脑屏幕", "婴儿", "蓝色的花",
    "a cat", "a dog running", "sunset", "snowy mountains", "a sandy beach", "city at night",
    "a red car", "a bowl of noodles", "birthday cake", "a wedding", "children in a park",
    "a path in the woods", "cherry blossoms", "two people laughing", "a football match",
    "a bookshelf", "an old house", "a subway station", "rain on a street", "handwritten notes",
    "a screenshot", "an airplane", "a horse on grass", "a kitchen", "a band on stage",
    "clouds in the sky", "a menu", "a bicycle", "a lake", "a computer screen", "a baby",
    "a blue flower",
)  # fmt: skip
"""What people search photographs for: texts to measure recall with."""


@dataclass(frozen=True)
class Changes:
    """What an update did; the lists name pictures."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    skipped: list[BadItem] = field(default_factory=list)
    """Pictures that cannot be read, also those of earlier updates."""
    embedded: int = 0
    """Pictures that went through the model: the others' bytes were known already."""

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)


@dataclass(frozen=True)
class Work:
    """How to embed."""

    batch_size: int = 64
    on_error: OnError = "skip"
    show_progress: bool | None = None


def build(
    encoder: Encoder, source_path: Path, out_dir: Path, settings: IndexSettings, work: Work
) -> Changes:
    """Make an index of a picture folder, shards or embeddings; index.py's `build_index` tells."""
    with open_writer(out_dir, anew=True) as writer, _nothing_or_all(writer):
        source = open_source(source_path, fingerprint=encoder.fingerprint, model=encoder.name)
        return build_from(writer, source, encoder, settings, work)


def build_vectors(
    maker: Maker, source: VectorSource, out_dir: Path, settings: IndexSettings
) -> Changes:
    """Make an index of vectors; index.py's `index_vectors` tells."""
    with open_writer(out_dir, anew=True) as writer, _nothing_or_all(writer):
        return build_from(writer, source, maker, settings, Work())


def build_from(
    writer: IndexWriter, source: Source, maker: Maker, settings: IndexSettings, work: Work
) -> Changes:
    """Make all vectors anew. Raises DataError if no picture can be read."""
    meta = _describe(writer.folder, source, maker, settings)
    writer.begin(maker, meta.source, replaces=True)
    stager = _Stager(writer, source, maker, work)
    stager.stage(range(len(source.entries)), reuses=False)
    names = {entry.name for entry in source.entries} - {bad.name for bad in stager.skipped}
    skipped = source.refused + stager.skipped
    if not names:
        first = f", the first is {skipped[0].name}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"{source.path}: none of {len(skipped):,} pictures can be read{first}")
    writer.finish(meta, wanted=names, skipped=skipped)
    writer.settle(words_of(maker))
    return Changes(added=sorted(names), skipped=skipped, embedded=stager.embedded)


def update(encoder: Encoder, folder: Path, work: Work) -> Changes:
    """Bring an index to its source's state; index.py's `update_index` tells."""
    with open_writer(folder) as writer:
        meta = changeable(writer, encoder)
        if meta.kind == "vectors":
            raise DataError(f"{folder}: index of vectors without a source; build it again instead")
        source = open_source(
            meta.source_path(folder), fingerprint=encoder.fingerprint, model=encoder.name
        )
        known, excluded = writer.table.versions(), set(writer.table.names("excluded"))
        listed = [entry for entry in source.entries if entry.name not in excluded]
        if not listed:
            raise DataError(f"{source.path}: holds no pictures any more; check the path")
        positions = {
            entry.name: i
            for i, entry in enumerate(source.entries)
            if entry.name not in excluded and known.get(entry.name) != entry.version
        }
        gone = known.keys() - {entry.name for entry in listed}
        stager = _Stager(writer, source, encoder, work)
        return _apply(stager, replace(meta, stamp=source.stamp), positions, gone, is_whole=True)


def add(encoder: Encoder, folder: Path, paths: Sequence[Path], work: Work) -> Changes:
    """Add pictures of the indexed folder; index.py's `add_pictures` tells."""
    with open_writer(folder) as writer:
        meta = changeable(writer, encoder)
        root = meta.root_path(folder)
        if meta.kind != "pictures" or root is None:
            raise DataError(
                f"{folder}: index of {meta.kind}, only one of a picture folder takes pictures; "
                f"change {meta.source_path(folder)} and run: m2enc index update {folder}"
            )
        wanted = {_name_below(root, path) for given in paths for path in _pictures_at(given)}
        source = PictureSource(root)
        positions = {e.name: i for i, e in enumerate(source.entries) if e.name in wanted}
        if missing := sorted(wanted - positions.keys()):
            raise DataError(f"{root / missing[0]}: not a picture of the indexed folder {root}")
        with writer.table.transaction("IMMEDIATE"):
            writer.table.delete(positions, "excluded")
        stager = _Stager(writer, source, encoder, work)
        return _apply(stager, meta, positions, set(), is_whole=False)


def remove(folder: Path, patterns: Sequence[str]) -> Changes:
    """Take pictures out for good; index.py's `remove_pictures` tells."""
    with open_writer(folder) as writer:
        meta = changeable(writer, None)
        names: list[str] = []
        for pattern in patterns:
            found = writer.table.names_like(pattern)
            if not found:
                raise DataError(
                    f"{folder}: no picture {pattern!r}, expected names as the search shows them, "
                    f"below the indexed folder, or a pattern such as 'trips/*'"
                )
            names += found
        maker = VectorMaker(meta.model, meta.model_fingerprint, meta.dim)
        writer.begin(maker, "", replaces=False)
        writer.finish(meta, wanted=(), gone=names, excluded=names)
        writer.settle(lambda: None)
        return Changes(removed=sorted(set(names)))


def changeable(writer: IndexWriter, encoder: Encoder | None) -> IndexMeta:
    """Return what a finished index says. Raises DataError if `encoder` cannot change it."""
    meta, folder = writer.meta, writer.folder
    if meta is None:
        raise DataError(
            f"{folder}: this index was never finished; go on with: "
            f"m2enc index MODEL PICTURES --out {folder}"
        )
    if encoder is not None and meta.model_fingerprint != encoder.fingerprint:
        raise other_model(folder, meta, encoder)
    if meta.ann is not None and meta.ann.kind == "hnsw":
        raise DataError(
            f"{folder}: HNSW index, which can only be read (faiss removes nothing from it); build "
            f"it again with: m2enc index MODEL {meta.source_path(folder)} --out {folder}"
        )
    return meta


def words_of(maker: Maker) -> Words:
    """Return what encodes WORDS, for a model that takes texts."""

    def encode() -> Vectors | None:
        if not isinstance(maker, Encoder) or maker.tokenizer is None:
            return None
        return maker.encode_text(WORDS, show_progress=False)

    return encode


class _Stager:
    """Stages the vectors of a source's pictures, a few thousand at a time."""

    def __init__(self, writer: IndexWriter, source: Source, maker: Maker, work: Work) -> None:
        self.writer, self.source, self.maker, self.work = writer, source, maker, work
        self.skipped: list[BadItem] = []
        self.unchanged: list[ItemRecord] = []
        """Pictures that were written again with the same bytes."""
        self.embedded = 0

    def stage(self, positions: Sequence[int], *, reuses: bool) -> None:
        """Stage the pictures at `positions` unless they are staged already.

        reuses: copy the vector of a picture of the index that has the same bytes.
        """
        staged, entries = self.writer.table.versions("staged"), self.source.entries
        todo = [i for i in positions if staged.get(entries[i].name) != entries[i].version]
        hide = None if self.work.show_progress is None else not self.work.show_progress
        step = VECTOR_ROWS if isinstance(self.source, VectorSource) else STAGE_ROWS
        with tqdm(total=len(todo), unit=" pictures", disable=hide) as bar:
            for start in range(0, len(todo), step):
                some = todo[start : start + step]
                if isinstance(self.source, VectorSource):
                    records = [self.source.describe(i) for i in some]
                    self.writer.stage(records, np.asarray(self.source.vectors[some], np.float32))
                else:
                    self._embed(self.source, self._reuse(some) if reuses else self._describe(some))
                bar.update(len(some))

    def _describe(self, positions: Sequence[int]) -> dict[int, ItemRecord]:
        """Return what is kept beside each vector; a file that is gone or locked is a bad item."""
        records: dict[int, ItemRecord] = {}
        for position in positions:
            try:
                records[position] = self.source.describe(position)
            except OSError as error:
                bad = BadItem(-1, self.source.entries[position].name, _reason(error))
                if self.work.on_error == "raise":
                    raise DataError(f"{bad.name}: {bad.reason}") from None
                self.skipped.append(bad)
        return records

    def _reuse(self, positions: Sequence[int]) -> dict[int, ItemRecord]:
        """Stage those whose bytes are known; returns the others."""
        fresh: dict[int, ItemRecord] = {}
        known: list[tuple[ItemRecord, int]] = []
        for position, record in self._describe(positions).items():
            same = self.writer.table.same_content(record)
            if same is None:
                fresh[position] = record
            elif same[0] == record.name:
                self.unchanged.append(record)
            else:
                known.append((record, same[1]))
        if known and self.writer.meta is not None:
            meta = self.writer.meta
            vectors = map_vectors(self.writer.folder / meta.segment, meta.rows, meta.dim)
            self.writer.stage([record for record, _ in known], vectors[[row for _, row in known]])
        return fresh

    def _embed(self, source: PictureSource, records: dict[int, ItemRecord]) -> None:
        """Stage what the model makes of these pictures."""
        if not records:
            return
        where = list(records)
        found = embed_pictures(
            cast(Encoder, self.maker),
            PictureSubset(source.pictures, where),
            batch_size=self.work.batch_size,
            on_error=self.work.on_error,
            upright=source.kind == "pictures",
            show_progress=False,
        )
        self.skipped += found.skipped
        self.embedded += len(found.vectors)
        self.writer.stage([records[where[i]] for i in found.kept.tolist()], found.vectors)


def _apply(
    stager: _Stager, meta: IndexMeta, positions: dict[str, int], gone: set[str], *, is_whole: bool
) -> Changes:
    """Embed the pictures at `positions` and finish; is_whole: nothing else is out of date."""
    writer, source = stager.writer, stager.source
    known = writer.table.versions()
    writer.begin(stager.maker, meta.source, replaces=False)
    stager.stage(list(positions.values()), reuses=True)
    bad = {item.name for item in stager.skipped}
    wanted = positions.keys() - bad
    gone = gone | (bad & known.keys())
    before = [] if is_whole else [b for b in writer.table.skipped() if b.name not in positions]
    skipped = before + (source.refused if is_whole else []) + stager.skipped
    writer.finish(meta, wanted=wanted, gone=gone, unchanged=stager.unchanged, skipped=skipped)
    writer.settle(words_of(stager.maker))
    new = wanted - {record.name for record in stager.unchanged}
    return Changes(
        added=sorted(new - known.keys()),
        changed=sorted(new & known.keys()),
        removed=sorted(gone),
        skipped=skipped,
        embedded=stager.embedded,
    )


def _reason(error: OSError) -> str:
    return f"cannot be read ({(error.strerror or str(error)).lower()})"


@contextmanager
def _nothing_or_all(writer: IndexWriter) -> Iterator[None]:
    """After an error, leave no folder behind in which nothing was done yet."""
    try:
        yield
    except Exception:
        writer.discard_if_empty()
        raise


def _describe(folder: Path, source: Source, maker: Maker, settings: IndexSettings) -> IndexMeta:
    """Return what the index will say; its numbers come when it is finished."""
    return IndexMeta(
        format=FORMAT,
        model=maker.name,
        model_path=str(maker.folder.resolve()) if maker.folder else None,
        model_fingerprint=maker.fingerprint,
        dim=maker.dim,
        count=0,
        source=path_from(folder, source.path),
        kind=source.kind,
        root=None if source.root is None else path_from(folder, source.root),
        stamp=source.stamp,
        segment="",
        rows=0,
        settings=settings,
    )


def _pictures_at(path: Path) -> list[Path]:
    return list_images(path) if path.is_dir() else [path]


def _name_below(root: Path, path: Path) -> str:
    try:
        return path.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        raise DataError(
            f"{path}: lies outside the indexed folder {root}; move it there, or index its folder"
        ) from None
