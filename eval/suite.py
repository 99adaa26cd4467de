"""What a shard folder says of a model in one mapping of plain numbers: for logs and short pages.

Not for the measuring and its intervals (shard_tasks.py), nor for pages (report.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from m2encoder import __version__
from m2encoder.distributed import World
from m2encoder.encoder import Encoder, OnError
from m2encoder.errors import DataError
from m2encoder.eval.results import Result
from m2encoder.eval.shard_tasks import run_shards
from m2encoder.eval.tasks import Running

Task = Literal["retrieval", "zero-shot"]
Results = dict[str, Any]
FORMAT = 2


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
    world: World | None = None,
    show_progress: bool | None = None,
) -> Results:
    """Encode a shard folder once and measure what its captions, labels and tasks allow.

    candidates: rank among that many pairs, drawn by `seed`, instead of all; with every caption.
    world: processes that share the work; all return the same. Returns what `summarise` does.
    What the data lacks is left out. Raises DataError if nothing is left to measure, ConfigError if
    `candidates` is less than 2 or more than there are pairs.
    """
    running = Running(
        batch_size=batch_size,
        on_error=on_error,
        world=world,
        seed=seed,
        show_progress=show_progress,
    )
    wanted = [name for task in tasks for name in (task, "hard-negatives")[: 1 + (task[0] == "r")]]
    results = run_shards(
        encoder,
        data_dir,
        running=running,
        tasks=wanted,  # pyright: ignore[reportArgumentType] - both names are tasks
        languages=languages,
        candidates=candidates,
    )
    if "retrieval" in tasks and not any(result.task == "retrieval" for result in results):
        raise DataError(
            f"{data_dir}: no captions in {' or '.join(languages)}, retrieval needs some"
        )
    return summarise(results)


def summarise(results: Sequence[Result]) -> Results:
    """Return the values of `run_shards` as plain numbers that JSON holds; shares are 0..1.

    {"format", "m2encoder": version, "model": {"name", "fingerprint"}, "data": {"path", "count",
    "skipped": [{"name", "reason"}]}, "protocol": {"candidates", "seed", "ties"},
    "retrieval": {language: {"i2t_r1", ..., "mean_recall", "rsum" (percent), ...}},
    "hard_negatives": {language: {"accuracy", "chance", "n", "by_kind": {kind: {"accuracy", "n"}}}},
    "zero_shot": {task: {language: {"top1", "mean_per_class_recall", "classes", "chance", "n"}}}}.
    """
    first = results[0]
    summary: Results = {
        "format": FORMAT,
        "m2encoder": __version__,
        "model": {key: first.model[key] for key in ("name", "fingerprint")},
        "data": {
            "path": first.data["path"],
            "count": max(result.data["images"] for result in results),
            "skipped": first.data["skipped"],
        },
    }
    for result in results:
        if result.task == "retrieval":
            settings = result.settings
            summary["protocol"] = {
                "candidates": settings["candidates"],
                "seed": settings["seed"],
                "ties": "the mean over random orders",
            }
            summary.setdefault("retrieval", {})[result.language] = _recalls(result)
            summary.setdefault("hard_negatives", {})
        elif result.task == "hard-negatives":
            summary["hard_negatives"][result.language] = _hard_negatives(result)
        elif result.task == "zero-shot":
            of_task = summary.setdefault("zero_shot", {}).setdefault(result.settings["task"], {})
            of_task[result.language] = _accuracies(result)
    return summary


def _recalls(result: Result) -> dict[str, float]:
    values = {name: metric.value for name, metric in result.metrics.items()}
    counts = ("images", "texts", "images_without_text")
    return {
        **values,
        "rsum": 100 * values["rsum"],
        **{name: result.details[name] for name in counts},
    }


def _hard_negatives(result: Result) -> dict[str, Any]:
    whole, kinds = result.metrics["accuracy"], result.details["kinds"]
    return {
        "accuracy": whole.value,
        "chance": result.details["chance"]["accuracy"],
        "n": whole.n,
        "by_kind": {
            kind: {"accuracy": result.metrics[f"accuracy_{kind}"].value, "n": n}
            for kind, n in kinds.items()
        },
    }


def _accuracies(result: Result) -> dict[str, float]:
    found = {name: metric.value for name, metric in result.metrics.items()}
    classes = len(result.details["classes"])
    return {**found, "classes": classes, "chance": 1 / classes, "n": result.metrics["top1"].n}


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
