"""One self-contained HTML page about results: numbers, examples, classes, how it was measured.

Not for the page of a training run (report.py), nor for what its parts look like (result_numbers.py,
result_examples.py, result_classes.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from m2encoder.eval.markup import Child, Markup, element, language_name, section
from m2encoder.eval.page import html_page, wide
from m2encoder.eval.picture_finder import PictureFinder
from m2encoder.eval.result_classes import classes_markup
from m2encoder.eval.result_details import details_markup, spoken, written
from m2encoder.eval.result_examples import examples_markup
from m2encoder.eval.result_numbers import metrics_markup
from m2encoder.eval.results import Result
from m2encoder.eval.table import language_place, make_tables, model_names, place_of
from m2encoder.eval.table_formats import table_markup

TASKS = {
    "retrieval": ("Retrieval", "Do words find their picture, and pictures their words?"),
    "zero-shot": ("Zero-shot classes", "Classes are described in words only."),
    "hard-negatives": (
        "Near misses",
        "Is the right caption preferred to one with one thing wrong?",
    ),
    "bilingual": (
        "One meaning, two languages",
        "Do parallel captions find the same, equally well?",
    ),
    "language-bias": ("Both languages in one list", "Does one language win where both compete?"),
    "robustness": ("Robustness", "What does writing the same in another way change?"),
    "calibration": ("Calibration", "From which cosine on does a picture fit, and when does none?"),
    "probe": ("Probes on features", "What do the vectors hold, with a simple classifier on top?"),
    "prompt-audit": ("Prompts", "Which class names say something else in the other language?"),
}
SHOWN = ("chance", "fair", "classes", "confusions", "confusion")
"""Details that have a place of their own."""


class Section(NamedTuple):
    """The results of one model, task and data set, a language each."""

    anchor: str
    title: str
    results: list[Result]


@dataclass(frozen=True)
class ResultReport:
    """What the page shows."""

    results: Sequence[Result]
    title: str = "Results"
    images: Path | None = None
    """Where pictures lie if not in the data that was measured."""
    published: bool = False
    """Show published figures beside ours."""


def render_results(report: ResultReport) -> str:
    """Return the page as HTML; the same results and pictures give the same page."""
    sections = _sections(report.results)
    models = list(model_names(report.results).values())
    finders: dict[str, PictureFinder] = {}
    content = [_section(each, report, finders) for each in sections]
    side_by_side = len(models) > 1 or report.published
    tables = make_tables(report.results, published=report.published) if side_by_side else []
    count = len(report.results)
    summary = [
        f"{count:,} {'result' if count == 1 else 'results'} of ",
        [[", " if i else "", element("b", spoken(name))] for i, name in enumerate(models)],
        ".",
    ]
    return html_page(
        report.title,
        _contents(sections),
        [table_markup(table) for table in tables],
        content,
        summary=summary,
        styles=("report.css", "result_report.css"),
    )


def _sections(results: Sequence[Result]) -> list[Section]:
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        place = (result.model["fingerprint"], result.task, place_of(result), result.data["path"])
        found = groups.setdefault(place, [])
        if any(each.language == result.language for each in found):  # measured twice
            found = groups.setdefault((*place, str(len(groups))), [])
        found.append(result)
    names = model_names(results)
    sections = []
    places = {task: place for place, task in enumerate(TASKS)}
    in_turn = sorted(groups.values(), key=lambda group: places.get(group[0].task, len(places)))
    for number, group in enumerate(in_turn, 1):
        title = TASKS.get(group[0].task, (group[0].task.capitalize(), ""))[0]
        if task := group[0].settings.get("task"):
            title += f": {task}"
        if len(names) > 1:
            title += f", {names[group[0].model['fingerprint']]}"
        in_order = sorted(group, key=lambda result: language_place(result.language))
        sections.append(Section(f"result-{number}", title, in_order))
    return sections


def _contents(sections: Sequence[Section]) -> Markup | None:
    if len(sections) < 2:
        return None
    links = [
        element("li", element("a", each.title, href=f"#{each.anchor}"), " ", _place(each.results))
        for each in sections
    ]
    return element("nav", element("ul", links), aria_label="Contents")


def _place(results: Sequence[Result]) -> Markup:
    first = results[0]
    is_custom = first.protocol["status"] == "custom"
    name = Path(first.data["path"]).name if is_custom else first.protocol["id"]
    return element("small", spoken(str(name)))


def _section(each: Section, report: ResultReport, finders: dict[str, PictureFinder]) -> Markup:
    results = each.results
    path = str(results[0].data["path"])
    if path not in finders:
        finders[path] = PictureFinder(
            Path(path), images=report.images, language=results[0].language
        )
    finder = finders[path]
    examples = examples_markup(results, finder)
    note = TASKS.get(results[0].task, ("", None))[1]
    skip = (*SHOWN, *(["examples"] if examples else []))
    others = [_other_details(result, skip, len(results) > 1) for result in results]
    return section(
        each.anchor,
        each.title,
        note,
        _status(results),
        metrics_markup(results),
        examples,
        _missing(finder) if examples else None,
        classes_markup(results),
        others,
        _how(results),
    )


def _missing(finder: PictureFinder) -> Markup | None:
    if not finder.missing:
        return None
    text = (
        f"{len(finder.missing):,} pictures are not shown: they are not where the data was, or "
        f"cannot be read. Name their folder with --images."
    )
    return element("p", text, class_="note")


def _other_details(result: Result, skip: Sequence[str], several: bool) -> Markup | None:
    content = details_markup(result.details, skip=skip)
    if content is None:
        return None
    language = [", ", language_name(result.language)] if several else None
    return element("details", element("summary", "Details", language), content)


# --- how it was measured -------------------------------------------------------------------------


def _status(results: Sequence[Result]) -> Markup:
    """Say under the heading what must not be overlooked: protocol, counts, contamination."""
    lines = [
        element(
            "li",
            element("i", class_=f"key {result.language}"),
            language_name(result.language),
            " ",
            element("code", str(result.protocol["id"])),
            " ",
            element("b", result.protocol["status"], class_=f"status {result.protocol['status']}"),
            " ",
            _counts(result),
            " ",
            _contamination(result),
        )
        for result in results
    ]
    notes = dict.fromkeys(
        str(note) for result in results for note in result.protocol.get("notes") or ()
    )
    items = [element("li", spoken(note)) for note in notes]
    return element("div", element("ul", lines), element("ul", items) if items else None,
                   class_="status-lines")  # fmt: skip


def _counts(result: Result) -> str:
    parts = [
        f"{result.data[key]:,} {name}"
        for key, name in (("images", "pictures"), ("texts", "texts"))
        if result.data.get(key)
    ]
    if skipped := result.data.get("skipped"):
        parts.append(f"{len(skipped):,} left out")
    return ", ".join(parts)


def _contamination(result: Result) -> Markup:
    found = result.contamination
    if not found["checked"]:
        return element("span", "Not checked for contamination.", class_="warn")
    hits = found.get("hits")
    if not hits:
        return element("span", "No test picture found in the training data.", class_="good")
    text = f"{hits:,} test pictures found in the training data."
    return element("span", text, class_="bad")


def _how(results: Sequence[Result]) -> Markup:
    """Return everything else that a result says of its run, languages side by side."""
    rows = []
    for title, read in FACTS:
        columns = [read(result) for result in results]
        keys = list(dict.fromkeys(key for column in columns for key in column))
        if not keys:
            continue
        heading = element("th", title, colspan=len(results) + 1, scope="rowgroup", class_="group")
        rows.append(element("tr", heading))
        for key in keys:
            values = [column.get(key) for column in columns]
            same = len({repr(value) for value in values}) == 1
            cells = [
                element("td", _fact(value), colspan=len(results) if same and i == 0 else None)
                for i, value in enumerate(values[:1] if same else values)
            ]
            name = element("th", spoken(key.replace("_", " ")), scope="row")
            rows.append(element("tr", name, cells))
    heads = [element("th", language_name(result.language), scope="col") for result in results]
    head = element("thead", element("tr", element("td"), heads)) if len(results) > 1 else None
    grid = element("table", head, element("tbody", rows), class_="how")
    return element(
        "details",
        element("summary", "How it was measured"),
        element("div", wide(grid), class_="table"),
    )


def _fact(value: Any) -> Child:
    if isinstance(value, Mapping):
        items = [f"{key}: {written(each)}" for key, each in value.items()]
        return spoken(", ".join(items))
    if isinstance(value, list | tuple):
        shown = " · ".join(written(each) for each in value[:8])
        return spoken(shown + (f" … {len(value):,} in all" if len(value) > 8 else ""))
    return spoken(written(value))


def _protocol(result: Result) -> dict[str, Any]:
    return {key: value for key, value in result.protocol.items() if key != "notes" and value}


def _data(result: Result) -> dict[str, Any]:
    facts = {key: value for key, value in result.data.items() if key != "skipped"}
    skipped = result.data.get("skipped") or []
    named = [f"{bad.get('name')}: {bad.get('reason')}" for bad in skipped]
    return facts | ({"left_out": named} if named else {})


def _seconds(result: Result) -> dict[str, Any]:
    return {name: f"{value:,.1f} s" for name, value in result.seconds.items()}


FACTS = (
    ("Protocol", _protocol),
    ("Data", _data),
    ("Model", lambda result: dict(result.model)),
    ("Preprocessing", lambda result: dict(result.preprocessing)),
    ("Settings", lambda result: dict(result.settings)),
    ("Contamination", lambda result: dict(result.contamination)),
    ("Environment", lambda result: dict(result.environment)),
    ("Time", _seconds),
)
