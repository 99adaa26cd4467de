"""Pairs of one picture and its captions, in plain webdataset tars beside an `index.json`.

Readers trust the index (counts, byte offsets, sha256): webdataset loses samples silently on damaged
tars. Not for decoding pictures (images.py), nor for order and batches (data_pipeline/stream.py).
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from m2encoder.errors import DataError
from m2encoder.pair_record import Pair, languages_with_text, read_pair

INDEX_NAME = "index.json"
INDEX_FORMAT = 1
SHARD_GLOB = "shard-[0-9][0-9][0-9][0-9][0-9][0-9].tar"


@dataclass(frozen=True)
class Shard:
    """One tar: its size and hash, and where each pair's members lie in it."""

    name: str
    bytes: int
    sha256: str
    pairs: list[dict[str, Any]]
    """Per pair {"key", "image": [extension, offset, size], "json": [offset, size], "languages"};
    others' tars have further fields (pair_record.read_pair). Older indexes lack languages."""


@dataclass(frozen=True)
class ShardIndex:
    """What `index.json` holds."""

    format: int
    count: int
    captions: dict[str, int]
    """Captions per language."""
    attribution: str
    """Whom to name wherever the pictures are shown; empty if nobody asks for it."""
    shards: list[Shard]

    @classmethod
    def load(cls, folder: Path) -> "ShardIndex":
        """Read `folder/index.json`. Raises DataError if missing, damaged or of another format."""
        path = folder / INDEX_NAME
        if not path.is_file() and any(folder.glob("*.tar")):
            raise DataError(f"{path}: missing index; write it with: m2enc data index {folder}")
        if not path.is_file():
            raise DataError(f"{path}: missing index, expected a shard folder; check the path")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != INDEX_FORMAT:
                raise DataError(
                    f"{path}: index format {raw['format']}, this version reads {INDEX_FORMAT}; "
                    f"write the shards again"
                )
            index = cls(**raw | {"shards": [Shard(**shard) for shard in raw["shards"]]})
            listed = sum(len({entry["key"] for entry in shard.pairs}) for shard in index.shards)
            if listed != index.count:
                raise ValueError(f"lists {listed:,} keys, says {index.count:,}")
            return index
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{path}: damaged index ({reason}); write the shards again") from None

    def save(self, folder: Path) -> None:
        """Write `folder/index.json`, complete or not at all."""
        temporary = folder / (INDEX_NAME + ".tmp")
        temporary.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, folder / INDEX_NAME)


def write_shards(
    pairs: Iterable[Pair], out_dir: Path, *, pairs_per_shard: int = 1000, attribution: str = ""
) -> ShardIndex:
    """Write pairs as `shard-000000.tar`, ... and their index; the same pairs give the same bytes.

    Streams: no more than one shard's pictures are in memory. The index is written last, so a folder
    without one is unfinished; tars of an earlier, longer run are removed. Raises DataError on
    repeated keys, keys with a dot or slash, text that UTF-8 cannot hold, or no pairs at all.
    """
    if pairs_per_shard < 1:
        raise ValueError(f"pairs_per_shard must be at least 1, got {pairs_per_shard}")
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / INDEX_NAME).unlink(missing_ok=True)
    shards: list[Shard] = []
    captions: dict[str, int] = {}
    stream = _checked(pairs, captions)
    while chunk := list(islice(stream, pairs_per_shard)):
        shards.append(_write_shard(chunk, out_dir / f"shard-{len(shards):06d}.tar"))
    if not shards:
        raise DataError(f"{out_dir}: no pairs to write, expected at least one; check the source")
    for stale in set(out_dir.glob(SHARD_GLOB)) - {out_dir / shard.name for shard in shards}:
        stale.unlink()  # webdataset readers take every tar of the folder
    count = sum(len(shard.pairs) for shard in shards)
    index = ShardIndex(INDEX_FORMAT, count, dict(sorted(captions.items())), attribution, shards)
    index.save(out_dir)
    return index


def _checked(pairs: Iterable[Pair], captions: dict[str, int]) -> Iterator[Pair]:
    seen: set[str] = set()
    for pair in pairs:
        if not pair.key or set("./\\") & set(pair.key):
            raise DataError(
                f"key {pair.key!r}: expected a name without dots and slashes; rename it"
            )
        if pair.key in seen:
            raise DataError(f"key {pair.key!r} appears twice, keys must be unique; rename one")
        seen.add(pair.key)
        for language, texts in pair.captions.items():
            captions[language] = captions.get(language, 0) + len(texts)
        yield pair


def _write_shard(pairs: list[Pair], path: Path) -> Shard:
    entries: list[dict[str, Any]] = []
    temporary = path.with_suffix(".tar.tmp")
    with temporary.open("wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for pair in pairs:
            text = _encode_record(pair)
            image_at = _add_member(tar, f"{pair.key}.{pair.image_ext}", pair.image)
            json_at = _add_member(tar, f"{pair.key}.json", text)
            entries.append(
                {
                    "key": pair.key,
                    "image": [pair.image_ext, *image_at],
                    "json": list(json_at),
                    "languages": languages_with_text(pair.captions),
                }
            )
    os.replace(temporary, path)
    return Shard(path.name, path.stat().st_size, sha256_of(path), entries)


def _encode_record(pair: Pair) -> bytes:
    record = {"captions": pair.captions, "meta": pair.meta}
    try:
        return json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, from badly cut JSON
        raise DataError(
            f"key {pair.key!r}: text that UTF-8 cannot hold ({error.reason}); clean it first"
        ) from None


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    """Append one member with fixed owner and time; return (offset of its data, size), in bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return tar.offset - padded, len(data)


def sha256_of(path: Path) -> str:
    """Return the file's sha256 as hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardReader:
    """Random access to the pairs of a shard folder, by position in its index.

    Opening compares every tar's size with the index (missing and truncated shards are found before
    work starts); `verify` compares hashes. Raises DataError. Files are opened anew for each read,
    so worker processes may share a reader.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = ShardIndex.load(self.folder)
        self._where = [(s, p) for s, shard in enumerate(self.index.shards) for p in shard.pairs]
        for shard in self.index.shards:
            self._check_size(shard)

    def _check_size(self, shard: Shard) -> None:
        path = self.folder / shard.name
        if not path.is_file():
            raise DataError(f"{path}: missing shard, the index lists it; restore the file")
        if path.stat().st_size != shard.bytes:
            raise DataError(
                f"{path}: truncated or changed shard, {path.stat().st_size:,} bytes found, "
                f"{shard.bytes:,} expected; restore the file"
            )

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[Pair]:
        return (self[i] for i in range(len(self)))

    @property
    def keys(self) -> list[str]:
        """Every pair's key, in order."""
        return [entry["key"] for _, entry in self._where]

    def key(self, position: int) -> str:
        """The key of pair `position`, without reading the pair."""
        return self._where[position][1]["key"]

    def __getitem__(self, position: int) -> Pair:
        """Read pair `position`. Raises DataError if its bytes are not what the index says."""
        shard_idx, entry = self._where[position]
        path = self.folder / self.index.shards[shard_idx].name
        try:
            with path.open("rb") as file:

                def read(offset: int, size: int) -> bytes:
                    file.seek(offset)
                    return file.read(size)

                return read_pair(entry, read)
        except FileNotFoundError:
            raise DataError(
                f"{path}: missing shard, the index lists it; restore the file"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: pair {entry['key']!r} is damaged ({error}); restore the file"
            ) from None

    def verify(self) -> None:
        """Compare every shard's sha256 with the index; DataError names the first that differs."""
        for shard in self.index.shards:
            self._check_size(shard)
            path = self.folder / shard.name
            if (found := sha256_of(path)) != shard.sha256:
                raise DataError(
                    f"{path}: sha256 {found[:12]}… differs from the index's {shard.sha256[:12]}…; "
                    f"restore the file"
                )
