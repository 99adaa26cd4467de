"""Search pictures by vector: an exact FAISS index of a picture folder or a shard folder.

Not for encoding queries (Encoder), nor for deciding when to build one (cli/search.py).
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from m2encoder.embed import embed_folder, embed_pairs
from m2encoder.encoder import BadItem, Encoder, OnError
from m2encoder.errors import DataError
from m2encoder.folders import (
    check_replaceable,
    complete_folder,
    read_jsonl,
    write_json,
    write_jsonl,
)
from m2encoder.images import list_images
from m2encoder.shards import INDEX_NAME, ShardReader

META_NAME = "index_meta.json"
VECTORS_NAME = "index.faiss"
ITEMS_NAME = "items.jsonl"
FORMAT = 1


class Hit(NamedTuple):
    """One picture that was found."""

    score: float
    """Cosine similarity, -1..1."""
    name: str
    """Path below the source folder with forward slashes, or the pair's key in a shard folder."""
    path: Path | None
    """Where the picture lies; None inside a shard."""


@dataclass(frozen=True)
class IndexMeta:
    """What `index_meta.json` says about an index."""

    format: int
    model: str
    model_path: str | None
    """The model folder, absolute; None if the model did not come from one."""
    model_fingerprint: str
    dim: int
    count: int
    source: str
    """The folder that was indexed; relative if the index lies inside it, so both can move."""
    kind: Literal["pictures", "shards"]
    stamp: str
    """`source_stamp` when it was built; another one today means that the source has changed."""
    skipped: list[dict[str, str]]
    """Name and reason of every picture that could not be read."""

    @classmethod
    def load(cls, folder: Path) -> "IndexMeta":
        """Read it. Raises DataError if it is missing, damaged or of another format."""
        path = folder / META_NAME
        if not path.is_file():
            raise DataError(
                f"{folder}: no {META_NAME}, expected an index; build one with: "
                f"m2enc index MODEL PICTURES --out {folder}"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise DataError(
                    f"{path}: index format {raw['format']}, this version reads {FORMAT}; build it "
                    f"again with: m2enc index"
                )
            return cls(**raw)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: damaged ({error}); build it again with: m2enc index"
            ) from None

    def source_path(self, folder: Path) -> Path:
        """Return the indexed folder, given where the index lies."""
        path = folder / self.source
        short = Path(os.path.normpath(path))  # photos, rather than photos/.m2enc-index/..
        return short if short.resolve() == path.resolve() else path


@dataclass(frozen=True)
class ImageIndex:
    """An opened index."""

    meta: IndexMeta
    names: list[str]
    source: Path
    vectors: Any
    """The faiss index: exact inner products of unit vectors, so cosines."""

    @classmethod
    def open(cls, folder: Path, *, encoder: Encoder) -> "ImageIndex":
        """Open an index for queries by `encoder`.

        Raises DataError if another model made it, or if files are missing or do not fit together.
        """
        meta = IndexMeta.load(folder)
        if meta.model_fingerprint != encoder.fingerprint:
            raise DataError(
                f"{folder}: index was made by {meta.model} ({meta.model_fingerprint[:12]}), you "
                f"opened it with {encoder.name} ({encoder.fingerprint[:12]}); build it again with: "
                f"m2enc index MODEL {meta.source_path(folder).resolve()} --out {folder}"
            )
        try:
            names = [row["name"] for row in read_jsonl(folder / ITEMS_NAME)]
            # Through memory: faiss opens no paths that are not ASCII on Windows.
            raw = np.frombuffer((folder / VECTORS_NAME).read_bytes(), np.uint8)
            vectors = faiss.deserialize_index(raw)
            if not len(names) == vectors.ntotal == meta.count or vectors.d != meta.dim:
                raise ValueError(
                    f"{vectors.ntotal:,} vectors of width {vectors.d} and {len(names):,} names, "
                    f"expected {meta.count:,} of width {meta.dim}"
                )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{folder}: half-written or damaged index ({reason}); build it again with: "
                f"m2enc index MODEL {meta.source_path(folder).resolve()} --out {folder}"
            ) from None
        return cls(meta, names, meta.source_path(folder), vectors)

    def search(self, queries: NDArray[np.float32], k: int) -> list[list[Hit]]:
        """Return per query the `k` best pictures (all, if there are fewer), best first.

        queries: (Q, D) float32, unit norm. Raises ValueError on another shape, k < 1 or NaN.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.meta.dim:
            raise ValueError(f"queries have shape {queries.shape}, expected (Q, {self.meta.dim})")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not np.isfinite(queries).all():
            raise ValueError("queries hold NaN or infinity; check the model's weights")
        scores, rows = self.vectors.search(queries, min(k, self.meta.count))
        found = []
        for of_query in zip(scores.tolist(), rows.tolist(), strict=True):
            ordered = sorted(zip(*of_query, strict=True), key=lambda pair: (-pair[0], pair[1]))
            found.append([self._hit(score, row) for score, row in ordered])
        return found

    def _hit(self, score: float, row: int) -> Hit:
        name = self.names[row]
        return Hit(score, name, self.source / name if self.meta.kind == "pictures" else None)

    @property
    def skipped(self) -> list[BadItem]:
        """The pictures that could not be read when it was built."""
        return [BadItem(-1, bad["name"], bad["reason"]) for bad in self.meta.skipped]


def build_index(
    encoder: Encoder,
    source: Path,
    out_dir: Path,
    *,
    batch_size: int = 64,
    on_error: OnError = "skip",
    show_progress: bool | None = None,
) -> ImageIndex:
    """Index the pictures of a folder (turned upright) or of shards; write `out_dir`, or nothing.

    Unreadable pictures are left out and listed in `.skipped`; on_error="raise" stops at the first.
    Raises DataError if there is no readable picture, or if `out_dir` holds something else.
    """
    check_replaceable(out_dir, marker=META_NAME)
    stamp = source_stamp(source)  # before reading: a change meanwhile shows at the next search
    is_shards = (source / INDEX_NAME).is_file()
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "on_error": on_error,
        "show_progress": show_progress,
    }
    if is_shards:
        pairs = embed_pairs(encoder, ShardReader(source), languages=(), **options)
        vectors, names, skipped = pairs.image, pairs.keys, pairs.skipped
    else:
        found = embed_folder(encoder, source, **options)
        vectors, names, skipped = found.vectors, found.names, found.skipped
    if not names:
        first = f", the first is {skipped[0].name}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"{source}: none of {len(skipped):,} pictures can be read{first}")
    meta = IndexMeta(
        format=FORMAT,
        model=encoder.name,
        model_path=str(encoder.folder.resolve()) if encoder.folder else None,
        model_fingerprint=encoder.fingerprint,
        dim=encoder.dim,
        count=len(names),
        source=_source_from(out_dir, source),
        kind="shards" if is_shards else "pictures",
        stamp=stamp,
        skipped=[{"name": bad.name, "reason": bad.reason} for bad in skipped],
    )
    _write(out_dir, meta, names, vectors)
    return ImageIndex.open(out_dir, encoder=encoder)


def _write(
    out_dir: Path, meta: IndexMeta, names: Sequence[str], vectors: NDArray[np.float32]
) -> None:
    flat = faiss.IndexFlatIP(meta.dim)
    flat.add(np.ascontiguousarray(vectors, np.float32))  # pyright: ignore[reportCallIssue]
    with complete_folder(out_dir, marker=META_NAME) as folder:
        (folder / VECTORS_NAME).write_bytes(faiss.serialize_index(flat).tobytes())
        write_jsonl(folder / ITEMS_NAME, ({"name": name} for name in names))
        write_json(folder / META_NAME, asdict(meta))


def _source_from(out_dir: Path, source: Path) -> str:
    inside = out_dir.resolve().is_relative_to(source.resolve())
    return os.path.relpath(source.resolve(), out_dir.resolve()) if inside else str(source.resolve())


def source_stamp(source: Path) -> str:
    """Return a hash that changes when pictures come, go or are written: names, sizes and times.

    Of a shard folder, its index.json. Raises DataError if the folder is missing.
    """
    digest = hashlib.sha256()
    if (source / INDEX_NAME).is_file():
        digest.update((source / INDEX_NAME).read_bytes())
        return digest.hexdigest()
    for path in list_images(source):
        about = path.stat()
        name = path.relative_to(source).as_posix()
        line = f"{name}\0{about.st_size}\0{about.st_mtime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
