"""The part of the report that shows a result's numbers: tiles, bars and tables, zh beside en.

Not for measuring (suite.py) nor for the page around it (report.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from m2encoder.eval.markup import LANGUAGE_NAMES, Markup, element, language_name, section

Shares = dict[str, tuple[float, float]]
"""Per language a share and what chance would give, both 0..1."""


def numbers_section(results: Mapping[str, Any]) -> Markup | None:
    """Show what `eval.suite.evaluate` returned as tiles and tables; None if there is nothing."""
    retrieval = results.get("retrieval") or {}
    tiles = [
        _tile("Words find the picture", "R@1, text to image", _recall(retrieval, "t2i_r1")),
        _tile("Picture finds the words", "R@1, image to text", _recall(retrieval, "i2t_r1")),
        _tile("Right attribute named", "zero-shot, mean of tasks", _mean_zero_shot(results)),
        _tile("Near misses told apart", "captions with one thing wrong", _hard_negatives(results)),
    ]
    tiles = [tile for tile in tiles if tile]
    if not tiles:
        return None
    details = [_recall_table(retrieval), _zero_shot_table(results), _kinds_table(results)]
    return section(
        "numbers",
        "What it learned",
        [_legend(), " The notch on a bar is chance."],
        element("div", tiles, class_="tiles"),
        element("div", details, class_="tables"),
    )


def _legend() -> Markup:
    return element(
        "span",
        [[element("i", class_=f"key {code}"), language_name(code), " "] for code in LANGUAGE_NAMES],
        class_="languages",
    )


def _recall(retrieval: Mapping[str, Any], key: str) -> Shares:
    return {
        language: (found[key], min(1.0, int(key.rpartition("_r")[2]) / found["images"]))
        for language, found in retrieval.items()
    }


def _mean_zero_shot(results: Mapping[str, Any]) -> Shares:
    tasks = (results.get("zero_shot") or {}).values()
    means: Shares = {}
    for language in LANGUAGE_NAMES:
        found = [task[language] for task in tasks if language in task]
        if found:
            top1 = sum(each["top1"] for each in found) / len(found)
            means[language] = top1, sum(each["chance"] for each in found) / len(found)
    return means


def _hard_negatives(results: Mapping[str, Any]) -> Shares:
    found = results.get("hard_negatives") or {}
    return {language: (each["accuracy"], each["chance"]) for language, each in found.items()}


def _tile(title: str, note: str, shares: Shares) -> Markup | None:
    if not shares:
        return None
    rows = [
        element(
            "div",
            element("span", language_name(language), class_="language"),
            element("span", _percent(share), element("small", "%"), class_="figure"),
            _bar(share, chance, language),
            class_=f"row {language}",
        )
        for language, (share, chance) in shares.items()
    ]
    return element("div", element("h3", title), element("p", note), rows, class_="tile")


def _bar(share: float, chance: float, language: str) -> Markup:
    return element(
        "span",
        element("span", class_="fill", style=f"width:{100 * share:.1f}%"),
        element("span", class_="chance", style=f"left:{100 * chance:.1f}%"),
        class_=f"bar {language}",
        role="img",
        aria_label=f"{LANGUAGE_NAMES.get(language, language)} {_percent(share)} percent, "
        f"chance {_percent(chance)}",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if share < 0.9995 else "100"


def _recall_table(retrieval: Mapping[str, Any]) -> Markup | None:
    if not retrieval:
        return None
    some = next(iter(retrieval.values()))
    names = {"t2i": "text to image", "i2t": "image to text"}
    head = ["", *(f"R@{k}" for k in (1, 5, 10)), "median rank"]
    groups = []
    for direction, name in names.items():
        rows = [
            _row(
                element(
                    "th",
                    element("i", class_=f"key {language}"),
                    language_name(language),
                    scope="row",
                ),
                *(_percent(found[f"{direction}_r{k}"]) for k in (1, 5, 10)),
                f"{found[f'{direction}_median_rank']:g}",
            )
            for language, found in retrieval.items()
        ]
        title = element("tr", element("th", name, colspan=5, scope="rowgroup", class_="group"))
        groups.append(element("tbody", title, rows))
    chance = [f"{100 * min(1.0, k / some['images']):.1f}" for k in (1, 5, 10)]
    groups.append(element("tbody", _row(element("th", "chance", scope="row"), *chance, "")))
    note = (
        f"Share of queries, in percent, whose right answer is among the first k of "
        f"{some['images']:,} pictures, or of their {some['texts']:,} texts. Ties count against the "
        f"model."
    )
    return _table("Retrieval", note, head, groups)


def _zero_shot_table(results: Mapping[str, Any]) -> Markup | None:
    return _bars_table(
        "Zero-shot classes",
        "Classes are described in words only; share of pictures, in percent, given the right one.",
        {
            f"{task} ({next(iter(found.values()))['classes']} classes)": {
                language: (each["top1"], each["chance"]) for language, each in found.items()
            }
            for task, found in (results.get("zero_shot") or {}).items()
        },
    )


def _kinds_table(results: Mapping[str, Any]) -> Markup | None:
    rows: dict[str, Shares] = {}
    for language, found in (results.get("hard_negatives") or {}).items():
        for kind, each in found["by_kind"].items():
            rows.setdefault(f"wrong {kind}", {})[language] = each["accuracy"], 0.5
    return _bars_table(
        "Near misses",
        "Share of pictures, in percent, closer to their caption than to the same with one change.",
        rows,
    )


def _bars_table(title: str, note: str, rows: Mapping[str, Shares]) -> Markup | None:
    if not rows:
        return None
    body = [
        _row(
            element("th", name, scope="row"),
            element(
                "td",
                [
                    element(
                        "div",
                        _bar(share, chance, language),
                        element("span", _percent(share), class_="n"),
                        class_="pair",
                    )
                    for language, (share, chance) in shares.items()
                ],
                class_="bars",
            ),
        )
        for name, shares in rows.items()
    ]
    return _table(title, note, [], [element("tbody", body)])


def _table(title: str, note: str, head: Sequence[str], bodies: Sequence[Markup]) -> Markup:
    cells = [element("th", name, scope="col") if name else element("td") for name in head]
    return element(
        "div",
        element("h3", title),
        element("table", element("thead", element("tr", cells)) if head else None, bodies),
        element("p", note, class_="note"),
        class_="table",
    )


def _row(*cells: str) -> Markup:
    return element(
        "tr", [cell if isinstance(cell, Markup) else element("td", cell) for cell in cells]
    )
