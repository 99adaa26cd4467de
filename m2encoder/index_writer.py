"""Change an index step by step, each step whole or not at all; index_files.py tells the order.

Not for what to embed (index_update.py).
"""

import logging
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from m2encoder.encoder import BadItem
from m2encoder.errors import DataError
from m2encoder.index_choice import HNSW_LINKS, add_rows, choose_kind, train, tune
from m2encoder.index_damage import DAMAGE, explain, is_outside
from m2encoder.index_files import (
    DATABASE_NAME,
    LOCK_NAME,
    append_vectors,
    check_writable,
    copy_rows,
    is_index,
    map_vectors,
    next_name,
    phase,
    read_ann,
    remove_leftovers,
    write_ann,
    writer_lock,
)
from m2encoder.index_items import ItemRecord, ItemTable
from m2encoder.index_meta import FORMAT, Ann, IndexMeta, Maker, Staging
from m2encoder.index_search import Rows, Vectors

logger = logging.getLogger(__name__)

WORST_NORM_ERROR = 1e-3
Words = Callable[[], Vectors | None]
"""Gives vectors of texts to measure recall with, when they are needed."""


@contextmanager
def open_writer(folder: Path, *, anew: bool = False) -> Iterator["IndexWriter"]:
    """Open an index for changes that nobody else makes meanwhile.

    anew: make the folder if needed, and start over where what it holds is damaged or of another
    format. Raises DataError otherwise, or if the folder cannot be written or is somebody else's.
    """
    check_writable(folder)
    if not anew and not is_index(folder):
        raise DataError(
            f"{folder}: no index here; build one with: m2enc index MODEL PICTURES --out {folder}"
        )
    with writer_lock(folder):
        table = _open_table(folder, anew)
        try:
            yield IndexWriter(folder, table)
        except sqlite3.Error as error:
            raise explain(folder, error) from None
        finally:
            table.close()


def _open_table(folder: Path, anew: bool) -> ItemTable:
    table = ItemTable(folder, creates=True)
    try:
        table.create()
        found = table.format()
        if found != FORMAT:
            raise ValueError(f"format {found}, this version writes {FORMAT}")
        meta = table.meta()
        table.staging()
        if meta is not None and not anew:
            map_vectors(folder / meta.segment, meta.rows, meta.dim)
    except DAMAGE as error:
        table.close()
        if not anew or is_outside(error):
            raise explain(folder, error) from None
        logger.info("%s: damaged or of another format; starting over", folder)
        (folder / (DATABASE_NAME + "-journal")).unlink(missing_ok=True)
        (folder / DATABASE_NAME).unlink(missing_ok=True)
        table = ItemTable(folder, creates=True)
        table.create()
    return table


class IndexWriter:
    """An index that is being changed: `begin`, `stage` as often as needed, `finish`, `settle`."""

    def __init__(self, folder: Path, table: ItemTable) -> None:
        self.folder, self.table = folder, table
        self.meta = table.meta()
        self._staging: Staging | None = None
        self._replaces = True

    def begin(self, maker: Maker, source: str, *, replaces: bool) -> None:
        """Start, or go on where an interrupted change with the same model and source stopped.

        replaces: make all vectors anew; the old index stays in use until `finish`.
        """
        old, meta = self.table.staging(), self.meta
        self._replaces = replaces or meta is None
        remove_leftovers(self.folder, self._files(old))
        same_file = old is not None and meta is not None and old.segment == meta.segment
        if (
            old is not None
            and (old.fingerprint, old.source) == (maker.fingerprint, source)
            and same_file != self._replaces
            and self._is_there(old, maker.dim)
        ):
            logger.info("going on with %s vectors of an interrupted run", f"{self._staged(old):,}")
            self._staging = old
            return
        with self.table.transaction("IMMEDIATE"):
            self.table.set_staging(None)
        remove_leftovers(self.folder, self._files(None))
        if meta is None or self._replaces:
            segment, rows = next_name(self.folder, "vectors"), 0
        else:
            segment, rows = meta.segment, meta.rows
        self._staging = Staging(maker.fingerprint, source, segment, rows)

    def stage(self, records: Sequence[ItemRecord], vectors: Vectors) -> None:
        """Write vectors (N, D) and note whose they are. Raises DataError unless of unit norm."""
        if not len(records):
            return
        error = np.abs(np.linalg.norm(vectors, axis=1) - 1)
        if not (error <= WORST_NORM_ERROR).all():  # also where it is NaN
            at = int(np.argmax(~(error <= WORST_NORM_ERROR)))
            raise DataError(
                f"{records[at].name}: its vector has length {error[at] + 1:.3g} at best, expected "
                f"1; check the model's weights or normalise the vectors"
            )
        staging = self._begun()
        append_vectors(self.folder / staging.segment, staging.rows, vectors)
        phase("vectors written")
        with self.table.transaction("IMMEDIATE"):
            self.table.stage(records, staging.rows)
            self._staging = replace(staging, rows=staging.rows + len(records))
            self.table.set_staging(self._staging)
            phase("staging")
        phase("staged")

    def finish(
        self,
        meta: IndexMeta,
        *,
        wanted: Collection[str],
        gone: Collection[str] = (),
        unchanged: Sequence[ItemRecord] = (),
        skipped: Sequence[BadItem] | None = None,
        excluded: Collection[str] = (),
    ) -> IndexMeta:
        """Make the staged pictures of names in `wanted` part of the index, in one transaction.

        meta: what the index says from now on; count, rows, segment and ann are filled in. gone:
        names to drop. unchanged: written again, but the same pictures. skipped: those that could
        not be read; None leaves the list as it is. excluded: names that updates leave out.
        """
        staging, old = self._begun(), self.meta
        keeps = old is not None and not self._replaces
        with self.table.transaction("IMMEDIATE"):
            staged = self.table.versions("staged").keys()
            self.table.delete(staged - set(wanted), "staged")
            if not keeps:  # every row of the old file goes, and what was excluded comes back
                gone = self.table.versions().keys() - (staged & set(wanted))
                self.table.delete(self.table.names("excluded"), "excluded")
            self.table.delete(gone)
            self.table.take_staged()
            self.table.refresh(unchanged)
            self.table.exclude(excluded)
            if skipped is not None:
                self.table.set_skipped(skipped)
            live = self.table.rows()
            dead = np.ones(staging.rows, np.bool_)
            dead[live] = False
            self.table.set_dead(np.flatnonzero(dead))
            meta = replace(
                meta,
                count=len(live),
                rows=staging.rows,
                segment=staging.segment,
                ann=old.ann if old is not None and keeps else None,
            )
            self.table.set_meta(meta)
            self.table.set_staging(None)
            phase("finishing")
        phase("finished")
        self.meta = meta
        remove_leftovers(self.folder, self._files(None), old_format=True)
        phase("cleaned")
        return meta

    def settle(self, words: Words) -> IndexMeta:
        """Write vectors without dead rows and a new FAISS index, where there is enough to gain."""
        meta = self.meta
        if meta is None:
            raise ValueError("settle comes after finish")
        dead = self.table.dead_rows()
        kind = choose_kind(meta.count, meta.dim, meta.settings)
        old = meta.ann if meta.ann is not None and meta.ann.kind == kind else None
        slack = max(meta.settings.slack_rows, meta.rows // 20)
        moves = len(dead) > slack or (kind == "hnsw" and old is None and len(dead) > 0)
        if kind == "flat":
            is_stale = meta.ann is not None
        else:
            is_stale = old is None or _waiting(old, meta, dead) > slack
        if not moves and not is_stale:
            return meta
        vectors = map_vectors(self.folder / meta.segment, meta.rows, meta.dim)
        live_before = live = self.table.rows()
        segment = meta.segment
        if moves:
            segment, live = next_name(self.folder, "vectors"), np.arange(meta.count)
            copy_rows(vectors, live_before, self.folder / segment)
            vectors = map_vectors(self.folder / segment, meta.count, meta.dim)
            phase("vectors copied")
        rows = len(vectors)
        ann = None
        if kind != "flat":
            index, facts = self._fill(kind, old, meta, vectors, live, dead, moves)
            queries = words()
            if queries is None and old is not None:  # what texts need was measured before
                facts = replace(facts, probes=old.probes)
            facts = tune(index, facts, vectors, live, meta.settings, queries)
            ann = replace(facts, bytes=write_ann(index, self.folder / facts.file))
            phase("index written")
        with self.table.transaction("IMMEDIATE"):
            if moves:
                self.table.renumber(live_before)
                self.table.set_dead(np.zeros(0, np.int64))
            self.meta = replace(meta, segment=segment, rows=rows, ann=ann)
            self.table.set_meta(self.meta)
            phase("switching")
        phase("switched")
        remove_leftovers(self.folder, self._files(None))
        phase("cleaned")
        return self.meta

    def discard_if_empty(self) -> None:
        """Remove what was begun for a new index, if nothing was staged yet."""
        if self.meta is None and self.table.staging() is None:
            self.table.close()
            remove_leftovers(self.folder, ())
            (self.folder / DATABASE_NAME).unlink(missing_ok=True)
            with suppress(OSError):  # Windows removes no open file
                (self.folder / LOCK_NAME).unlink(missing_ok=True)
                self.folder.rmdir()  # unless it holds something else

    def _fill(
        self,
        kind: Literal["ivf", "hnsw"],
        old: Ann | None,
        meta: IndexMeta,
        vectors: Vectors,
        live: Rows,
        dead: Rows,
        moved: bool,
    ) -> tuple[Any, Ann]:
        """Return a FAISS index of the vectors at `live`, trained anew or from the old one."""
        trained_on = meta.count
        index = self._reopen(old) if old and meta.count < 2 * old.trained_on else None
        if index is None or old is None:
            index = train(vectors, live, kind, meta.settings)
            phase("trained")
            add_rows(index, vectors, live)
        else:
            trained_on = old.trained_on
            if moved:
                index.reset()
                add_rows(index, vectors, live)
            else:
                index.remove_ids(dead[dead < old.rows])
                add_rows(index, vectors, live[live >= old.rows])
        facts = Ann(
            file=next_name(self.folder, "ann"),
            bytes=0,
            kind=kind,
            rows=len(vectors),
            count=index.ntotal,
            trained_on=trained_on,
            lists=HNSW_LINKS if kind == "hnsw" else index.nlist,
            probes=1,
            recall_at_10={},
            queries={},
        )
        return index, facts

    def _reopen(self, ann: Ann) -> Any:
        try:
            return read_ann(self.folder / ann.file, ann.bytes, to_change=True)
        except DAMAGE as error:
            logger.warning("%s: damaged, making it anew (%s)", ann.file, error)
            return None

    def _begun(self) -> Staging:
        if self._staging is None:
            raise ValueError("begin comes before stage and finish")
        return self._staging

    def _staged(self, staging: Staging) -> int:
        return staging.rows - (0 if self._replaces or self.meta is None else self.meta.rows)

    def _files(self, staging: Staging | None) -> list[str]:
        files = [] if staging is None else [staging.segment]
        if self.meta is not None:
            files.append(self.meta.segment)
            files += [] if self.meta.ann is None else [self.meta.ann.file]
        return files

    def _is_there(self, staging: Staging, dim: int) -> bool:
        path = self.folder / staging.segment
        return path.is_file() and path.stat().st_size >= staging.rows * dim * 4


def _waiting(ann: Ann, meta: IndexMeta, dead: Rows) -> int:
    """Return how many rows the FAISS index has too few or too many."""
    too_many = ann.count - (ann.rows - int((dead < ann.rows).sum()))
    return (meta.rows - ann.rows) + too_many
