"""What can be wrong with an index's files, as the one line that a user reads.

Not for a source that cannot be read (index_sources.py).
"""

import sqlite3
from pathlib import Path

from m2encoder.errors import DataError
from m2encoder.index_meta import IndexMeta, Maker

DAMAGE = (sqlite3.Error, OSError, ValueError, KeyError, TypeError, RuntimeError)
"""What reading a damaged index may raise."""
OUTSIDE = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
)


def explain(folder: Path, error: Exception) -> DataError:
    """Return the one line about an error that a folder's files raised."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if is_outside(error):
        return DataError(f"{folder}: cannot be read or written now ({reason}); try again")
    return DataError(
        f"{folder}: half-written or damaged index ({reason}); build it again with: "
        f"m2enc index MODEL PICTURES --out {folder}"
    )


def is_outside(error: Exception) -> bool:
    """Say whether the disk, its permissions or another process is to blame, not the content."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return isinstance(error, sqlite3.Error) and code in OUTSIDE


def other_model(folder: Path, meta: IndexMeta, encoder: Maker) -> DataError:
    """Return the one line about an index of another model or preprocessing."""
    return DataError(
        f"{folder}: index was made by {meta.model} ({meta.model_fingerprint[:12]}), you "
        f"opened it with {encoder.name} ({encoder.fingerprint[:12]}); build it again with: "
        f"m2enc index MODEL {meta.source_path(folder).resolve()} --out {folder}"
    )
