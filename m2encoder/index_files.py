"""The files of an index, written so that a kill at any moment leaves it as before or as after.

Not for what the database says (index_items.py) nor for what is searched (index_search.py).

An index folder holds
- `index.sqlite`: the only judge of what belongs to the index: names, ids and metadata of the
  pictures, which row of the vectors each has, and which files below count;
- `vectors-N.f32`: float32 vectors, one row each, only ever appended to. They are what a flat search
  reads, memory-mapped, and what approximate hits are scored with again;
- `ann-N.faiss`: for large indexes, a FAISS index whose ids are those rows. Never changed: a new one
  is written under the next number;
- `writer.lock`: held by the process that changes the index.

An update (1) appends vectors behind the last row that the database knows and flushes them to disk,
(2) notes them as staged, in one transaction; repeated for every few thousand pictures. (3) One
transaction makes the staged rows pictures, drops those that are gone and marks their rows dead.
(4) When many rows are dead or wait outside the FAISS index, new files are written and one
transaction switches to them. Killed before (3), the index is the old one, and the next update goes
on after the staged rows; killed after it, the new one. What a kill leaves over, the next change
removes (files that the database does not name) or writes over (rows that it does not know).
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from m2encoder.errors import DataError
from m2encoder.index_search import BLOCK_ROWS

logger = logging.getLogger(__name__)

DATABASE_NAME = "index.sqlite"
LOCK_NAME = "writer.lock"
OLD_NAMES = ("index_meta.json", "index.faiss", "items.jsonl")
"""The files of format 1."""
OURS = re.compile(
    r"index\.sqlite(-journal)?|writer\.lock|(vectors-\d+\.f32|ann-\d+\.faiss)(\.tmp)?"
)


def phase(name: str) -> None:
    """Say in the debug log how far a change has come; the tests kill at each of these."""
    logger.debug("phase: %s", name)


def is_index(folder: Path) -> bool:
    """Say whether a folder holds an index, finished or not, of this format or the old one."""
    return (folder / DATABASE_NAME).is_file() or (folder / OLD_NAMES[0]).is_file()


def check_writable(folder: Path) -> None:
    """Raise DataError if `folder` is a file, or holds files but no index."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file, expected a folder to write; choose another name")
    if not folder.is_dir() or is_index(folder):
        return
    if any(not OURS.fullmatch(path.name) for path in folder.iterdir()):
        raise DataError(
            f"{folder}: holds other files and no index, they might be lost; choose another folder"
        )


@contextmanager
def writer_lock(folder: Path) -> Iterator[None]:
    """Keep others from changing the index meanwhile. Raises DataError if somebody does already."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK_NAME, timeout=0):
            yield
    except Timeout:
        raise DataError(
            f"{folder}: another process is changing this index; try again when it has ended"
        ) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{folder}: cannot be written ({reason}); choose a folder that can"
        ) from None


def next_name(folder: Path, kind: str) -> str:
    """Return a name for a new `vectors` or `ann` file that no file has yet."""
    suffix = {"vectors": "f32", "ann": "faiss"}[kind]
    taken = [int(re.sub(r"\D", "", path.name[:-4])) for path in folder.glob(f"{kind}-*")]
    return f"{kind}-{max(taken, default=0) + 1:06d}.{suffix}"


def append_vectors(path: Path, at_row: int, vectors: NDArray[np.float32]) -> None:
    """Write rows from row `at_row` on, over leftovers if there are any, and flush to disk."""
    row_bytes = vectors.shape[1] * 4
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.seek(at_row * row_bytes)
        file.write(np.ascontiguousarray(vectors, "<f4").tobytes())
        file.flush()
        os.fsync(file.fileno())
    _flush_folder(path.parent)


def copy_rows(source: NDArray[np.float32], rows: NDArray[np.int64], path: Path) -> None:
    """Write some rows of a segment as a new segment, and flush it to disk."""
    with path.open("wb") as file:
        for start in range(0, len(rows), BLOCK_ROWS):
            file.write(source[rows[start : start + BLOCK_ROWS]].tobytes())
        file.flush()
        os.fsync(file.fileno())
    _flush_folder(path.parent)


def map_vectors(path: Path, rows: int, dim: int) -> NDArray[np.float32]:
    """Map the first `rows` rows, read-only. Raises OSError or ValueError if they are not there."""
    found = path.stat().st_size
    if found < rows * dim * 4:
        raise ValueError(f"{path.name} has {found:,} bytes, expected {rows * dim * 4:,}")
    if not rows:
        return np.zeros((0, dim), np.float32)
    return np.asarray(np.memmap(path, "<f4", "r", shape=(rows, dim)))


def write_ann(index: Any, path: Path) -> int:
    """Write a FAISS index and flush it to disk; returns its size in bytes."""
    if os.name == "nt":  # faiss opens no paths that are not ASCII there
        path.write_bytes(faiss.serialize_index(index).tobytes())
    else:
        faiss.write_index(index, str(path))
    with path.open("r+b") as file:
        os.fsync(file.fileno())
    _flush_folder(path.parent)
    return path.stat().st_size


def read_ann(path: Path, size_bytes: int, *, to_change: bool = False) -> Any:
    """Open a FAISS index, memory-mapped, or in memory where it will be changed.

    Raises OSError, ValueError or RuntimeError if it is not whole.
    """
    if (found := path.stat().st_size) != size_bytes:  # mapped, a short file would crash later
        raise ValueError(f"{path.name} has {found:,} bytes, expected {size_bytes:,}")
    if os.name == "nt":
        return faiss.deserialize_index(np.frombuffer(path.read_bytes(), np.uint8))
    return faiss.read_index(str(path), 0 if to_change else faiss.IO_FLAG_MMAP_IFC)


def remove_leftovers(folder: Path, keep: Iterable[str], *, old_format: bool = False) -> None:
    """Delete the vectors and FAISS files that are not named in `keep`, and those of format 1."""
    kept = {DATABASE_NAME, DATABASE_NAME + "-journal", LOCK_NAME, *keep}
    old = OLD_NAMES if old_format and (folder / OLD_NAMES[0]).is_file() else ()
    for path in folder.iterdir():
        if (OURS.fullmatch(path.name) and path.name not in kept) or path.name in old:
            try:
                path.unlink()
            except OSError as error:  # still mapped by a reader on Windows: the next change tries
                logger.debug("left %s for later: %s", path, error)


def size_on_disk(folder: Path) -> int:
    """Return the bytes of all files of an index."""
    return sum(path.stat().st_size for path in folder.iterdir() if OURS.fullmatch(path.name))


def _flush_folder(folder: Path) -> None:
    """Make new names last through a power cut."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
