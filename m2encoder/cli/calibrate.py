"""`m2enc eval calibrate`: from which score on a picture fits, kept beside the model for searching.

Not for the measuring (eval/calibrate.py), nor for using it (m2encoder/calibration.py).
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m2encoder.cli.measured import OnError, aligned, embed_shards, finish
from m2encoder.errors import ConfigError

if TYPE_CHECKING:
    from m2encoder.eval.results import Result


def calibrate(
    model: str,
    data: Path,
    *,
    precision: float = 0.95,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
    on_error: OnError = "raise",
    batch_size: int = 64,
    device: str = "auto",
) -> int:
    """Find from which score on a picture fits a text, and keep it beside the model for searching.

    The more pictures the better; take as many as will be searched, of the same kind.

    Args:
        model: A model folder, which gets a calibration.json.
        data: A shard folder with captions in Chinese, English or both.
        precision: Share of matches, 0 to 1, wanted among what is called a match.
        seed: Draws the bootstrap samples and the halves for the check on other pictures.
        out: Folder to write the results into as well, one JSON file per language.
        json: Print JSON instead of a table.
        on_error: Stop at an unreadable picture or empty caption, or leave it out (exit code 4).
        batch_size: Pictures or texts at a time.
        device: Where to compute: auto, cpu, cuda, ...
    """
    from m2encoder.eval.calibrate import calibrate as measure
    from m2encoder.eval.result_facts import caption_facts, result_of

    if not 0 < precision <= 1:
        raise ConfigError(f"precision is {precision:g}, expected more than 0 and at most 1")
    encoder, pairs, embed_s = embed_shards(
        model, data, device=device, batch_size=batch_size, on_error=on_error
    )
    if encoder.folder is None:
        raise ConfigError(
            f"{model}: lies in no folder that a calibration could be kept in; save the model first "
            f"with save_pretrained and calibrate that folder"
        )
    began = time.perf_counter()
    found, outputs = measure(encoder, pairs, precision=precision, data=data.name, seed=seed)
    seconds = {"embed": embed_s, "score": time.perf_counter() - began}
    settings = {"seed": seed, "precision": precision}
    results = [
        result_of(
            encoder,
            "calibration",
            caption_facts(data, pairs, [language]),
            output,
            settings=settings,
            seconds=seconds,
        )
        for language, output in outputs.items()
    ]
    kept = found.save(encoder.folder)
    lines = [*_table(results, precision), f"kept in {kept}"]
    return finish(results, lines, pairs.skipped, out=out, json=json)


def _table(results: Sequence["Result"], precision: float) -> list[str]:
    from m2encoder.eval.metric_names import write_value

    names = ("threshold", "precision", "precision_held_out", "recall", "rejection")
    rows = [["", *(name.replace("_", " ") for name in names), "no-match AUROC", "n", "pictures"]]
    for result in results:
        metrics = result.metrics
        cells = [_with_interval(result, name) for name in (*names, "no_match_auroc")]
        count = f"{metrics['recall'].n:,}"
        rows.append([result.language, *cells, count, f"{result.details['pictures']:,}"])
    lines = aligned(rows)
    for result in results:
        if not result.details["reached"]:
            best = write_value("precision", result.metrics["precision"].value)
            lines.append(
                f"{result.language}: no score reaches a precision of {100 * precision:g} %, the "
                f"best is {best} %; searches will not say that nothing fits"
            )
    return lines


def _with_interval(result: "Result", name: str) -> str:
    from m2encoder.eval.metric_names import write_interval, write_value

    metric = result.metrics[name]
    return f"{write_value(name, metric.value)} {write_interval(name, metric)}".strip()
