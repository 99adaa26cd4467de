"""Shards that lie far away (s3://, gs://, https://, ...), kept whole in a bounded local folder.

Several processes may share the folder. Not for reading pairs (shard_files.py).
"""

import hashlib
import logging
import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError

from filelock import FileLock

from m2encoder.data_pipeline.shard_files import PackedShard
from m2encoder.errors import ConfigError, DataError
from m2encoder.shards import INDEX_NAME, ShardIndex

logger = logging.getLogger(__name__)

ATTEMPTS = 3
PIECE_BYTES = 1 << 20
TIMEOUT_S = 60
ABANDONED_S = 3600
"""Part of a copy that nobody has written to for so long was left by a process that died."""


def is_remote(path: str) -> bool:
    """Say whether a path names a place beyond the file system, by its ://."""
    return "://" in path


class RemoteFolder:
    """A shard folder far away; each shard is copied whole into `cache` when it is needed.

    A copy gets its name when it is complete and its hash is the index's, so the same shard of two
    runs is kept once, and changed shards are never mixed up. The copies together take at most
    cache_gb (10^9 bytes); those used longest ago go first.
    Raises ConfigError where the address cannot be used here, DataError where it does not answer.
    """

    def __init__(self, url: str, cache: Path, cache_gb: float) -> None:
        self.url = url.rstrip("/")
        self.cache, self.limit_bytes = cache, int(cache_gb * 1e9)
        self._ahead: ThreadPoolExecutor | None = None
        self._asked: set[str] = set()
        cache.mkdir(parents=True, exist_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ahead": None, "_asked": set()}

    def index(self) -> ShardIndex:
        """Fetch the index anew. Raises DataError."""
        folder = self.cache / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        folder.mkdir(exist_ok=True)
        temporary = folder / f"{INDEX_NAME}.{os.getpid()}.tmp"
        with temporary.open("wb") as file:
            self._fetch(INDEX_NAME, file)
        os.replace(temporary, folder / INDEX_NAME)
        return ShardIndex.load(folder)

    def local(self, shard: PackedShard) -> Path:
        """Return the shard's copy, made now if there is none. Raises DataError, ConfigError."""
        path = self._path(shard)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                self._bring(shard, path)
            with suppress(FileNotFoundError):
                now = time.time_ns()  # finer than the kernel's own clock for files
                os.utime(path, ns=(now, now))  # the last use, by which others see what may go
        return path

    def prefetch(self, shard: PackedShard) -> bool:
        """Begin to copy the shard in the background, once; True if it is here already."""
        if self._path(shard).is_file():
            return True
        if shard.name not in self._asked:
            self._ahead = self._ahead or ThreadPoolExecutor(2, thread_name_prefix="shards")
            self._asked.add(shard.name)
            self._ahead.submit(self._bring_ahead, shard)
        return False

    def _bring_ahead(self, shard: PackedShard) -> None:
        try:
            self.local(shard)
        except (DataError, ConfigError, OSError) as error:
            logger.debug("%s", error)  # whoever reads from it meets the same, and says so
        finally:
            self._asked.discard(shard.name)

    def _path(self, shard: PackedShard) -> Path:
        return self.cache / f"{shard.sha256}.tar"

    def _bring(self, shard: PackedShard, path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        self._make_room(shard, temporary)
        with temporary.open("r+b") as file:
            sha256 = self._fetch(shard.name, file)
            found = file.tell()
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        if (found, sha256) != (shard.size_bytes, shard.sha256):
            temporary.unlink()
            raise DataError(
                f"{self.url}/{shard.name}: {found:,} bytes with sha256 {sha256[:12]}… found, the "
                f"index says {shard.size_bytes:,} and {shard.sha256[:12]}…; restore the shard"
            )
        os.replace(temporary, path)

    def _make_room(self, shard: PackedShard, temporary: Path) -> None:
        """Remove what was used longest ago, and take the shard's size before others do."""
        if shard.size_bytes > self.limit_bytes:
            raise ConfigError(
                f"{self.url}/{shard.name} takes {shard.size_bytes / 1e9:.2f} GB, data.cache_gb is "
                f"{self.limit_bytes / 1e9:.2f}; raise it"
            )
        with FileLock(self.cache / "room.lock"):
            copies = {path: path.stat() for path in _copies(self.cache) if path != temporary}
            total = sum(stat.st_size for stat in copies.values())
            for path in sorted(copies, key=lambda path: copies[path].st_mtime_ns):
                if total + shard.size_bytes <= self.limit_bytes:
                    break
                is_left = time.time() - copies[path].st_mtime > ABANDONED_S
                if path.suffix == ".tar" or is_left:  # who has it open may read on
                    path.unlink(missing_ok=True)
                    total -= copies[path].st_size
            with temporary.open("wb") as file:
                file.truncate(shard.size_bytes)

    def _fetch(self, name: str, target: IO[bytes]) -> str:
        """Write a file of the folder to target and return its sha256; tries again on failure."""
        url = f"{self.url}/{name}"
        for attempt in range(1, ATTEMPTS + 1):
            try:
                digest = hashlib.sha256()
                with _opened(url) as source:
                    target.seek(0)
                    while piece := source.read(PIECE_BYTES):
                        digest.update(piece)
                        target.write(piece)
                return digest.hexdigest()
            except FileNotFoundError:
                break
            except OSError as error:
                if isinstance(error, HTTPError) and error.code in (404, 410):
                    break
                if attempt == ATTEMPTS:
                    raise DataError(
                        f"{url}: cannot be fetched ({error}), tried {ATTEMPTS} times; "
                        f"check address, rights and network"
                    ) from None
                time.sleep(attempt)
        raise DataError(f"{url}: not there, expected a shard folder; check the address")


def _copies(cache: Path) -> list[Path]:
    return [*cache.glob("*.tar"), *cache.glob("*.tmp")]


def _opened(url: str) -> AbstractContextManager[IO[bytes]]:
    """Open an address for reading: the web with the standard library, the rest with fsspec."""
    if url.startswith(("http://", "https://")):
        return urllib.request.urlopen(url, timeout=TIMEOUT_S)
    import fsspec

    try:
        return fsspec.open(url, "rb")  # pyright: ignore[reportReturnType]
    except (ImportError, ValueError) as error:  # a package is missing, or no such protocol
        raise ConfigError(f"{url}: cannot be read here ({error}); install what it names") from None
