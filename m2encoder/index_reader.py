"""Open an index and search it, while others may change it.

Not for making and changing one (index.py).
"""

import sqlite3
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2encoder.encoder import BadItem
from m2encoder.errors import DataError
from m2encoder.index_damage import DAMAGE, explain, other_model
from m2encoder.index_files import DATABASE_NAME, OLD_NAMES, map_vectors, read_ann
from m2encoder.index_items import FoundItem, ItemTable
from m2encoder.index_meta import FORMAT, IndexMeta, Maker
from m2encoder.index_search import (
    BLOCK_ROWS,
    AnnIndex,
    Nearest,
    Rows,
    Vectors,
    exact_nearest,
    merge_nearest,
    row_bits,
)
from m2encoder.index_where import Where, compile_where


class Hit(NamedTuple):
    """One picture that was found."""

    score: float
    """Cosine similarity, -1..1."""
    name: str
    """Path below the source folder with forward slashes, or the pair's key in a shard folder."""
    path: Path | None
    """Where the picture lies; None inside a shard."""
    id: int
    """Stays with the name as long as the picture is in the index, also when it changes."""
    date: str | None
    """When it was taken, or else written: YYYY-MM-DD HH:MM:SS."""
    meta: dict[str, Any]


@dataclass(frozen=True)
class _Opened:
    """The files of one state of the index."""

    meta: IndexMeta
    vectors: Vectors
    live: Rows | None
    """Rows that a picture has; None: all of them."""
    live_bits: NDArray[np.uint8] | None
    """The same as `row_bits`."""
    ann: AnnIndex | None
    seen: int
    """`ItemTable.changes_elsewhere` when it was read."""


class ImageIndex:
    """An opened index. It sees what other processes change in it at the next search.

    Threads may share it; their searches wait for each other.
    """

    def __init__(self, folder: Path, table: ItemTable, opened: _Opened) -> None:
        self.folder = folder
        self._table, self._opened = table, opened
        self._lock = threading.Lock()
        self.close = weakref.finalize(self, table.close)
        """Close the files; also done when the index is no longer used."""

    @classmethod
    def open(cls, folder: Path, *, encoder: Maker) -> "ImageIndex":
        """Open an index for queries by `encoder`.

        Raises DataError if another model made it, or if files are missing or do not fit together.
        """
        table = _open_table(folder)
        try:
            with table.transaction():
                opened = _read(folder, table)
        except (*DAMAGE, DataError) as error:
            table.close()
            raise error if isinstance(error, DataError) else explain(folder, error) from None
        index = cls(folder, table, opened)
        if opened.meta.model_fingerprint != encoder.fingerprint:
            index.close()
            raise other_model(folder, opened.meta, encoder)
        return index

    @property
    def meta(self) -> IndexMeta:
        """What the index says about itself."""
        return self._opened.meta

    @property
    def names(self) -> list[str]:
        """The name of every picture."""
        return self._table.names()

    @property
    def skipped(self) -> list[BadItem]:
        """The pictures that could not be read."""
        return self._table.skipped()

    def counts(self) -> dict[str, int]:
        """Return how many pictures and dead rows there are, and how many were left out."""
        tables = ("items", "dead", "skipped", "excluded")
        with self._lock, self._reading():
            return {table: self._table.count_of(table) for table in tables}

    def __enter__(self) -> "ImageIndex":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def search(
        self, queries: NDArray[np.float32], k: int, *, where: str | Sequence[str] = ()
    ) -> list[list[Hit]]:
        """Return per query the `k` best pictures (all, if there are fewer), best first.

        queries: (Q, D) float32, unit norm. where: conditions that every hit meets, such as
        `date>=2024` (index_where.py). Raises ValueError on another shape, k < 1 or NaN, ConfigError
        on a wrong condition, DataError if the files were damaged meanwhile.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.meta.dim:
            raise ValueError(f"queries have shape {queries.shape}, expected (Q, {self.meta.dim})")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not np.isfinite(queries).all():
            raise ValueError("queries hold NaN or infinity; check the model's weights")
        condition = compile_where(where) if where else None
        with self._lock:
            found, items = self._search(queries, k, condition)
            return [self._hits(*of_query, items) for of_query in zip(*found, strict=True)]

    def check(self) -> None:
        """Compare database, vectors and FAISS index. Raises DataError where they differ."""
        with self._lock, self._reading() as opened:
            meta, rows, dead = self.meta, self._table.rows(), self._table.dead_rows()
            both = np.concatenate([rows, dead])
            if not np.array_equal(np.sort(both), np.arange(meta.rows)):
                raise ValueError(f"{len(rows):,} and {len(dead):,} of {meta.rows:,} rows")
            for start in range(0, len(rows), BLOCK_ROWS):
                norms = np.linalg.norm(opened.vectors[rows[start : start + BLOCK_ROWS]], axis=1)
                if not np.allclose(norms, 1, atol=1e-2):
                    raise ValueError("vectors are no unit vectors")
            if meta.ann is not None and opened.ann is not None:
                found = opened.ann.index.ntotal
                live = int((rows < meta.ann.rows).sum())
                if not live <= found == meta.ann.count <= meta.ann.rows:
                    raise ValueError(f"FAISS index of {found:,} vectors, {live:,} pictures")

    def _search(
        self, queries: Vectors, k: int, condition: Where | None
    ) -> tuple[Nearest, dict[int, FoundItem]]:
        """Search outside of a transaction, so that nobody waits for us; again after a change."""
        while True:
            with self._reading() as opened:
                rows = self._table.rows(*condition) if condition else None
            found = _nearest(opened, queries, k, rows)
            with self._reading() as now:
                if now is opened:
                    return found, self._table.at_rows(np.unique(found.rows))

    def _hits(self, scores: Any, rows: Any, items: dict[int, FoundItem]) -> list[Hit]:
        root = self.meta.root_path(self.folder)
        hits = []
        for score, row in zip(scores.tolist(), rows.tolist(), strict=True):
            item = items[row]
            path = None if root is None else root / item.name
            hits.append(Hit(score, item.name, path, item.id, item.date, item.meta))
        return hits

    @contextmanager
    def _reading(self) -> Iterator[_Opened]:
        """Keep the state still for the block, and see to it that it is the newest."""
        try:
            with self._table.transaction():
                if self._table.changes_elsewhere() != self._opened.seen:
                    before = self.meta
                    self._opened = _read(self.folder, self._table)
                    if self.meta.model_fingerprint != before.model_fingerprint:
                        raise DataError(
                            f"{self.folder}: was built again with another model, "
                            f"{self.meta.model}; open it again"
                        )
                yield self._opened
        except DAMAGE as error:
            raise explain(self.folder, error) from None


def read_meta(folder: Path) -> IndexMeta:
    """Return what an index says about itself.

    Raises DataError if there is none, or if it is unfinished, damaged or of another format.
    """
    table = _open_table(folder)
    try:
        with table.transaction():
            return _meta_of(folder, table)
    except DAMAGE as error:
        raise explain(folder, error) from None
    finally:
        table.close()


def is_finished(folder: Path) -> bool:
    """Say whether an index of this format can be opened there.

    False before the first build has ended, and of format 1. Raises DataError on a damaged one.
    """
    if not (folder / DATABASE_NAME).is_file():
        return False
    table = _open_table(folder)
    try:
        return table.exists() and table.meta() is not None
    except DAMAGE as error:
        raise explain(folder, error) from None
    finally:
        table.close()


def _nearest(opened: _Opened, queries: Vectors, k: int, rows: Rows | None) -> Nearest:
    """Return the best `k`, or all, of the pictures, or of those at `rows`: no empty places."""
    live = opened.live if rows is None else rows
    count = opened.meta.count if live is None else len(live)
    k = min(k, count)
    ann = opened.ann
    if ann is None or (rows is not None and count <= opened.meta.settings.few_rows):
        return exact_nearest(opened.vectors, queries, k, live)
    share = count / len(opened.vectors)
    bits = opened.live_bits if rows is None else row_bits(rows, len(opened.vectors))
    found = ann.nearest(opened.vectors, queries, k, allowed=bits, share=share)
    covered = opened.meta.ann.rows if opened.meta.ann else 0
    if covered < len(opened.vectors):
        tail = np.arange(covered, len(opened.vectors))
        tail = tail if live is None else live[live >= covered]
        found = merge_nearest(found, exact_nearest(opened.vectors, queries, k, tail), k)
    short = (found.rows < 0).any(axis=1)
    if short.any():  # its lists, or its way through the graph, held too few that are allowed
        exact = exact_nearest(opened.vectors, queries[short], k, live)
        found.scores[short], found.rows[short] = exact
    return found


def _open_table(folder: Path) -> ItemTable:
    if not (folder / DATABASE_NAME).is_file():
        if (folder / OLD_NAMES[0]).is_file():
            raise DataError(
                f"{folder}: index format 1, this version reads {FORMAT}; build it again with: "
                f"m2enc index MODEL PICTURES --out {folder}"
            )
        raise DataError(
            f"{folder}: no {DATABASE_NAME}, expected an index; build one with: "
            f"m2enc index MODEL PICTURES --out {folder}"
        )
    try:
        return ItemTable(folder, creates=False)
    except sqlite3.Error as error:
        raise explain(folder, error) from None


def _meta_of(folder: Path, table: ItemTable) -> IndexMeta:
    if table.exists():
        if (found := table.format()) != FORMAT:
            raise DataError(
                f"{folder}: index format {found}, this version reads {FORMAT}; build it again "
                f"with: m2enc index MODEL PICTURES --out {folder}"
            )
        if (meta := table.meta()) is not None:
            return meta
    raise DataError(
        f"{folder}: half-written index, nothing is finished yet; go on with: "
        f"m2enc index MODEL PICTURES --out {folder}"
    )


def _read(folder: Path, table: ItemTable) -> _Opened:
    """Map the files that the database names, inside a transaction."""
    seen = table.changes_elsewhere()
    meta = _meta_of(folder, table)
    dead = table.dead_rows()
    count = table.count()
    if not count == meta.count == meta.rows - len(dead):
        raise ValueError(f"{count:,} pictures, {meta.rows - len(dead):,} vectors")
    vectors = map_vectors(folder / meta.segment, meta.rows, meta.dim)
    ann = None
    if meta.ann is not None:
        index = read_ann(folder / meta.ann.file, meta.ann.bytes)
        if (index.d, index.ntotal) != (meta.dim, meta.ann.count):
            raise ValueError(f"{meta.ann.file} has {index.ntotal:,} vectors of width {index.d}")
        ann = AnnIndex(index, meta.ann.kind, meta.ann.probes)
    live = np.delete(np.arange(meta.rows), dead) if len(dead) else None
    bits = None if live is None else row_bits(live, meta.rows)
    return _Opened(meta, vectors, live, bits, ann, seen)
