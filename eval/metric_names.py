"""How metrics are called, ordered and written wherever results are shown.

Not for measuring them, nor for the tables and pages around them (table.py, result_report.py).
"""

import math
import re
from collections.abc import Iterable
from typing import Literal

from m2encoder.eval.metric import Metric

LABELS = {
    "mean_recall": "mean recall",
    "mean_per_class_recall": "per-class recall",
    "accuracy": "accuracy",
    "auroc": "AUROC",
}
# What is no share of 1, and so not written in percent.
PLAIN_WORDS = frozenset(
    {"rank", "threshold", "cosine", "score", "margin", "distance", "count", "correlation"}
    | {"spearman", "kendall", "ratio", "perplexity", "scale", "temperature", "dprime"}
)
LOWER_IS_BETTER = frozenset({"rank", "error", "distance", "loss", "drop", "truncated"})
# Best near some value, or neither good nor bad.
NEITHER = frozenset({"gap", "offset", "share", "prefers", "cosine", "score", "threshold", "bias"})
# Directions, then what is known, in the order of published tables; the rest by name.
ORDER = (
    *("top", "mean_per_class_recall", "t2i_r", "t2i_mean_recall", "t2i_median_rank"),
    *("i2t_r", "i2t_mean_recall", "i2t_median_rank", "mean_recall", "rsum", "accuracy"),
)
DASH = "–"


def label(name: str) -> str:
    """Return a metric's name as people write it: `t2i_r1` is `T2I R@1`."""
    if name in LABELS:
        return LABELS[name]
    if top := re.fullmatch(r"top_?(\d+)", name):
        return f"top-{top[1]}"
    text = re.sub(r"_at_(\d+)", r"@\1", name).replace("_to_", "→")
    words = [_word(word) for word in text.split("_")]
    return " ".join(word for word in words if word)


def _word(word: str) -> str:
    if re.fullmatch(r"[ti]2[ti]", word) or word in ("auroc", "mrr", "map"):
        return word.upper()
    recall = re.fullmatch(r"r(\d+)", word)
    return f"R@{recall[1]}" if recall else word


def ordered(names: Iterable[str]) -> list[str]:
    """Return the names without repeats, in an order that depends on nothing else."""
    return sorted(set(names), key=_place)


def _place(name: str) -> tuple[int, list[tuple[str, int]], str]:
    stem = name.rstrip("0123456789")
    place = ORDER.index(stem) if stem in ORDER else len(ORDER) + (not is_share(name))
    parts = re.findall(r"(\D*)(\d*)", name)  # numbers by value: r5 before r10
    return place, [(text, int(number or 0)) for text, number in parts], name


def is_share(name: str) -> bool:
    """Say whether a metric is a share of 1, which is shown in percent."""
    words = re.split(r"[^a-z]+", name.lower())
    return words[0] in ("accuracy", "top") or PLAIN_WORDS.isdisjoint(words)  # accuracy_count


def better_direction(name: str) -> Literal[-1, 0, 1]:
    """Return 1 where a larger value is the better one, -1 where a smaller is, 0 where neither."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    if words & NEITHER:
        return 0
    return -1 if words & LOWER_IS_BETTER else 1


def is_difference(name: str) -> bool:
    """Say whether a metric is how far one value is from another, and so has a sign."""
    return name.endswith(("_change", "_gap", "_offset")) or "_offset_" in name


def write_value(name: str, value: float | None, *, signed: bool | None = None) -> str:
    """Return a value for people: shares in percent, a dash where nothing was measured.

    signed: write a plus, too; by default where the metric is a difference.
    """
    if value is None or not math.isfinite(value):
        return DASH
    sign = "+" if (is_difference(name) if signed is None else signed) else ""
    if is_share(name):
        text = f"{100 * value:{sign}.1f}"
    elif name.endswith("rank"):
        text = f"{round(value, 1):{sign}g}"
    elif value == int(value) and abs(value) >= 2:
        text = f"{value:{sign},.0f}"
    else:
        text = f"{value:{sign}.3f}"
    is_zero = not text.strip("+-0.")
    return text.lstrip("+-") if is_zero else text


def write_interval(name: str, metric: Metric) -> str:
    """Return half the width of the 95 % interval as `±1.2`, or nothing where there is none."""
    if metric.ci95 is None or not all(map(math.isfinite, metric.ci95)):
        return ""
    return f"±{write_value(name, (metric.ci95[1] - metric.ci95[0]) / 2, signed=False)}"


def write_tie_bounds(name: str, metric: Metric) -> str:
    """Return what ties could make of the value, `85.1–90.3`; nothing where rounding hides it."""
    if metric.tie_low is None or metric.tie_high is None:
        return ""
    low, high = write_value(name, metric.tie_low), write_value(name, metric.tie_high)
    return "" if low == high else f"{low}–{high}"
