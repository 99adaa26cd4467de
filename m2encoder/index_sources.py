"""What an index can be made of: a folder of pictures, shards, or vectors that are there already.

Not for the order of work (index_update.py). A source lists what it has without opening a picture.
"""

import hashlib
import io
import json
import re
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m2encoder.encoder import BadItem
from m2encoder.errors import DataError
from m2encoder.folders import read_jsonl
from m2encoder.images import HEIF_SUFFIXES, enable_heif, has_heif, list_images
from m2encoder.index_items import ItemRecord
from m2encoder.index_meta import SourceKind
from m2encoder.pictures import FilePictures, ShardPictures
from m2encoder.shards import INDEX_NAME, ShardReader

EXIF_POINTER, DATE_TAKEN, DATE_CHANGED = 0x8769, 0x9003, 0x0132
EMBEDDED = ("image.npy", "items.jsonl", "meta.json")
"""What `m2enc embed` writes."""


class Entry(NamedTuple):
    """One picture as its source lists it."""

    name: str
    version: str
    """Changes when the picture may have changed."""


class PictureSource:
    """Pictures of a folder, by their paths below it, or of shards, by their keys."""

    kind: SourceKind
    root: Path | None
    pictures: FilePictures | ShardPictures

    def __init__(self, path: Path) -> None:
        self.path = path
        self.refused: list[BadItem] = []
        """Pictures whose names cannot be kept."""
        if (path / INDEX_NAME).is_file():
            self.kind = "shards"
            self.root = None
            self.reader = ShardReader(path)
            self.pictures = ShardPictures(self.reader)
            self.entries = _shard_entries(self.reader)
            self.stamp = hashlib.sha256((path / INDEX_NAME).read_bytes()).hexdigest()
            return
        self.kind, self.root = "pictures", path
        paths, self.entries = [], []
        for found, entry in _list_files(path):
            if _is_text(entry.name):
                paths.append(found)
                self.entries.append(entry)
            else:
                shown = entry.name.encode("utf-8", "backslashreplace").decode()
                self.refused.append(BadItem(-1, shown, "its name is not UTF-8; rename it"))
        self.pictures = FilePictures([entry.name for entry in self.entries], paths)
        self.stamp = _stamp(self.entries)

    def describe(self, position: int) -> ItemRecord:
        """Read a picture's bytes for what is kept beside its vector. Raises DataError, OSError."""
        entry = self.entries[position]
        if isinstance(self.pictures, ShardPictures):
            pair = self.reader[position]
            meta = {"language": sorted(pair.captions)} | pair.meta
            date = _date_taken(io.BytesIO(pair.image))
            digest, size = hashlib.sha256(pair.image).hexdigest(), len(pair.image)
            return ItemRecord(entry.name, entry.version, digest, size, date, meta)
        path = self.pictures.paths[position]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            date = _date_taken(file)
        about = path.stat()
        date = date or f"{datetime.fromtimestamp(about.st_mtime):%Y-%m-%d %H:%M:%S}"
        return ItemRecord(entry.name, entry.version, digest, about.st_size, date, {})


class VectorSource:
    """Vectors that are there already, with a name for each."""

    kind: SourceKind

    def __init__(
        self,
        vectors: NDArray[np.float32],
        names: Sequence[str],
        *,
        metas: Sequence[dict[str, Any]] | None = None,
        path: Path,
        root: Path | None = None,
        stamp: str = "",
        kind: SourceKind = "vectors",
    ) -> None:
        if vectors.ndim != 2 or not len(vectors) == len(names) == len(metas or names):
            raise DataError(
                f"{path}: vectors of shape {vectors.shape} and {len(names):,} names, expected one "
                f"row per name"
            )
        if len(set(names)) != len(names):
            seen: set[str] = set()
            twice = next(name for name in names if name in seen or seen.add(name))
            raise DataError(f"{path}: name {twice!r} appears twice, names must be unique; rename")
        if bad := [name for name in names if not _is_text(name)]:
            raise DataError(f"{path}: name {bad[0]!r} is not valid Unicode; rename it")
        self.path, self.root, self.kind, self.stamp = path, root, kind, stamp
        self.vectors, self.metas = vectors, metas
        self.entries = [Entry(name, stamp) for name in names]
        self.refused: list[BadItem] = []

    def describe(self, position: int) -> ItemRecord:
        """Return what is kept beside the vector."""
        name, version = self.entries[position]
        meta = {} if self.metas is None else self.metas[position]
        return ItemRecord(name, version, None, None, None, meta)


Source = PictureSource | VectorSource


def open_source(path: Path, *, fingerprint: str, model: str) -> Source:
    """Open a folder of pictures, shards, or what `m2enc embed` wrote.

    Raises DataError if it is none of these, holds no picture, or holds another model's vectors.
    """
    if all((path / name).is_file() for name in EMBEDDED):
        return _open_embedded(path, fingerprint, model)
    source = PictureSource(path)
    if not source.entries and not source.refused:
        raise DataError(f"{path}: holds no pictures, expected JPEG, PNG, ...; check the path")
    return source


def source_stamp(path: Path) -> str:
    """Return a hash that changes when pictures come, go or are written: names, sizes and times.

    Of a shard folder, its index.json; of embeddings, their meta.json. Raises DataError if the
    folder is missing.
    """
    if all((path / name).is_file() for name in EMBEDDED):
        return _embedded_stamp(path)
    if (path / INDEX_NAME).is_file():
        return hashlib.sha256((path / INDEX_NAME).read_bytes()).hexdigest()
    return _stamp([entry for _, entry in _list_files(path) if _is_text(entry.name)])


def _list_files(folder: Path) -> list[tuple[Path, Entry]]:
    found = []
    for path in list_images(folder):
        try:
            about = path.stat()
        except OSError:  # gone since it was listed
            continue
        name = path.relative_to(folder).as_posix()
        found.append((path, Entry(name, f"{about.st_size}-{about.st_mtime_ns}")))
    return found


def _stamp(entries: Sequence[Entry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(f"{entry.name}\0{entry.version}\n".encode())
    if any(Path(entry.name).suffix.lower() in HEIF_SUFFIXES for entry in entries):
        digest.update(b"heif" if has_heif() else b"")  # those left out are tried again with it
    return digest.hexdigest()


def _shard_entries(reader: ShardReader) -> list[Entry]:
    return [
        Entry(pair["key"], f"{shard.sha256[:32]}-{pair['image'][1]}")
        for shard in reader.index.shards
        for pair in shard.pairs
    ]


def _date_taken(file: Any) -> str | None:
    """Return when a camera says it took a picture, as YYYY-MM-DD HH:MM:SS."""
    if has_heif():
        enable_heif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as picture:
                exif = picture.getexif()
        said = exif.get_ifd(EXIF_POINTER).get(DATE_TAKEN) or exif.get(DATE_CHANGED)
    except Exception:  # whatever is wrong with it, decoding the picture will say
        return None
    match = re.match(r"(\d{4}):(\d\d):(\d\d) (\d\d:\d\d:\d\d)", str(said))
    return None if match is None or match[1] == "0000" else "{}-{}-{} {}".format(*match.groups())


def _open_embedded(path: Path, fingerprint: str, model: str) -> VectorSource:
    try:
        said = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        items = [row for row in read_jsonl(path / "items.jsonl") if row["array"] == "image"]
        vectors = np.load(path / "image.npy", mmap_mode="r")
        names = [str(row.get("name") or row["key"]) for row in items]
        if said["fingerprint"] != fingerprint:
            raise DataError(
                f"{path}: vectors were made by {said['model']} ({said['fingerprint'][:12]}), this "
                f"is {model} ({fingerprint[:12]}); embed the pictures again with: m2enc embed"
            )
        if [row["row"] for row in items] != list(range(len(items))):
            raise ValueError("rows are out of order")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: damaged embeddings ({reason}); write them again") from None
    usual = {"array", "row", "name", "key"}
    metas = [{key: value for key, value in row.items() if key not in usual} for row in items]
    pictures = Path(said.get("source", ""))
    has_files = "name" in (items or [{}])[0] and pictures.is_dir()
    root = pictures.resolve() if has_files else None
    stamp = _embedded_stamp(path)
    return VectorSource(
        vectors, names, metas=metas, path=path, root=root, stamp=stamp, kind="embeddings"
    )


def _embedded_stamp(path: Path) -> str:
    about = (path / "image.npy").stat()
    digest = hashlib.sha256((path / "meta.json").read_bytes())
    digest.update(f"{about.st_size}-{about.st_mtime_ns}".encode())
    return digest.hexdigest()


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of a file's name that are not UTF-8
        return False
    return True
