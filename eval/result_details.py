"""The part of a results page for whatever a task says beside its metrics, in any shape.

Not for metrics (result_numbers.py), examples (result_examples.py) and classes (result_classes.py).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from m2encoder.eval.markup import Child, Markup, element
from m2encoder.eval.metric_names import DASH
from m2encoder.eval.page import wide

MAX_ROWS, MAX_LIST, MAX_DEPTH = 20, 12, 4
HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def details_markup(details: Mapping[str, Any], *, skip: Sequence[str] = ()) -> Markup | None:
    """Show plain values of any shape as lists and tables; None where nothing is left."""
    shown = {key: value for key, value in details.items() if key not in skip}
    parts = _parts(shown, depth=1)
    return element("div", parts, class_="table other") if parts else None


def _parts(values: Mapping[str, Any], depth: int) -> list[Markup]:
    plain = {key: value for key, value in values.items() if _is_scalar(value)}
    parts = [_facts(plain)] if plain else []
    for key, value in values.items():
        content = None if _is_scalar(value) else _nested(value, depth)
        if content:
            parts.append(element("h4", spoken(key.replace("_", " "))))
            parts.append(content)
    return parts


def _nested(value: Any, depth: int) -> Markup | None:
    if not value:
        return None
    if isinstance(value, Mapping):
        inner = list(value.values())
        if len(inner) > 1 and all(isinstance(each, Mapping) and _is_flat(each) for each in inner):
            return rows_markup([{"": key, **each} for key, each in value.items()])
        return element("div", _parts(value, depth + 1)) if depth < MAX_DEPTH else None
    if all(isinstance(each, Mapping) and _is_flat(each) for each in value):
        return rows_markup(value)
    if all(isinstance(each, list) and all(map(_is_scalar, each)) for each in value):
        return rows_markup(
            [{str(i): cell for i, cell in enumerate(row)} for row in value], head=False
        )
    if all(map(_is_scalar, value)):
        more = f" … {len(value):,} in all" if len(value) > MAX_LIST else ""
        items = [[" · ", spoken(written(each))] for each in value[:MAX_LIST]]
        return element("p", items[0][1:], items[1:], more)
    return None


def rows_markup(rows: Sequence[Mapping[str, Any]], *, head: bool = True) -> Markup:
    """Return rows with the same keys as a table, the first twenty of them."""
    shown = [_flattened(row) for row in rows[:MAX_ROWS]]
    keys = list(dict.fromkeys(key for row in shown for key in row))
    names = [element("th", spoken(key.replace("_", " ")), scope="col") for key in keys]
    body = [
        element(
            "tr",
            [
                element("th", spoken(written(row.get(key))), scope="row")
                if i == 0
                else element("td", spoken(written(row.get(key))))
                for i, key in enumerate(keys)
            ],
        )
        for row in shown
    ]
    top = element("thead", element("tr", names)) if head else None
    grid = element("table", top, element("tbody", body))
    more = f"The first {MAX_ROWS} of {len(rows):,}." if len(rows) > MAX_ROWS else None
    note = element("p", more, class_="note") if more else None
    return element("div", wide(grid), note)


def _flattened(row: Mapping[str, Any]) -> dict[str, Any]:
    """Bring what is inside a value up into columns of its own, `nearest` to `nearest label`."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{key} {inner}": each for inner, each in value.items()}
        else:
            flat[key] = value
    return flat


def _facts(values: Mapping[str, Any]) -> Markup:
    rows = [
        element(
            "div",
            element("dt", spoken(key.replace("_", " "))),
            element("dd", spoken(written(value))),
        )
        for key, value in values.items()
    ]
    return element("dl", rows, class_="small-facts")


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _is_flat(row: Mapping[str, Any]) -> bool:
    """Say whether a row fits into a table, once flattened."""
    for value in _flattened(row).values():
        if not _is_scalar(value) and not (
            isinstance(value, list) and len(value) <= MAX_LIST and all(map(_is_scalar, value))
        ):
            return False
    return True


def written(value: Any) -> str:
    """Return a plain value for people."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return " · ".join(map(written, value)) or DASH
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def spoken(text: str) -> Child:
    """Return a text, marked as Chinese where it has Chinese characters."""
    return element("span", text, lang="zh") if HAN.search(text) else text
