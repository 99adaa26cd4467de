"""Where every rank stands: groups of ranks, and inside a group a grid of R rows and C columns.

Pure arithmetic. Images are gathered along a rank's row (C ranks), texts along its column (R ranks),
so that rank (r, c) can compare C batches of images with R batches of texts, and the blocks of all
ranks tile the whole similarity matrix of the group. A group alone is the paper's grouped
aggregation (M2-Encoder, arXiv 2401.15896). Not for communication (collectives.py).
"""

import os
from dataclasses import dataclass

from m2encoder.errors import PlacementError


@dataclass(frozen=True)
class Placement:
    """A rank's place; row, column, and the ranks that it shares them with, in ring order."""

    rank: int
    world_size: int
    rows: int
    """R, ranks along a column."""
    columns: int
    """C, ranks along a row."""
    row: int
    column: int
    row_ranks: tuple[int, ...]
    """The C ranks of this rank's row; images are gathered among them."""
    column_ranks: tuple[int, ...]
    """The R ranks of this rank's column; texts are gathered among them."""

    @property
    def group_ranks(self) -> int:
        """Ranks that share negatives."""
        return self.rows * self.columns

    def feature_bytes(self, batch: int, dim: int, *, wire: int = 4, gradient: int = 4) -> int:
        """Bytes of features and of their gradients that this rank sends per step.

        (R + C - 2) * batch * dim * (wire + gradient): with 4-byte numbers both ways the
        2 (R + C - 2) b d s that stands everywhere. The vectors that travel beside them have no dim.
        """
        return (self.rows + self.columns - 2) * batch * dim * (wire + gradient)


def place(
    rank: int,
    world_size: int,
    *,
    grid: str = "auto",
    group_ranks: int | None = None,
    ranks_per_node: int | None = None,
) -> Placement:
    """Return where `rank` stands.

    grid: `RxC` (R rows, C columns, R * C the ranks of a group), or `auto`: the shape that sends
    least over the links between nodes. A node's ranks form a rectangle a x c of the grid, out of
    which it takes in a (C - c) batches of images and c (R - a) of texts; among equals the squarest
    shape wins, then the wider one, because texts in two languages travel along columns.
    group_ranks: ranks that share negatives, consecutive ones; None means all.
    ranks_per_node: by default what torchrun says, else all ranks on one node.
    Raises PlacementError with both numbers where they do not fit.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise PlacementError(
            f"rank {rank} of world_size {world_size}, expected 0 to {world_size}-1"
        )
    size = world_size if group_ranks is None else group_ranks
    if size < 1 or world_size % size:
        raise PlacementError(
            f"group_ranks {size} does not divide world_size {world_size}; expected a divisor"
        )
    node = ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    node = min(node, size) if size % min(node, size) == 0 else 1
    shapes = _factors(size) if grid == "auto" else [_parse(grid, size)]
    candidates = [
        (a * (columns - c) + c * (rows - a), rows + columns, rows, columns, a, c)
        for rows, columns in shapes
        for a, c in _factors(node)
        if rows % a == 0 and columns % c == 0
    ]  # an explicit grid may hold no rectangle of a whole node: then ranks stand in plain order
    *_, rows, columns, a, c = min(candidates or [(0, 0, *shapes[0], 1, 1)])
    first = rank - rank % size
    table: dict[tuple[int, int], int] = {}
    for member in range(size):
        node_idx, local = divmod(member, a * c)
        node_row, node_column = divmod(node_idx, columns // c)
        local_row, local_column = divmod(local, c)
        table[node_row * a + local_row, node_column * c + local_column] = first + member
    (row, column) = next(where for where, member in table.items() if member == rank)
    return Placement(
        rank,
        world_size,
        rows,
        columns,
        row,
        column,
        tuple(table[row, i] for i in range(columns)),
        tuple(table[i, column] for i in range(rows)),
    )


def _factors(size: int) -> list[tuple[int, int]]:
    return [(a, size // a) for a in range(1, size + 1) if size % a == 0]


def _parse(grid: str, size: int) -> tuple[int, int]:
    words = grid.lower().split("x")
    if len(words) != 2 or not all(word.strip().isdecimal() for word in words):
        raise PlacementError(f"grid is {grid!r}, expected auto or RxC, for example 2x4")
    rows, columns = (int(word) for word in words)
    if rows * columns != size:
        raise PlacementError(
            f"grid {rows}x{columns} has {rows * columns} places, expected {size}: as many as ranks "
            f"share negatives"
        )
    return rows, columns
