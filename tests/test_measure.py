"""What the loss costs: counted bytes against the formula, peak memory against the tile."""

import pytest
import torch
import torch.distributed as dist
from dense_loss import unit_rows

from m2encoder.loss import MISSING, make_loss
from m2encoder.measure import SentBytes, peak_allocated_bytes

BATCH, DIM = 32, 512
SIZES = {2: ("1x2", "2x1"), 4: ("2x2", "1x4"), 8: ("2x4", "4x2")}


def sent_in_a_step(rank, world_size, batch, options, terms=False):
    """Bytes that forward and backward send, and what the formula says of the features."""
    loss_fn = make_loss(rank=rank, world_size=world_size, **options)
    sides = [
        unit_rows(batch, DIM, seed=seed, dtype=torch.float32).requires_grad_() for seed in (1, 2)
    ]
    with SentBytes() as sent:
        if terms:
            tags = {"text": torch.arange(batch).masked_fill(torch.arange(batch) == 1, MISSING)}
            named: dict[str, torch.Tensor] = dict(zip(("image", "text"), sides, strict=True))
            loss_fn.terms(named, [("image", "text")], 10.0, tags=tags).losses.sum().backward()
        else:
            loss_fn(sides[0], sides[1], 10.0).backward()
    wire = getattr(torch, options.get("wire_dtype", "float32")).itemsize
    return sent.total, loss_fn.placement.feature_bytes(batch, DIM, wire=wire)


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize(("world_size", "grid"), [(w, grid) for w in SIZES for grid in SIZES[w]])
def test_bytes_are_those_of_the_features_and_a_few_small_vectors(gloo, world_size, grid, kind):
    for sent, formula in gloo(world_size).run(sent_in_a_step, BATCH, {"grid": grid, "kind": kind}):
        rows, columns = (int(n) for n in grid.split("x"))
        # per axis: log-sum-exp, largest and positives of a batch's queries to and fro, in float32
        vectors = 4 * 4 * BATCH * (rows + columns - 2)
        header = 200 * world_size
        assert formula <= sent <= 1.03 * formula + vectors + header
        assert sent <= 1.05 * formula  # small indeed


def test_half_precision_on_the_wire_saves_a_quarter_and_groups_the_most(gloo):
    pool = gloo(4)
    full, half, group, alone = (
        pool.run(sent_in_a_step, BATCH, options)[0][0]
        for options in (
            {},
            {"wire_dtype": "bfloat16"},
            {"group_ranks": 2},
            {"group_ranks": 1},
        )
    )
    assert half / full == pytest.approx(0.75, abs=0.02)
    assert group / full == pytest.approx(0.5, abs=0.02)
    assert alone < 0.01 * full


def test_masks_cost_a_few_small_vectors(gloo):
    (plain, formula), *_ = gloo(4).run(sent_in_a_step, BATCH, {})
    (masked, _), *_ = gloo(4).run(sent_in_a_step, BATCH, {}, True)
    assert plain < masked < plain + 0.02 * formula


def bytes_of_collectives(rank, world_size):
    x = torch.zeros(world_size * 6)  # 24 bytes per rank
    parts = list(torch.zeros(world_size, 6).unbind())
    calls = {
        "all_reduce": lambda: dist.all_reduce(x),
        "all_gather": lambda: dist.all_gather(parts, parts[0]),
        "broadcast": lambda: dist.broadcast(x, src=0),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(x), x),
    }
    found = {}
    for name, call in calls.items():
        with SentBytes() as sent:
            call()
        found[name] = sent.total
    return found


def test_each_collective_counts_as_its_best_algorithm(gloo):
    for found in gloo(4).run(bytes_of_collectives):
        assert found == {"all_reduce": 144, "all_gather": 72, "broadcast": 96, "all_to_all": 72}


def step_of_one_process(rows, tile):
    sides = [unit_rows(rows, 16, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2)]
    loss_fn = make_loss(rank=0, world_size=1, tile=tile)
    return lambda: loss_fn(sides[0], sides[1], 10.0).backward()


def test_peak_memory_is_independent_of_the_number_of_tiles():
    step_of_one_process(64, 64)()  # what torch allocates once
    few, many = (peak_allocated_bytes(step_of_one_process(rows, 128)) for rows in (512, 2048))
    vectors = 16 * 4 * 4  # of one more row: both sides and their gradients
    # 16 tiles and 256: beside vectors that grow with the batch there is no more than one tile
    assert many - few < 2 * vectors * (2048 - 512)
    whole = peak_allocated_bytes(step_of_one_process(2048, 2048))
    assert whole > many + 2048 * 2048 * 4 * 0.9


def test_peak_memory_counts_what_lives_at_once():
    def work():
        a = torch.zeros(1000, dtype=torch.float32)
        del a
        b, c = torch.zeros(2000), torch.zeros(500)
        return b.sum() + c.sum()

    assert 10_000 <= peak_allocated_bytes(work) <= 10_400
