"""Where the time of training goes: how long the loop waits for batches, and for which work.

Not for what a step costs inside (profiling.py), nor for hangs (watchdog.py).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

from m2encoder.batch import Batch
from m2encoder.distributed import World
from m2encoder.log_line import CAUSES


class StepClock:
    """Measure, on this rank, the time since the last row and how much of it went by waiting.

    These are the loop's own waits: a GPU may still have work meanwhile, so the time that it is idle
    is less or equal.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._start()

    def _start(self) -> None:
        self._started, self._paused_s = self._now(), 0.0
        self._waited_s: dict[str, float] = dict.fromkeys(CAUSES, 0.0)

    def batches(self, stream: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the stream's batches and measure how long each was waited for; time begins here.

        A wait is shared out by the work that went into its batch. It cannot be longer than that
        work, which was begun before; what is left over is `other`.
        """
        self._start()
        iterator = iter(stream)
        while True:
            before = self._now()
            batch = next(iterator, None)
            if batch is None:
                return
            self._share_out(self._now() - before, batch.work_s)
            yield batch

    def _share_out(self, wait_s: float, work_s: Mapping[str, float]) -> None:
        known = {cause: work_s[cause] for cause in CAUSES if work_s.get(cause, 0.0) > 0}
        whole = sum(known.values())
        explained = min(1.0, wait_s / whole) if whole else 0.0
        for cause, seconds in known.items():
            self._waited_s[cause] += seconds * explained
        self._waited_s["other"] += max(0.0, wait_s - whole * explained)

    @contextmanager
    def transfer(self) -> Iterator[None]:
        """Count the time inside as waiting for a copy to the device."""
        before = self._now()
        yield
        self._waited_s["transfer"] += self._now() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out: evaluating, saving."""
        before = self._now()
        try:
            yield
        finally:
            self._paused_s += self._now() - before

    @property
    def seconds(self) -> float:
        """Seconds since the last row, without pauses."""
        return self._now() - self._started - self._paused_s

    def row(self, samples: int, world_size: int) -> dict[str, float]:
        """Return speed and waiting since the last call, and begin anew.

        samples: pairs that all ranks together trained on meanwhile. `waiting` is a share of the
        time, `waiting/CAUSE` its parts, whose sum it is.
        """
        elapsed_s = max(self.seconds, 1e-9)
        speed = samples / elapsed_s
        shares = {f"waiting/{cause}": s / elapsed_s for cause, s in self._waited_s.items()}
        self._start()
        return {
            "samples_per_s": speed,
            "samples_per_s_per_device": speed / world_size,
            "waiting": sum(shares.values()),
            **shares,
        }


def longest_waiting(row: Mapping[str, float], world: World) -> dict[str, float]:
    """Return the row with the waiting of the rank that waited most, and `waiting_rank`.

    All ranks call this at the same time: one that waits for data makes the others wait for it in
    the exchange of features, which their own clocks do not see.
    """
    names = [name for name in row if name.partition("/")[0] == "waiting"]
    if world.size == 1:
        return dict(row)
    mine = torch.tensor([row[name] for name in names], device=world.device)
    gathered = [torch.empty_like(mine) for _ in range(world.size)]
    dist.all_gather(gathered, mine)
    waits = torch.stack(gathered).cpu()
    rank = int(waits[:, names.index("waiting")].argmax())
    found = dict(zip(names, waits[rank].tolist(), strict=True))
    return {**row, **found, "waiting_rank": rank}
