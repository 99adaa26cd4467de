"""One self-contained HTML page about a run: numbers, curves and searches in Chinese and English.

Not for measuring (suite.py): it shows plain values that it is given.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from m2encoder.eval.charts import line_chart
from m2encoder.eval.markup import LANGUAGE_NAMES, Markup, element, section
from m2encoder.eval.page import html_page, write_page
from m2encoder.eval.report_numbers import numbers_section
from m2encoder.eval.training_curves import curve, evaluation_curves, loss_curves
from m2encoder.images import open_image

Language = Literal["zh", "en"]
THUMBNAIL_PX = 256


@dataclass(frozen=True)
class FoundPicture:
    """One search result."""

    image: bytes
    """The encoded picture."""
    score: float
    """Cosine similarity."""
    description: str
    """What it shows, for people who cannot see it: a caption in the query's language, or a name."""
    fits: bool | None = None
    """Whether it is what was asked for; None where nobody knows."""


@dataclass(frozen=True)
class Search:
    """One query and its results, best first."""

    query: str
    hits: Sequence[FoundPicture]


@dataclass(frozen=True)
class ReportData:
    """What the page shows; empty parts are left out."""

    title: str
    summary: str = ""
    """One or two sentences under the title."""
    glance: Sequence[tuple[str, str]] = ()
    """A few short facts beside the title, as (value, what it counts): ("12,000", "pairs")."""
    results: Mapping[str, Any] = field(default_factory=dict)
    """What `eval.suite.evaluate` returned."""
    metrics: Sequence[Mapping[str, Any]] = ()
    """Rows of metrics.jsonl."""
    searches: Sequence[tuple[Search, Search]] = ()
    """The same query in Chinese and in English."""
    attribution: str = ""
    """Whom to name for the pictures."""
    facts: Sequence[tuple[str, str]] = ()
    """What was run, as (name, value): command, versions, seed, times, counts."""
    next_steps: Sequence[tuple[str, str]] = ()
    """(command, what it does)."""


def write_report(out: Path, *, run: ReportData) -> None:
    """Write the page to `out`, complete or not at all; it needs no other file and no network.

    Raises DataError if a picture cannot be read.
    """
    write_page(out, render(run))


def render(run: ReportData) -> str:
    """Return the page as HTML."""
    sections = [numbers_section(run.results), _searches(run), _training(run.metrics), _run(run)]
    rows = [element("div", element("dt", what), element("dd", value)) for value, what in run.glance]
    glance = element("dl", rows, class_="glance") if rows else None
    content = [sections, _next(run.next_steps)]
    return html_page(run.title, *content, summary=run.summary, glance=glance)


# --- searches ------------------------------------------------------------------------------------


def _searches(run: ReportData) -> Markup | None:
    if not run.searches:
        return None
    cards = [
        element(
            "article",
            _side(zh, "zh"),
            _side(en, "en"),
            element("p", _agreement(zh, en), class_="agreement"),
            class_="search",
        )
        for zh, en in run.searches
    ]
    credit = (
        element("p", "Pictures: ", run.attribution, class_="credit") if run.attribution else None
    )
    note = "The same question in two languages: the pictures closest to it, with their cosine."
    if any(hit.fits is not None for pair in run.searches for side in pair for hit in side.hits):
        note += " ✓ marks those that fit."
    return section("search", "What it finds", note, cards, credit)


def _agreement(zh: Search, en: Search) -> str:
    shared = {hit.image for hit in zh.hits} & {hit.image for hit in en.hits}
    most = max(len(zh.hits), len(en.hits))
    return f"{len(shared)} of {most} pictures found in both languages"


def _side(search: Search, language: Language) -> Markup:
    figures = [_found(hit, language) for hit in search.hits]
    return element(
        "div",
        element(
            "h3",
            element("span", LANGUAGE_NAMES[language], class_=f"badge {language}"),
            element("q", search.query),
            lang=language,
        ),
        element("div", figures, class_="pictures"),
        class_="side",
    )


def _found(hit: FoundPicture, language: Language) -> Markup:
    mark = element(
        "span", "✓", class_="fits", title="fits the query", role="img", aria_label="fits"
    )
    return element(
        "figure",
        element("img", src=picture_uri(hit.image), alt=hit.description, lang=language),
        mark if hit.fits else None,
        element("figcaption", f"{hit.score:.3f}"),
        title=hit.description,
    )


def picture_uri(image: bytes) -> str:
    """Return the picture as the model sees its colours, at most 256 pixels wide, as a data URI."""
    picture = open_image(image, name="search result", upright=True)
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    is_small = max(picture.size) <= 128
    stream = io.BytesIO()
    picture.save(stream, "PNG" if is_small else "JPEG", quality=88)
    kind = "png" if is_small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


# --- training ------------------------------------------------------------------------------------


def _training(metrics: Sequence[Mapping[str, Any]]) -> Markup | None:
    charts = [
        line_chart("Loss", loss_curves(metrics), y_text=lambda y: f"{y:.3g}"),
        line_chart(
            "R@1 on validation data, mean of both directions",
            evaluation_curves(metrics, "(?:i2t|t2i)_r1"),
            y_text=lambda y: f"{100 * y:.0f} %",
        ),
        line_chart(
            "Learning rate",
            [curve("learning rate", metrics, "lr", "other")],
            y_text=lambda y: f"{y:.2g}",
        ),
        line_chart(
            "Speed",
            [curve("samples per second", metrics, "samples_per_s", "other")],
            y_text=lambda y: f"{y:,.0f}",
        ),
    ]
    charts = [chart for chart in charts if chart]
    if not charts:
        return None
    note = "Loss as it was measured while learning, step by step; faint lines are single readings."
    return section("training", "How it learned", note, element("div", charts, class_="charts"))


# --- what was run, and what to do next -----------------------------------------------------------


def _run(run: ReportData) -> Markup | None:
    facts = [*run.facts]
    if data := run.results.get("data"):
        facts.append(("measured on", f"{data['path']}, {data['count']:,} pairs"))
        if data.get("skipped"):
            facts.append(("left out", f"{len(data['skipped']):,} unreadable pictures or texts"))
    if model := run.results.get("model"):
        facts.append(("model", f"{model['name']}, fingerprint {model['fingerprint'][:16]}"))
    if not facts:
        return None
    rows = [element("div", element("dt", name), element("dd", value)) for name, value in facts]
    return section("run", "What was run", None, element("dl", rows, class_="facts"))


def _next(steps: Sequence[tuple[str, str]]) -> Markup | None:
    if not steps:
        return None
    items = [
        element("li", element("p", what), element("pre", element("code", command)))
        for command, what in steps
    ]
    return section("next", "What to type next", None, element("ol", items, class_="steps"))
