"""The loss across real processes: every placement gives what one process with one matrix gives.

Gradients follow data-parallel averaging: a rank's features have W times the reference's gradient,
and the mean over ranks of that of logit_scale and logit_bias is the reference's. Float64, so that
1e-9 leaves nothing but rounding. Several terms: test_loss_terms.py. Bytes: test_measure.py.
"""

import math
from typing import NamedTuple

import pytest
import torch
from dense_loss import info_nce, relative_error, sigmoid, unit_rows

from m2encoder.errors import FeatureError
from m2encoder.loss import make_loss

EXACT = 1e-9
DIM, SCALE, BIAS = 9, 7.3, -3.1
KINDS = ("infonce", "sigmoid")
GRIDS = {
    1: ("auto", "1x1"),
    2: ("auto", "1x2", "2x1"),
    4: ("auto", "1x4", "2x2", "4x1"),
    8: ("auto", "1x8", "2x4", "4x2", "8x1"),
}


class Found(NamedTuple):
    """What one rank found in one case, beside what one process would."""

    loss: float
    loss_error: float
    feature_error: float
    """The larger one of both sides; the reference times W."""
    numbers: list[float]
    """Gradients of logit_scale and logit_bias, by the reference's."""


def whole_batch(rows, *, dtype=torch.float64):
    return [unit_rows(rows, DIM, seed=seed, dtype=dtype) for seed in (1, 2)]


def dense(kind, sides, numbers, group_rows):
    """The loss in one process, and its gradients: each group by itself, each pair counts once."""
    leaves = [x.clone().requires_grad_() for x in (*sides, *numbers)]
    image, text, *rest = leaves
    reference = info_nce if kind == "infonce" else sigmoid
    parts = zip(image.split(group_rows), text.split(group_rows), strict=True)
    sums = [len(a) * reference(a, b, *rest) for a, b in parts if len(a)]
    total = torch.stack(sums).sum() if sums else image.sum()
    loss = total / max(1, len(image)) + 0.0 * sum(x.sum() for x in leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def compare(rank, world_size, batches, kind, **options):
    """Compute the loss of this rank's share of a batch, and set it beside the dense one."""
    loss_fn = make_loss(rank=rank, world_size=world_size, kind=kind, **options)
    numbers = [torch.tensor(SCALE, dtype=torch.float64), torch.tensor(BIAS, dtype=torch.float64)]
    numbers = numbers[: 1 if kind == "infonce" else 2]
    sides = whole_batch(sum(batches))
    size = loss_fn.placement.group_ranks
    group_rows = [sum(batches[at : at + size]) for at in range(0, world_size, size)]
    expected = dense(kind, sides, numbers, group_rows)
    mine = [x.split(batches)[rank] for x in sides]
    leaves = [x.clone().requires_grad_() for x in (*mine, *numbers)]
    loss = loss_fn(*leaves)
    found = torch.autograd.grad(loss, leaves)
    references = [world_size * x.split(batches)[rank] for x in expected[1:3]]
    return Found(
        loss.item(),
        relative_error(loss.detach(), expected[0]),
        max(relative_error(x, y) for x, y in zip(found[:2], references, strict=True)),
        [(x / y).item() for x, y in zip(found[2:], expected[3:], strict=True)],
    )


def compare_all(rank, world_size, cases):
    """One Found per (batches, kind, options)."""
    return [compare(rank, world_size, *case[:2], **case[2]) for case in cases]


def wrong_cases(pool, cases):
    """The cases in which a rank is off, with what it found; expected to be none."""
    wrong = {}
    for case, *ranks in zip(cases, *pool.run(compare_all, cases), strict=True):
        by_number = zip(*(found.numbers for found in ranks), strict=True)
        ratios = [sum(ratios) / len(ratios) for ratios in by_number]
        errors = [e for found in ranks for e in (found.loss_error, found.feature_error)]
        errors += [abs(ratio - 1) for ratio in ratios]
        one_value = len({found.loss for found in ranks}) == 1
        if not (one_value and all(error < EXACT for error in errors)):  # nan is wrong too
            wrong[str(case)] = ranks
    return wrong


# --- the whole batch ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world_size", "grid"), [(w, g) for w in GRIDS for g in GRIDS[w]])
def test_every_grid_gives_the_full_batch_loss_and_gradients(gloo, world_size, grid, kind):
    tiles = (5, 64, None) if world_size < 8 else (5, None)
    cases = [((6,) * world_size, kind, {"grid": grid, "tile": tile}) for tile in tiles]
    assert wrong_cases(gloo(world_size), cases) == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "batches",
    [(0, 6), (5, 2), (0, 0), (3, 7, 1, 5), (4, 0, 2, 5), (0, 0, 3, 0), (0, 0, 0, 0)],
)
def test_unequal_batches_are_one_batch(gloo, batches, kind):
    cases = [(batches, kind, {"grid": grid, "tile": 3}) for grid in GRIDS[len(batches)]]
    if not sum(batches):  # 0 / 0: no gradient of the scale to compare with
        for ranks in zip(*gloo(len(batches)).run(compare_all, cases), strict=True):
            assert {found[:3] for found in ranks} == {(0.0, 0.0, 0.0)}
    elif sum(batches) == max(batches) and kind == "infonce" and max(batches) == 1:
        pytest.fail("a single pair has no gradient to compare")
    else:
        assert wrong_cases(gloo(len(batches)), cases) == {}


def test_unequal_batches_of_eight_processes_are_one_batch(gloo):
    cases = [((3, 0, 5, 1, 2, 2, 7, 4), kind, {"grid": "2x4"}) for kind in KINDS]
    assert wrong_cases(gloo(8), cases) == {}


# --- groups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_all_ranks_is_the_full_loss(gloo, kind):
    cases = [((5,) * 4, kind, {"group_ranks": 4, "grid": grid}) for grid in GRIDS[4]]
    assert wrong_cases(gloo(4), cases) == {}
    (by_group,), (full,) = (
        gloo(4).run(compare_all, [((5,) * 4, kind, options)])[0]
        for options in ({"group_ranks": 4}, {})
    )
    assert by_group.loss == full.loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("world_size", "group_ranks", "grid"),
    [
        (2, 1, "auto"),
        (4, 1, "auto"),
        (4, 2, "auto"),
        (4, 2, "2x1"),
        (8, 2, "1x2"),
        (8, 4, "2x2"),
        (8, 4, "4x1"),
    ],
)
def test_smaller_groups_are_the_mean_of_their_own_losses(gloo, world_size, group_ranks, grid, kind):
    options = {"group_ranks": group_ranks, "grid": grid, "tile": 7}
    assert wrong_cases(gloo(world_size), [((6,) * world_size, kind, options)]) == {}


def test_every_pair_counts_the_same_in_groups_of_unequal_batches(gloo):
    cases = [
        ((3, 7, 0, 2), kind, {"group_ranks": 2, "grid": grid})
        for kind in KINDS
        for grid in ("1x2", "2x1")
    ]
    assert wrong_cases(gloo(4), cases) == {}


# --- towers, precision --------------------------------------------------------------------------


def train_two_towers(rank, world_size):
    """One backward pass through DistributedDataParallel; returns the largest error."""
    from torch import nn
    from torch.nn.functional import normalize
    from torch.nn.parallel import DistributedDataParallel

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.image, self.text = (nn.Linear(7, DIM, dtype=torch.float64) for _ in range(2))
            self.log_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, x, y):
            sides = (normalize(tower(z)) for tower, z in ((self.image, x), (self.text, y)))
            return *sides, self.log_scale.exp()

    alone, wrapped = Towers(), DistributedDataParallel(Towers())
    x, y = (unit_rows(5 * world_size, 7, seed=seed) for seed in (3, 4))
    here = slice(5 * rank, 5 * rank + 5)
    info_nce(*alone(x, y)).backward()
    make_loss(rank=rank, world_size=world_size)(*wrapped(x[here], y[here])).backward()
    pairs = zip(wrapped.module.parameters(), alone.parameters(), strict=True)
    found = [(ours.grad, theirs.grad) for ours, theirs in pairs]
    return max(relative_error(x, y) for x, y in found if x is not None and y is not None)


@pytest.mark.parametrize("world_size", [2, 4])
def test_data_parallel_towers_get_the_gradients_of_one_process(gloo, world_size):
    assert max(gloo(world_size).run(train_two_towers)) < EXACT


def value_without_gradient(rank, world_size):
    image, text = [x.chunk(world_size)[rank] for x in whole_batch(6 * world_size)]
    with torch.no_grad():
        return make_loss(rank=rank, world_size=world_size)(image, text, SCALE).item()


def test_no_grad_gives_the_same_value(gloo):
    image, text = whole_batch(24)
    expected = info_nce(image, text, SCALE).item()
    assert gloo(4).run(value_without_gradient) == [pytest.approx(expected, rel=1e-12)] * 4


def wire_error(rank, world_size, wire_dtype, feature_dtype, scale):
    """Error of the loss, relative error of the gradient; against float64 of the same features."""
    width, options = 64, {"grid": "2x2", "wire_dtype": wire_dtype}
    sides = [unit_rows(4 * 48, width, seed=seed) for seed in (1, 2)]
    sides = [sides[0], sides[0] + 3 * sides[1]]  # loss above 0.1 even at scale 100
    sides = [torch.nn.functional.normalize(x, dim=1).to(feature_dtype) for x in sides]
    expected = dense("infonce", [x.double() for x in sides], [torch.tensor(scale)], len(sides[0]))
    leaves = [x.chunk(world_size)[rank].clone().requires_grad_() for x in sides]
    loss = make_loss(rank=rank, world_size=world_size, **options)(leaves[0], leaves[1], scale)
    gradient = torch.autograd.grad(loss, leaves[0])[0]
    assert gradient.dtype == feature_dtype
    reference = world_size * expected[1].chunk(world_size)[rank]
    return (loss.double() - expected[0]).abs().item(), relative_error(gradient, reference)


@pytest.mark.parametrize(("wire_dtype", "digit"), [("bfloat16", 2**-8), ("float16", 2**-11)])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_a_narrow_wire_costs_only_the_digits_it_lacks(gloo, wire_dtype, digit, scale):
    for loss_error, gradient_error in gloo(4).run(wire_error, wire_dtype, torch.float32, scale):
        # each side of a cosine is off by half a digit at most, and so is a logit by scale times it
        assert loss_error < scale * digit
        assert 1e-5 < gradient_error < scale * digit  # it did round


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_travel_as_they_are(gloo, dtype):
    for loss_error, gradient_error in gloo(4).run(wire_error, "float32", dtype, 14.3):
        assert loss_error < 1e-6
        assert gradient_error < (4e-3 if dtype == torch.bfloat16 else 1e-3)  # its own dtype's


# --- mistakes -----------------------------------------------------------------------------------


def placement_mistake(rank, world_size, options):
    make_loss(**{"rank": rank, "world_size": world_size} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "3x2"}, "grid 3x2 has 6 places, expected 4: as many as ranks share negatives"),
        (
            {"grid": "2x2", "group_ranks": 2},
            "grid 2x2 has 4 places, expected 2: as many as ranks share negatives",
        ),
        ({"grid": "4"}, "grid is '4', expected auto or RxC, for example 2x4"),
        ({"group_ranks": 3}, "group_ranks 3 does not divide world_size 4; expected a divisor"),
        ({"group_ranks": "8"}, "group_ranks 8 does not divide world_size 4; expected a divisor"),
        ({"kind": "hinge"}, "kind is 'hinge', expected one of infonce, sigmoid"),
        ({"wire_dtype": "fp8"}, "wire_dtype is 'fp8', expected one of float32, float16, bfloat16"),
        ({"rank": 4}, "rank 4 of world_size 4, expected 0 to 4-1"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused_everywhere(gloo, options, message):
    assert gloo(4).errors(placement_mistake, options) == [("PlacementError", message)] * 4
    assert wrong_cases(gloo(4), [((2,) * 4, "infonce", {})]) == {}


def turned_ranks(rank, world_size):
    make_loss(rank=(rank + 1) % world_size, world_size=world_size)


def test_another_rank_than_that_of_torch_distributed_is_refused(gloo):
    assert gloo(2).errors(turned_ranks) == [
        (
            "PlacementError",
            f"rank {1 - rank} of world_size 2 asked for, but torch.distributed runs as rank {rank} "
            f"of 2",
        )
        for rank in range(2)
    ]


def feature_mistake(rank, world_size, grid, at_rank, mistake):
    """Call the loss with a mistake on one rank."""
    image, text = (x.chunk(world_size)[rank].clone() for x in whole_batch(5 * world_size))
    scale = SCALE
    if rank == at_rank:
        match mistake:
            case "nan":
                text[2, 1] = math.nan
            case "inf":
                image[4] = math.inf
            case "rows":
                text = text[:3]
            case "width":
                image, text = image[:, :7], text[:, :7]
            case "text width":
                text = text[:, :7]
            case "dtype":
                image, text = image.float(), text.float()
            case "text dtype":
                text = text.half()
            case "vector":
                image = image[0]
            case "negative scale":
                scale = -SCALE
            case "no scale":
                scale = math.nan
            case "own scale":
                scale = SCALE + 0.5
    make_loss(rank=rank, world_size=world_size, grid=grid)(image, text, scale)


FEATURE_MISTAKES = {
    "nan": "row 2 of text_features is not finite; look at that sample, or lower the learning rate",
    "inf": "row 4 of image_features is not finite; look at that sample, or lower the learning rate",
    "rows": "image_features are (5, 9) float64, text_features (3, 9) float64; expected the same",
    "width": "image_features are (5, 7) float64, on rank 0 (5, 9) float64; expected the same width "
    "and dtype",
    "text width": "image_features are (5, 9) float64, text_features (5, 7) float64; expected the "
    "same",
    "dtype": "image_features are (5, 9) float32, on rank 0 (5, 9) float64; expected the same width "
    "and dtype",
    "text dtype": "image_features are (5, 9) float64, text_features (5, 9) float16; expected the "
    "same",
    "vector": "image_features has 1 dimensions, expected (b, d)",
    "negative scale": "logit_scale is -7.3, expected a finite number > 0 (1 / temperature, not its "
    "logarithm)",
    "no scale": "logit_scale is nan, expected a finite number > 0 (1 / temperature, not its "
    "logarithm)",
    "own scale": "logit_scale is 7.8, on rank 0 7.3; ranks train different models",
}


@pytest.mark.parametrize("mistake", FEATURE_MISTAKES)
@pytest.mark.parametrize(("world_size", "grid", "at_rank"), [(2, "1x2", 1), (4, "2x2", 2)])
def test_a_mistake_on_one_rank_is_the_same_error_on_all(gloo, world_size, grid, at_rank, mistake):
    pool = gloo(world_size)
    message = f"rank {at_rank}: {FEATURE_MISTAKES[mistake]}"
    found = pool.errors(feature_mistake, grid, at_rank, mistake)
    assert found == [("FeatureError", message)] * world_size
    assert wrong_cases(pool, [((2,) * world_size, "infonce", {"grid": grid})]) == {}


def who_is_to_blame(rank, world_size):
    try:
        feature_mistake(rank, world_size, "2x2", 3, "nan")
    except FeatureError as error:
        return error.rank, error.row


def test_every_rank_knows_which_row_of_which_rank_is_to_blame(gloo):
    assert gloo(4).run(who_is_to_blame) == [(3, 2)] * 4
