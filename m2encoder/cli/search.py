"""`m2enc embed` and `m2enc search`: vectors of pictures and texts, and search.

Not for the work itself (embed.py, index.py); this decides when to build an index and what to print.
"""

import csv
import logging
import sys
from collections.abc import Sequence
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from m2encoder.errors import ConfigError, DataError

if TYPE_CHECKING:
    from m2encoder.encoder import BadItem, Encoder
    from m2encoder.index import Hit, ImageIndex, IndexMeta
    from m2encoder.index_query import Term

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


def search(
    folder: Path,
    query: str | None = None,
    *,
    model: str | None = None,
    image: Path | None = None,
    plus: list[str] | None = None,
    minus: list[str] | None = None,
    where: list[str] | None = None,
    k: int = 5,
    json: bool = False,
    output: Literal["table", "json", "csv", "paths"] = "table",
    device: str = "auto",
) -> int:
    """Find pictures by a Chinese or English description, by another picture, or by both.

    Args:
        folder: A folder of pictures, which is indexed at the first search, or an index.
        query: Words in any language, or the path of a picture.
        model: A model folder; needed at the first search of a folder, remembered afterwards.
        image: A picture that the hits should be like, too.
        plus: More words or pictures to look for; 'sunset^2' counts twice.
        minus: Words or pictures to avoid; 'people^0.3' less than the usual 0.5.
        where: Conditions, all of which must hold: 'date>=2024' 'name GLOB trips/*' language=zh.
        k: How many pictures to show.
        json: The same as --output json.
        output: A table, JSON, CSV, or the paths alone.
        device: Where to compute: auto, cpu, cuda, ...
    """
    from m2encoder.index_query import encode_terms, read_terms
    from m2encoder.index_where import compile_where

    if k < 1:
        raise ConfigError(f"k is {k}, expected at least 1")
    terms = read_terms(query, image=image, plus=plus or (), minus=minus or ())
    compile_where(where or ())  # a mistake shows before anything is embedded
    opened, encoder, is_new = open_for_search(folder, model, device=device)
    hits = opened.search(encode_terms(encoder, terms), k, where=where or ())[0]
    threshold = _threshold(encoder, terms)
    rows = [_row(rank, hit, threshold) for rank, hit in enumerate(hits, 1)]
    found = {"query": query, "threshold": threshold, "hits": rows}
    if json or output == "json":
        print(dumps(found, ensure_ascii=False, indent=2))
    else:
        _print_rows(rows, output)
    if not rows:
        print("nothing found: no picture meets the conditions", file=sys.stderr)
    elif all(row["match"] is False for row in rows):
        print(f"no match: every picture scores below {threshold:.3f}", file=sys.stderr)
    return report_skipped(opened.skipped) if is_new else 0


def _row(rank: int, hit: "Hit", threshold: float | None) -> dict[str, Any]:
    return {
        "rank": rank,
        "score": hit.score,
        "name": hit.name,
        "path": None if hit.path is None else str(hit.path),
        "id": hit.id,
        "date": hit.date,
        "meta": hit.meta,
        "match": None if threshold is None else hit.score >= threshold,
    }


def _threshold(encoder: "Encoder", terms: "Sequence[Term]") -> float | None:
    """Return the cosine from which on a picture fits, where the model was calibrated for that."""
    from m2encoder.calibration import load_calibration
    from m2encoder.index_query import language_of_terms

    language = language_of_terms(terms)
    calibration = None if language is None else load_calibration(encoder)
    return None if calibration is None or language is None else calibration.threshold(language)


def _print_rows(rows: list[dict[str, Any]], output: str) -> None:
    if output == "csv":
        writer = csv.DictWriter(
            sys.stdout,
            ["rank", "score", "name", "path", "date", "match"],
            extrasaction="ignore",
            lineterminator="\n",
        )
        writer.writeheader()
        writer.writerows(rows)
        return
    for row in rows:
        shown = row["path"] or row["name"]
        if output == "table":
            mark = "  (no match)" if row["match"] is False else ""
            shown = f"{row['rank']:>3}  {row['score']:.3f}  {shown}{mark}"
        print(shown)


def open_for_search(
    folder: Path, model: str | None, *, device: str = "auto"
) -> "tuple[ImageIndex, Encoder, bool]":
    """Open an index, or a picture folder's own, which is built or updated where it is needed.

    Returns it, its model, and whether that was done just now. Raises DataError, or ConfigError if a
    model is needed and none was given or remembered.
    """
    from m2encoder.index import (
        ImageIndex,
        build_index,
        is_finished,
        is_index,
        read_meta,
        source_stamp,
        update_index,
    )

    if is_index(folder):
        meta = read_meta(folder)
        encoder = load_remembered(model, meta, folder, device)
        return ImageIndex.open(folder, encoder=encoder), encoder, False
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of pictures or an index; check the path")
    own = folder / OWN_INDEX
    meta = read_meta(own) if is_finished(own) else None
    encoder = load_remembered(model or _old_model(own), meta, folder, device)
    if meta is None:
        return build_index(encoder, folder, own), encoder, True
    if meta.model_fingerprint != encoder.fingerprint:
        logger.info("the index of %s is another model's; building it again", folder)
        return build_index(encoder, folder, own, settings=meta.settings), encoder, True
    is_new = meta.stamp != source_stamp(folder)
    if is_new:
        changes = update_index(encoder, own)
        logger.info("%s: %s", folder, describe_changes(changes))
    return ImageIndex.open(own, encoder=encoder), encoder, is_new


def _old_model(own: Path) -> str | None:
    """Return the model that an index of format 1 remembers, so that it is built again as it was."""
    try:
        said = loads((own / "index_meta.json").read_text(encoding="utf-8"))
        return said["model_path"] if Path(said["model_path"]).is_dir() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_remembered(
    model: str | None, meta: "IndexMeta | None", folder: Path, device: str
) -> "Encoder":
    """Load `model`, or else the one that an index was made with."""
    from m2encoder.load import load_model

    if model is None and (meta is None or meta.model_path is None):
        found = "no finished index yet" if meta is None else "its index knows no model folder"
        raise ConfigError(f"{folder}: {found}, so a model is needed; say which with --model FOLDER")
    if model is None and meta and meta.model_path and not Path(meta.model_path).is_dir():
        raise ConfigError(
            f"{folder}: its index was made with {meta.model_path}, which is gone; say where the "
            f"model is with --model FOLDER"
        )
    return load_model(model or (meta and meta.model_path) or "", device=device)


def describe_changes(changes: Any) -> str:
    """Say how many pictures an update added, changed and removed."""
    counts = [
        f"{len(names):,} {what}"
        for what in ("added", "changed", "removed")
        if (names := getattr(changes, what))
    ]
    return f"{', '.join(counts) or 'nothing new'}; {changes.embedded:,} embedded"


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
