"""HTML and SVG elements whose text is escaped by construction.

Not for layout or style: report.py and charts.py say what goes where, report.css how it looks.
"""

from collections.abc import Iterable
from html import escape

LANGUAGE_NAMES = {"zh": "中文", "en": "English"}
VOID = frozenset({"br", "img", "meta"})


class Markup(str):
    """Text that is markup already and must not be escaped again."""

    __slots__ = ()


Child = str | Iterable["Child"] | None


def element(name: str, /, *children: Child, **attributes: object) -> Markup:
    """Return `<name attributes>children</name>`.

    Strings are escaped, Markup is not, lists are joined and None is left out. An attribute's
    trailing underscore is dropped and others become dashes (`class_`, `aria_label`); None and False
    leave the attribute out.
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Markup(f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{join(children)}</{name}>")


def join(children: Child) -> Markup:
    """Return children one after another, escaped unless they are Markup."""
    if children is None:
        return Markup()
    if isinstance(children, Markup):
        return children
    if isinstance(children, str):
        return Markup(escape(children))
    return Markup("".join(join(child) for child in children))


def language_name(language: str) -> Markup:
    """Return a language's own name, marked as being in that language."""
    return element("span", LANGUAGE_NAMES.get(language, language), lang=language)


def section(anchor: str, title: str, note: Child, *content: Child) -> Markup:
    """Return a part of a page with its heading and, under it, an optional note."""
    heading = [element("h2", title), element("p", note, class_="note") if note else None]
    return element("section", heading, *content, id=anchor)
