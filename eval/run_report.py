"""One self-contained HTML page about a training run, finished or not: curves, time, events.

Not for a model's results on test data (result_report.py) nor for the demo's page (report.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from m2encoder.errors import DataError
from m2encoder.eval.charts import Line, Mark, line_chart, stacked_chart
from m2encoder.eval.markup import Markup, element, section
from m2encoder.eval.page import html_page
from m2encoder.eval.run_tables import SAVED, STARTS, evaluation_table, events_table
from m2encoder.eval.training_curves import curve, evaluation_curves, loss_curves, term_curves
from m2encoder.log import METRICS, read_events, read_metrics
from m2encoder.log_line import CAUSES, WORTH_SAYING, duration, waiting_sentence

BAD_EVENTS = ("bad step", "rewound", "hang", "save failed")
CAUSE_NAMES = {"transfer": "copy to device"}
REMEDIES = {
    "read": "Reading: faster storage, or a copy of the shards on this machine, helps most.",
    "decode": "Decoding: more data.workers, or smaller pictures in the shards, help most.",
    "tokenise": "Tokenising: more data.workers help most.",
    "transfer": "Copying to the device: nothing in the data would help.",
    "other": "Mostly processes that start or hand batches over: fewer data.workers may do.",
}
"""What helps against each cause of waiting."""


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says about its run."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    """Of metrics.jsonl."""
    events: Sequence[Mapping[str, Any]]
    """Of events.jsonl; empty in folders of earlier versions."""
    config: str
    """config.yaml as it is; empty if there is none."""

    @property
    def steps(self) -> Sequence[Mapping[str, Any]]:
        """The rows about training."""
        return [row for row in self.rows if "loss" in row]

    @property
    def total_steps(self) -> int | None:
        """Steps that the whole run takes; None where the folder does not say."""
        known = [event["total_steps"] for event in self.events if event.get("total_steps")]
        if known:
            return int(known[-1])
        settings = yaml.safe_load(self.config) or {}
        if settings.get("steps"):
            return int(settings["steps"])
        if self.steps and self.steps[-1].get("epoch") and settings.get("epochs"):
            last = self.steps[-1]
            return round(last["step"] / last["epoch"] * settings["epochs"])
        return None


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. Raises DataError if it is none."""
    if not (folder / METRICS).is_file():
        raise DataError(
            f"{folder}: no {METRICS}, so no run that has begun; give the folder (out) of a training"
        )
    try:
        file = folder / "config.yaml"
        config = file.read_text(encoding="utf-8") if file.is_file() else ""
        rows, events = read_metrics(folder / METRICS), read_events(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder}: cannot be read ({error}); expected a run's files") from None
    return RunRecord(folder.resolve().name, rows, events, config)


def render_run(run: RunRecord) -> str:
    """Return the page as HTML."""
    marks = _marks(run.events)
    content = [
        _measured(run, marks),
        _learned(run, marks),
        _time(run, marks),
        events_table(run.events),
        _facts(run),
    ]
    title = f"Training run {run.name}"
    return html_page(title, *content, summary=_summary(run), glance=_glance(run))


# --- the top ---


def _summary(run: RunRecord) -> str:
    if not run.steps:
        return "Unfinished: it has begun and not logged a step yet."
    last, total = run.steps[-1], run.total_steps
    done = f"{last['step']:,} of {total:,} steps" if total else f"{last['step']:,} steps"
    if total and last["step"] >= total:
        return f"Finished: {done}."
    share = f" ({100 * last['step'] / total:.0f} %)" if total else ""
    return f"Unfinished: {done}{share}{_when(run)}."


def _when(run: RunRecord) -> str:
    """Say when the run last started, if known; rows have no times of their own."""
    starts = [event for event in run.events if event["event"] in STARTS]
    if not starts:
        return ""
    return f"; last {starts[-1]['event']} at {starts[-1]['time'][:16].replace('T', ' ')} UTC"


def _glance(run: RunRecord) -> Markup | None:
    if not run.steps:
        return None
    last = run.steps[-1]
    speeds = [row["samples_per_s"] for row in run.steps if row.get("samples_per_s")]
    facts = [
        (f"{last['step']:,}", "steps"),
        (f"{last['samples']:,}", "pairs seen") if last.get("samples") else None,
        (duration(last["seconds"]), "training") if last.get("seconds") else None,
        (_number(median(speeds)), "pairs per second") if speeds else None,
        (f"{last['loss']:.3f}", "loss at the end") if last.get("loss") is not None else None,
    ]
    rows = [
        element("div", element("dt", what), element("dd", value))
        for value, what in (fact for fact in facts if fact)
    ]
    return element("dl", rows, class_="glance")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _marks(events: Sequence[Mapping[str, Any]]) -> list[Mark]:
    marks = []
    for event in events:
        kind = str(event["event"])
        if kind == "resumed" or kind in BAD_EVENTS:
            style = "resumed" if kind == "resumed" else "bad"
            marks.append(Mark(event["step"], f"step {event['step']:,}: {kind}", style))
    return marks


# --- the curves ---


def _measured(run: RunRecord, marks: Sequence[Mark]) -> Markup | None:
    def chart(title: str, metric: str) -> Markup | None:
        lines = evaluation_curves(run.rows, metric)
        return line_chart(title, lines, y_text=_percent, marks=marks)

    charts = [
        chart("R@1, mean of both directions", "(?:i2t|t2i)_r1"),
        chart("Mean recall (R@1, 5, 10, both directions)", "mean_recall"),
        chart("Zero-shot accuracy, mean of tasks", r"zero_shot/.*"),
    ]
    table = evaluation_table(run.rows)
    if table is None:
        return None
    note = "Chinese beside English, measured between steps on data that was not trained on."
    return section("measured", "What it learned", note, _charts(charts), table)


def _learned(run: RunRecord, marks: Sequence[Mark]) -> Markup | None:
    rows = run.steps
    charts = [
        line_chart("Loss", loss_curves(rows), y_text=lambda y: f"{y:.3g}", marks=marks),
        line_chart(
            "Accuracy within the batch", term_curves(rows, "accuracy"), y_text=_percent, marks=marks
        ),
        _single("Gradient norm, before clipping", "gradient norm", rows, "grad_norm", marks),
        _single("Learning rate", "learning rate", rows, "lr", marks),
        _single("Scale (1 / temperature)", "scale", rows, "logit_scale", marks),
    ]
    if not any(charts):
        return None
    note = ["As measured while learning; faint lines are single readings.", _marks_key(marks)]
    return section("training", "How it learned", note, _charts(charts))


def _single(
    title: str, label: str, rows: Sequence[Mapping[str, Any]], key: str, marks: Sequence[Mark]
) -> Markup | None:
    line = curve(label, rows, key, "other")
    return line_chart(title, [line], y_text=lambda y: f"{y:.3g}", marks=marks)


def _marks_key(marks: Sequence[Mark]) -> list[Markup | str] | None:
    styles = {mark.style for mark in marks}
    names = {"resumed": "resumed here", "bad": "something went wrong: see what happened"}
    return [
        part
        for style, name in names.items()
        if style in styles
        for part in (" ", element("i", class_=f"key mark-{style}"), name, ".")
    ]


def _time(run: RunRecord, marks: Sequence[Mark]) -> Markup | None:
    rows = run.steps
    waits = [row for row in rows if row.get("waiting") is not None]
    lines = [
        Line(
            CAUSE_NAMES.get(cause, cause),
            [(row["step"], row.get(f"waiting/{cause}") or 0.0) for row in waits],
            "rest" if cause == "other" else cause,
        )
        for cause in CAUSES
    ]
    lines = [line for line in lines if any(share > 0 for _, share in line.points)]
    charts = [
        line_chart(
            "Speed",
            [curve("pairs per second", rows, "samples_per_s", "other")],
            y_text=_number,
            marks=marks,
        ),
        stacked_chart(
            "Waiting for batches, share of the time (legend: mean)",
            lines,
            y_text=_percent,
            y_at_least=0.2,
            marks=marks,
        ),
        line_chart(
            "MFU (share of the device's peak)",
            [curve("MFU", rows, "mfu", "other")],
            y_text=_percent,
            marks=marks,
        ),
    ]
    if not any(charts):
        return None
    return section("time", "Where the time went", _waiting_note(waits), _charts(charts))


def _waiting_note(waits: Sequence[Mapping[str, Any]]) -> str | None:
    if not waits:
        return None
    names = ["waiting", *(f"waiting/{cause}" for cause in CAUSES)]
    mean = {name: fmean(row.get(name) or 0.0 for row in waits) for name in names}
    said = waiting_sentence(mean)
    if not said:
        return f"The loop hardly waited for batches (less than {100 * WORTH_SAYING:.0f} %)."
    worst = max(waits, key=lambda row: row["waiting"])
    cause = max(CAUSES, key=lambda cause: mean[f"waiting/{cause}"])
    return (
        f"On average {said}; most at step {worst['step']:,}: {waiting_sentence(worst)}. "
        f"{REMEDIES[cause]}"
    )


def _charts(charts: Sequence[Markup | None]) -> Markup | None:
    shown = [chart for chart in charts if chart]
    return element("div", shown, class_="charts") if shown else None


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0095 or share == 0 else f"{100 * share:.1g} %"


# --- facts ---


def _facts(run: RunRecord) -> Markup:
    starts = [event for event in run.events if event["event"] in STARTS]
    hidden = ("time", "step", "event", "total_steps")
    facts = [
        (name.replace("_", " "), str(value))
        for name, value in (starts[-1] if starts else {}).items()
        if name not in hidden
    ]
    if run.steps and run.steps[-1].get("dropped") is not None:
        dropped = run.steps[-1]["dropped"]
        facts.append(("unusable pairs", f"{dropped:,}, left out" if dropped else "none"))
    facts.append(("starts", f"{max(1, len(starts)):,}"))
    if saves := [event for event in run.events if event["event"] == SAVED]:
        stalls = [event["stall_s"] for event in saves if event.get("stall_s") is not None]
        stood = f"; training stood still {median(stalls):.2g} s for one" if stalls else ""
        facts.append(("checkpoints", f"{len(saves):,} written{stood}"))
    rows = [element("div", element("dt", name), element("dd", value)) for name, value in facts]
    config = None
    if run.config:
        config = element(
            "details",
            element("summary", "Configuration (config.yaml)"),
            element("pre", element("code", run.config.rstrip())),
            class_="config",
        )
    return section("run", "What was run", None, element("dl", rows, class_="facts"), config)
