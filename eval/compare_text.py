"""A comparison of two runs as Markdown.

Not for comparing (compare.py).
"""

from collections.abc import Sequence

from m2encoder.eval.compare import Change, Compared, Comparison, Group, QueryChange
from m2encoder.eval.metric_names import DASH, better_direction, is_share, label, write_value
from m2encoder.eval.text_table import escaped, markdown_table

MAX_TEXT = 60
GROUP_NAMES = {"t2i": "text to image", "i2t": "image to text", "class": "classes"}


def comparison_markdown(compared: Compared) -> str:
    """Return every comparison with its table, wins and losses, and largest changes."""
    parts = [_markdown(each) for each in compared.comparisons]
    if compared.alone:
        names = [f"- {escaped(name)}" for name in compared.alone]
        parts.append("\n".join(["### Without counterpart", "", *names]) + "\n")
    return "\n".join(parts)


def _markdown(each: Comparison) -> str:
    title = f"{each.task}: {each.protocol}, {each.language}"
    head = ["", f"A: {each.first}", f"B: {each.second}", "B - A", "95 % interval", "McNemar p"]
    rows = [_row(change) for change in each.metrics]
    lines = [f"### {escaped(title)}", "", markdown_table(head, rows), "", _legend(each)]
    lines += [f"- {escaped(note)}" for note in each.notes]
    for group in each.groups:
        lines += ["", *_group(group)]
    return "\n".join(lines).rstrip() + "\n"


def _row(change: Change) -> list[str]:
    name = change.metric
    difference = write_value(name, change.difference, signed=True)
    interval = DASH
    if change.ci95 is not None:
        low, high = (write_value(name, end, signed=True) for end in change.ci95)
        interval = f"{low} to {high}"
    p_value = DASH if change.p_value is None else write_p(change.p_value)
    values = [write_value(name, value) for value in (change.first, change.second)]
    mark = verdict(change)
    return [label(name), *values, f"{difference} {mark}".strip(), interval, p_value]


def verdict(change: Change) -> str:
    """Return `better` or `worse` where the interval leaves no doubt of it, otherwise nothing."""
    if change.ci95 is None or change.ci95[0] <= 0 <= change.ci95[1]:
        return ""
    direction = better_direction(change.metric) * (1 if change.ci95[0] > 0 else -1)
    return {1: "better", 0: "", -1: "worse"}[direction]


def write_p(p_value: float) -> str:
    """Return a probability for people; very small ones as a bound."""
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _legend(each: Comparison) -> str:
    shares = (
        "Shares in percent. " if any(is_share(change.metric) for change in each.metrics) else ""
    )
    return (
        f"{shares}Interval: paired bootstrap of the difference, clustered by picture. McNemar: "
        f"exact, of hits at rank 1."
    )


def _group(group: Group) -> list[str]:
    name = GROUP_NAMES.get(group.name, group.name)
    total = group.better + group.worse + group.same
    lines = [
        f"{escaped(name)}: B ranks the right answer higher for {group.better:,} of {total:,} "
        f"queries, lower for {group.worse:,}."
    ]
    for title, changes in (("Largest gains", group.gains), ("Largest losses", group.losses)):
        if changes:
            lines += ["", f"{title}:", "", *_changes(changes)]
    return lines


def _changes(changes: Sequence[QueryChange]) -> list[str]:
    return [f"- {_query(change)}: rank {change.first:g} → {change.second:g}" for change in changes]


def _query(change: QueryChange) -> str:
    if not change.text:
        return f"query {change.query}"
    text = " ".join(change.text.split())
    return escaped(text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…")
