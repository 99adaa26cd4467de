"""`m2enc index` and its subcommands: make, describe and change a search index.

Not for searching (cli/search.py).
"""

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from m2encoder.cli.search import OWN_INDEX, describe_changes, load_remembered, report_skipped

if TYPE_CHECKING:
    from m2encoder.index import ImageIndex


def index(
    model: str,
    source: Path,
    *,
    out: Path,
    kind: Literal["auto", "flat", "ivf", "hnsw"] = "auto",
    flat_limit: int = 200_000,
    memory_budget_mb: int | None = None,
    recall: float = 0.95,
    batch_size: int = 64,
    device: str = "auto",
) -> int:
    """Build a search index of a picture folder, a shard folder or what `m2enc embed` wrote.

    Args:
        model: A model folder.
        source: Pictures to find later; unreadable ones are left out (exit code 4).
        out: Folder to write the index into.
        kind: flat compares with every picture; ivf reads a few lists of 8-bit vectors; hnsw is a
            graph that can only be read; auto is flat while the index is small, ivf above.
        flat_limit: The most pictures that auto searches flat.
        memory_budget_mb: auto searches flat only while the vectors fit into this.
        recall: Share of the true ten nearest that ivf and hnsw must find.
        batch_size: Pictures at a time.
        device: Where to compute: auto, cpu, cuda, ...
    """
    from m2encoder.index import IndexSettings, build_index
    from m2encoder.load import load_model

    settings = IndexSettings(
        kind=kind, flat_limit=flat_limit, memory_budget_mb=memory_budget_mb, recall=recall
    )
    encoder = load_model(model, device=device)
    with build_index(encoder, source, out, settings=settings, batch_size=batch_size) as built:
        print(f"{out}: {built.meta.count:,} pictures of {source}, {_searched(built)}")
        return report_skipped(built.skipped)


def info(folder: Path, *, json: bool = False) -> int:
    """Describe an index: what is in it, how it is searched, and what that finds.

    Args:
        folder: An index, or a picture folder that was searched.
        json: Print JSON instead of a table.
    """
    from m2encoder.index import ImageIndex, VectorMaker, read_meta

    folder = _place(folder)
    said = read_meta(folder)
    maker = VectorMaker(said.model, said.model_fingerprint, said.dim)
    with ImageIndex.open(folder, encoder=maker) as opened:
        opened.check()
        facts = _facts(opened)
    if json:
        print(dumps(facts, ensure_ascii=False, indent=2))
        return 0
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        print(f"{name.ljust(width)}{_plain(value)}")
    return 0


def update(
    folder: Path, *, model: str | None = None, batch_size: int = 64, device: str = "auto"
) -> int:
    """Bring an index to the state of its source: embed what is new or changed, drop what is gone.

    Args:
        folder: An index, or a picture folder that was searched.
        model: The model folder; by default the one that the index remembers.
        batch_size: Pictures at a time.
        device: Where to compute: auto, cpu, cuda, ...
    """
    from m2encoder.index import read_meta, update_index

    folder = _place(folder)
    encoder = load_remembered(model, read_meta(folder), folder, device)
    changes = update_index(encoder, folder, batch_size=batch_size)
    print(f"{folder}: {describe_changes(changes)}")
    return report_skipped(changes.skipped)


def add(
    folder: Path, pictures: list[Path], *, model: str | None = None, device: str = "auto"
) -> int:
    """Add pictures of the indexed folder, without looking at the others.

    Args:
        folder: An index of a picture folder.
        pictures: Files or folders below the indexed folder; removed ones come back.
        model: The model folder; by default the one that the index remembers.
        device: Where to compute: auto, cpu, cuda, ...
    """
    from m2encoder.index import add_pictures, read_meta

    folder = _place(folder)
    encoder = load_remembered(model, read_meta(folder), folder, device)
    changes = add_pictures(encoder, folder, pictures)
    print(f"{folder}: {describe_changes(changes)}")
    return report_skipped(changes.skipped)


def remove(folder: Path, names: list[str]) -> int:
    """Take pictures out of an index, also from later updates; the files stay.

    Args:
        folder: An index, or a picture folder that was searched.
        names: Names as the search shows them below the indexed folder, or patterns: 'trips/*'.
    """
    from m2encoder.index import remove_pictures

    folder = _place(folder)
    changes = remove_pictures(folder, names)
    print(f"{folder}: {describe_changes(changes)}")
    return 0


def _place(folder: Path) -> Path:
    """Return an index, or that which searching a picture folder has made inside it."""
    from m2encoder.index import is_index

    own = folder / OWN_INDEX
    return own if not is_index(folder) and is_index(own) else folder


def _searched(index: "ImageIndex") -> str:
    ann = index.meta.ann
    if ann is None:
        return "searched exactly"
    recall = ", ".join(f"{value:.3f} for {name}" for name, value in ann.recall_at_10.items())
    how = f"{ann.probes} of {ann.lists} lists" if ann.kind == "ivf" else f"efSearch {ann.probes}"
    return f"{ann.kind} with {how}, recall@10 {recall}"


def _facts(index: "ImageIndex") -> dict[str, Any]:
    from m2encoder.errors import DataError
    from m2encoder.index import source_stamp
    from m2encoder.index_files import size_on_disk

    meta = index.meta
    source = meta.source_path(index.folder)
    try:
        is_current = source_stamp(source) == meta.stamp if meta.kind != "vectors" else None
    except DataError:
        is_current = None
    found = index.counts()
    facts: dict[str, Any] = {
        "pictures": meta.count,
        "source": str(source) if meta.kind != "vectors" else None,
        "source_kind": meta.kind,
        "is_current": is_current,
        "model": meta.model,
        "model_path": meta.model_path,
        "fingerprint": meta.model_fingerprint,
        "dim": meta.dim,
        "search": _searched(index),
        "recall_at_10": None if meta.ann is None else meta.ann.recall_at_10,
        "recall_queries": None if meta.ann is None else meta.ann.queries,
        "rows_waiting": meta.rows - (meta.ann.rows if meta.ann else meta.rows),
        "rows_dead": found["dead"],
        "left_out": found["skipped"],
        "removed_by_hand": found["excluded"],
        "bytes": size_on_disk(index.folder),
    }
    return facts


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items())
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:.3f}"
        if isinstance(value, float)
        else str(value)
    )
