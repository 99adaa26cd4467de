"""What is said to people about a row of metrics: one line, why it waits, durations in words.

Not for writing rows (log.py) nor for measuring (step_clock.py).
"""

from collections.abc import Mapping

CAUSES = ("read", "decode", "tokenise", "transfer", "other")
"""Why the loop waits; `other` is the rest: worker processes that start or hand batches over."""
WORTH_SAYING = 0.05
"""Share of the time from which waiting is mentioned."""
WORTH_NAMING = 0.25
"""Share of the waiting from which a cause is named."""


def log_line(
    row: Mapping[str, float], *, step: int, total_steps: int, left_s: float | None = None
) -> str:
    """Return what a log step says: losses, speed, gradient norm, rate, waiting, time left.

    row: as written to metrics.jsonl; what it lacks is left out. left_s: seconds to the end.
    """
    parts = [f"step {step:,} of {total_steps:,}"]
    if (loss := row.get("loss")) is not None:
        terms = {k.partition("/")[2]: v for k, v in row.items() if k.startswith("loss/")}
        shown = ", ".join(f"{name} {value:.3f}" for name, value in terms.items())
        parts.append(f"loss {loss:.3f}" + (f" ({shown})" if shown else ""))
    if (speed := row.get("samples_per_s")) is not None:
        each = row.get("samples_per_s_per_device", speed)
        per_device = f" ({_rate(each)} per device)" if each != speed else ""
        parts.append(f"{_rate(speed)} samples/s{per_device}")
    if (mfu := row.get("mfu")) is not None:
        parts.append(f"MFU {100 * mfu:.1f} %")
    if (norm := row.get("grad_norm")) is not None:
        parts.append(f"gradient norm {norm:.3g}")
    if (lr := row.get("lr")) is not None:
        parts.append(f"lr {lr:.2e}")
    if waits := waiting_sentence(row):
        parts.append(waits)
    if left_s is not None:
        parts.append(f"{duration(left_s)} left")
    return ", ".join(parts)


def waiting_sentence(row: Mapping[str, float]) -> str:
    """Say how much of the time went by waiting and for what; nothing below a twentieth.

    For example `waiting 41 % of the time, for read`; with `waiting_rank` in the row it begins with
    `rank 2`.
    """
    waiting = row.get("waiting", 0.0)
    if not waiting >= WORTH_SAYING:
        return ""
    parts = {cause: row.get(f"waiting/{cause}", 0.0) for cause in CAUSES}
    named = [cause for cause in CAUSES if parts[cause] >= WORTH_NAMING * waiting]
    named.sort(key=lambda cause: -parts[cause])
    who = f"rank {row['waiting_rank']:.0f} " if "waiting_rank" in row else ""
    what = "other work of the readers" if named == ["other"] else " and ".join(named)
    return f"{who}waiting {100 * waiting:.0f} % of the time, for {what}"


def _rate(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


def duration(seconds: float) -> str:
    """Return seconds in two units: `45 s`, `12 min 05 s`, `3 h 20 min`, `2 d 04 h`."""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(whole / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(whole / 3600)
    return f"{hours // 24} d {hours % 24:02} h"
