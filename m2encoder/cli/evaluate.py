"""`m2enc eval retrieval` and `m2enc eval zero-shot`: measure a model on a shard folder.

Not for the measuring (eval/suite.py); this prints the result and writes it where asked.
"""

import os
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from m2encoder.cli.search import report_skipped

if TYPE_CHECKING:
    from m2encoder.eval.suite import Task


def retrieval(
    model: str,
    data: Path,
    *,
    candidates: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    batch_size: int = 64,
    device: str = "auto",
) -> int:
    """Measure recall at 1, 5 and 10 between pictures and their captions, in Chinese and English.

    Args:
        model: A model folder.
        data: A shard folder.
        candidates: Rank among that many pairs, drawn at random, instead of all.
        seed: Draws the candidates.
        out: File to write the result to, as JSON.
        json: Print JSON instead of a table.
        on_error: Stop at an unreadable picture or empty caption, or leave it out (exit code 4).
        batch_size: Pictures or texts at a time.
        device: Where to compute: auto, cpu, cuda, ...
    """
    options = {"candidates": candidates, "seed": seed, "on_error": on_error}
    return _run("retrieval", model, data, device, options | {"batch_size": batch_size}, out, json)


def zero_shot(
    model: str,
    data: Path,
    *,
    out: Path | None = None,
    json: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    batch_size: int = 64,
    device: str = "auto",
) -> int:
    """Measure how often the right class, described in words, fits a picture best.

    Args:
        model: A model folder.
        data: A shard folder with a zero_shot.json.
        out: File to write the result to, as JSON.
        json: Print JSON instead of a table.
        on_error: Stop at an unreadable picture, or leave it out (exit code 4).
        batch_size: Pictures or texts at a time.
        device: Where to compute: auto, cpu, cuda, ...
    """
    options = {"on_error": on_error, "batch_size": batch_size}
    return _run("zero-shot", model, data, device, options, out, json)


def _run(
    task: "Task",
    model: str,
    data: Path,
    device: str,
    options: dict[str, Any],
    out: Path | None,
    json: bool,
) -> int:
    from m2encoder.encoder import BadItem
    from m2encoder.eval.suite import evaluate, format_table
    from m2encoder.load import load_model

    results = evaluate(load_model(model, device=device), data, tasks=(task,), **options)
    text = dumps(results, ensure_ascii=False, indent=2)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(out.name + ".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, out)
    print(text if json else format_table(results))
    skipped = [BadItem(-1, bad["name"], bad["reason"]) for bad in results["data"]["skipped"]]
    return report_skipped(skipped)
