"""Suites: lists of tasks, kept as YAML in configs/eval, and the data that each of them reads.

Not for running a task (tasks.py, shard_tasks.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2encoder.errors import ConfigError
from m2encoder.eval.protocols import EvalProtocol, get_protocol


@dataclass(frozen=True)
class SuiteTask:
    """One line of a suite."""

    protocol: str | None
    """A protocol's name; None measures all that a shard folder allows."""
    data: tuple[str, ...]
    """Where its data may lie below the root, the first that is there counts."""
    images: str | None = None
    """Folder of the pictures that a file of captions names."""
    candidates: int | None = None
    """Rank among that many pictures, drawn at random; without a protocol only."""
    names_file: str | None = None
    """File of class names below the root, where no package holds them."""
    templates_file: str | None = None

    @property
    def known(self) -> EvalProtocol | None:
        """The protocol, if there is one."""
        return get_protocol(self.protocol) if self.protocol else None

    def find(self, root: Path) -> Path | None:
        """Return where the data lies, or None."""
        return next((root / name for name in self.data if (root / name).exists()), None)


@dataclass(frozen=True)
class Suite:
    """What to measure, in order."""

    title: str
    tasks: tuple[SuiteTask, ...]


def suite_from(values: Mapping[str, Any], where: str) -> Suite:
    """Return a suite from what its YAML holds. Raises ConfigError naming `where` and the mistake.

    {"title": ..., "tasks": [{"protocol": ID, "data": PATH or [PATHS], ...}, ...]}
    """
    if set(values) != {"title", "tasks"} or not isinstance(values["tasks"], list):
        raise ConfigError(f"{where}: holds {', '.join(values)}, expected title and a list of tasks")
    if not values["tasks"]:
        raise ConfigError(f"{where}: no tasks, expected at least one")
    return Suite(str(values["title"]), tuple(_task_from(raw, where) for raw in values["tasks"]))


def _task_from(raw: Any, where: str) -> SuiteTask:
    known = SuiteTask.__dataclass_fields__
    if not isinstance(raw, dict) or "data" not in raw:
        raise ConfigError(f"{where}: a task is {raw!r}, expected a mapping with data and protocol")
    if unknown := sorted(set(raw) - set(known)):
        raise ConfigError(
            f"{where}: no setting {unknown[0]!r} of a task; known: {', '.join(known)}"
        )
    paths = [raw["data"]] if isinstance(raw["data"], str) else raw["data"]
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
        raise ConfigError(f"{where}: data is {raw['data']!r}, expected a path or a list of some")
    values: dict[str, Any] = {"protocol": None, **raw, "data": tuple(paths)}
    task = SuiteTask(**values)
    try:
        protocol = task.known
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if protocol is not None and task.candidates is not None:
        raise ConfigError(f"{where}: {protocol.id} has its own candidates; leave them out")
    return task
