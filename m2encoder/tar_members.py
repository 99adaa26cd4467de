"""Where the members of an uncompressed tar lie, grouped into samples as webdataset does.

Nothing is unpacked. Not for shard folders with an index (shards.py), which need no scan.
"""

import tarfile
from pathlib import Path
from typing import NamedTuple

from m2encoder.errors import DataError


class Member(NamedTuple):
    """Where one member's bytes lie."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the bytes. Raises DataError if the tar is gone or has become shorter."""
        try:
            with self.tar.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise DataError(f"{self.tar}: cannot be read ({error.strerror}); restore it") from None
        if len(data) != self.size:
            raise DataError(f"{self.tar}: has become shorter while it was read; restore it")
        return data


def list_tars(path: Path) -> list[Path]:
    """Return a tar, or the tars below a folder in order."""
    return [path] if path.is_file() else sorted(path.rglob("*.tar"))


def grouped_members(tar: Path) -> dict[str, dict[str, Member]]:
    """Return sample key -> lower-case extension -> member, in the tar's order.

    A key is a member's name up to the first dot of its last part. Raises DataError where a tar is
    cut off or compressed, or a member is there twice.
    """
    groups: dict[str, dict[str, Member]] = {}
    for name, member in _members(tar):
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")  # as webdataset does
        key = f"{folder}/{stem}" if folder else stem
        group = groups.setdefault(key.removeprefix("./"), {})
        if extension.lower() in group:
            raise DataError(f"{tar}: member {name!r} is there twice; write the tar again")
        group[extension.lower()] = member
    return groups


def _members(tar: Path) -> list[tuple[str, Member]]:
    """Return name and place of each file of a tar. Tarfile ends in silence where a tar does."""
    try:
        with tarfile.open(tar, "r:") as archive:
            infos = [info for info in archive.getmembers() if info.isreg()]
            end = archive.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{tar}: not a complete, uncompressed tar ({error}); restore it, or unpack it first"
        ) from None
    with tar.open("rb") as file:
        file.seek(end)
        closing = file.read(tarfile.BLOCKSIZE)
    if closing != bytes(tarfile.BLOCKSIZE):
        raise DataError(f"{tar}: damaged or cut off after {end:,} bytes; restore it")
    return [(info.name, Member(tar, info.offset_data, info.size)) for info in infos]
