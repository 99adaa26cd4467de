"""Where pictures come from, without opening them: files, a folder, a shard folder, bytes in memory.

Not for decoding (images.py) nor for encoding (embed.py).
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from m2encoder.images import ImageSource, list_images
from m2encoder.shards import ShardReader


def content_hash(kind: str, *parts: str) -> str:
    """Return the sha256 of a list of strings, as hex; other lists and kinds have others."""
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")  # names may hold bytes that are no text
        digest.update(len(raw).to_bytes(8) + raw)
    return digest.hexdigest()


class Pictures(Protocol):
    """A list of pictures that are read one by one; picklable, so that processes can share it."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def name(self, position: int) -> str:
        """What to call picture `position` in results and errors."""
        ...

    def read(self, position: int) -> ImageSource:
        """Return its path or its encoded bytes. Raises DataError where the source is damaged."""
        ...

    def content_key(self) -> str:
        """Return a hash of what decides names, order and pixels; another one is other data."""
        ...


class FilePictures:
    """Picture files, each under a name of its own. One that is missing is refused when opened."""

    def __init__(self, names: Sequence[str], paths: Sequence[Path]) -> None:
        if len(names) != len(paths):
            raise ValueError(f"{len(names):,} names for {len(paths):,} paths")
        self.names, self.paths = list(names), list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, position: int) -> str:
        """The name given to it."""
        return self.names[position]

    def read(self, position: int) -> Path:
        """Return its path."""
        return self.paths[position]

    def content_key(self) -> str:
        """Return a hash of names, sizes and times of change; the pixels are not read."""
        return content_hash("files", *map(self._state, range(len(self))))

    def _state(self, position: int) -> str:
        path = self.paths[position]
        try:
            found = path.stat()
        except OSError:
            return f"{self.names[position]}\0missing"
        if not os.access(path, os.R_OK):  # what could not be read is remembered as bad
            return f"{self.names[position]}\0unreadable"
        return f"{self.names[position]}\0{found.st_size}\0{found.st_mtime_ns}"


class FolderPictures(FilePictures):
    """Every picture below a folder, in the order of `list_images`.

    Named by the path below the folder, with forward slashes. Raises DataError if it is missing; an
    empty one has no pictures.
    """

    def __init__(self, folder: Path) -> None:
        paths = list_images(folder)
        super().__init__([path.relative_to(folder).as_posix() for path in paths], paths)
        self.folder = folder


class ShardPictures:
    """The pictures of a shard folder, named by their keys."""

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, position: int) -> str:
        """The pair's key."""
        return self.reader.key(position)

    def read(self, position: int) -> bytes:
        """Return its encoded bytes. Raises DataError on a damaged shard."""
        return self.reader[position].image

    def content_key(self) -> str:
        """Return a hash of the shards' sha256 as their index lists them; the tars are not read."""
        return content_hash("shards", *(shard.sha256 for shard in self.reader.index.shards))


class ListedBytes:
    """Encoded pictures that are in memory already."""

    def __init__(self, names: Sequence[str], contents: Sequence[bytes]) -> None:
        if len(names) != len(contents):
            raise ValueError(f"{len(names):,} names for {len(contents):,} pictures")
        self.names, self.contents = list(names), list(contents)

    def __len__(self) -> int:
        return len(self.contents)

    def name(self, position: int) -> str:
        """The name given to it."""
        return self.names[position]

    def read(self, position: int) -> bytes:
        """Return its encoded bytes."""
        return self.contents[position]

    def content_key(self) -> str:
        """Return a hash of names and bytes."""
        digests = (hashlib.sha256(content).hexdigest() for content in self.contents)
        states = (f"{name}\0{digest}" for name, digest in zip(self.names, digests, strict=True))
        return content_hash("bytes", *states)


class PictureSubset:
    """Some of the pictures of another list, in the order of `rows`."""

    def __init__(self, pictures: Pictures, rows: Iterable[int]) -> None:
        self.pictures, self.rows = pictures, [int(row) for row in rows]
        if wrong := [row for row in self.rows if not 0 <= row < len(pictures)]:
            raise ValueError(f"row {wrong[0]:,} is asked for, there are {len(pictures):,} pictures")

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, position: int) -> str:
        """Its name in the other list."""
        return self.pictures.name(self.rows[position])

    def read(self, position: int) -> ImageSource:
        """Read it from the other list."""
        return self.pictures.read(self.rows[position])

    def content_key(self) -> str:
        """Return a hash of the other list's key and the rows."""
        return content_hash("subset", self.pictures.content_key(), *map(str, self.rows))
