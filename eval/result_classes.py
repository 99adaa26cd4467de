"""The part of a results page about classes: which fare worst, and which are taken for which.

Not for the metrics over all classes (result_numbers.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from m2encoder.eval.markup import Markup, element, language_name
from m2encoder.eval.metric_names import DASH
from m2encoder.eval.page import wide
from m2encoder.eval.results import Result

MAX_CLASSES, MAX_PAIRS, MAX_GRID = 15, 12, 20
MAX_NAME = 28
Row = Mapping[str, Any]


def classes_markup(results: Sequence[Result]) -> Markup | None:
    """Show the worst classes, languages side by side, and what is confused; None without any."""
    results = [result for result in results if _rows(result, "classes")]
    if not results:
        return None
    parts = [_worst(results), *(_confusions(result) for result in results)]
    grids = [grid for result in results if (grid := _grid(result))]
    tables = element("div", parts, class_="tables")
    return element("div", tables, element("div", grids, class_="tables") if grids else None)


def _rows(result: Result, key: str) -> list[Row]:
    found = result.details.get(key)
    if not isinstance(found, Sequence) or isinstance(found, str):
        return []
    wanted = {"classes": {"name", "top1"}, "confusions": {"true", "predicted", "n"}}[key]
    return [row for row in found if isinstance(row, Mapping) and wanted <= row.keys()]


def _worst(results: Sequence[Result]) -> Markup:
    """Order classes by their worst language; classes of one number are the same class."""
    columns = [_rows(result, "classes") for result in results]
    if len({len(column) for column in columns}) != 1:  # other label lists: nothing to set beside
        columns, results = columns[:1], results[:1]
    together = list(zip(*columns, strict=True))
    seen = [row for row in together if any(each["top1"] is not None for each in row)]
    seen.sort(key=lambda row: min(each["top1"] for each in row if each["top1"] is not None))
    head = [element("th", language_name(result.language), scope="col") for result in results]
    body = [
        element(
            "tr",
            element("th", _names(row, results), scope="row"),
            [_share(each, result) for each, result in zip(row, results, strict=True)],
        )
        for row in seen[:MAX_CLASSES]
    ]
    grid = element(
        "table", element("thead", element("tr", element("td"), head)), element("tbody", body)
    )
    note = (
        f"Share of a class's pictures given the right name, in percent; below it what they are "
        f"mostly taken for. The {len(body)} worst of {len(seen):,} classes."
    )
    return element(
        "div",
        element("h4", "Worst classes"),
        wide(grid),
        element("p", note, class_="note"),
        class_="table",
    )


def _names(row: Sequence[Row], results: Sequence[Result]) -> list[Markup]:
    names = [
        _name(each["name"], result.language) for each, result in zip(row, results, strict=True)
    ]
    return [element("span", name, class_="name") for name in names]


def _name(name: Any, language: str) -> Markup:
    """Return a class's name, of several the first, cut where it is long; the whole as its title."""
    whole = str(name)
    short = whole.split(" / ")[0]
    short = short if len(short) <= MAX_NAME else short[: MAX_NAME - 1] + "…"
    return element("span", short, lang=language, title=whole if short != whole else None)


def _share(row: Row, result: Result) -> Markup:
    share = row["top1"]
    wrong, count = row.get("confused_with"), row.get("confused_n")
    taken = None
    if wrong:
        times = f" {count:,g}×" if isinstance(count, int | float) else ""
        taken = element("small", _name(wrong, result.language), times)
    text = DASH if share is None else f"{100 * share:.1f}"
    seen = row.get("n")
    title = f"{seen:,} pictures" if isinstance(seen, int) else None
    return element("td", element("b", text), element("br"), taken, title=title)


def _confusions(result: Result) -> Markup | None:
    pairs = _rows(result, "confusions")[:MAX_PAIRS]
    if not pairs:
        return None
    most = max(float(pair["n"]) for pair in pairs)
    rows = [
        element(
            "tr",
            element(
                "th",
                _name(pair["true"], result.language),
                " → ",
                _name(pair["predicted"], result.language),
                scope="row",
            ),
            element("td", _bar(float(pair["n"]), most, result.language), class_="bars"),
            element("td", f"{float(pair['n']):,g}"),
        )
        for pair in pairs
    ]
    heading = [
        "Confused most, ",
        element("i", class_=f"key {result.language}"),
        language_name(result.language),
    ]
    return element(
        "div",
        element("h4", heading),
        wide(element("table", element("tbody", rows))),
        element("p", "The right class → what the model says, and for how many pictures.",
                class_="note"),
        class_="table",
    )  # fmt: skip


def _bar(count: float, most: float, language: str) -> Markup:
    fill = element("span", class_="fill", style=f"width:{100 * count / most if most else 0:.1f}%")
    return element("span", fill, class_=f"bar {language}", aria_hidden="true")


def _grid(result: Result) -> Markup | None:
    """Return the whole confusion as a grid where there are few enough classes to read it."""
    matrix = result.details.get("confusion")
    names = [_name(row["name"], result.language) for row in _rows(result, "classes")]
    if not isinstance(matrix, Sequence) or not 2 <= len(names) == len(matrix) <= MAX_GRID:
        return None
    if any(not isinstance(row, Sequence) or len(row) != len(names) for row in matrix):
        return None
    head = [element("th", name, scope="col", lang=result.language)
            for name in names]  # fmt: skip
    body = [
        element(
            "tr",
            element("th", name, scope="row"),
            [_cell(float(count), float(sum(row)), i == j) for j, count in enumerate(row)],
        )
        for i, (name, row) in enumerate(zip(names, matrix, strict=True))
    ]
    grid = element(
        "table",
        element("thead", element("tr", element("td"), head)),
        element("tbody", body),
        class_="confusion",
    )
    title = ["Confusion, ", language_name(result.language)]
    note = "Rows: the right class. Columns: what the model says. Stronger: more of the row."
    return element(
        "div",
        element("h4", title),
        wide(grid),
        element("p", note, class_="note"),
        class_="table",
    )


def _cell(count: float, total: float, is_right: bool) -> Markup:
    share = count / total if total else 0.0
    kind = "right" if is_right else "wrong"
    shown = f"{count:,g}" if count else ""
    return element("td", shown, class_=kind, style=f"--share:{share:.3f}")
