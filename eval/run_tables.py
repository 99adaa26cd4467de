"""The tables on a page about a training run: the newest measurements, and what happened when.

Not for the page around them (run_report.py).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from m2encoder.eval.markup import LANGUAGE_NAMES, Markup, element, language_name, section
from m2encoder.eval.page import wide

NAMES = {
    "t2i_r1": "text to image, R@1",
    "t2i_r5": "text to image, R@5",
    "t2i_r10": "text to image, R@10",
    "i2t_r1": "image to text, R@1",
    "i2t_r5": "image to text, R@5",
    "i2t_r10": "image to text, R@10",
    "mean_recall": "mean recall",
    "t2i_mean_recall": "text to image, mean",
    "i2t_mean_recall": "image to text, mean",
}
ORDER = list(NAMES)
STARTS = ("started", "resumed")
SAVED = "saved"


def evaluation_table(rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Show the newest value of every measure, Chinese beside English, and the best and its step.

    Only what is measured per language, `eval/SET/LANGUAGE/MEASURE`, in shares; None if nothing is.
    """
    readings = _readings(rows)
    if not readings:
        return None
    languages = [code for code in LANGUAGE_NAMES if any(code in each for each in readings.values())]
    heads = [
        element("th", element("i", class_=f"key {code}"), language_name(code), scope="col")
        for code in languages
    ]
    best = [
        element("th", "best ", language_name(code), " (step)", scope="col") for code in languages
    ]
    several = len({data for data, _ in readings}) > 1
    body = [
        element(
            "tr",
            element("th", _name(data, measure, several), scope="row"),
            [element("td", _latest(found.get(code))) for code in languages],
            [element("td", _best(found.get(code)), class_="soft") for code in languages],
        )
        for (data, measure), found in sorted(readings.items(), key=lambda item: _order(*item[0]))
    ]
    table = element(
        "table",
        element("thead", element("tr", element("td"), heads, best)),
        element("tbody", body),
    )
    note = element("p", "Newest values, in percent.", class_="note")
    return element("div", wide(table), note, class_="table measured")


def _readings(
    rows: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str], dict[str, list[tuple[int, float]]]]:
    """Return (data set, measure) to language to (step, value) of each time."""
    found: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    wanted = re.compile(rf"eval/(?:([^/]+)/)?({'|'.join(LANGUAGE_NAMES)})/(.+)")
    for row in rows:
        for key, value in row.items():
            if value is None or not (match := wanted.fullmatch(key)):
                continue
            data, language, measure = match.groups(default="")
            of_measure = found.setdefault((data, measure), {})
            of_measure.setdefault(language, []).append((row["step"], value))
    return found


def _order(data: str, measure: str) -> tuple[str, int, str]:
    place = ORDER.index(measure) if measure in ORDER else len(ORDER)
    return data, place, measure


def _name(data: str, measure: str, several: bool) -> str:
    name = NAMES.get(measure, measure.replace("zero_shot/", "zero-shot, ").replace("_", " "))
    return f"{data}: {name}" if several and data else name


def _latest(readings: Sequence[tuple[int, float]] | None) -> str:
    return f"{100 * readings[-1][1]:.1f}" if readings else "–"


def _best(readings: Sequence[tuple[int, float]] | None) -> str:
    if not readings:
        return "–"
    step, value = max(readings, key=lambda reading: reading[1])
    return f"{100 * value:.1f} ({step:,})"


def events_table(events: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Show what happened to a run, oldest first, but for saves; None if nothing is known."""
    events = [event for event in events if event["event"] != SAVED]
    if not events:
        return None
    body = [
        element(
            "tr",
            element("td", str(event["time"])[:16].replace("T", " "), class_="time"),
            element("td", f"{event['step']:,}", class_="step"),
            element("td", str(event["event"]), class_="what"),
            element("td", details, class_="details"),
        )
        for event, details in zip(events, _all_details(events), strict=True)
    ]
    heads = [element("th", name, scope="col") for name in ("time (UTC)", "step", "what", "details")]
    table = element("table", element("thead", element("tr", heads)), element("tbody", body))
    note = "Starts, resumes, bad steps and the like, as they came; steps that were done again too."
    return section(
        "events", "What happened", note, element("div", wide(table), class_="table events")
    )


def _all_details(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say each event's facts; of a start only what differs from the one before."""
    said, before = [], {}
    for event in events:
        facts = {k: v for k, v in event.items() if k not in ("time", "step", "event")}
        if event["event"] in STARTS:
            is_same = facts == before and bool(before)
            changed = {k: v for k, v in facts.items() if k not in before or before[k] != v}
            before = facts
            said.append("as before" if is_same else _details(changed))
        else:
            said.append(_details(facts))
    return said


def _details(facts: Mapping[str, Any]) -> str:
    if set(facts) == {"text"}:
        return str(facts["text"])
    return ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in facts.items())


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value[:5])) + (" …" if len(value) > 5 else "")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
