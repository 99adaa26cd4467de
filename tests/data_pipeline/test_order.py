"""The order of pairs against a slow reference that walks the run draw by draw, and its promises.

Not what the stream makes of it: test_stream.py.
"""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2encoder.data_pipeline.order import (
    LANE_ROWS,
    SHUFFLE_WINDOW,
    WINDOW_STEPS,
    Mixture,
    SourceOrder,
)

WEIGHTS = st.lists(st.floats(0.001, 10), min_size=1, max_size=6)


def places(order, mixture, source, steps):
    """(shard, pair) of a source's draws, step by step."""
    found = []
    for step in steps:
        sources, draws = mixture.rows(step)
        shards, pairs = order.places(step, draws[sources == source])
        found.append(list(zip(shards.tolist(), pairs.tolist(), strict=True)))
    return found


def make(sizes, batch_size, *, seed=0, resampled=False, weights=(1.0,), source=0):
    mixture = Mixture(weights, batch_size)
    return mixture, SourceOrder(sizes, mixture, source, seed=seed, resampled=resampled)


def by_hand(sizes, batch_size, *, epochs, seed, weights, source):
    """The draws of some epochs from the order's description: lanes are lists, walked one by one."""
    mixture = Mixture(weights, batch_size)
    total, lanes = sum(sizes), max(1, int(mixture.fewest()[source]) // LANE_ROWS)
    lane_of, step = [], 0  # the lane of every draw
    while len(lane_of) < epochs * total:
        count = int((mixture.drawn(step + 1) - mixture.drawn(step))[source])
        lane_of += [min(j // LANE_ROWS, lanes - 1) for j in range(count)]
        step += 1
    found = []
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, 2, source, epoch])
        shards = rng.permutation(len(sizes)).tolist()
        sequence = [(shard, pair) for shard in shards for pair in range(sizes[shard])]
        turned_by = int(rng.integers(total))
        sequence = sequence[turned_by:] + sequence[:turned_by]
        mine = lane_of[epoch * total : (epoch + 1) * total]
        stretches, begin = [], 0
        for lane in range(lanes):
            stretch = sequence[begin : begin + mine.count(lane)]
            begin += len(stretch)
            shuffled = []
            for window, first in enumerate(range(0, len(stretch), SHUFFLE_WINDOW)):
                part = stretch[first : first + SHUFFLE_WINDOW]
                rng = np.random.default_rng([seed, 3, source, epoch, lane, window])
                shuffled += [part[i] for i in rng.permutation(len(part))]
            stretches.append(iter(shuffled))
        found += [next(stretches[lane]) for lane in mine]
    return found


@pytest.mark.parametrize(
    ("sizes", "batch_size", "weights", "source"),
    [
        ([7, 5, 1, 9], 4, (1.0,), 0),
        ([50, 33, 41], 100, (1.0,), 0),
        ([3000, 2500, 1], 96, (1.0,), 0),
        ([13, 8, 30], 24, (0.3, 0.7), 0),
        ([113, 88, 30], 130, (1.0, 2.0, 4.0), 1),
        ([40, 61], 16, (0.01, 1.0), 0),
    ],
)
def test_the_order_is_the_one_described(sizes, batch_size, weights, source):
    expected = by_hand(sizes, batch_size, epochs=3, seed=5, weights=weights, source=source)
    mixture, order = make(sizes, batch_size, seed=5, weights=weights, source=source)
    found, step = [], 0
    while len(found) < len(expected):
        found += places(order, mixture, source, [step])[0]
        step += 1
    assert found[: len(expected)] == expected


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=6).filter(sum),
    batch_size=st.integers(2, 150),
    weights=WEIGHTS,
    seed=st.integers(0, 2**31),
)
def test_every_epoch_takes_every_pair_once(sizes, batch_size, weights, seed):
    mixture, order = make(sizes, batch_size, seed=seed, weights=weights)
    found, step = [], 0
    while len(found) < 2 * sum(sizes) and step < 400:
        found += places(order, mixture, 0, [step])[0]
        step += 1
    everything = sorted((s, p) for s, size in enumerate(sizes) for p in range(size))
    for epoch in range(len(found) // sum(sizes)):
        assert sorted(found[epoch * sum(sizes) : (epoch + 1) * sum(sizes)]) == everything


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS, batch_size=st.integers(2, 300))
def test_each_source_stays_within_one_pair_of_its_share(weights, batch_size):
    mixture = Mixture(weights, batch_size)
    drawn = np.stack([mixture.drawn(step) for step in range(2 * WINDOW_STEPS + 1)])
    steps = np.arange(len(drawn))
    assert (drawn.sum(axis=1) == steps * batch_size).all()
    assert (np.diff(drawn, axis=0) >= 0).all()
    share = np.outer(steps, mixture.per_window / WINDOW_STEPS)
    assert np.abs(drawn - share).max() < 1
    exact = np.asarray(weights) / sum(weights) * batch_size * WINDOW_STEPS
    assert np.abs(mixture.per_window - exact).max() < 1
    assert (drawn[WINDOW_STEPS] == mixture.per_window).all()


def test_stated_weights_are_exact_where_a_window_can_hold_them():
    mixture = Mixture([0.3, 0.5, 0.2], 16)
    assert mixture.drawn(WINDOW_STEPS).tolist() == [4800, 8000, 3200]
    assert mixture.drawn(7 * WINDOW_STEPS).tolist() == [33600, 56000, 22400]


def test_the_sources_of_a_batch_are_evenly_interleaved():
    sources, draws = Mixture([3, 1], 16).rows(2)
    assert sources.tolist() == [0, 0, 1, 0] * 4  # so each of 4 processes has its share of each
    assert draws[sources == 0].tolist() == list(range(24, 36))
    assert draws[sources == 1].tolist() == list(range(8, 12))


def test_a_process_reads_few_shards_at_a_time():
    sizes = [1000] * 400  # 400,000 pairs
    mixture, order = make(sizes, 1024)
    for rank in (0, 3):  # of 8, each with 128 rows: 4 lanes
        rows = slice(rank * 128, (rank + 1) * 128)
        shards = set()
        for step in range(40):  # 40 steps of 32 rows stay within one window of a lane or two
            shards |= set(order.places(step, mixture.rows(step)[1][rows])[0].tolist())
        assert len(shards) <= 4 * 4


def test_a_lane_reads_its_stretch_window_by_window():
    _, order = make([5000, 7000], 32)  # one lane
    draws = np.arange(12_000)
    position = {}
    for step in range(12_000 // 32):
        here = draws[step * 32 : (step + 1) * 32]
        shards, pairs = order.places(step, here)
        for draw, shard, pair in zip(here, shards, pairs, strict=True):
            position[draw] = (int(shard), int(pair))
    for window in range(12_000 // SHUFFLE_WINDOW):
        taken = sorted(position[d] for d in draws[window * 2048 : (window + 1) * 2048])
        gaps = sum(b != (a[0], a[1] + 1) for a, b in pairwise(taken))
        assert gaps <= 2  # the border of two shards, and the end joined to the beginning


def test_what_will_be_read_is_told_once_and_before_it_is_read():
    mixture, order = make([3000, 2500, 700], 64)
    told = set()
    for step in range(150):
        shards, pairs = order.places(step, mixture.rows(step)[1])
        for run in order.take_ahead():
            told |= {(run.shard, pair) for pair in range(run.first, run.past)}
        assert order.take_ahead() == []
        assert set(zip(shards.tolist(), pairs.tolist(), strict=True)) <= told


def test_two_epochs_two_seeds_and_two_sources_differ():
    def first_epoch(**changes):
        mixture, order = make([40, 24], 16, weights=(1.0, 1.0), **changes)
        return [
            p for step in places(order, mixture, changes.get("source", 0), range(16)) for p in step
        ]

    plain = first_epoch()
    assert plain[:64] != plain[64:]
    assert sorted(plain[:64]) == sorted(plain[64:])
    assert plain != first_epoch(seed=1)
    assert plain != first_epoch(source=1)


def test_any_two_pairs_meet_in_a_batch_equally_often():
    """Neighbours in a shard are no more often negatives of each other than strangers are."""
    mixture, order = make([64, 64], 64)  # two lanes
    near = far = 0
    for epoch in range(600):
        for step in (2 * epoch, 2 * epoch + 1):
            shards, pairs = order.places(step, mixture.rows(step)[1])
            batch = set(zip(shards.tolist(), pairs.tolist(), strict=True))
            near += {(0, 10), (0, 11)} <= batch
            far += {(0, 10), (1, 30)} <= batch
    # 600 epochs, chance 1/2 each: 300 with standard deviation 12
    assert 250 < near < 350
    assert 250 < far < 350


def test_resampled_draws_shards_with_replacement():
    mixture, order = make([10] * 30, 30, resampled=True)
    found = [p for step in places(order, mixture, 0, range(10)) for p in step]
    missing = 300 - len(set(found))
    assert 60 < missing < 160  # about 300 / e
    again = make([10] * 30, 30, resampled=True)
    assert found == [p for step in places(again[1], again[0], 0, range(10)) for p in step]


def test_steps_may_come_in_any_order():
    sizes, batch_size = [300, 211, 97], 80
    mixture, order = make(sizes, batch_size)
    forward = places(order, mixture, 0, range(40))
    for step in (39, 3, 22, 7, 8, 38, 0):
        assert places(order, mixture, 0, [step])[0] == forward[step]


def test_a_late_step_of_a_long_run_is_found_at_once():
    mixture, order = make([1000] * 50, 4096, weights=(1.0, 2.0))
    sources, draws = mixture.rows(10**9)
    shards, pairs = order.places(10**9, draws[sources == 0])
    assert len(set(zip(shards.tolist(), pairs.tolist(), strict=True))) == len(pairs)
