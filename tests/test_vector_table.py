"""How a list is cut into batches, and the batches into shares of ranks: all of it, once, evenly."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2encoder.distributed import World
from m2encoder.vector_table import BAD, MISSING, TRUNCATED, WHOLE, Span, VectorTable, cut, runs
from m2encoder.vector_work import share_of

COUNTS = st.integers(0, 3000)
SIZES = st.integers(1, 200)


@given(COUNTS, SIZES, st.booleans())
def test_a_cut_covers_every_row_once_in_order(count, size, fine_tail):
    spans = cut(count, size, fine_tail=fine_tail)
    assert [row for span in spans for row in range(*span)] == list(range(count))
    assert all(1 <= len(span) <= size for span in spans)


@given(COUNTS, SIZES)
def test_a_plain_cut_has_the_fewest_batches(count, size):
    assert len(cut(count, size, fine_tail=False)) == -(-count // size)


def test_a_fine_tail_ends_in_small_batches():
    sizes = [len(span) for span in cut(200, 8, fine_tail=True)]
    assert sizes[:22] == [8] * 22
    assert sizes[22:] == [6, 5, 4, 3, 2, 1, 1, 1, 1]


@given(COUNTS, SIZES, st.integers(1, 9), st.randoms())
def test_shares_cover_what_is_missing_and_are_even(count, size, world_size, random):
    spans = [span for span in cut(count, size, fine_tail=True) if random.random() < 0.7]
    shares = [share_of(spans, World(rank, world_size)) for rank in range(world_size)]
    assert [span for share in shares for span in share] == spans
    rows = [sum(map(len, share)) for share in shares]
    assert max(rows) - sum(rows) / world_size <= size


@given(st.sets(st.integers(0, 60)))
def test_runs_join_neighbours_and_nothing_else(chosen):
    spans = [span for i, span in enumerate(cut(200, 3, fine_tail=False)) if i in chosen]
    joined = list(runs(spans))
    assert [row for span in joined for row in range(*span)] == [
        row for span in spans for row in range(*span)
    ]
    assert all(a.last < b.first for a, b in pairwise(joined))


def test_a_cut_into_nothing_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        cut(5, 0, fine_tail=True)


def test_a_table_knows_what_is_there_truncated_and_bad():
    table = VectorTable(5, 2)
    table.vectors[:] = 1
    table.states[:4] = [WHOLE, TRUNCATED, MISSING, WHOLE]
    table.set_bad(3, "坏图 👎")
    assert (table.kept.tolist(), table.truncated, len(table)) == ([0, 1], 1, 5)
    assert [table.has(Span(0, 2)), table.has(Span(1, 3)), table.has(Span(3, 4))] == [1, 0, 1]
    assert table.reasons_in(Span(2, 4)) == {3: "坏图 👎"}
    assert table.states[3] == BAD
    np.testing.assert_array_equal(table.vectors[3], [0, 0])
    table.forget(Span(3, 5))
    assert (table.reasons, table.has(Span(3, 4))) == ({}, False)
