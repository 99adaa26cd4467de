"""The frame of a self-contained HTML page: safe head, styles, title, written complete or not.

Not for what a page shows (result_report.py, table_formats.py).
"""

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from m2encoder.errors import DataError
from m2encoder.eval.markup import Child, Markup, element

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html_page(
    title: str,
    *content: Child,
    summary: Child = None,
    glance: Child = None,
    styles: Sequence[str] = ("report.css",),
) -> str:
    """Return a page that needs no other file and no network, and follows light and dark.

    glance: what stands beside the title. styles: names of style sheets beside this file, the later
    ones winning.
    """
    folder = resources.files("m2encoder.eval")
    sheets = [(folder / name).read_text(encoding="utf-8") for name in styles]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup("\n".join(sheets))),
    )
    header = element(
        "header",
        element("p", "m2encoder", class_="kicker"),
        element("h1", title),
        element("p", summary, class_="summary") if summary else None,
        glance,
    )
    body = element("body", header, element("main", *content))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def wide(content: Markup) -> Markup:
    """Let a wide table scroll inside its frame, by keyboard too."""
    return element("div", content, class_="wide", tabindex=0)


def write_page(out: Path, html: str) -> None:
    """Write a page, complete or not at all. Raises DataError if it cannot be written."""
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(html.encode("utf-8", "backslashreplace"))
        os.replace(temporary, out)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{out}: cannot be written ({reason}); choose another place") from None
