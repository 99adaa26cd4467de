"""What the commands that measure a shard folder share: embedding it, tables, writing results.

Not for the measuring, nor for the commands themselves (bilingual.py, fine_grained.py, ...).
"""

import time
from collections.abc import Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from m2encoder.cli.search import report_skipped

if TYPE_CHECKING:
    from m2encoder.embed import PairEmbeddings
    from m2encoder.encoder import BadItem, Encoder
    from m2encoder.eval.metric import Metric
    from m2encoder.eval.results import Result

LANGUAGES = ("zh", "en")
OnError = Literal["raise", "skip"]


class Embedded(NamedTuple):
    """A model, a shard folder's vectors, and how long they took."""

    encoder: "Encoder"
    pairs: "PairEmbeddings"
    seconds: float


def embed_shards(
    model: str,
    data: Path,
    *,
    device: str,
    batch_size: int,
    on_error: OnError,
    languages: Sequence[str] = LANGUAGES,
) -> Embedded:
    """Open a model and encode a shard folder's pictures and its captions in these languages."""
    from m2encoder.embed import embed_pairs
    from m2encoder.load import load_model
    from m2encoder.shards import ShardReader

    reader = ShardReader(data)  # complains before the model is opened
    encoder = load_model(model, device=device)
    began = time.perf_counter()
    pairs = embed_pairs(
        encoder, reader, languages=languages, batch_size=batch_size, on_error=on_error
    )
    return Embedded(encoder, pairs, time.perf_counter() - began)


def metric_table(head: str, metrics: Mapping[str, "Metric"], names: Sequence[str]) -> list[str]:
    """Return lines: name, value, interval, tie bounds and count of those metrics that exist."""
    from m2encoder.eval.metric_names import label, write_interval, write_tie_bounds, write_value

    rows = [[head, "value", "±95 %", "ties", "n"]]
    for name in names:
        if (metric := metrics.get(name)) is not None:
            values = write_value(name, metric.value), write_interval(name, metric).lstrip("±")
            rows.append([label(name), *values, write_tie_bounds(name, metric), f"{metric.n:,}"])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Return lines whose columns stand under each other; the first `left` of them lie left."""
    from m2encoder.eval.text_table import display_width, padded

    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            padded(cell, width, right=place >= left)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def finish(
    results: Sequence["Result"],
    tables: Sequence[str],
    skipped: Sequence["BadItem"],
    *,
    out: Path | None,
    json: bool,
) -> int:
    """Write results into a folder, print them as JSON or tables; returns the exit code."""
    paths = [] if out is None else [result.save(out) for result in results]
    if json:
        content = [result.to_json() for result in results]
        print(dumps(content, ensure_ascii=False, indent=2))
    else:
        print("\n".join(tables))
        for path in paths:
            print(f"wrote {path}")
    return report_skipped(skipped)
