"""The database of an index: names, stable ids and metadata of its pictures, and what counts.

Not for the vectors (index_files.py); the two meet in `row`, a picture's place among the vectors.
"""

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2encoder.encoder import BadItem
from m2encoder.index_files import DATABASE_NAME
from m2encoder.index_meta import FORMAT, IndexMeta, Staging

WAIT_S = 30.0
"""How long to wait for another process's transaction; they take milliseconds."""
RECORD = "name, row, version, sha256, size, date, meta"
# AUTOINCREMENT: the id of a picture that is gone is never given to another.
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS items (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, row INTEGER NOT NULL,
    version TEXT NOT NULL, sha256 TEXT, size INTEGER, date TEXT, meta TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS items_row ON items (row);
CREATE INDEX IF NOT EXISTS items_sha256 ON items (sha256);
CREATE TABLE IF NOT EXISTS staged (
    name TEXT PRIMARY KEY, row INTEGER NOT NULL, version TEXT NOT NULL, sha256 TEXT, size INTEGER,
    date TEXT, meta TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS dead (row INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS skipped (name TEXT PRIMARY KEY, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS excluded (name TEXT PRIMARY KEY);
INSERT OR IGNORE INTO state VALUES ('format', '{FORMAT}');
"""


class ItemRecord(NamedTuple):
    """What is kept of a picture beside its vector."""

    name: str
    version: str
    """Changes when the picture may have changed."""
    sha256: str | None
    """Of the encoded picture: equal bytes need not be embedded again."""
    size: int | None
    """Bytes of the encoded picture."""
    date: str | None
    """When it was taken, or else written: YYYY-MM-DD HH:MM:SS."""
    meta: dict[str, Any]


class FoundItem(NamedTuple):
    """A picture of the index, as a hit needs it."""

    id: int
    name: str
    date: str | None
    meta: dict[str, Any]


class ItemTable:
    """One connection to `index.sqlite`.

    Its methods raise sqlite3.Error, ValueError, KeyError or TypeError on a damaged file.
    """

    def __init__(self, folder: Path, *, creates: bool) -> None:
        path = folder / DATABASE_NAME
        address = path.absolute().as_uri()
        # Not "ro" where it can be helped: after a kill, SQLite must first undo what was half done.
        can_write = os.access(folder, os.W_OK) and os.access(path, os.W_OK)
        mode = "rwc" if creates else "rw" if can_write else "ro"
        self.db = sqlite3.connect(
            f"{address}?mode={mode}",
            uri=True,
            timeout=WAIT_S,
            isolation_level=None,  # transactions begin and end where we say
            check_same_thread=False,
        )

    def close(self) -> None:
        """Close the connection."""
        self.db.close()

    @contextmanager
    def transaction(self, kind: str = "DEFERRED") -> Iterator[None]:
        """Do all of the block or nothing; IMMEDIATE for writing."""
        self.db.execute(f"BEGIN {kind}")
        try:
            yield
            self.db.execute("COMMIT")
        finally:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")

    def create(self) -> None:
        """Make the tables, unless they are there."""
        with self.transaction("IMMEDIATE"):
            for statement in SCHEMA.split(";\n"):
                self.db.execute(statement)

    def exists(self) -> bool:
        """Say whether the tables are there: a kill may come before."""
        query = "SELECT count(*) FROM sqlite_master WHERE name = 'state'"
        return bool(self.db.execute(query).fetchone()[0])

    # ── state ──

    def format(self) -> int:
        """The format of the folder. Raises sqlite3.OperationalError where there are no tables."""
        return int(self._state("format") or 0)

    def meta(self) -> IndexMeta | None:
        """What the finished index says; None before the first one is finished."""
        raw = self._state("meta")
        return None if raw is None else IndexMeta.from_json(raw)

    def set_meta(self, meta: IndexMeta) -> None:
        """Say what the finished index is from now on."""
        self._set_state("meta", meta.to_json())

    def staging(self) -> Staging | None:
        """What is staged, if anything is."""
        raw = self._state("staging")
        return None if raw is None else Staging(**raw)

    def set_staging(self, staging: Staging | None) -> None:
        """Say what is staged; None forgets the staged pictures."""
        if staging is None:
            self.db.execute("DELETE FROM staged")
            self.db.execute("DELETE FROM state WHERE key = 'staging'")
        else:
            self._set_state("staging", asdict(staging))

    def changes_elsewhere(self) -> int:
        """A number that changes when another connection has written."""
        self.count_of("state")  # inside a transaction, what follows is of this moment
        return self.db.execute("PRAGMA data_version").fetchone()[0]

    def _state(self, key: str) -> Any:
        found = self.db.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()
        return None if found is None else json.loads(found[0])

    def _set_state(self, key: str, value: Any) -> None:
        text = json.dumps(value, ensure_ascii=False)
        self.db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (key, text))

    # ── reading ──

    def count(self) -> int:
        """How many pictures can be found."""
        return self.count_of("items")

    def count_of(self, table: str) -> int:
        """How many rows a table has."""
        return self.db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]

    def rows(self, condition: str = "1", parameters: Sequence[Any] = ()) -> NDArray[np.int64]:
        """Return the rows of the pictures that meet an SQL condition, ascending."""
        query = f"SELECT row FROM items WHERE {condition} ORDER BY row"
        found = self.db.execute(query, tuple(parameters))
        return np.fromiter((row for (row,) in found), np.int64)

    def dead_rows(self) -> NDArray[np.int64]:
        """Return the rows below `meta.rows` that no picture has, ascending."""
        found = self.db.execute("SELECT row FROM dead ORDER BY row")
        return np.fromiter((row for (row,) in found), np.int64)

    def at_rows(self, rows: Iterable[int]) -> dict[int, FoundItem]:
        """Return the pictures at these rows."""
        # As one JSON value: the statement stays the same, whatever the number of rows.
        found = self.db.execute(
            "SELECT row, id, name, date, meta FROM items "
            "WHERE row IN (SELECT value FROM json_each(?))",
            (json.dumps([int(row) for row in rows]),),
        )
        return {row: FoundItem(i, name, date, json.loads(m)) for row, i, name, date, m in found}

    def versions(self, table: str = "items") -> dict[str, str]:
        """Return name and version of every picture, of `items` or `staged`."""
        return dict(self.db.execute(f"SELECT name, version FROM {table}"))

    def names(self, table: str = "items") -> list[str]:
        """Return the names in `items` (by row), `skipped` or `excluded` (by name)."""
        order = "row" if table in ("items", "staged") else "name"
        return [name for (name,) in self.db.execute(f"SELECT name FROM {table} ORDER BY {order}")]

    def names_like(self, pattern: str) -> list[str]:
        """Return the names that are, or match as a glob, `pattern`."""
        query = "SELECT name FROM items WHERE name = ? OR name GLOB ? ORDER BY row"
        return [name for (name,) in self.db.execute(query, (pattern, pattern))]

    def same_content(self, record: ItemRecord) -> tuple[str, int] | None:
        """Return name and row of a picture with exactly these bytes: itself, if it is one."""
        query = "SELECT name, row FROM items WHERE sha256 = ? AND size = ? ORDER BY name != ?"
        return self.db.execute(query, (record.sha256, record.size, record.name)).fetchone()

    def skipped(self) -> list[BadItem]:
        """The pictures that could not be read, and why."""
        found = self.db.execute("SELECT name, reason FROM skipped ORDER BY name")
        return [BadItem(-1, name, reason) for name, reason in found]

    # ── writing, inside a transaction ──

    def stage(self, records: Sequence[ItemRecord], first_row: int) -> None:
        """Note pictures whose vectors lie from `first_row` on."""
        self.db.executemany(
            f"INSERT OR REPLACE INTO staged ({RECORD}) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (r.name, row, r.version, r.sha256, r.size, r.date, _to_json(r.meta))
                for row, r in enumerate(records, first_row)
            ),
        )

    def take_staged(self) -> None:
        """Make the staged pictures part of the index; one of a known name keeps its id."""
        updates = ", ".join(f"{column} = excluded.{column}" for column in RECORD.split(", ")[1:])
        self.db.execute(  # WHERE: without it SQLite reads ON as the condition of a join
            f"INSERT INTO items ({RECORD}) SELECT {RECORD} FROM staged WHERE 1 ORDER BY row "
            f"ON CONFLICT (name) DO UPDATE SET {updates}"
        )

    def refresh(self, records: Iterable[ItemRecord]) -> None:
        """Note what else is new about pictures that were written again but are the same."""
        rows = ((r.version, r.date, _to_json(r.meta), r.name) for r in records)
        self.db.executemany("UPDATE items SET version = ?, date = ?, meta = ? WHERE name = ?", rows)

    def delete(self, names: Iterable[str], table: str = "items") -> None:
        """Take pictures out of `items`, `staged` or `excluded`."""
        self.db.executemany(f"DELETE FROM {table} WHERE name = ?", ((name,) for name in names))

    def exclude(self, names: Iterable[str]) -> None:
        """Leave these pictures out of later updates."""
        rows = ((name,) for name in names)
        self.db.executemany("INSERT OR IGNORE INTO excluded VALUES (?)", rows)

    def set_skipped(self, skipped: Iterable[BadItem]) -> None:
        """Say which pictures could not be read."""
        self.db.execute("DELETE FROM skipped")
        rows = ((bad.name, bad.reason) for bad in skipped)
        self.db.executemany("INSERT OR REPLACE INTO skipped VALUES (?, ?)", rows)

    def set_dead(self, rows: NDArray[np.int64]) -> None:
        """Say which rows no picture has."""
        self.db.execute("DELETE FROM dead")
        self.db.executemany("INSERT INTO dead VALUES (?)", ((row,) for row in rows.tolist()))

    def renumber(self, old_rows: NDArray[np.int64]) -> None:
        """Give the picture at `old_rows[i]` the row i; ascending, so no two ever meet."""
        moves = ((new, old) for new, old in enumerate(old_rows.tolist()) if new != old)
        self.db.executemany("UPDATE items SET row = ? WHERE row = ?", moves)


def _to_json(meta: dict[str, Any]) -> str:
    return json.dumps(meta, ensure_ascii=False)
