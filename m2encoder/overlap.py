"""Prepare the items of later batches in threads while earlier ones are computed; order is kept.

Not for what is prepared and computed (embed.py), nor for training batches (data_pipeline/stream).
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Threads:
    """How many threads do what.

    On CPUs, each core computes batches of its own with one thread: nobody waits for another at the
    end of every operation, as torch's own threads would whenever one of them is held up by a
    decoder. Threads and not processes: Pillow and torch release the interpreter while they work,
    and weights and pixels need no copies.
    """

    prepare: int
    """Threads that read, decode and scale."""
    compute: int
    """Batches that are computed at the same time."""
    one_each: bool
    """Whether torch uses one thread for each of them."""

    @classmethod
    def on(cls, device: torch.device, workers: int | None = None) -> "Threads":
        """Return what suits a device; workers: threads that prepare, None for a good number."""
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        if device.type == "cpu":
            own = torch.get_num_threads()
            return cls(workers or own, own, one_each=True)
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        # Two batches: one is put together and copied while the other is computed.
        return cls(workers or max(1, usable_cores() // processes), 2, one_each=False)


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def overlapped(
    batches: Iterable[Sequence[Item]],
    prepare: Callable[[Item], Prepared],
    compute: Callable[[list[Prepared]], Result],
    threads: Threads,
) -> Generator[Result, None, None]:
    """Yield compute([prepare(item) for item in batch]) of each batch, in order.

    `batches` is read in the calling thread, a few batches ahead. The first error, in order, stops
    everything and is raised.
    """
    torch_threads = torch.get_num_threads()
    initializer = _one_thread if threads.one_each else None
    preparing = ThreadPoolExecutor(threads.prepare, "prepare")
    computing = ThreadPoolExecutor(threads.compute, "compute", initializer=initializer)
    waiting: deque[tuple[Future[Result], int]] = deque()
    try:
        for batch in batches:
            items = [preparing.submit(prepare, item) for item in batch]
            waiting.append((computing.submit(_compute, compute, items), len(items)))
            while len(waiting) > threads.compute + 1 and _enough(waiting, threads):
                yield waiting.popleft()[0].result()
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        for pool in (preparing, computing):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (preparing, computing):
            pool.shutdown(wait=True)
        if threads.one_each:
            # This thread kept its number; later threads take the one that was set last.
            torch.set_num_threads(torch_threads)


def _compute(compute: Callable[[list[Prepared]], Result], items: list[Future[Prepared]]) -> Result:
    return compute([item.result() for item in items])


def _enough(waiting: "deque[tuple[Future[Result], int]]", threads: Threads) -> bool:
    """Say whether every thread that prepares has work, beside the batches being computed."""
    ahead = list(waiting)[threads.compute :]
    return sum(count for _, count in ahead) >= 2 * threads.prepare


def _one_thread() -> None:
    torch.set_num_threads(1)
