"""The part of a results page that shows single queries: what was asked, wanted and found.

Not for choosing the examples (the tasks do, in details["examples"]), nor for the page around them
(result_report.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from m2encoder.eval.markup import Markup, element, language_name
from m2encoder.eval.picture_finder import PictureFinder
from m2encoder.eval.results import Result

MAX_FAILURES, MAX_SUCCESSES, MAX_FOUND = 6, 3, 4
DIRECTIONS = {"t2i": "Text to image", "i2t": "Image to text"}


def examples_markup(results: Sequence[Result], finder: PictureFinder) -> Markup | None:
    """Show the examples of one task on one data set, languages side by side; None without any."""
    parts = []
    for direction, title in DIRECTIONS.items():
        sides = [
            _side(result, direction, examples, finder)
            for result in results
            if (examples := _examples(result, direction))
        ]
        if sides:
            one = " alone" if len(sides) == 1 else ""
            parts.append(element("h3", title, class_="direction"))
            parts.append(element("div", sides, class_=f"sides{one}"))
    if not parts:
        return None
    note = (
        "The queries whose right answer came last, then some that were answered well. ✓ marks what "
        "is right; the figure under a picture is its cosine."
    )
    return element("div", element("p", note, class_="note"), parts, class_="examples")


def _examples(result: Result, direction: str) -> list[Mapping[str, Any]]:
    examples = result.details.get("examples")
    found = examples.get(direction) if isinstance(examples, Mapping) else None
    if not isinstance(found, Sequence):
        return []
    return [each for each in found if isinstance(each, Mapping) and "query" in each]


def _side(
    result: Result, direction: str, examples: Sequence[Mapping[str, Any]], finder: PictureFinder
) -> Markup:
    failed = [each for each in examples if each.get("rank", 1) > 1][:MAX_FAILURES]
    fine = [each for each in examples if each.get("rank", 1) <= 1][:MAX_SUCCESSES]
    shown = _from_text if direction == "t2i" else _from_picture
    return element(
        "div",
        element(
            "h4", element("i", class_=f"key {result.language}"), language_name(result.language)
        ),
        [shown(each, result.language, finder) for each in (*failed, *fine)],
        class_="side",
    )


def _rank(example: Mapping[str, Any]) -> Markup:
    rank = example.get("rank", 1)
    is_right = rank <= 1
    text = "found first" if is_right else f"right answer at rank {rank:,g}"
    return element("p", text, class_="rank good" if is_right else "rank bad")


def _from_text(example: Mapping[str, Any], language: str, finder: PictureFinder) -> Markup:
    right = {str(name) for name in example.get("right") or ()}
    found = list(example.get("found") or ())[:MAX_FOUND]
    figures = [
        _picture(str(hit.get("name")), hit.get("score"), str(hit.get("name")) in right, finder)
        for hit in found
    ]
    if right and not right & {str(hit.get("name")) for hit in found}:
        wanted = _picture(sorted(right)[0], None, True, finder, caption="wanted")
        figures.append(wanted)
    return element(
        "article",
        element("p", str(example["query"]), lang=language, class_="query"),
        _rank(example),
        element("div", figures, class_="pictures"),
        class_="example",
    )


def _from_picture(example: Mapping[str, Any], language: str, finder: PictureFinder) -> Markup:
    right = {str(text) for text in example.get("right") or ()}
    found = list(example.get("found") or ())[:MAX_FOUND]
    items = [_text(hit, right, language) for hit in found]
    if right and not right & {str(hit.get("text")) for hit in found}:
        wanted = element("small", "wanted")
        items.append(element("li", element("span", sorted(right)[0], lang=language), wanted))
    return element(
        "article",
        element(
            "div",
            _picture(str(example["query"]), None, False, finder, caption=str(example["query"])),
            element("div", _rank(example), element("ul", items, class_="texts")),
            class_="beside",
        ),
        class_="example",
    )


def _text(hit: Mapping[str, Any], right: set[str], language: str) -> Markup:
    is_right = str(hit.get("text")) in right
    mark = element("b", "✓", class_="good", role="img", aria_label="right") if is_right else None
    score = element("small", _score(hit.get("score")))
    return element("li", element("span", str(hit.get("text")), lang=language), mark, score)


def _score(score: Any) -> str:
    return f"{score:.3f}" if isinstance(score, int | float) else ""


def _picture(
    name: str, score: Any, is_right: bool, finder: PictureFinder, *, caption: str | None = None
) -> Markup:
    uri = finder.uri(name)
    alt = f"right picture {name}" if is_right else f"picture {name}"
    shown = (
        element("img", src=uri, alt=alt)
        if uri
        else element("div", name, class_="no-picture", role="img", aria_label=f"{alt}, not found")
    )
    mark = element("span", "✓", class_="fits", title="right", role="img", aria_label="right")
    return element(
        "figure",
        shown,
        mark if is_right else None,
        element("figcaption", _score(score) if caption is None else caption),
        title=name,
    )
