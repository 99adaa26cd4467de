"""Vectors on disk, so that a model encodes the same data once and goes on after a kill.

Not for search (index.py), nor for vectors that people take away (embed_to_folder).
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from m2encoder.errors import DataError
from m2encoder.folders import check_replaceable
from m2encoder.vector_table import BAD, MISSING, TRUNCATED, Span, VectorTable

logger = logging.getLogger(__name__)

FORMAT = 1
MARKER = "m2enc-vectors.json"
KEY_NAME = "key.json"
KEY_PATTERN = re.compile(r"[0-9a-f]{40}")
PART_SUFFIX = ".part"
PRUNED_SUFFIX = ".pruned"
FLUSH_BYTES = 64 * 2**20
ATTEMPTS = 5
"""How often a part is written when others prune the folder at that very moment."""


@dataclass(frozen=True)
class VectorKey:
    """What decides vectors. Two keys that differ in anything share no file."""

    kind: Literal["pictures", "texts"]
    model: str
    """`Encoder.fingerprint`: weights, shape, tokenizer, picture settings."""
    preprocessing: str
    """What is done to an item before the model, beside what the fingerprint covers."""
    precision: str
    content: str
    """Hash of the items and their order."""
    count: int
    dim: int

    @property
    def digest(self) -> str:
        """Name of the key, 40 hex digits."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:40]


class StoreEntry(NamedTuple):
    """Vectors of one key, as `VectorStore.entries` finds them."""

    folder: Path
    key: VectorKey | None
    """None if it cannot be read; `prune` removes such entries."""
    size_bytes: int
    used: float
    """When it was last opened, in seconds since 1970."""


class VectorStore:
    """A folder of vectors by key; made at the first write.

    flush_s: how long computed vectors may wait before they are written: what a kill can lose.
    Raises DataError if the folder holds something else.
    """

    def __init__(self, folder: str | Path, *, flush_s: float = 10.0) -> None:
        self.folder = Path(folder)
        self.flush_s = flush_s
        check_replaceable(self.folder, marker=MARKER)

    def open(self, key: VectorKey) -> "StoredVectors":
        """Return what is stored under a key, perhaps nothing yet."""
        return StoredVectors(self, key)

    def entries(self) -> list[StoreEntry]:
        """Return every key's vectors, the least recently used first."""
        if not self.folder.is_dir():
            return []
        found = [_entry(path) for path in self.folder.iterdir() if KEY_PATTERN.fullmatch(path.name)]
        return sorted(found, key=lambda entry: (entry.used, entry.folder.name))

    def size_bytes(self) -> int:
        """Return how much space all vectors take."""
        return sum(entry.size_bytes for entry in self.entries())

    def prune(self, *, max_bytes: int) -> int:
        """Remove what is damaged, then the least recently used, until `max_bytes` are not exceeded.

        Returns how many bytes were freed. A running job whose vectors are removed computes on.
        """
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, got {max_bytes:,}")
        entries = self.entries()
        size, freed = sum(entry.size_bytes for entry in entries), 0
        for entry in sorted(entries, key=lambda entry: entry.key is not None):
            if entry.key is None or size - freed > max_bytes:
                # Renamed first: nobody writes into what goes.
                with _writing(entry.folder), suppress(FileNotFoundError):
                    away = f"{entry.folder.name}.{secrets.token_hex(4)}{PRUNED_SUFFIX}"
                    entry.folder.rename(entry.folder.with_name(away))
                freed += entry.size_bytes
        for gone in self.folder.glob(f"*{PRUNED_SUFFIX}"):
            shutil.rmtree(gone, ignore_errors=True)
        return freed

    def make(self) -> None:
        """Create the folder and the file that says whose it is."""
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / MARKER).is_file():
                _write_whole(self.folder / MARKER, json.dumps({"format": FORMAT}).encode())


class StoredVectors:
    """The vectors of one key on disk, in parts: each a span of rows, complete or absent."""

    def __init__(self, store: VectorStore, key: VectorKey) -> None:
        self.store, self.key = store, key
        self.folder = store.folder / key.digest
        self._waiting: Span | None = None  # rows not written yet
        self._since = time.monotonic()

    def load(self, table: VectorTable) -> None:
        """Fill a table with every row that is stored; damaged parts are removed and logged."""
        parts = sorted(self._parts(), key=lambda part: (part[1].first, -part[1].last))
        for path, span in parts:
            if table.has(span):  # left over from before a larger part was written
                continue
            try:
                _read_part(path, span, self.key, table)
            except FileNotFoundError:  # another process has just joined the parts
                table.forget(span)
            except (OSError, ValueError, KeyError, TypeError) as error:
                table.forget(span)
                logger.warning("%s: damaged (%s), computed again", path, error)
                with suppress(OSError):
                    path.unlink()
        with suppress(OSError):
            os.utime(self.folder / KEY_NAME)  # when it was last used

    def add(self, table: VectorTable, span: Span) -> None:
        """Take note of new rows; written now and then. Raises DataError if that is impossible."""
        if self._waiting is not None and self._waiting.last != span.first:
            self.flush(table)
        first = span.first if self._waiting is None else self._waiting.first
        self._waiting = Span(first, span.last)
        size = len(self._waiting) * table.vectors.shape[1] * 4
        if size >= FLUSH_BYTES or time.monotonic() - self._since >= self.store.flush_s:
            self.flush(table)

    def flush(self, table: VectorTable) -> None:
        """Write the rows that wait."""
        if self._waiting is not None:
            self._write(table, self._waiting)
        self._waiting, self._since = None, time.monotonic()

    def finish(self, table: VectorTable) -> None:
        """See to it that one part holds all rows, and remove the others."""
        self._waiting = None
        whole = Span(0, len(table))
        parts = {span: path for path, span in self._parts()}
        if whole not in parts and len(whole):
            self._write(table, whole)
        with _writing(self.folder):
            for span, path in parts.items():
                if span != whole:
                    path.unlink(missing_ok=True)
        for path in self.folder.glob("*.tmp"):  # left by a kill; a day, in case others write now
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > 86_400:
                    path.unlink()

    def _parts(self) -> Iterator[tuple[Path, Span]]:
        for path in self.folder.glob(f"*{PART_SUFFIX}"):
            numbers = path.stem.split("-")
            if len(numbers) == 2 and all(number.isdecimal() for number in numbers):
                span = Span(*map(int, numbers))
                if span.first < span.last <= self.key.count:
                    yield path, span

    def _write(self, table: VectorTable, span: Span) -> None:
        for _ in range(ATTEMPTS):
            self.store.make()
            with _writing(self.folder), suppress(FileNotFoundError):
                self.folder.mkdir(exist_ok=True)
                if not (self.folder / KEY_NAME).is_file():
                    content = json.dumps(asdict(self.key), indent=2) + "\n"
                    _write_whole(self.folder / KEY_NAME, content.encode())
                path = self.folder / f"{span.first:010d}-{span.last:010d}{PART_SUFFIX}"
                _write_whole(path, *_part_content(table, span, self.key))
                return
        logger.debug("%s: removed again and again, its vectors are not kept", self.folder)


def _part_content(table: VectorTable, span: Span, key: VectorKey) -> list[Any]:
    """Return what a part holds: sha256 of the rest, a line of JSON, states, vectors."""
    reasons = {str(row): reason for row, reason in table.reasons_in(span).items()}
    about = {"format": FORMAT, "key": key.digest, "first": span.first, "last": span.last}
    header = json.dumps({**about, "bad": reasons}).encode() + b"\n"  # ASCII: no half characters
    rest = [header, table.states[span.rows].data, _raw(table, span)]
    digest = hashlib.sha256()
    for piece in rest:
        digest.update(piece)
    return [digest.hexdigest().encode() + b"\n", *rest]


def _read_part(path: Path, span: Span, key: VectorKey, table: VectorTable) -> None:
    """Fill the rows of `span`. Raises ValueError, KeyError, TypeError or OSError on damage."""
    with path.open("rb") as file:
        digest, header = file.readline().strip(), file.readline()
        about = json.loads(header)
        found = (about["format"], about["key"], about["first"], about["last"])
        if found != (FORMAT, key.digest, *span):
            raise ValueError("holds other vectors")
        states = table.states[span.rows]
        sizes = file.readinto(states.data), file.readinto(_raw(table, span))
        if sizes != (states.nbytes, len(states) * table.vectors.shape[1] * 4) or file.read(1):
            raise ValueError("its length is wrong")
    actual = hashlib.sha256(header)
    actual.update(states.data)
    actual.update(_raw(table, span))
    if actual.hexdigest().encode() != digest:
        raise ValueError("its sha256 is another")
    reasons = {int(row): str(reason) for row, reason in about["bad"].items()}
    if set(reasons) != {span.first + int(i) for i in np.flatnonzero(states == BAD)}:
        raise ValueError("its bad items do not fit")
    if ((states == MISSING) | (states > max(BAD, TRUNCATED))).any():
        raise ValueError("rows are missing")
    table.reasons.update(reasons)


def _raw(table: VectorTable, span: Span) -> memoryview:
    return table.vectors[span.rows].data.cast("B")


def _write_whole(path: Path, *pieces: Any) -> None:
    """Write a file under another name first: no reader and no kill ever sees half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{folder}: vectors cannot be kept there ({reason}); choose a folder that can be "
            f"written, or work without one"
        ) from None


def _entry(folder: Path) -> StoreEntry:
    size = 0
    with suppress(OSError):  # removed by another process
        for path in folder.iterdir():
            with suppress(OSError):
                size += path.stat().st_size
    path = folder / KEY_NAME
    try:
        key = VectorKey(**json.loads(path.read_text(encoding="utf-8")))
        whose = key if key.digest == folder.name else None
        return StoreEntry(folder, whose, size, path.stat().st_mtime)
    except (OSError, ValueError, TypeError):
        return StoreEntry(folder, None, size, 0.0)
