"""Everything that one shard folder can measure about a model, in each language, in one result.

Not for the metrics themselves (retrieval.py, zero_shot.py), nor for pages (report.py).
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from m2encoder import __version__
from m2encoder.embed import PairEmbeddings, TextEmbeddings, embed_pairs
from m2encoder.encoder import Encoder, OnError
from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.retrieval import retrieval_metrics
from m2encoder.shards import ShardReader
from m2encoder.zero_shot import TASKS_NAME, ZeroShotTask, load_tasks, zero_shot_accuracy

Task = Literal["retrieval", "zero-shot"]
Results = dict[str, Any]
FORMAT = 1


def evaluate(
    encoder: Encoder,
    data_dir: Path,
    *,
    tasks: Sequence[Task] = ("retrieval", "zero-shot"),
    candidates: int | None = None,
    seed: int = 0,
    languages: Sequence[str] = ("zh", "en"),
    batch_size: int = 64,
    on_error: OnError = "raise",
    show_progress: bool | None = None,
) -> Results:
    """Encode a shard folder once and measure what its captions, labels and tasks allow.

    candidates: rank among that many pairs, drawn by `seed`, instead of all; with every caption.
    Returns values that JSON holds; shares are 0..1:
    {"format": 1, "m2encoder": version, "model": {"name", "fingerprint"},
    "data": {"path", "count", "skipped": [{"name", "reason"}]},
    "retrieval": {language: retrieval_metrics(...)}, "protocol": {"candidates", "seed", "ties"},
    "hard_negatives": {language: {"accuracy", "chance", "n", "by_kind": {kind: {"accuracy", "n"}}}},
    "zero_shot": {task: {language: zero_shot_accuracy(...)}}}.
    What the data lacks is left out. Raises DataError if nothing is left to measure, ConfigError if
    `candidates` is less than 2 or more than there are pairs.
    """
    reader = ShardReader(data_dir)
    if candidates is not None:
        draw_candidates(len(reader), candidates, seed)  # complains before the long work
    zero_shot = "zero-shot" in tasks and ("retrieval" not in tasks or has_tasks(data_dir))
    known = load_tasks(data_dir) if zero_shot else []
    pairs = embed_pairs(
        encoder,
        reader,
        languages=languages if "retrieval" in tasks else (),
        batch_size=batch_size,
        on_error=on_error,
        show_progress=show_progress,
    )
    results = _header(encoder, data_dir, pairs)
    if "retrieval" in tasks:
        if not pairs.texts:
            wanted = " or ".join(languages)
            raise DataError(f"{data_dir}: no captions in {wanted}, retrieval needs some")
        results["protocol"] = {"candidates": candidates, "seed": seed, "ties": "against the query"}
        results["retrieval"] = {
            language: _retrieval(pairs, texts, candidates, seed)
            for language, texts in pairs.texts.items()
        }
        results["hard_negatives"] = _hard_negatives(encoder, pairs, batch_size)
    if known:
        results["zero_shot"] = {
            task.name: _zero_shot(encoder, pairs, task, languages) for task in known
        }
    return results


def _header(encoder: Encoder, data_dir: Path, pairs: PairEmbeddings) -> Results:
    return {
        "format": FORMAT,
        "m2encoder": __version__,
        "model": {"name": encoder.name, "fingerprint": encoder.fingerprint},
        "data": {
            "path": str(data_dir),
            "count": len(pairs.keys),
            "skipped": [{"name": bad.name, "reason": bad.reason} for bad in pairs.skipped],
        },
    }


def has_tasks(data_dir: Path) -> bool:
    """Say whether a shard folder comes with zero-shot tasks."""
    return (data_dir / TASKS_NAME).is_file()


def _retrieval(
    pairs: PairEmbeddings, texts: TextEmbeddings, candidates: int | None, seed: int
) -> dict[str, float]:
    if candidates is None:
        return retrieval_metrics(pairs.image, texts.vectors, texts.owner)
    chosen = draw_candidates(len(pairs.keys), candidates, seed)
    place = np.full(len(pairs.keys), -1)
    place[chosen] = np.arange(candidates)
    owner = place[texts.owner]
    kept = owner >= 0
    return retrieval_metrics(pairs.image[chosen], texts.vectors[kept], owner[kept])


def draw_candidates(count: int, candidates: int, seed: int) -> list[int]:
    """Draw that many of `count` pairs, in order; the same seed gives the same ones everywhere."""
    if not 2 <= candidates <= count:
        raise ConfigError(
            f"candidates is {candidates:,}, expected 2 to {count:,}, the number of pairs"
        )
    return sorted(random.Random(f"candidates/{seed}").sample(range(count), candidates))


def _hard_negatives(encoder: Encoder, pairs: PairEmbeddings, batch_size: int) -> Results:
    """Compare each picture's first caption with its captions that are wrong in one attribute.

    `accuracy`: the right one scores higher than every wrong one. `by_kind`: higher than the one
    that is wrong in this attribute. A tie is a miss.
    """
    results: Results = {}
    for language, texts in pairs.texts.items():
        owners, first = np.unique(texts.owner, return_index=True)
        wrong: list[str] = []
        rows: list[int] = []
        kinds: list[str] = []
        for row, owner in enumerate(owners):
            meta = pairs.metas[owner]
            captions = meta.get("hard_negatives", {}).get(language, [])
            names = meta.get("hard_negative_kinds", ["any"] * len(captions))
            if len(names) != len(captions):
                raise DataError(
                    f"{pairs.keys[owner]}: {len(captions)} hard negatives in {language}, but "
                    f"{len(names)} kinds; write the shards again"
                )
            wrong += captions
            kinds += names
            rows += [row] * len(captions)
        if not wrong:
            continue
        vectors = encoder.encode_text(wrong, batch_size=batch_size, show_progress=False)
        image = pairs.image[owners]
        own = np.einsum("nd,nd->n", image, texts.vectors[first])
        beaten = own[rows] > np.einsum("nd,nd->n", image[rows], vectors)
        results[language] = _summary(beaten, np.asarray(rows), np.asarray(kinds))
    return results


def _summary(beaten: Any, rows: Any, kinds: Any) -> dict[str, Any]:
    """beaten, rows, kinds: (W,) per wrong caption whether it lost, whose it is, what is wrong."""
    asked, counts = np.unique(rows, return_counts=True)
    lost = np.unique(rows[~beaten])
    return {
        "accuracy": 1 - len(lost) / len(asked),
        "chance": float(np.mean(1 / (1 + counts))),
        "n": len(asked),
        "by_kind": {
            str(kind): {
                "accuracy": float(beaten[kinds == kind].mean()),
                "n": int(np.count_nonzero(kinds == kind)),
            }
            for kind in dict.fromkeys(kinds.tolist())
        },
    }


def _zero_shot(
    encoder: Encoder, pairs: PairEmbeddings, task: ZeroShotTask, languages: Sequence[str]
) -> dict[str, dict[str, float]]:
    asked = [row for row, meta in enumerate(pairs.metas) if meta.get(task.label) is not None]
    if not asked:
        raise DataError(
            f"zero-shot task {task.name!r}: no picture has a label {task.label!r} in its meta; "
            f"correct the task file or the data"
        )
    labels = [str(pairs.metas[row][task.label]) for row in asked]
    return {
        language: zero_shot_accuracy(encoder, pairs.image[asked], labels, task, language)
        for language in languages
        if language in task.templates
    }


def flat_metrics(results: Results) -> dict[str, float]:
    """Return the shares of `evaluate` as `language/measure`, for a training log.

    `zh/i2t_r1`, ..., `zh/mean_recall`, `zh/hard_negatives`, `zh/zero_shot/colour` (top1), ...
    """
    flat: dict[str, float] = {}
    for language, metrics in results.get("retrieval", {}).items():
        shares = {k: v for k, v in metrics.items() if "_r" in k and "rank" not in k}
        flat |= {f"{language}/{key}": value for key, value in shares.items()}
    for language, found in results.get("hard_negatives", {}).items():
        flat[f"{language}/hard_negatives"] = found["accuracy"]
    for task, by_language in results.get("zero_shot", {}).items():
        for language, found in by_language.items():
            flat[f"{language}/zero_shot/{task}"] = found["top1"]
    return flat


def format_table(results: Results) -> str:
    """Return the result as plain text for a terminal; shares in percent."""
    data = results["data"]
    lines = [f"{results['model']['name']} on {data['path']}, {data['count']:,} pairs"]
    if "retrieval" in results:
        lines += ["", *_retrieval_lines(results)]
    if results.get("hard_negatives"):
        lines += ["", *_hard_negative_lines(results["hard_negatives"])]
    if "zero_shot" in results:
        lines += ["", *_zero_shot_lines(results["zero_shot"])]
    return "\n".join(lines)


def _retrieval_lines(results: Results) -> list[str]:
    columns = {"i2t": "image to text", "t2i": "text to image"}
    first = next(iter(results["retrieval"].values()))
    drawn = results["protocol"]["candidates"]
    among = f"{first['images']:,} pictures" + (
        f", drawn by seed {results['protocol']['seed']}" if drawn else ""
    )
    rows = [
        ["", *(f"{name} R@{k}" for name in ("I>T", "T>I") for k in (1, 5, 10)), "mean", "texts"]
    ]
    for language, metrics in results["retrieval"].items():
        recalls = [metrics[f"{direction}_r{k}"] for direction in columns for k in (1, 5, 10)]
        rows.append(
            [
                language,
                *map(_percent, recalls),
                _percent(metrics["mean_recall"]),
                f"{metrics['texts']:,}",
            ]
        )
    return [f"retrieval among {among}, % (I>T: image to text)", *_aligned(rows)]


def _hard_negative_lines(results: Results) -> list[str]:
    kinds = list(dict.fromkeys(kind for found in results.values() for kind in found["by_kind"]))
    rows = [["", "all", *kinds, "chance for all", "pictures"]]
    for language, found in results.items():
        shares = [found["by_kind"].get(kind, {}).get("accuracy") for kind in kinds]
        values = map(_percent, [found["accuracy"], *shares, found["chance"]])
        rows.append([language, *values, f"{found['n']:,}"])
    return ["right caption preferred to captions wrong in one attribute, %", *_aligned(rows)]


def _zero_shot_lines(results: Results) -> list[str]:
    languages = list(dict.fromkeys(language for found in results.values() for language in found))
    rows = [["", *languages, "chance", "classes", "pictures"]]
    for task, found in results.items():
        some = next(iter(found.values()))
        shares = [_percent(found.get(language, {}).get("top1")) for language in languages]
        rows.append(
            [task, *shares, _percent(some["chance"]), f"{some['classes']}", f"{some['n']:,}"]
        )
    return ["zero-shot accuracy (top-1), %", *_aligned(rows)]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
