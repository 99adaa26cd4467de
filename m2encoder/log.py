"""What a run leaves behind to be read: rows of numbers, what happened, and copies for viewers.

`metrics.jsonl` holds one row per log step, `events.jsonl` what happened (starts, resumes, bad
steps). Not for messages to people: those go through logging and one progress bar.
"""

import json
import logging
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from m2encoder.errors import MissingExtraError

logger = logging.getLogger(__name__)

WriterName = Literal["tensorboard", "wandb"]
METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
FLUSH_S = 30


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    # not splitlines, which also breaks at U+2028 and the like
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def read_events(out: Path) -> list[dict[str, Any]]:
    """Return what happened to the run in `out`, oldest first; see `add_event`."""
    return read_metrics(out / EVENTS)


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
        append_line(self._path, json.dumps({"step": step} | row))


def append_line(path: Path, line: str) -> None:
    """Append one line, or on a full disk none of it and OSError."""
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        content = line.encode("utf-8", "backslashreplace") + b"\n"
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), size)
            raise


def add_event(out: Path, step: int, kind: str, **facts: Any) -> None:
    """Append to `out`/events.jsonl what happened at a step, and when; any rank may.

    kind: started, resumed, bad step, rewound, hang, ... Events of steps that are done again stay:
    the file is the run's history. A file that cannot be written is a warning.
    """
    row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, "event": kind}
    path = out / EVENTS
    try:
        append_line(path, json.dumps(row | facts, ensure_ascii=False))
    except OSError as error:
        logger.warning("%s: cannot be written (%s); the event is lost", path, error.strerror)


class _Writer(Protocol):
    """A viewer's own copy of the rows."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Everything that one run writes for its readers; for the first rank alone.

    from_step: steps done already; rows of later ones are dropped, to be written again.
    writers: viewers that get the rows too. TensorBoard (OUT/tensorboard) is left out with a warning
    when it is not installed; W&B raises MissingExtraError then.
    resolved_config: for W&B. facts: what this start runs on, kept with the event `started` or
    `resumed`, for example world_size=4, total_steps=1000.
    """

    def __init__(
        self,
        out: Path,
        *,
        from_step: int,
        writers: Sequence[WriterName] = ("tensorboard",),
        resolved_config: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._out = out
        self._writers: list[_Writer] = []
        if "wandb" in writers:  # first: it may refuse
            self._writers.append(_Wandb(out, resolved_config or {}))
        if "tensorboard" in writers:
            try:
                self._writers.append(_TensorBoard(out / "tensorboard", from_step=from_step))
            except ImportError:
                logger.warning(
                    "no TensorBoard log: tensorboard is not installed (pip install "
                    "'m2encoder[train]'); %s has every number",
                    METRICS,
                )
        self._metrics = MetricsLog(out / METRICS, from_step=from_step)
        self._is_full = False
        self._saved: int | None = None
        self.event(from_step, "resumed" if from_step else "started", **(facts or {}))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row everywhere. A disk that is full is a warning, once; training goes on."""
        try:
            self._metrics.write(step, values)
            self._is_full = False
        except OSError as error:
            if not self._is_full:
                logger.warning(
                    "step %d: %s cannot be written (%s); training goes on, rows are missing",
                    *(step, self._out / METRICS, error.strerror),
                )
            self._is_full = True
        for writer in list(self._writers):
            try:
                writer.write(step, values)
            except OSError as error:
                self._writers.remove(writer)
                logger.warning(
                    "step %d: no more %s log (%s); %s goes on",
                    *(step, type(writer).__name__.strip("_"), error, METRICS),
                )

    def event(self, step: int, kind: str, **facts: Any) -> None:
        """Note that something happened; see `add_event`."""
        add_event(self._out, step, kind, **facts)

    def saved(self, step: int | None, *, stall_s: float) -> None:
        """Note once that the checkpoint of a step is complete, and how long it kept training."""
        if step is not None and step != self._saved:
            self._saved = step
            self.event(step, "saved", stall_s=round(stall_s, 4))

    def close(self) -> None:
        """Let the viewers write what they hold back."""
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _TensorBoard:
    def __init__(self, folder: Path, *, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier start wrote of steps that are done again
        self._writer = SummaryWriter(
            str(folder), purge_step=from_step + 1, flush_secs=FLUSH_S, max_queue=100
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """The id in OUT/wandb-id lets a resumed run go on where it was."""

    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise MissingExtraError("wandb", extra="wandb") from None
        own = out / "wandb-id"
        if not own.is_file():
            own.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self._run = wandb.init(
            dir=str(out),
            id=own.read_text(encoding="utf-8").strip(),
            name=out.name,
            resume="allow",
            config=dict(config),
        )
        # our own step as the x axis: W&B's refuses to go back, as a resumed run does
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()
