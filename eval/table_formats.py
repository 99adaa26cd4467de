"""Tables of results as Markdown, CSV and a page.

Not for what is in them (table.py).
"""

import csv
import io
import math
from collections.abc import Sequence
from typing import Literal

from m2encoder.eval.markup import Markup, element
from m2encoder.eval.metric import Metric
from m2encoder.eval.metric_names import (
    DASH,
    label,
    ordered,
    write_interval,
    write_tie_bounds,
    write_value,
)
from m2encoder.eval.page import html_page, wide
from m2encoder.eval.table import Column, Row, Table
from m2encoder.eval.text_table import escaped, markdown_table

Format = Literal["markdown", "csv", "html"]
FACTS = ("task", "protocol", "status", "language", "model", "fingerprint", "source", "remarks")
MAX_COLUMNS = 12
PARTS = ("", "_n", "_ci95_low", "_ci95_high", "_tie_low", "_tie_high")


def write_tables(tables: Sequence[Table], form: Format) -> str:
    """Return the tables as text in that form, ending in a line break."""
    return {"markdown": to_markdown, "csv": to_csv, "html": to_html}[form](tables)


def to_markdown(tables: Sequence[Table]) -> str:
    """Return a heading, a table and its notes for each; columns line up in a terminal."""
    return "\n".join(_markdown(table) for table in tables)


def _markdown(table: Table) -> str:
    if lies_down(table):
        columns = _lying_columns(table)
        alone = len(table.languages) == 1
        head = ["", *(_named(row, "" if alone else language) for row, language in columns)]
        rows = [
            [label(name), *(_cell(row, Column(language, name)) for row, language in columns)]
            for name in _metrics(table)
        ]
    else:
        head = ["model", *(table.heading(column) for column in table.columns)]
        rows = [[_named(row), *(_cell(row, each) for each in table.columns)] for row in table.rows]
        if _has_sources(table):
            head.append("source")
            rows = [
                [*cells, row.source or "ours"] for cells, row in zip(rows, table.rows, strict=True)
            ]
    notes = [f"{mark} {text}".strip() for mark, text in table.notes]
    lines = [f"### {escaped(table.title)}", "", markdown_table(head, rows), ""]
    return "\n".join([*lines, *(f"{escaped(note)}  " for note in notes)]).rstrip() + "\n"


def lies_down(table: Table) -> bool:
    """Say whether metrics are the rows: there are too many to stand beside each other."""
    return len(table.columns) > MAX_COLUMNS and len(table.rows) < len(table.columns)


def _lying_columns(table: Table) -> list[tuple[Row, str]]:
    """Return each row in each of its languages."""
    return [
        (row, language)
        for row in table.rows
        for language in table.languages
        if any(column.language == language for column in row.values)
    ]


def _metrics(table: Table) -> list[str]:
    return ordered(column.metric for column in table.columns)


def _has_sources(table: Table) -> bool:
    return any(row.source for row in table.rows)


def _named(row: Row, language: str = "") -> str:
    return " ".join(filter(None, [row.model, language, *row.marks, row.source if language else ""]))


def _cell(row: Row, column: Column) -> str:
    metric = row.values.get(column)
    if metric is None:
        return DASH
    ties = write_tie_bounds(column.metric, metric)
    parts = [write_value(column.metric, metric.value), write_interval(column.metric, metric)]
    return " ".join(filter(None, [*parts, f"({ties})" if ties else ""]))


# --- CSV -----------------------------------------------------------------------------------------


def to_csv(tables: Sequence[Table]) -> str:
    """Return one table: a row for each model, task and language; shares 0..1, unrounded.

    Which columns there are depends on which metrics there are, and on nothing else.
    """
    names = ordered(column.metric for table in tables for column in table.columns)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*FACTS, *(name + part for name in names for part in PARTS)])
    for table in tables:
        reasons = dict(table.notes)
        for row in table.rows:
            for language in table.languages:
                values = {c.metric: m for c, m in row.values.items() if c.language == language}
                if values:
                    facts = _facts(table, row, language, reasons)
                    cells = [cell for name in names for cell in _numbers(values.get(name))]
                    writer.writerow([*facts, *cells])
    return stream.getvalue()


def _facts(table: Table, row: Row, language: str, reasons: dict[str, str]) -> list[str]:
    facts = row.facts or {}
    known = [facts.get(key, {}).get(language, "") for key in ("protocol", "status")]
    remarks = "; ".join(reasons[mark] for mark in row.marks)
    fingerprint = str(facts.get("fingerprint", ""))
    source = str(facts.get("source", ""))
    return [table.task, *known, language, row.model, fingerprint, source, remarks]


def _numbers(metric: Metric | None) -> list[str]:
    if metric is None:
        return [""] * len(PARTS)
    low, high = metric.ci95 or (None, None)
    values = [metric.value, metric.n or None, low, high, metric.tie_low, metric.tie_high]
    return ["" if v is None or not math.isfinite(v) else repr(v) for v in values]


# --- HTML ----------------------------------------------------------------------------------------


def to_html(tables: Sequence[Table]) -> str:
    """Return a self-contained page with every table."""
    styles = ("report.css", "result_report.css")
    return html_page("Results", [table_markup(table) for table in tables], styles=styles)


def table_markup(table: Table) -> Markup:
    """Return one table with its heading and notes, wide ones scrolling inside their frame."""
    grid = _lying(table) if lies_down(table) else _standing(table)
    notes = [
        element("p", element("sup", mark) if mark else None, " ", text)
        for mark, text in table.notes
    ]
    return element(
        "section",
        element("h2", table.title),
        element("div", wide(grid), notes, class_="table results"),
    )


def _standing(table: Table) -> Markup:
    head = ["", *(table.heading(column) for column in table.columns)]
    head += ["source"] if _has_sources(table) else []
    rows = [
        element(
            "tr",
            _model(row, "row"),
            [_cell_markup(row, column) for column in table.columns],
            element("td", row.source or "ours") if _has_sources(table) else None,
            class_="published" if row.source else "ours",
        )
        for row in table.rows
    ]
    cells = [element("th", name, scope="col") if name else element("td") for name in head]
    return element("table", element("thead", element("tr", cells)), element("tbody", rows))


def _lying(table: Table) -> Markup:
    columns = _lying_columns(table)
    several = len(table.languages) > 1
    models = [_model(row, "col", language if several else "") for row, language in columns]
    rows = [
        element(
            "tr",
            element("th", label(name), scope="row"),
            [_cell_markup(row, Column(language, name)) for row, language in columns],
        )
        for name in _metrics(table)
    ]
    head = element("thead", element("tr", element("td"), models))
    return element("table", head, element("tbody", rows))


def _model(row: Row, scope: str, language: str = "") -> Markup:
    marks = element("sup", " ".join(filter(None, [*row.marks, row.source if language else ""])))
    return element("th", row.model, f" {language}" if language else None, marks, scope=scope)


def _cell_markup(row: Row, column: Column) -> Markup:
    metric = row.values.get(column)
    if metric is None:
        return element("td", DASH)
    ties = write_tie_bounds(column.metric, metric)
    interval = write_interval(column.metric, metric)
    return element(
        "td",
        write_value(column.metric, metric.value),
        [" ", element("small", interval)] if interval else None,
        [" ", element("small", f"({ties})", title="what ties could make of it")] if ties else None,
        title=f"{label(column.metric)}: {metric.n:,} measured" if metric.n else None,
    )
