"""Where ranks stand: every shape is a partition, and `auto` sends least between nodes."""

from itertools import product

import pytest

from m2encoder.errors import PlacementError
from m2encoder.grid import place


def world(world_size, **options):
    return [place(rank, world_size, **options) for rank in range(world_size)]


@pytest.mark.parametrize("node", [1, 2, 4, 8, None])
@pytest.mark.parametrize(
    ("world_size", "options"),
    [(1, {}), (2, {}), (8, {}), (8, {"grid": "4x2"}), (8, {"group_ranks": 4}), (12, {}), (24, {})]
    + [(16, {"grid": grid, "group_ranks": size}) for grid, size in (("2x2", 4), ("1x8", 8))],
)
def test_rows_and_columns_of_all_ranks_meet_in_each_rank_once(world_size, options, node):
    places = world(world_size, ranks_per_node=node, **options)
    for rank, here in enumerate(places):
        first = rank - rank % here.group_ranks
        group = set(range(first, first + here.group_ranks))
        assert here.row_ranks[here.column] == here.column_ranks[here.row] == rank
        assert len(here.row_ranks) == here.columns
        assert len(here.column_ranks) == here.rows
        assert all(places[other].row_ranks == here.row_ranks for other in here.row_ranks)
        assert all(places[other].column_ranks == here.column_ranks for other in here.column_ranks)
        # a block holds the images of the row and the texts of the column; together: every pair once
        members = [places[other] for other in group]
        met = [pair for m in members for pair in product(m.row_ranks, m.column_ranks)]
        assert sorted(met) == sorted(product(group, group))


@pytest.mark.parametrize(
    ("world_size", "shape"),
    [(1, (1, 1)), (2, (1, 2)), (4, (2, 2)), (6, (2, 3)), (8, (2, 4)), (16, (4, 4)), (7, (1, 7))],
)
def test_auto_is_the_squarest_shape_and_then_the_wider_one(world_size, shape):
    here = place(0, world_size)
    assert (here.rows, here.columns) == shape


def batches_taken_in(here, node):
    """Batches of features that cross into this rank's node on its behalf, both sides."""
    return sum(other // node != here.rank // node for other in here.row_ranks + here.column_ranks)


@pytest.mark.parametrize(("world_size", "node"), [(8, 2), (8, 4), (16, 4), (32, 8), (64, 8)])
def test_auto_takes_in_least_from_other_nodes(world_size, node):
    def taken(**options):
        places = world(world_size, ranks_per_node=node, **options)
        unique = {
            (side, here.rank // node, other)
            for here in places
            for side, ranks in (("image", here.row_ranks), ("text", here.column_ranks))
            for other in ranks
            if other // node != here.rank // node
        }
        return len(unique)

    shapes = [(a, world_size // a) for a in range(1, world_size + 1) if world_size % a == 0]
    assert taken() == min(taken(grid=f"{a}x{b}") for a, b in shapes)


def test_torchrun_says_how_many_ranks_share_a_node(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert place(5, 16) == place(5, 16, ranks_per_node=4)
    assert place(5, 16) != place(5, 16, ranks_per_node=16)


def test_feature_bytes_are_those_of_the_formula():
    here = place(3, 8, grid="2x4")
    assert here.feature_bytes(256, 512) == 2 * (2 + 4 - 2) * 256 * 512 * 4
    assert here.feature_bytes(256, 512, wire=2) == (2 + 4 - 2) * 256 * 512 * (2 + 4)
    assert place(0, 1).feature_bytes(256, 512) == 0


@pytest.mark.parametrize(
    ("rank", "world_size", "options", "message"),
    [
        (0, 8, {"grid": "3x3"}, "grid 3x3 has 9 places, expected 8: as many as ranks share neg"),
        (0, 8, {"grid": "八"}, "grid is '八', expected auto or RxC, for example 2x4"),
        (0, 8, {"group_ranks": 3}, "group_ranks 3 does not divide world_size 8; expected a div"),
        (8, 8, {}, "rank 8 of world_size 8, expected 0 to 8-1"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_numbers(rank, world_size, options, message):
    with pytest.raises(PlacementError) as refusal:
        place(rank, world_size, **options)
    assert str(refusal.value).startswith(message)
