"""Say which rank is missing when training stands still, and leave every rank's stacks behind.

One thread per rank writes where its rank is to OUT/ranks; files carry all that the ranks tell each
other, since collectives may be what hangs. Not for a rank that raises: its error says enough.
"""

import faulthandler
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from m2encoder.log import add_event
from m2encoder.watchdog_words import Seen, Sign, missing_sentence

logger = logging.getLogger(__name__)

BEAT_S = 5.0
"""Most seconds between two signs of life."""
BEATS_TO_WAIT = 3
"""Signs of life that a rank may miss before it is held for stopped."""


class _Place(NamedTuple):
    """Where this rank is; replaced as a whole, so that the thread always reads one moment."""

    step: int
    order: int
    """How many places of this step came before."""
    phase: str
    keys: Sequence[str]
    since: float
    is_paused: bool = False


class Watchdog:
    """Watch this rank while the block runs; all ranks of the world have one, on one file system.

    When a rank made no progress for `timeout_s`, each writes the stacks of its threads and its last
    sample keys to `out`/ranks/rank-N.txt; the lowest rank alive says in one sentence who is missing
    (also in `out`/ranks/hang.txt and events.jsonl); then all of them end with exit code 1, at once
    and without cleaning up, since their main threads are stuck. A stopped process has to be killed
    by whoever started it.
    """

    def __init__(self, out: Path, rank: int, world_size: int, timeout_s: float) -> None:
        self._out, self._rank, self._world_size = out, rank, world_size
        self._timeout_s = timeout_s
        self._beat_s = min(BEAT_S, timeout_s / 4)
        self._folder = out / "ranks"
        self._alarm = self._folder / "alarm"  # empty, later the rank that is to speak
        self._hang = self._folder / "hang.txt"
        self._stacks = self._folder / f"rank-{rank:05d}.txt"
        self._last_resort = self._folder / f"rank-{rank:05d}.stuck.txt"
        self._place = _Place(0, 0, "start", (), time.monotonic())
        self._beats = 0
        self._ended: str | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def enter(self, phase: str, step: int, keys: Sequence[str] = ()) -> None:
        """Say what the loop does now; this is what counts as progress, and costs nothing.

        phase: a word or two, for example read, exchange. keys: the samples at hand; the last ones
        stay until others come. All ranks call this in the same order within a step.
        """
        logger.debug("phase: %s", phase)
        last = self._place
        order = last.order + 1 if step == last.step else 0
        self._place = _Place(step, order, phase, keys or last.keys, time.monotonic())

    @contextmanager
    def paused(self, phase: str, step: int) -> Iterator[None]:
        """Allow any time inside, to this rank and to those that wait for it: evaluating, saving."""
        self.enter(phase, step)
        self._place = self._place._replace(is_paused=True)
        yield
        self.enter(f"after {phase}", step)

    def __enter__(self) -> "Watchdog":
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in (self._stacks, self._alarm, self._hang):
            path.unlink(missing_ok=True)  # of an earlier start
        # Held open: when this thread cannot run, C code writes the stacks there.
        self._last_resort_file = self._last_resort.open("w", encoding="utf-8")
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._ended = "" if error is None else f"{type(error).__name__}: {error}".splitlines()[0]
        self._stopping.set()
        self._thread.join()
        self._drop_last_resort()

    # --- the thread ---

    def _watch(self) -> None:
        while not self._stopping.wait(self._beat_s):
            self._beat()
            place = self._place
            if self._alarm.exists():
                self._follow_alarm()
            elif not place.is_paused and time.monotonic() - place.since > self._timeout_s:
                self._check_world(place)
        self._beat()

    def _follow_alarm(self) -> None:
        """Leave the stacks, speak if it is this rank's turn, and end."""
        self._write_stacks()
        for _ in range(3 * BEATS_TO_WAIT):
            if self._stopping.wait(self._beat_s):
                return
            self._beat()  # who raised the alarm looks who is alive
            if speaker := self._read(self._alarm):
                if speaker == str(self._rank):
                    logger.error("%s", self._read(self._hang))
                break
        self._exit()

    def _check_world(self, place: _Place) -> None:
        """Raise the alarm, find out who is missing and end, if the whole world stands still.

        It does not while a rank goes on, or is alive and has leave to take its time.
        """
        signs = self._look_twice()
        is_moving = any(sign.is_moving for sign in signs.values())
        if is_moving or any(s.is_paused and s.is_alive for s in signs.values()):
            return
        if self._place is not place or self._stopping.is_set():
            return
        try:
            self._alarm.open("x").close()
        except OSError:
            return  # another rank was first: the next beat sees it
        self._write_stacks()
        signs = self._look_twice()  # the others write theirs meanwhile
        sentence = missing_sentence(signs, self._world_size, timeout_s=self._timeout_s)
        sentence = f"{sentence}; stacks in {self._folder}"
        self._write(self._hang, sentence + "\n")
        add_event(self._out, place.step, "hang", text=sentence)
        # The lowest rank alive speaks: launchers show the first one's words.
        alive = [rank for rank, seen in signs.items() if seen.is_alive]
        speaker = min(alive, default=self._rank)
        self._write(self._alarm, str(speaker))
        if speaker == self._rank:
            logger.error("%s", sentence)
        if not self._stopping.wait(BEATS_TO_WAIT * self._beat_s):  # until it has spoken
            self._exit()

    def _exit(self) -> None:
        self._drop_last_resort()
        for handler in logging.getLogger().handlers:
            handler.flush()
        os._exit(1)

    def _beat(self) -> None:
        """Give a sign of life: where this rank is."""
        place = self._place
        self._beats += 1
        faulthandler.dump_traceback_later(self._timeout_s, file=self._last_resort_file)
        sign = Sign(
            rank=self._rank,
            pid=os.getpid(),
            beats=self._beats,
            time=time.time(),
            step=place.step,
            order=place.order,
            phase=place.phase,
            phase_s=time.monotonic() - place.since,
            is_paused=place.is_paused,
            keys=list(place.keys),
            ended=self._ended,
        )
        self._write(self._sign_path(self._rank), json.dumps(sign._asdict(), indent=1))

    def _look_twice(self) -> dict[int, Seen]:
        """Return each rank's last sign, and whether it gave another and moved while we looked.

        No clocks are compared: machines may differ. Takes BEATS_TO_WAIT beats.
        """
        before = self._signs()
        for _ in range(BEATS_TO_WAIT):
            self._stopping.wait(self._beat_s)
            self._beat()
        return {rank: Seen.between(before.get(rank), sign) for rank, sign in self._signs().items()}

    def _signs(self) -> dict[int, Sign]:
        found: dict[int, Sign] = {}
        for rank in range(self._world_size):
            try:
                content = json.loads(self._sign_path(rank).read_text(encoding="utf-8"))
                found[rank] = Sign(**content)
            except (OSError, ValueError, TypeError):
                continue  # not there yet: it is said to be missing
        return found

    def _write_stacks(self) -> None:
        place, frames = self._place, sys._current_frames()
        waits_s = time.monotonic() - place.since
        lines = [
            f"rank {self._rank}, step {place.step}, {place.phase} for {waits_s:.0f} s",
            f"last samples: {', '.join(place.keys)}",
        ]
        threads = sorted(threading.enumerate(), key=lambda t: t is not threading.main_thread())
        for thread in threads:
            if thread.ident in frames and thread is not threading.current_thread():
                lines.append(f"\nthread {thread.name}, innermost call last:")
                lines += [line.rstrip() for line in traceback.format_stack(frames[thread.ident])]
        self._write(self._stacks, "\n".join(lines) + "\n")

    def _drop_last_resort(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._last_resort_file.close()
        self._last_resort.unlink(missing_ok=True)

    def _sign_path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _read(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8").strip()
        except OSError:
            return ""

    def _write(self, path: Path, text: str) -> None:
        """Write a whole file or none; a full disk must not end a run."""
        temporary = path.with_name(path.name + ".tmp")
        try:
            temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
            os.replace(temporary, path)
        except OSError as error:
            logger.debug("%s: cannot be written (%s)", path, error.strerror)
