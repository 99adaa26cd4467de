"""Fill a table of vectors: what is stored is read, the rest is computed, each rank doing its share.

Not for how a batch is computed (embed.py) nor for files (vector_store.py).
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from m2encoder.distributed import World
from m2encoder.errors import DataError, M2EncoderError, PlacementError
from m2encoder.vector_store import StoredVectors
from m2encoder.vector_table import Span, VectorTable, runs

SENT_ROWS = 65_536
"""Rows that go to the other ranks at once, through the GPU's memory where there is one."""

Compute = Callable[[Sequence[Span]], Generator[Span, None, None]]
"""Fills the rows of some spans of a table and yields each span when it is filled, in order."""


def fill(
    table: VectorTable,
    spans: Sequence[Span],
    compute: Compute,
    *,
    stored: StoredVectors | None,
    world: World,
    bar: Any,
) -> None:
    """Fill every row of the table, on every rank.

    spans: cover the table; computed as they are, so the result does not depend on the world.
    What was computed when an error comes is stored. An error on one rank is raised on all of them.
    bar: a progress bar, which is told of rows.
    """
    _check_same(len(table), world)
    if stored is not None and world.is_first:
        stored.load(table)
    missing = [span for span in spans if not table.has(span)] if world.is_first else []
    missing = world.share(missing)
    own = share_of(missing, world)
    bar.update(len(table) - sum(map(len, missing)))
    failure: Exception | None = None
    try:
        _compute(table, own, compute, stored, bar)
    except Exception as error:
        if world.size == 1:
            raise
        failure = error
    raise_together(failure, world)
    _exchange(table, missing, world)
    bar.update(sum(map(len, missing)) - sum(map(len, own)))
    if stored is not None:
        try:
            if world.is_first:
                stored.finish(table)
        except DataError as error:
            failure = error
        raise_together(failure, world)


def _compute(
    table: VectorTable,
    own: Sequence[Span],
    compute: Compute,
    stored: StoredVectors | None,
    bar: Any,
) -> None:
    try:
        with closing(compute(own)) as done:
            for span in done:
                if stored is not None:
                    stored.add(table, span)
                bar.update(len(span))
    finally:
        if stored is not None:
            stored.flush(table)


def share_of(spans: Sequence[Span], world: World) -> list[Span]:
    """Return the consecutive spans that are this rank's, about as many rows as every other's."""
    ends = np.cumsum([len(span) for span in spans]) if spans else np.zeros(1)
    middles = [end - len(span) / 2 for span, end in zip(spans, ends, strict=False)]
    return [
        span
        for span, middle in zip(spans, middles, strict=True)
        if int(middle * world.size / ends[-1]) == world.rank
    ]


def _check_same(count: int, world: World) -> None:
    counts = world.concatenated([count])
    if len(set(counts)) > 1:
        found = ", ".join(f"{found:,}" for found in counts)
        raise PlacementError(f"ranks have {found} items, expected the same on all; check the data")


def raise_together(failure: Exception | None, world: World) -> None:
    """Raise the failure of one rank on all of them, so that nobody waits for who has stopped."""
    found = world.concatenated([] if failure is None else [(world.rank, _described(failure))])
    if failure is not None:
        raise failure
    if found:
        rank, message = found[0]
        raise DataError(f"{message} (process {rank})")


def _described(failure: Exception) -> str:
    if isinstance(failure, M2EncoderError):
        return str(failure)
    return f"{type(failure).__name__}: {failure}"


def _exchange(table: VectorTable, missing: Sequence[Span], world: World) -> None:
    """Send what each rank computed, and what the first one read, to all the others."""
    if world.size == 1:
        return
    is_read = np.ones(len(table), bool)
    for span in missing:
        is_read[span.rows] = False
    parts = [(0, span) for span in _true_runs(is_read)]
    for rank in range(world.size):
        own = share_of(missing, World(rank, world.size, world.device))
        parts += [(rank, span) for span in runs(own)]
    for rank, span in parts:
        for first in range(span.first, span.last, SENT_ROWS):
            rows = slice(first, min(first + SENT_ROWS, span.last))
            for array in (table.vectors, table.states):
                _broadcast(array[rows], rank, world)
    table.reasons = dict(sorted(world.concatenated(list(table.reasons.items()))))


def _true_runs(is_true: NDArray[np.bool_]) -> list[Span]:
    edges = np.flatnonzero(np.diff(is_true, prepend=False, append=False))
    return [Span(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _broadcast(array: NDArray[Any], source: int, world: World) -> None:
    """Fill `array` in place with what rank `source` has in it."""
    on_cpu = torch.from_numpy(array)
    sent = on_cpu.to(world.device)
    dist.broadcast(sent, src=source)
    if sent is not on_cpu:
        on_cpu.copy_(sent)
