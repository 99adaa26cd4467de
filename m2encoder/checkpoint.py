"""Training checkpoints: saved in the background by all ranks, complete or absent, kept and found.

A checkpoint is written under a temporary name and renamed, so what has a name is complete. What is
in one: checkpoint_state.py; its files: checkpoint_files.py. Not for model folders (load.py).
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from m2encoder.checkpoint_files import (
    PROGRESS,
    FileFacts,
    Piece,
    Progress,
    read_progress,
    sync_folder,
    verify_files,
    write_manifest,
    write_progress,
    write_shard,
)
from m2encoder.checkpoint_state import Staging, TrainState, load_tensors
from m2encoder.distributed import TIMEOUT, World
from m2encoder.errors import CheckpointError

__all__ = ["Checkpoints", "Progress", "TrainState", "list_checkpoints"]

logger = logging.getLogger(__name__)
T = TypeVar("T")
GRACE_S = 30.0
"""How long a run that fails waits for the save that it began."""


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


class Checkpoints:
    """The checkpoints of a run: `folder/step-00000042`, on a file system that all ranks share.

    Make it on all ranks at the same time: they get a process group of their own, so that a save
    beside the training never meets its collectives. All methods but poll are called on all ranks,
    in the same order. keep_last: how many of the newest stay; keep_every_steps: those whose step is
    a multiple of it stay too.
    """

    def __init__(
        self,
        folder: Path,
        world: World | None = None,
        *,
        keep_last: int = 2,
        keep_every_steps: int | None = None,
    ) -> None:
        self.folder, self.world = folder, world or World()
        self.keep_last, self.keep_every_steps = keep_last, keep_every_steps
        self.stall_s = 0.0
        """Seconds for which the last save() kept the training."""
        self.write_s = 0.0
        """Seconds that the last save took to be complete, from when its tensors were copied."""
        self.completed: int | None = None
        """Step of the last save that is complete."""
        self._group: dist.ProcessGroup | None = None
        if self.world.size > 1:
            group = dist.new_group(backend="gloo", timeout=TIMEOUT)
            assert isinstance(group, dist.ProcessGroup)  # of all ranks, so this one is in it
            self._group = group
        self._staging = Staging()
        self._writer: threading.Thread | None = None
        self._failure: str | None = None
        self._untold: str | None = None  # what poll() is still to return

    # --- saving ---

    def save(self, state: TrainState, progress: Progress, *, wait: bool = False) -> None:
        """Begin to save; returns when the tensors are copied, or written if `wait`.

        A save that is still running is waited for. Raises CheckpointError only if `wait`: else
        poll() tells of a save that failed, and finish() raises.
        """
        started = time.perf_counter()
        self._settle()
        self._failure = None
        pieces = self._staging.copy(
            state.tensors(), rank=self.world.rank, world_size=self.world.size
        )
        # A daemon: a run that fails does not wait for it, and what is half written has no name.
        self._writer = threading.Thread(
            target=self._write, args=(pieces, progress), name="checkpoint", daemon=True
        )
        self._writer.start()
        if wait:
            self.finish()
        self.stall_s = time.perf_counter() - started

    def poll(self) -> str | None:
        """Log a save that failed on the first rank, and return what it says, both once.

        Costs next to nothing: call it often.
        """
        if self._writer is not None and not self._writer.is_alive():
            self._settle()
        untold, self._untold = self._untold, None
        return untold

    def finish(self) -> None:
        """Return when the last save is complete; CheckpointError if it failed."""
        self._settle(tell=False)
        if self._failure is not None:
            raise CheckpointError(self._failure)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Let a save that runs come to its end when the run fails, unless other ranks are gone."""
        if self._writer is not None:
            self._writer.join(GRACE_S)

    def _settle(self, *, tell: bool = True) -> None:
        if self._writer is None:
            return
        self._writer.join()
        self._writer = None
        if self._failure is not None and tell and self.world.is_first:
            logger.warning("%s; training goes on", self._failure)
            self._untold = self._failure

    def _write(self, pieces: Mapping[str, Piece], progress: Progress) -> None:
        """Run in the thread. Every error ends here: its rank must not leave the others waiting."""
        started = time.perf_counter()
        path = self.folder / f"step-{progress.step:08d}"
        temporary = _temporary(path)
        rank, size = self.world.rank, self.world.size
        shard = f"tensors-{rank:05d}-of-{size:05d}.safetensors"
        try:
            logger.debug("phase: writing")
            self._together(lambda: _prepare(temporary), only_first=True)
            parts = self._together(lambda: (shard, write_shard(temporary / shard, pieces)))
            facts: dict[str, FileFacts] = dict(part for part in parts if part)
            self._together(lambda: self._complete(path, progress, facts), only_first=True)
            self.completed = progress.step
        except Exception as error:
            logger.debug("a save failed", exc_info=True)
            if self.world.is_first:
                shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs it
            stands = self._last_before(path)
            self._failure = f"{path}: cannot write ({_one_line(error)}); {stands}"
        self.write_s = time.perf_counter() - started

    def _complete(self, path: Path, progress: Progress, facts: dict[str, FileFacts]) -> None:
        temporary = _temporary(path)
        facts[PROGRESS] = write_progress(temporary, progress)
        write_manifest(temporary, facts)
        sync_folder(temporary)
        logger.debug("phase: renaming")
        if path.exists():
            _remove(path)
        os.replace(temporary, path)
        logger.debug("phase: renamed")
        sync_folder(self.folder)
        for old in list_checkpoints(self.folder)[: -self.keep_last]:
            step = int(old.name.removeprefix("step-"))
            if not self.keep_every_steps or step % self.keep_every_steps:
                _remove(old)

    def _last_before(self, path: Path) -> str:
        there = [found for found in list_checkpoints(self.folder) if found != path]
        if not there:
            return "there is no earlier one; free space"
        return f"the last good checkpoint, {there[-1].name}, stands; free space"

    # --- loading ---

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, the same on all ranks; None if there is none."""
        self._settle()
        found = self._together(lambda: list_checkpoints(self.folder)[-1:], only_first=True)[0]
        return found[0] if found else None

    def load(self, path: Path, state: TrainState) -> Progress:
        """Put a checkpoint in place, to the bit, whatever world and sharding it was saved under.

        The files are compared with their hashes, each by one rank. Raises CheckpointError on all
        ranks if it is damaged, of another model or another format; all is then as it was.
        """
        self._settle()
        progress = self._together(lambda: self._verified(path))[0]
        had_average = self._together(lambda: load_tensors(path, state))[0]
        assert progress is not None
        if self.world.is_first and had_average != (state.ema is not None):
            what = "has no average: it starts at its weights" if state.ema else "average left out"
            logger.warning("%s: %s", path, what)
        return progress

    def _verified(self, path: Path) -> Progress:
        progress = read_progress(path)
        verify_files(path, share=self.world.rank, shares=self.world.size)
        return progress

    # --- together ---

    def _together(self, work: Callable[[], T], *, only_first: bool = False) -> list[T | None]:
        """Do something on all ranks, or the first; return every rank's result on each.

        Where a rank fails all raise: it its own error, the others a CheckpointError that says it.
        """
        if self._group is None:
            return [work()]
        result, error, said = None, None, ""
        if self.world.is_first or not only_first:
            try:
                result = work()
            except Exception as raised:
                error, said = raised, _one_line(raised)
                if not isinstance(raised, CheckpointError):  # those name the place themselves
                    said = f"rank {self.world.rank}: {said}"
        answers: list[Any] = [None] * self.world.size
        dist.all_gather_object(answers, (result, said), group=self._group)
        if error is not None:
            raise error
        for _, text in answers:
            if text:
                raise CheckpointError(text)
        return [found for found, _ in answers]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _prepare(temporary: Path) -> None:
    """Make the folder to write in; remove what runs that were killed have left beside it."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for old in temporary.parent.glob(".step-*.tmp"):
        shutil.rmtree(old)
    temporary.mkdir()


def _remove(path: Path) -> None:
    """Delete a checkpoint; killed half-way it has no name that could be taken for complete."""
    temporary = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    os.replace(path, temporary)
    shutil.rmtree(temporary)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"
