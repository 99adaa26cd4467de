"""Read single pairs of many shards from open files, and tell the kernel what comes next.

One file per shard and process, the least recently used closed. Not for the order (order.py), nor
for shards that are far away (remote.py).
"""

import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from m2encoder.data_pipeline.order import Run
from m2encoder.errors import DataError
from m2encoder.pair_record import Pair, read_pair
from m2encoder.shards import Shard

GAP_BYTES = 16_384
"""Members of a pair no further apart are read at once, with what lies between them."""


class PackedShard(NamedTuple):
    """One tar and where its pairs lie, small enough to hold for a whole data set."""

    name: str
    size_bytes: int
    sha256: str
    pairs: int
    entries: bytes
    """The index's entries of the pairs that count: JSON lines, compressed."""

    @classmethod
    def of(cls, shard: Shard, entries: list[dict[str, Any]]) -> "PackedShard":
        """Pack a shard, with those of its entries that count."""
        lines = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        packed = zlib.compress(lines.encode(), 1)
        return cls(shard.name, shard.bytes, shard.sha256, len(entries), packed)

    def lines(self) -> list[bytes]:
        """The entries, each still JSON."""
        return zlib.decompress(self.entries).split(b"\n") if self.pairs else []


class ShardFolder(Protocol):
    """Where shards lie."""

    def local(self, shard: PackedShard) -> Path:
        """Return a file with the shard's bytes. Raises DataError if it cannot be had."""
        ...

    def prefetch(self, shard: PackedShard) -> bool:
        """Begin to bring the shard here, if it is far away; True if it is here already."""
        ...


class LocalFolder:
    """Shards of a file system that every process sees."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def local(self, shard: PackedShard) -> Path:
        """The shard itself."""
        return self.path / shard.name

    def prefetch(self, shard: PackedShard) -> bool:
        """It is here."""
        return True


class _OpenShard(NamedTuple):
    path: Path
    file: int
    lines: list[bytes]


class ShardFiles:
    """The pairs of one source by shard and place; holds at most `limit` open files.

    May be pickled: the copy opens its own files.
    """

    def __init__(self, folder: ShardFolder, shards: list[PackedShard], *, limit: int) -> None:
        self.folder, self.shards, self.limit = folder, shards, limit
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def __del__(self) -> None:
        for shard in self._open.values():
            os.close(shard.file)

    def key(self, shard: int, place: int) -> str:
        """Return a pair's name; needs no file once the shard is open."""
        held = self._open.get(shard)
        return json.loads((held.lines if held else self.shards[shard].lines())[place])["key"]

    def pair(self, shard: int, place: int) -> Pair:
        """Read one pair. Raises DataError if its bytes are not what the index says."""
        held = self._opened(shard)
        entry = json.loads(held.lines[place])
        try:
            return read_pair(entry, _reader(held.file, entry))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{held.path}: pair {entry['key']!r} is damaged ({error}); restore the file"
            ) from None

    def read_ahead(self, run: Run) -> None:
        """Tell the kernel, or the store far away, that these pairs are read soon."""
        if not self.folder.prefetch(self.shards[run.shard]) or not hasattr(os, "posix_fadvise"):
            return  # on its way; or macOS, which has no such call
        try:
            held = self._opened(run.shard)
        except DataError:
            return  # reading its first pair says so
        begin, _ = _span(json.loads(held.lines[run.first]))
        _, end = _span(json.loads(held.lines[run.past - 1]))
        os.posix_fadvise(held.file, begin, max(0, end - begin), os.POSIX_FADV_WILLNEED)

    def _opened(self, shard: int) -> _OpenShard:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path = self.folder.local(self.shards[shard])
        try:
            file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError:
            raise DataError(
                f"{path}: missing shard, the index lists it; restore the file"
            ) from None
        except OSError as error:
            raise DataError(f"{path}: cannot be opened ({error.strerror}); restore it") from None
        self._open[shard] = _OpenShard(path, file, self.shards[shard].lines())
        while len(self._open) > self.limit:
            os.close(self._open.popitem(last=False)[1].file)
        return self._open[shard]


def _members(entry: dict[str, Any]) -> list[tuple[int, int]]:
    image = entry["image"][1:]
    return [tuple(m) for m in (image, entry.get("json"), entry.get("text")) if m]


def _span(entry: dict[str, Any]) -> tuple[int, int]:
    members = _members(entry)
    return min(offset for offset, _ in members), max(offset + size for offset, size in members)


def _reader(file: int, entry: dict[str, Any]) -> Callable[[int, int], bytes]:
    """Return read(offset, size) for an entry's members: one system call where they are close."""
    first, past = _span(entry)
    if past - first > sum(size for _, size in _members(entry)) + GAP_BYTES:
        return lambda offset, size: _pread(file, offset, size)
    data = _pread(file, first, past - first)
    return lambda offset, size: data[offset - first : offset - first + size]


def _pread(file: int, offset: int, size: int) -> bytes:
    data = os.pread(file, size, offset)
    if len(data) != size:
        raise ValueError(f"{len(data):,} bytes found, {size:,} expected")
    return data
