"""Pictures and captions in webdataset tars that others wrote, without an index of ours.

Read in place, nothing is unpacked. Not for our own shard folders (m2encoder.shards), nor for the
tars' layout (m2encoder.tar_members).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m2encoder.errors import DataError
from m2encoder.images import IMAGE_SUFFIXES
from m2encoder.tar_members import Member, grouped_members, list_tars

TEXT_MEMBERS = ("json", "txt", "cls")


class Sample(NamedTuple):
    """Members with the same name up to the first dot."""

    key: str
    image: Member | None
    others: dict[str, Member]
    """`json`, `txt` and `cls`, where there are such."""

    def text(self, kind: str) -> str:
        """Return a member as text. Raises DataError if it is not UTF-8."""
        try:
            return self.others[kind].read().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError(
                f"{self.others[kind].tar}: {self.key}.{kind} is not UTF-8; write it again"
            ) from None

    def record(self) -> dict[str, Any]:
        """Return the JSON member, or nothing where there is none. Raises DataError."""
        if "json" not in self.others:
            return {}
        try:
            value = json.loads(self.text("json"))
        except ValueError as error:
            raise DataError(
                f"{self.others['json'].tar}: {self.key}.json is not JSON ({error}); write it again"
            ) from None
        return value if isinstance(value, dict) else {}


class TarPictures:
    """The pictures of some samples, named by their keys."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.names = [sample.key for sample in samples]
        self.members = [sample.image for sample in samples if sample.image is not None]
        if len(self.members) != len(samples):
            raise ValueError("every sample needs a picture")

    def __len__(self) -> int:
        return len(self.members)

    def name(self, position: int) -> str:
        """The sample's key."""
        return self.names[position]

    def read(self, position: int) -> bytes:
        """Return its encoded bytes. Raises DataError where the tar was damaged since."""
        return self.members[position].read()

    def content_key(self) -> str:
        """Return a hash of keys, places and the tars' sizes and times; the pixels are not read."""
        digest = hashlib.sha256(b"tars")
        for tar in dict.fromkeys(member.tar for member in self.members):
            state = tar.stat()
            digest.update(f"{tar.name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
        for name, member in zip(self.names, self.members, strict=True):
            line = f"{name}\0{member.tar.name}\0{member.offset}\0{member.size}\n"
            digest.update(line.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def read_samples(path: Path) -> list[Sample]:
    """Return the samples of a tar, or of every tar below a folder, in order.

    Raises DataError where a tar is truncated or compressed, a key comes twice, or nothing is there.
    """
    samples: dict[str, Sample] = {}
    for tar in list_tars(path):
        for key, members in grouped_members(tar).items():
            if key in samples:
                raise DataError(
                    f"{tar}: sample {key!r} is in another tar too; keys must differ, write the "
                    f"tars again"
                )
            samples[key] = _sample(tar, key, members)
    if not samples:
        raise DataError(f"{path}: no samples in its tars, expected pictures and texts")
    return list(samples.values())


def _sample(tar: Path, key: str, members: dict[str, Member]) -> Sample:
    images = [m for extension, m in members.items() if f".{extension}" in IMAGE_SUFFIXES]
    if len(images) > 1:
        raise DataError(f"{tar}: sample {key!r} has {len(images)} pictures, expected one")
    others = {kind: members[kind] for kind in TEXT_MEMBERS if kind in members}
    return Sample(key, images[0] if images else None, others)
