"""The part of a results page that shows metrics with their bars, languages side by side.

Not for what else tasks say (result_details.py, result_examples.py, result_classes.py), nor for the
page around it (result_report.py).
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from m2encoder.eval.markup import LANGUAGE_NAMES, Markup, element, language_name
from m2encoder.eval.metric import Metric
from m2encoder.eval.metric_names import (
    DASH,
    is_difference,
    is_share,
    label,
    ordered,
    write_interval,
    write_tie_bounds,
    write_value,
)
from m2encoder.eval.page import wide
from m2encoder.eval.results import Result

FEW = 12
"""Metrics shown at once; the rest opens on demand."""
CHANGES = {"changed": "texts changed", "cosine": "cosine", "t2i_r1_change": "T2I R@1 change"}
"""What is measured of each way to change texts, by the end of the metric's name."""


def metrics_markup(results: Sequence[Result]) -> Markup | None:
    """Show the metrics of one task, languages side by side; None where there are none.

    A result about two languages at once has its metrics of either side by side, too, as far as they
    are named so: `t2i_r1_zh`, `t2i_r1_en` and their `t2i_r1_gap`.
    """
    if not any(result.metrics for result in results):
        return None
    pivots = [_pairs_table(results[0]) if len(results) == 1 else None, _changes_table(results)]
    shown = {name for pivot in pivots if pivot for name in pivot.names}
    names = ordered(name for result in results for name in result.metrics if name not in shown)
    few, rest = names[:FEW], names[FEW:]
    folded = [element("summary", f"{len(rest)} more"), wide(_metrics_table(results, rest))]
    return element(
        "div",
        [wide(pivot.markup) for pivot in pivots if pivot],
        wide(_metrics_table(results, few)) if few else None,
        element("details", folded) if rest else None,
        element("p", _legend(results), class_="note"),
        class_="table",
    )


class Pivot(NamedTuple):
    """Metrics whose names go together, in one table."""

    names: set[str]
    """The metrics shown."""
    markup: Markup


def _pairs_table(result: Result) -> Pivot | None:
    languages = result.language.split("+")
    if len(languages) != 2:
        return None
    rows: list[tuple[str, list[str]]] = []
    for name in ordered(result.metrics):
        stem = name.removesuffix(f"_{languages[0]}")
        across = name.removeprefix(f"{languages[0]}_to_{languages[1]}_")
        if stem != name:
            sides = [name, f"{stem}_{languages[1]}"]
            gap = next((g for g in (f"{stem}_gap", f"{stem}_offset") if g in result.metrics), "")
            rows.append((label(stem), [*sides, gap]))
        elif across != name:
            other = f"{languages[1]}_to_{languages[0]}_{across}"
            rows.append((f"{label(across)} in the other language", [name, other, ""]))
    rows = [row for row in rows if row[1][1] in result.metrics]
    if not rows:
        return None
    heads = [element("th", element("i", class_=f"key {tag}"), language_name(tag), scope="col")
             for tag in languages]  # fmt: skip
    body = [
        element(
            "tr",
            element("th", title, scope="row"),
            [_metric_cell(result, name, tag) for name, tag in zip(sides, languages, strict=False)],
            _metric_cell(result, sides[2], None),
        )
        for title, sides in rows
    ]
    top = element("tr", element("td"), heads, element("th", "difference", scope="col"))
    grid = element("table", element("thead", top), element("tbody", body), class_="metrics")
    return Pivot({name for _, sides in rows for name in sides}, grid)


def _changes_table(results: Sequence[Result]) -> Pivot | None:
    """Show what each way to change texts does: a row each, languages side by side."""
    names = ordered(name for result in results for name in result.metrics)
    ways = [name.removesuffix("_changed") for name in names if name.endswith("_changed")]
    if not ways:
        return None
    tops = [
        element("th", element("i", class_=f"key {each.language}"), language_name(each.language),
                colspan=len(CHANGES), scope="colgroup")
        for each in results
    ]  # fmt: skip
    heads = [element("th", text, scope="col") for _ in results for text in CHANGES.values()]
    body = [
        element(
            "tr",
            element("th", label(way), scope="row"),
            [_metric_cell(result, f"{way}_{end}", None) for result in results for end in CHANGES],
        )
        for way in ways
    ]
    top = [element("tr", element("td"), tops), element("tr", element("td"), heads)]
    grid = element("table", element("thead", top), element("tbody", body), class_="metrics changes")
    return Pivot({f"{way}_{end}" for way in ways for end in CHANGES}, grid)


def _legend(results: Sequence[Result]) -> str:
    metrics = [each for result in results for each in result.metrics.items()]
    text = "Shares in percent."
    if any(metric.ci95 for _, metric in metrics):
        text += " ±: half of the 95 % bootstrap interval."
    if any(write_tie_bounds(*each) for each in metrics):
        text += " (low–high): what ties could make of the value."
    if any(chance_of(result, name) is not None for result in results for name in result.metrics):
        text += " The notch on a bar is chance, or what would be fair."
    return text


def _metrics_table(results: Sequence[Result], names: Sequence[str]) -> Markup:
    heads = [
        element("th", element("i", class_=f"key {tag}"), language_name(tag), scope="col")
        for tag in (result.language for result in results)
    ]
    rows = [
        element(
            "tr",
            element("th", label(name), scope="row"),
            [_metric_cell(result, name, result.language) for result in results],
        )
        for name in names
    ]
    head = element("thead", element("tr", element("td"), heads))
    alone = " alone" if len(results) == 1 else ""
    return element("table", head, element("tbody", rows), class_=f"metrics{alone}")


def _metric_cell(result: Result, name: str, language: str | None) -> Markup:
    """Return a value with what it may be; with a bar in the language's colour, if one is given."""
    metric = result.metrics.get(name)
    if metric is None:
        return element("td", DASH if name else None)
    ties, interval = write_tie_bounds(name, metric), write_interval(name, metric)
    return element(
        "td",
        element("b", write_value(name, metric.value)),
        [" ", element("small", interval)] if interval else None,
        [" ", element("small", f"({ties})")] if ties else None,
        _bar(name, metric, chance_of(result, name), language) if language is not None else None,
        title=f"over {metric.n:,}",
    )


def _bar(name: str, metric: Metric, chance: float | None, language: str) -> Markup | None:
    has_bar = is_share(name) and name != "rsum" and not is_difference(name)
    if not has_bar or not 0 <= metric.value <= 1:  # not NaN either
        return None
    notch = element("span", class_="chance", style=f"left:{100 * chance:.1f}%") if chance else None
    text = f"{LANGUAGE_NAMES.get(language, language)} {write_value(name, metric.value)} percent"
    if chance:
        text += f", chance {write_value(name, chance)}"
    return element(
        "span",
        element("span", class_="fill", style=f"width:{100 * metric.value:.1f}%"),
        notch,
        class_=f"bar {language if language in LANGUAGE_NAMES else 'other'}",
        role="img",
        aria_label=text,
    )


def chance_of(result: Result, name: str) -> float | None:
    """Return what chance would give for a metric, or what would be fair, where it is known."""
    given = result.details.get("chance")
    if isinstance(given, Mapping):
        head = name.partition("_")[0]
        given = given.get(name, given.get(f"{head}_KIND") if head != name else None)
    elif recall := re.fullmatch(r"([ti])2[ti]_r(\d+)", name):
        given = _chance_of_recall(result, recall[1] == "t", int(recall[2]))
    elif re.match("share|own_class", name):
        given = result.details.get("fair")
    elif isinstance(given, float) and (top := re.fullmatch(r"top_?(\d+)", name)):
        given *= int(top[1])
    elif not re.match("accuracy|mean_per_class_recall", name) or is_difference(name):
        given = None
    is_share_of_1 = isinstance(given, int | float) and 0 <= given <= 1
    return float(given) if is_share_of_1 and given is not None else None


def _chance_of_recall(result: Result, from_text: bool, k: int) -> float | None:
    """Return the chance that k drawn candidates hold a right one, over the queries that there are.

    A picture is right for a text; of a picture's texts any is.
    """
    images, texts = result.data.get("images"), result.data.get("texts")
    histogram = result.data.get("captions_per_image")
    if not images or not texts:
        return None
    if from_text:
        return min(1.0, k / images)
    if not isinstance(histogram, Mapping):
        return None
    asked = [(int(owned), int(count)) for owned, count in histogram.items() if int(owned)]
    missed = [count * _chance_of_none(texts, owned, k) for owned, count in asked]
    total = sum(count for _, count in asked)
    return 1 - sum(missed) / total if total else None


def _chance_of_none(total: int, right: int, k: int) -> float:
    """Return the chance that k of `total` candidates, drawn without putting back, are all wrong."""
    return math.prod(max(0, total - right - j) / (total - j) for j in range(min(k, total)))
