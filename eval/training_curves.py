"""Rows of metrics.jsonl as the curves that pages about training show.

Not for drawing them (charts.py).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from m2encoder.eval.charts import Line
from m2encoder.eval.markup import LANGUAGE_NAMES

Rows = Sequence[Mapping[str, Any]]


def curve(label: str, rows: Rows, key: str, style: str) -> Line:
    """Return the values of one key over the steps; rows without it are passed over."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return Line(label, points, style)


def term_curves(rows: Rows, prefix: str) -> list[Line]:
    """Return a curve per objective: each key `prefix/OBJECTIVE`, coloured by its language."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(f"{prefix}/"))
    return [curve(key.partition("/")[2], rows, key, _style(key)) for key in keys]


def loss_curves(rows: Rows) -> list[Line]:
    """Return each objective's loss, and the total where there are several."""
    terms = term_curves(rows, "loss")
    return terms if len(terms) == 1 else [*terms, curve("total", rows, "loss", "total")]


def evaluation_curves(rows: Rows, metric: str) -> list[Line]:
    """Return a curve per language: the mean of the metrics whose name matches, at each step.

    metric: a regular expression for what follows `eval/LANGUAGE/` or, under a data set's name,
    `eval/val/LANGUAGE/`.
    """
    lines = []
    for language in LANGUAGE_NAMES:
        wanted = re.compile(rf"eval/(?:[^/]+/)?{language}/(?:{metric})")
        points = []
        for row in rows:
            values = [v for key, v in row.items() if wanted.fullmatch(key) and v is not None]
            if values:
                points.append((row["step"], sum(values) / len(values)))
        lines.append(Line(LANGUAGE_NAMES[language], points, language))
    return lines


def _style(key: str) -> str:
    """Colour an objective by its language; one over both or neither gets a neutral colour."""
    named = [language for language in LANGUAGE_NAMES if language in re.split(r"[^a-z]+", key)]
    return named[0] if len(named) == 1 else "other"
