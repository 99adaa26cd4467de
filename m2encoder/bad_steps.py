"""Steps whose loss or gradient is not finite: keep their samples, and count them in a row.

Not for pairs that cannot be read (train.check_dropped).
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from m2encoder.batch import Batch

logger = logging.getLogger(__name__)

MAX_PICTURES = 64
"""Pictures that are written of one rank and step."""


def write_bad_samples(
    out: Path, step: int, rank: int, batch: Batch, rows: Sequence[int] | None, reason: str
) -> Path:
    """Write the samples of a bad step to `out`/bad-steps/step-N; returns that folder.

    rows: the rows of this rank's share that are to blame; None where that is unknown, then all of
    them. `rank-R.json` names each with its key, place in the global stream and captions; the
    pictures, as the model saw them, lie beside it, at most MAX_PICTURES. A folder that cannot be
    written is a warning.
    """
    folder = out / "bad-steps" / f"step-{step:08d}"
    chosen = range(len(batch.keys)) if rows is None else rows
    samples = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for count, row in enumerate(chosen):
            picture = f"rank-{rank:05d}-row-{row:05d}.png" if count < MAX_PICTURES else None
            if picture is not None:
                pixels = batch.pixels[row].permute(1, 2, 0).cpu().numpy()
                Image.fromarray(pixels).save(folder / picture)
            samples.append(_sample(batch, row) | {"picture": picture})
        record = {"step": step, "rank": rank, "reason": reason, "samples": samples}
        text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
        path = folder / f"rank-{rank:05d}.json"
        path.write_bytes(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        logger.warning("%s: cannot be written (%s)", folder, error.strerror)
    return folder


def _sample(batch: Batch, row: int) -> dict[str, Any]:
    texts = {}
    for language, captions in batch.captions.items():
        where = captions.rows.tolist()
        if row in where:
            texts[language] = batch.texts[language][where.index(row)]
    key, position = batch.keys[row], int(batch.positions[row])
    return {"row": row, "key": key, "position": position, "texts": texts}


class BadSteps:
    """Count bad steps in a row."""

    def __init__(self, limit: int) -> None:
        self._limit, self._count = limit, 0

    def bad(self) -> bool:
        """Count a step that was skipped; True when it is the limit's: time to rewind.

        The count then begins anew.
        """
        self._count += 1
        if self._count < self._limit:
            return False
        self._count = 0
        return True

    def good(self) -> None:
        """Say that a step was as it should be."""
        self._count = 0
