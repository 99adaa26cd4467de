"""`m2enc embed`, `m2enc index` and `m2enc search`: vectors of pictures and texts, and search.

Not for the work itself (embed.py, index.py); this decides when to build an index and what to print.
"""

import logging
import os
import sys
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from m2encoder.errors import ConfigError, DataError

if TYPE_CHECKING:
    from m2encoder.encoder import BadItem, Encoder
    from m2encoder.index import ImageIndex, IndexMeta

logger = logging.getLogger(__name__)

OWN_INDEX = ".m2enc-index"
"""The index that a search makes inside a picture folder."""
EXIT_PARTIAL = 4
MAX_NAMED = 20


def embed(
    model: str,
    source: Path,
    *,
    out: Path,
    batch_size: int = 64,
    on_error: Literal["raise", "skip"] = "skip",
    device: str = "auto",
) -> int:
    """Write the vectors of a picture folder, a shard folder or a .txt file with one text per line.

    Args:
        model: A model folder.
        source: What to embed.
        out: Folder to write image.npy, text.npy, items.jsonl and meta.json into.
        batch_size: Pictures or texts at a time.
        on_error: Leave out unreadable pictures and empty texts (exit code 4), or stop at the first.
        device: Where to compute: auto, cpu, cuda, ...
    """
    from m2encoder.embed import embed_to_folder
    from m2encoder.load import load_model

    encoder = load_model(model, device=device)
    written = embed_to_folder(encoder, source, out, batch_size=batch_size, on_error=on_error)
    for name, count in written.counts.items():
        print(f"{out / name}.npy: {count:,} x {encoder.dim} float32")
    return report_skipped(written.skipped)


def index(
    model: str, source: Path, *, out: Path, batch_size: int = 64, device: str = "auto"
) -> int:
    """Build a search index of a picture folder or a shard folder.

    Args:
        model: A model folder.
        source: Pictures to find later; unreadable ones are left out (exit code 4).
        out: Folder to write the index into.
        batch_size: Pictures at a time.
        device: Where to compute: auto, cpu, cuda, ...
    """
    from m2encoder.index import build_index
    from m2encoder.load import load_model

    built = build_index(load_model(model, device=device), source, out, batch_size=batch_size)
    print(f"{out}: {built.meta.count:,} pictures of {source}")
    return report_skipped(built.skipped)


def search(
    where: Path,
    query: str,
    *,
    model: str | None = None,
    k: int = 5,
    json: bool = False,
    device: str = "auto",
) -> int:
    """Find pictures by a Chinese or English description, or by another picture.

    Args:
        where: A folder of pictures, which is indexed at the first search, or an index.
        query: Words in any language, or the path of a picture.
        model: A model folder; needed at the first search of a folder, remembered afterwards.
        k: How many pictures to show.
        json: Print JSON instead of a table.
        device: Where to compute: auto, cpu, cuda, ...
    """
    if k < 1:
        raise ConfigError(f"k is {k}, expected at least 1")
    by_picture = is_picture(query)
    opened, encoder, is_new = open_for_search(where, model, device=device)
    vectors = encoder.encode_image(Path(query)) if by_picture else encoder.encode_text(query)
    hits = opened.search(vectors, k)[0]
    if json:
        found = [
            {"rank": rank, "score": hit.score, "name": hit.name, "path": _path(hit.path)}
            for rank, hit in enumerate(hits, 1)
        ]
        print(dumps({"query": query, "hits": found}, ensure_ascii=False, indent=2))
    else:
        for rank, hit in enumerate(hits, 1):
            print(f"{rank:>3}  {hit.score:.3f}  {hit.path or hit.name}")
    return report_skipped(opened.skipped) if is_new else 0


def is_picture(query: str) -> bool:
    """Say whether a query is the path of a file, not words. Raises DataError if it is neither."""
    from m2encoder.images import IMAGE_SUFFIXES

    if not query.strip():
        raise DataError("the query is empty, expected words or the path of a picture; type some")
    if os.path.isfile(query):  # unlike Path.is_file, False on names that are too long to be one
        return True
    if Path(query[-8:]).suffix.lower() in IMAGE_SUFFIXES:
        raise DataError(f"{query}: no such picture; check the path")
    return False


def open_for_search(
    where: Path, model: str | None, *, device: str = "auto"
) -> "tuple[ImageIndex, Encoder, bool]":
    """Open an index, or a picture folder's own, which is built when missing or out of date.

    Returns it, its model, and whether it was built just now. Raises DataError, or ConfigError if a
    model is needed and none was given or remembered.
    """
    from m2encoder.index import META_NAME, ImageIndex, IndexMeta, build_index, source_stamp

    if (where / META_NAME).is_file():
        meta = IndexMeta.load(where)
        encoder = _load(model, meta, where, device)
        return ImageIndex.open(where, encoder=encoder), encoder, False
    if not where.is_dir():
        raise DataError(f"{where}: expected a folder of pictures or an index; check the path")
    own = where / OWN_INDEX
    meta = IndexMeta.load(own) if (own / META_NAME).is_file() else None
    encoder = _load(model, meta, where, device)
    if meta and meta.stamp == source_stamp(where):
        if meta.model_fingerprint == encoder.fingerprint:
            return ImageIndex.open(own, encoder=encoder), encoder, False
        logger.info("the index of %s is another model's; building it again", where)
    elif meta:
        logger.info("the pictures of %s have changed; building the index again", where)
    return build_index(encoder, where, own), encoder, True


def _load(model: str | None, meta: "IndexMeta | None", where: Path, device: str) -> "Encoder":
    from m2encoder.load import load_model

    if model is None and (meta is None or meta.model_path is None):
        raise ConfigError(
            f"{where}: no index yet, so a model is needed; say which with --model FOLDER"
        )
    if model is None and meta and meta.model_path and not Path(meta.model_path).is_dir():
        raise ConfigError(
            f"{where}: its index was made with {meta.model_path}, which is gone; say where the "
            f"model is with --model FOLDER"
        )
    return load_model(model or (meta and meta.model_path) or "", device=device)


def report_skipped(skipped: "Sequence[BadItem]") -> int:
    """Name what was left out on stderr; returns the exit code, 4 if there was anything."""
    if not skipped:
        return 0
    print(f"left out {len(skipped):,}:", file=sys.stderr)
    for bad in skipped[:MAX_NAMED]:
        print(f"  {bad.name}: {bad.reason}", file=sys.stderr)
    if len(skipped) > MAX_NAMED:
        print(f"  and {len(skipped) - MAX_NAMED:,} more", file=sys.stderr)
    return EXIT_PARTIAL


def _path(path: Path | None) -> Any:
    return None if path is None else str(path)
