"""Results of several models side by side: rows are models, columns metrics per language.

Published figures stand beside ours, marked where they were measured otherwise. Not for the
difference of two runs (compare.py), nor for how a table is written (table_formats.py).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from m2encoder.eval.metric import Metric
from m2encoder.eval.metric_names import label, ordered, write_tie_bounds
from m2encoder.eval.protocols import EvalProtocol, Published, known_protocols
from m2encoder.eval.result_fields import IMMATERIAL
from m2encoder.eval.results import Result

MARKS = "†‡§¶‖"


class Column(NamedTuple):
    """One metric in one language."""

    language: str
    metric: str


@dataclass(frozen=True)
class Row:
    """One model's figures."""

    model: str
    values: Mapping[Column, Metric]
    marks: tuple[str, ...] = ()
    source: str = ""
    """Letters of where the figures were published; empty for ours."""
    facts: Mapping[str, Any] | None = None
    """{"protocol", "status", "fingerprint", "source"}, for the CSV; the first two by language."""


@dataclass(frozen=True)
class Table:
    """Everything measured by one task under one protocol."""

    task: str
    protocol: str
    languages: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[tuple[str, str], ...]
    """(mark, what it means); a note without a mark is about the whole table."""

    @property
    def title(self) -> str:
        """Task, protocol and, where there is one alone, the language."""
        language = f", {self.languages[0]}" if len(self.languages) == 1 else ""
        return f"{self.task}: {self.protocol}{language}"

    def heading(self, column: Column) -> str:
        """Return what stands over a column."""
        alone = len(self.languages) == 1
        return label(column.metric) if alone else f"{column.language} {label(column.metric)}"


class Notes:
    """Gives each reason a mark and each source a letter of its own, the same one every time."""

    def __init__(self) -> None:
        self.marks: dict[str, str] = {}
        self.letters: dict[str, str] = {}

    def mark(self, reason: str) -> str:
        """Return the mark of a reason."""
        used = len(self.marks)
        fresh = MARKS[used % len(MARKS)] * (used // len(MARKS) + 1)
        return self.marks.setdefault(reason, fresh)

    def letter(self, source: str) -> str:
        """Return the letter of a source."""
        used = len(self.letters)
        fresh = chr(ord("A") + used % 26) + ("" if used < 26 else str(used // 26))
        return self.letters.setdefault(source, fresh)


def make_tables(results: Sequence[Result], *, published: bool = False) -> list[Table]:
    """Return a table for each task and protocol, in the order in which they come.

    Custom data is one table for each path, whatever the languages. Rows keep the order of the
    results. published: add the figures that are known for the data set, marked where they were
    measured otherwise.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.task, place_of(result)), []).append(result)
    known = known_protocols() if published else {}
    return [_table(task, place, group, known) for (task, place), group in groups.items()]


def _table(
    task: str, place: str, results: list[Result], known: Mapping[str, EvalProtocol]
) -> Table:
    notes = Notes()
    rows = _our_rows(results, notes)
    languages = tuple(sorted({result.language for result in results}, key=language_place))
    columns = tuple(
        Column(language, name)
        for language in languages
        for name in ordered(
            name for each in results if each.language == language for name in each.metrics
        )
    )
    if place in known and known[place].task == task:
        rows += published_rows(known[place].published, place, columns, notes)
    general = [("", text) for text in _general_notes(results)]
    marked = [(mark, reason) for reason, mark in notes.marks.items()]
    marked += [(letter, source) for source, letter in notes.letters.items()]
    return Table(task, place, languages, columns, tuple(rows), (*marked, *general))


def place_of(result: Result) -> str:
    """Return what results are put together by: the protocol, or the path of custom data.

    One path may hold several sets of classes to tell apart; which one is a setting called `task`.
    """
    if result.protocol["status"] != "custom":
        return str(result.protocol["id"])
    task = result.settings.get("task")
    return f"{result.data['path']} {task}" if task else str(result.data["path"])


def language_place(language: str) -> tuple[int, str]:
    """Return what languages are sorted by: Chinese, English, then the others."""
    return {"zh": 0, "en": 1}.get(language, 2), language


def model_names(results: Iterable[Result]) -> dict[str, str]:
    """Return what to call each model, by fingerprint: its name, and more where two share one."""
    names = {result.model["fingerprint"]: result.model["name"] for result in results}
    shared = Counter(names.values())
    return {
        fingerprint: f"{name} ({fingerprint[:8]})" if shared[name] > 1 else name
        for fingerprint, name in names.items()
    }


def _our_rows(results: Sequence[Result], notes: Notes) -> list[Row]:
    names = model_names(results)
    merged: dict[tuple[str, str, int], list[Result]] = {}
    for result in results:
        variant = _variant(result, [r for r in results if r.language == result.language])
        run = 1
        while any(
            other.language == result.language
            for other in merged.get((result.model["fingerprint"], variant, run), [])
        ):
            run += 1  # the same model measured twice alike: two rows
        merged.setdefault((result.model["fingerprint"], variant, run), []).append(result)
    first_ids: dict[str, str] = {}
    for result in results:
        first_ids.setdefault(result.language, str(result.protocol["id"]))
    rows = []
    for (fingerprint, variant, run), group in merged.items():
        name = names[fingerprint] + (f" [{variant}]" if variant else "")
        name += f" (run {run})" if run > 1 else ""
        values = {
            Column(each.language, key): metric
            for each in group
            for key, metric in each.metrics.items()
        }
        reasons = [reason for each in group for reason in _reasons(each, first_ids)]
        marks = tuple(dict.fromkeys(notes.mark(reason) for reason in reasons))
        rows.append(Row(name, values, marks, facts=_facts(group)))
    return rows


def _variant(result: Result, others: Sequence[Result]) -> str:
    """Name the settings in which results of one language differ, as this one has them."""
    keys = sorted({key for other in others for key in other.settings})
    differing = [
        key
        for key in keys
        if key not in IMMATERIAL and len({repr(other.settings.get(key)) for other in others}) > 1
    ]
    return ", ".join(f"{key} {_short(result.settings.get(key))}" for key in differing)


def _short(value: Any) -> str:
    text = "none" if value is None else " ".join(str(value).split())
    return text if len(text) <= 24 else text[:23] + "…"


def _reasons(result: Result, first_ids: Mapping[str, str]) -> list[str]:
    """Say what sets a result of ours apart from the figures around it."""
    status, found = result.protocol["status"], str(result.protocol["id"])
    reasons = []
    if status == "unverified":
        reasons.append("protocol unverified: nothing to check the captions against")
    if status == "custom":
        checksum = str(result.protocol.get("checksum") or found)[:12]
        language = "" if len(first_ids) == 1 else f" ({result.language})"
        reasons.append(f"custom data{language}, comparable only at checksum {checksum}")
    if found != first_ids[result.language]:
        reasons.append(f"measured on {found}, the first row on {first_ids[result.language]}")
    if (candidates := result.settings.get("candidates")) is not None:
        reasons.append(f"ranked among {candidates} drawn candidates only")
    if result.settings.get("gt", "index") != "index":
        reasons.append(f"right answers by gt {result.settings['gt']}, not by index")
    if skipped := len(result.data.get("skipped") or ()):
        items = "picture or text" if skipped == 1 else "pictures or texts"
        reasons.append(f"{skipped:,} unreadable {items} left out")
    if hits := result.contamination.get("hits"):
        reasons.append(f"{hits:,} test pictures found in the training data")
    return reasons


def _facts(group: Sequence[Result]) -> dict[str, Any]:
    return {
        "protocol": {each.language: str(each.protocol["id"]) for each in group},
        "status": {each.language: str(each.protocol["status"]) for each in group},
        "fingerprint": group[0].model["fingerprint"],
    }


def published_rows(
    found: Iterable[Published], protocol: str, columns: Sequence[Column], notes: Notes
) -> list[Row]:
    """Return the published figures of these columns; those of another protocol are marked."""
    rows = []
    for each in found:
        values = {
            column: Metric(each.values[column.metric] / 100, 0)
            for column in columns
            if column.metric in each.values
        }
        if values:
            marks = tuple(notes.mark(reason) for reason in _objections(each, protocol, columns))
            texts = [source.text for source in each.sources]
            facts: dict[str, Any] = {
                "protocol": {each.language: each.protocol or ""},
                "status": {each.language: "published"},
            }
            letters = ", ".join(map(notes.letter, texts))
            facts["source"] = "; ".join(texts)
            rows.append(Row(each.model, values, marks, letters, facts))
    return rows


def _objections(row: Published, protocol: str, columns: Sequence[Column]) -> list[str]:
    reasons = []
    if row.protocol is None:
        reasons.append(f"published without saying under which protocol, perhaps not {protocol}")
    elif row.protocol != protocol:
        reasons.append(f"published under {_described(row.protocol)}, not {_described(protocol)}")
    shown = {column.metric for column in columns}
    if computed := [label(name) for name in row.computed if name in shown]:
        reasons.append(f"{', '.join(computed)} computed from the printed figures")
    if row.second_hand:
        reasons.append("second-hand")
    if row.note:
        reasons.append(row.note)
    return reasons


def _described(name: str) -> str:
    """Return a protocol's name with its counts, which are what mostly sets two apart."""
    known = known_protocols().get(name)
    counts = []
    if known and known.images is not None:
        counts.append(f"{known.images:,} pictures")
    if known and known.texts is not None:
        counts.append(f"{known.texts:,} captions")
    if known and known.labels is not None:
        names = known.labels.source if known.labels.source != "file" else "a file"
        counts.append(f"names from {names}, {known.labels.num_templates} templates")
    return f"{name} ({', '.join(counts)})" if counts else name


def _general_notes(results: Sequence[Result]) -> list[str]:
    metrics = [(name, metric) for each in results for name, metric in each.metrics.items()]
    units = "Shares in percent."
    if any(metric.ci95 for _, metric in metrics):
        units += " ±: half of the 95 % bootstrap interval."
    if any(write_tie_bounds(name, metric) for name, metric in metrics):
        units += " (low–high): what ties could make of the value."
    said = [str(note) for each in results for note in each.protocol.get("notes") or ()]
    names = model_names(results)
    unchecked = dict.fromkeys(
        names[each.model["fingerprint"]] for each in results if not each.contamination["checked"]
    )
    if unchecked:
        said.append(f"Not checked for test pictures in the training data: {', '.join(unchecked)}.")
    return [units, *dict.fromkeys(said)]
