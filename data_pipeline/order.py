"""Which pair fills which row of which batch: a pure function of the seed and the step.

No files, no worker, no rank: those only take their share. Not for reading pairs (stream.py).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]

WINDOW_STEPS = 1000
"""Sources are mixed by weight exactly over so many batches, and within one pair at each step."""
LANE_ROWS = 32
"""Draws of one source that lie together in a batch and walk the same stretch of the data."""
SHUFFLE_WINDOW = 2048
"""Pairs of a lane that are shuffled among each other."""

_SHARDS, _WINDOW = 2, 3  # what a generator decides; 1 is captions and crops (stream.py)


class Run(NamedTuple):
    """Neighbouring pairs of one shard: first, first + 1, ... past - 1."""

    shard: int
    first: int
    past: int


class Mixture:
    """How many rows of each batch each source fills.

    After any number of steps each source has been drawn within one pair of its share; after
    WINDOW_STEPS exactly, its share being the weight rounded to 1 / (WINDOW_STEPS * batch_size).
    """

    def __init__(self, weights: Sequence[float], batch_size: int) -> None:
        self.batch_size = batch_size
        self.per_window = _shares(np.asarray(weights, dtype=np.float64), WINDOW_STEPS * batch_size)
        self._drawn = _drawn_evenly(self.per_window, batch_size)

    def drawn(self, step: int) -> Ints:
        """Return (S,): draws of each source before this step."""
        windows, rest = divmod(step, WINDOW_STEPS)
        return windows * self.per_window + self._drawn[rest]

    def fewest(self) -> Ints:
        """Return (S,): the fewest rows that each source has in any batch."""
        return np.diff(self._drawn, axis=0).min(axis=0)

    def most(self) -> Ints:
        """Return (S,): the most rows that each source has in any batch."""
        return np.diff(self._drawn, axis=0).max(axis=0)

    def step_of(self, source: int, draw: int) -> int:
        """Return the step in which a source's draw (counted over the whole run) falls."""
        windows, rest = divmod(draw, int(self.per_window[source]))
        within = np.searchsorted(self._drawn[:, source], rest, side="right") - 1
        return windows * WINDOW_STEPS + int(within)

    def rows(self, step: int) -> tuple[Ints, Ints]:
        """Return (B,) sources and (B,) their draws: the sources evenly interleaved."""
        before = self.drawn(step)
        counts = self.drawn(step + 1) - before
        sources = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(self.batch_size) - np.repeat(counts.cumsum() - counts, counts)
        order = np.argsort((nth + 0.5) / counts[sources], kind="stable")
        sources, nth = sources[order], nth[order]
        return sources, before[sources] + nth


def _shares(weights: np.ndarray[Any, Any], total: int) -> Ints:
    """Split total in proportion to the weights; the largest remainders are rounded up."""
    exact = weights / weights.sum() * total
    shares = np.floor(exact).astype(np.int64)
    missing = total - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:missing]] += 1
    return shares


def _drawn_evenly(per_window: Ints, batch_size: int) -> Ints:
    """Return (WINDOW_STEPS + 1, S): draws before each step, never a whole pair off the share.

    A source's n-th pair may be drawn once its share exceeds n - 1 and must be by when its share
    reaches n. Earliest deadline first meets every such deadline that can be met; all can, for the
    shares themselves would (R. Tijdeman, The chairman assignment problem, 1980).
    """
    drawn = np.zeros((WINDOW_STEPS + 1, len(per_window)), dtype=np.int64)
    for step in range(1, WINDOW_STEPS + 1):
        row = np.maximum(drawn[step - 1], per_window * step // WINDOW_STEPS)
        missing = batch_size * step - int(row.sum())
        if missing:
            free = np.flatnonzero(row < -(-per_window * step // WINDOW_STEPS))
            deadlines = -(-(row[free] + 1) * WINDOW_STEPS // per_window[free])
            row[free[np.argsort(deadlines, kind="stable")[:missing]]] += 1
        drawn[step] = row
    return drawn


class _Epoch(NamedTuple):
    """One pass over a source: its shards in a row, turned, and cut into a stretch for each lane."""

    shards: Ints
    """(shards,) their numbers in order; one may come twice where they are resampled."""
    starts: Ints
    """(shards + 1,) pairs before each of them, and all."""
    turned_by: int
    lane_starts: Ints
    """(lanes + 1,) pairs of the pass before each lane, and all."""
    lane_drawn: Ints
    """(lanes,) draws of each lane before this epoch."""


class SourceOrder:
    """In which order one source's pairs are drawn: draw k of the run is a shard and a pair in it.

    Draws k * pairs .. (k + 1) * pairs - 1 are epoch k: every pair once, in shards of another order,
    wherever a batch begins or ends; `resampled` draws shards with replacement instead. Each lane of
    LANE_ROWS draws walks its own stretch of the epoch, so a process that takes neighbouring rows
    reads few shards, each nearly in sequence. Holds memory for shards and windows, none for pairs.
    """

    def __init__(
        self, sizes: Sequence[int], mixture: Mixture, source: int, *, seed: int, resampled: bool
    ) -> None:
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._filled = np.flatnonzero(self._sizes)
        self.pairs = int(self._sizes.sum())
        self.lanes = max(1, int(mixture.fewest()[source]) // LANE_ROWS)
        self._mixture, self._source = mixture, source
        self._seed, self._resampled = seed, resampled
        self._epochs: dict[int, _Epoch] = {}
        self._windows: dict[int, tuple[int, int, Ints]] = {}  # lane: epoch, window, permutation
        self._ahead: list[Run] = []

    def places(self, step: int, draws: Ints) -> tuple[Ints, Ints]:
        """Return (n,) shards and (n,) pairs within them of some draws that all lie in this step."""
        nth = draws - self._mixture.drawn(step)[self._source]
        lanes = np.minimum(nth // LANE_ROWS, self.lanes - 1)
        lane_draws = self._lane_draws_before(step)[lanes] + nth - lanes * LANE_ROWS
        epochs = draws // self.pairs
        places = np.zeros((2, len(draws)), dtype=np.int64)
        for number in np.unique(epochs).tolist():
            epoch = self._epoch(number)
            here = np.flatnonzero(epochs == number)
            within = lane_draws[here] - epoch.lane_drawn[lanes[here]]
            places[:, here] = self._locate(
                epoch, self._shuffled(number, epoch, lanes[here], within)
            )
        return places[0], places[1]

    def take_ahead(self) -> list[Run]:
        """Return, once, what is read soon: the next windows of lanes that began one lately."""
        ahead, self._ahead = self._ahead, []
        return ahead

    def _lane_draws_before(self, step: int) -> Ints:
        """Return (lanes,): draws of each lane before the step. The last lane takes what is over."""
        draws = np.full(self.lanes, LANE_ROWS * step, dtype=np.int64)
        draws[-1] = self._mixture.drawn(step)[self._source] - draws[:-1].sum()
        return draws

    def _lane_draws_until(self, draw: int) -> Ints:
        """Return (lanes,): how many of the source's first `draw` draws each lane had."""
        step = self._mixture.step_of(self._source, draw)
        rest = draw - int(self._mixture.drawn(step)[self._source])
        within = np.clip(rest - LANE_ROWS * np.arange(self.lanes), 0, LANE_ROWS)
        within[-1] = max(0, rest - LANE_ROWS * (self.lanes - 1))
        return self._lane_draws_before(step) + within

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            # Batches may span two epochs and read-ahead looks into the next.
            self._epochs = {n: e for n, e in self._epochs.items() if n >= number - 1}
            self._epochs[number] = self._begin(number)
        return self._epochs[number]

    def _begin(self, number: int) -> _Epoch:
        rng = np.random.default_rng([self._seed, _SHARDS, self._source, number])
        if self._resampled:
            shards = np.zeros(0, dtype=np.int64)
            while self._sizes[shards].sum() < self.pairs:
                shards = np.append(shards, rng.choice(self._filled, size=len(self._filled)))
        else:
            shards = rng.permutation(self._filled)
        starts = np.append(0, self._sizes[shards].cumsum())
        before = self._lane_draws_until(number * self.pairs)
        sizes = self._lane_draws_until((number + 1) * self.pairs) - before
        turned_by = int(rng.integers(starts[-1]))
        return _Epoch(shards, starts, turned_by, np.append(0, sizes.cumsum()), before)

    def _shuffled(self, number: int, epoch: _Epoch, lanes: Ints, within: Ints) -> Ints:
        """Turn each lane's n-th draw into a place in the epoch, shuffled inside its window."""
        windows = within // SHUFFLE_WINDOW
        places = epoch.lane_starts[lanes] + windows * SHUFFLE_WINDOW
        for lane, window in dict.fromkeys(zip(lanes.tolist(), windows.tolist(), strict=True)):
            here = (lanes == lane) & (windows == window)
            order = self._window(number, epoch, lane, window)
            places[here] += order[within[here] - window * SHUFFLE_WINDOW]
        return places

    def _window(self, number: int, epoch: _Epoch, lane: int, window: int) -> Ints:
        held = self._windows.get(lane)
        if held is None or held[:2] != (number, window):
            first, past = _bounds(epoch, lane, window)
            rng = np.random.default_rng([self._seed, _WINDOW, self._source, number, lane, window])
            if held is None:
                self._ahead += self._runs(epoch, first, past)
            self._windows[lane] = held = (number, window, rng.permutation(past - first))
            if past < epoch.lane_starts[lane + 1]:
                self._ahead += self._runs(epoch, *_bounds(epoch, lane, window + 1))
            else:
                following = self._epoch(number + 1)
                self._ahead += self._runs(following, *_bounds(following, lane, 0))
        return held[2]

    def _locate(self, epoch: _Epoch, places: Ints) -> tuple[Ints, Ints]:
        turned = (places + epoch.turned_by) % epoch.starts[-1]
        at = np.searchsorted(epoch.starts, turned, side="right") - 1
        return epoch.shards[at], turned - epoch.starts[at]

    def _runs(self, epoch: _Epoch, first: int, past: int) -> list[Run]:
        if first >= past:
            return []
        shards, pairs = self._locate(epoch, np.arange(first, past))
        cuts = np.flatnonzero((np.diff(shards) != 0) | (np.diff(pairs) != 1)) + 1
        begins, ends = np.append(0, cuts), np.append(cuts, past - first)
        return [
            Run(int(shards[begin]), int(pairs[begin]), int(pairs[end - 1]) + 1)
            for begin, end in zip(begins, ends, strict=True)
        ]


def _bounds(epoch: _Epoch, lane: int, window: int) -> tuple[int, int]:
    """Return the first place of a lane's window in the epoch, and the one past its last."""
    first = int(epoch.lane_starts[lane]) + window * SHUFFLE_WINDOW
    return first, min(first + SHUFFLE_WINDOW, int(epoch.lane_starts[lane + 1]))
