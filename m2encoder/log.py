"""What a run leaves behind in `metrics.jsonl`: one JSON object per line.

Not for messages to people: those go through logging and one progress bar.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsLog:
    """Append rows; opening at step n drops rows of later steps, which the run will do again."""

    def __init__(self, path: Path, *, from_step: int) -> None:
        self._path = path
        kept = [row for row in read_metrics(path) if row["step"] <= from_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row; a value that is not finite becomes null."""
        row = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | row) + "\n")
