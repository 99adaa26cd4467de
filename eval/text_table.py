"""Markdown tables whose columns line up in a terminal too, Chinese and emoji included.

Not for choosing what they hold (table.py, compare.py).
"""

import re
import unicodedata
from collections.abc import Sequence

Cells = Sequence[str]


def display_width(text: str) -> int:
    """Return how many terminal columns a text takes: two for wide characters, none for marks."""
    width = 0
    for character in text:
        if unicodedata.category(character) in ("Mn", "Me", "Cf", "Cc"):
            continue
        width += 2 if unicodedata.east_asian_width(character) in "WF" else 1
    return width


def padded(text: str, width: int, *, right: bool = False) -> str:
    """Return the text filled with spaces to `width` columns; right: at its left side."""
    space = " " * max(0, width - display_width(text))
    return space + text if right else text + space


def escaped(text: str) -> str:
    """Return plain text that Markdown shows as it is, on one line."""
    text = " ".join(text.split())
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text.replace("&", "&amp;"))  # not of "<0.001"
    return re.sub(r"([\\|*`\[\]~])", r"\\\1", text)


def markdown_table(head: Cells, rows: Sequence[Cells], *, left: int = 1) -> str:
    """Return a table of plain cells; the first `left` columns lie left, numbers right."""
    if wrong := [row for row in rows if len(row) != len(head)]:
        raise ValueError(f"row of {len(wrong[0])} cells under a head of {len(head)}")
    lines = [[escaped(cell) for cell in row] for row in (head, *rows)]
    widths = [max(3, *map(display_width, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines.insert(1, rule)
    shown = [
        [padded(cell, widths[i], right=i >= left) for i, cell in enumerate(line)] for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in shown)
