"""`m2enc eval bilingual`: what two languages, and other spellings, do to one model.

Not for the measuring (eval/bilingual.py, language_bias.py, robustness.py).
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2encoder.cli.measured import (
    LANGUAGES,
    Embedded,
    OnError,
    aligned,
    embed_shards,
    finish,
    metric_table,
)

if TYPE_CHECKING:
    from m2encoder.eval.metric import TaskOutput
    from m2encoder.eval.result_facts import DataFacts
    from m2encoder.eval.results import Result
    from m2encoder.zero_shot import ZeroShotTask

CONSISTENCY = (
    *("overlap_at_1", "overlap_at_5", "overlap_at_10", "spearman", "kendall"),
    *("zh_to_en_r1", "en_to_zh_r1", "cosine_parallel", "cosine_offset"),
)
GAP = tuple(f"{way}_r1_{which}" for way in ("t2i", "i2t") for which in ("zh", "en", "gap"))
BIAS = (
    *("share_zh", "accuracy_zh", "accuracy_en", "accuracy_together", "own_class_prefers_zh"),
    *("score_offset_own_class", "accuracy_zh_with_en_names_change"),
    "accuracy_en_with_zh_names_change",
)


def bilingual(
    model: str,
    data: Path,
    *,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
    on_error: OnError = "raise",
    batch_size: int = 64,
    device: str = "auto",
) -> int:
    """Compare Chinese with English: consistency, gap, bias between labels, other spellings.

    Args:
        model: A model folder.
        data: A shard folder whose pictures have captions in both languages.
        seed: Draws the bootstrap samples.
        out: Folder to write the results into, one JSON file per measure.
        json: Print JSON instead of tables.
        on_error: Stop at an unreadable picture or empty caption, or leave it out (exit code 4).
        batch_size: Pictures or texts at a time.
        device: Where to compute: auto, cpu, cuda, ...
    """
    from m2encoder.zero_shot import TASKS_NAME, load_tasks

    tasks = load_tasks(data) if (data / TASKS_NAME).is_file() else []
    embedded = embed_shards(model, data, device=device, batch_size=batch_size, on_error=on_error)
    results = _measure(embedded, data, tasks, batch_size=batch_size, seed=seed)
    return finish(results, _tables(results), embedded.pairs.skipped, out=out, json=json)


def _measure(
    embedded: Embedded, data: Path, tasks: "Sequence[ZeroShotTask]", *, batch_size: int, seed: int
) -> "list[Result]":
    from m2encoder.eval.bilingual import measure_bilingual
    from m2encoder.eval.language_bias import measure_language_bias
    from m2encoder.eval.result_facts import (
        caption_facts,
        class_facts,
        labelled_pictures,
        result_of,
    )
    from m2encoder.eval.robustness import measure_robustness

    encoder, pairs, embed_s = embedded
    results: list[Result] = []

    def add(task: str, facts: "DataFacts", output: "TaskOutput", began: float) -> None:
        seconds = {"embed": embed_s, "score": time.perf_counter() - began}
        settings = {"seed": seed}
        results.append(result_of(encoder, task, facts, output, settings=settings, seconds=seconds))

    began = time.perf_counter()
    output = measure_bilingual(pairs, LANGUAGES, seed=seed)
    add("bilingual", caption_facts(data, pairs, LANGUAGES), output, began)
    for task in tasks:
        if set(LANGUAGES) <= set(task.templates):
            began = time.perf_counter()
            rows, targets = labelled_pictures(pairs, task)
            output = measure_language_bias(encoder, pairs.image[rows], targets, task, seed=seed)
            add("language-bias", class_facts(data, pairs, task, LANGUAGES), output, began)
    for language in LANGUAGES:
        began = time.perf_counter()
        output = measure_robustness(
            encoder, pairs.image, pairs.texts[language], language, batch_size=batch_size, seed=seed
        )
        add("robustness", caption_facts(data, pairs, [language]), output, began)
    return results


def _tables(results: Sequence["Result"]) -> list[str]:
    lines: list[str] = []
    for result in results:
        metrics = result.metrics
        if result.task == "bilingual":
            data = result.data
            lines.append(f"{result.model['name']} on {data['path']}, {data['images']:,} pictures")
            lines += ["", *metric_table("parallel captions", metrics, CONSISTENCY)]
            lines += ["", *metric_table("retrieval and gap (zh less en)", metrics, GAP)]
        elif result.task == "language-bias":
            head = f"both languages in one list: {result.details['task']}"
            lines += ["", *metric_table(head, metrics, BIAS)]
        else:
            lines += ["", *_robustness_table(result)]
    return lines


def _robustness_table(result: "Result") -> list[str]:
    from m2encoder.eval.metric_names import write_interval, write_value

    metrics: Mapping[str, Any] = result.metrics
    rows = [
        [
            f"{result.language} captions written otherwise",
            "changed",
            "cosine",
            "R@1 change",
            "±95 %",
        ]
    ]
    for key in (name for name in metrics if name.endswith("_changed")):
        name = key.removesuffix("_changed")
        change = metrics[f"{name}_t2i_r1_change"]
        rows.append(
            [
                name.replace("_", " "),
                write_value(key, metrics[key].value),
                write_value(f"{name}_cosine", metrics[f"{name}_cosine"].value),
                write_value("change", change.value, signed=True),
                write_interval("change", change).lstrip("±"),
            ]
        )
    truncated = write_value("truncated", metrics["truncated"].value)
    lines = [*aligned(rows), f"truncated: {truncated} % of {metrics['truncated'].n:,} captions"]
    for name, reason in result.details["left_out"].items():
        lines.append(f"{name}: left out, {reason}")
    return lines
