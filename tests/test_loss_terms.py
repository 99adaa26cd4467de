"""Several comparisons of one batch: missing rows, rows that are no negatives, accuracies.

Held to a dense matrix with the same masks, gradients included, in one process and in several.
"""

from typing import NamedTuple

import pytest
import torch
from dense_loss import accuracy, masked, relative_error, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from m2encoder.loss import MISSING, make_loss

EXACT = 1e-9
DIM, SCALE, BIAS = 6, 8.1, -2.3
PAIRS = (("image", "zh"), ("image", "en"), ("zh", "en"))
WEIGHTS = (0.3, 2.0, 0.7)
KINDS = ("infonce", "sigmoid")


class Terms(NamedTuple):
    """What terms gave, and the gradients of their weighted sum."""

    losses: torch.Tensor
    accuracies: torch.Tensor
    counts: list[int]
    gradients: list[torch.Tensor]
    """Of image, zh, en, scale and, for sigmoid, bias."""


def random_batch(rows, *, seed, missing=0.3, texts=4):
    """Sides and tags: few different texts, so that many are the same, and some are missing."""
    generator = torch.Generator().manual_seed(seed)
    names = ("image", "zh", "en")
    sides = {name: unit_rows(rows, DIM, seed=seed + i) for i, name in enumerate(names)}
    tags = {}
    for language in ("zh", "en"):
        tag = torch.randint(0, texts, (rows,), generator=generator)
        is_missing = torch.rand(rows, generator=generator) < missing
        tags[language] = tag.masked_fill(is_missing, MISSING)
    return sides, tags


def numbers_of(kind):
    values = (SCALE, BIAS) if kind == "sigmoid" else (SCALE,)
    return [torch.tensor(x, dtype=torch.float64) for x in values]


def masks(pair, tags, rows):
    """Which pairs take part in a term, and which entries are no negatives."""
    present, same = torch.ones(rows, dtype=torch.bool), torch.eye(rows, dtype=torch.bool)
    for side in pair:
        if side in tags:
            present &= tags[side] != MISSING
            same |= tags[side][:, None] == tags[side]
    return present, same


def dense_terms(kind, sides, tags, *, groups=1, pairs=PAIRS):
    leaves = [x.clone().requires_grad_() for x in (*sides.values(), *numbers_of(kind))]
    named = dict(zip(sides, leaves, strict=False))
    scale, bias = leaves[3], leaves[4] if kind == "sigmoid" else None
    losses, accuracies, counts = [], [], []
    for pair in pairs:
        present, same = masks(pair, tags, len(leaves[0]))
        options = {"present": present, "same": same, "groups": groups}
        rows, columns = named[pair[0]], named[pair[1]]
        losses.append(masked(rows, columns, scale, bias=bias, **options))
        accuracies.append(accuracy(rows, columns, **options))
        counts.append(int(present.sum()))
    return _finish(torch.stack(losses), torch.tensor(accuracies), counts, leaves)


def _finish(losses, accuracies, counts, leaves):
    weights = torch.tensor(WEIGHTS[: len(losses)], dtype=losses.dtype)
    total = (losses * weights).sum() + 0.0 * sum(x.sum() for x in leaves)
    gradients = list(torch.autograd.grad(total, leaves))
    return Terms(losses.detach(), accuracies, counts, gradients)


def our_terms(loss_fn, sides, tags, *, pairs=PAIRS):
    leaves = [x.clone().requires_grad_() for x in (*sides.values(), *numbers_of(loss_fn.kind))]
    named = dict(zip(sides, leaves, strict=False))
    found = loss_fn.terms(named, pairs, *leaves[3:], tags=tags)
    return _finish(found.losses, found.accuracies, found.counts, leaves)


def assert_same(found, expected, *, limit=EXACT):
    assert found.counts == expected.counts
    torch.testing.assert_close(found.losses, expected.losses, rtol=limit, atol=limit)
    torch.testing.assert_close(found.accuracies, expected.accuracies, rtol=1e-6, atol=0)
    for ours, theirs in zip(found.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit)


# --- in one process -----------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, 30),
    missing=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    texts=st.sampled_from([1, 2, 5, 1000]),
    tile=st.integers(1, 40) | st.none(),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
)
def test_any_masks_equal_a_dense_matrix_with_them(rows, missing, texts, tile, kind, seed):
    sides, tags = random_batch(rows, seed=seed, missing=missing, texts=texts)
    loss_fn = make_loss(rank=0, world_size=1, kind=kind, tile=tile)
    assert_same(our_terms(loss_fn, sides, tags), dense_terms(kind, sides, tags))


def test_masks_worked_by_hand():
    sides = {"image": torch.eye(4), "zh": torch.eye(4)[[0, 1, 1, 3]]}
    tags = {"zh": torch.tensor([11, 22, 22, MISSING])}
    loss_fn = make_loss(rank=0, world_size=1)
    found = loss_fn.terms(sides, [("image", "zh")], 2.0, tags=tags)
    # Pictures 0..2 and their texts; texts 1 and 2 are one sentence, so that no row meets both.
    # Cosines 1 0 0 / 0 1 . / 0 . 0 times 2: every query but those of pair 2 leads by 2.
    lost, even = torch.tensor([-2.0, 0.0]).exp()
    rows = torch.log1p(torch.stack([2 * lost, lost, even]))
    columns = torch.log1p(torch.stack([2 * lost, lost, even]))
    assert found.losses.item() == pytest.approx((rows.sum() + columns.sum()).item() / 6, rel=1e-6)
    assert found.accuracies.item() == pytest.approx(4 / 6)  # a tie is no hit
    assert found.counts == [3]


@pytest.mark.parametrize("kind", KINDS)
def test_without_tags_every_row_is_there_and_different(kind):
    sides, _ = random_batch(9, seed=3)
    tags = {name: torch.arange(9) for name in sides}
    loss_fn = make_loss(rank=0, world_size=1, kind=kind, tile=4)
    assert_same(our_terms(loss_fn, sides, {}), our_terms(loss_fn, sides, tags))
    assert_same(our_terms(loss_fn, sides, {}), dense_terms(kind, sides, {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_missing_has_no_influence_and_no_gradient(kind):
    sides, tags = random_batch(9, seed=5, missing=0)
    tags["zh"][4] = MISSING
    loss_fn = make_loss(rank=0, world_size=1, kind=kind)
    pairs = PAIRS[:1]
    before = our_terms(loss_fn, sides, tags, pairs=pairs)
    assert before.counts == [8]
    assert all(torch.equal(g[4], torch.zeros(DIM, dtype=g.dtype)) for g in before.gradients[:2])
    changed = {name: x.clone() for name, x in sides.items()}
    changed["image"][4], changed["zh"][4] = unit_rows(2, DIM, seed=99)
    assert torch.equal(our_terms(loss_fn, changed, tags, pairs=pairs).losses, before.losses)


@pytest.mark.parametrize("kind", KINDS)
def test_a_term_of_nothing_is_zero_and_leaves_the_others_alone(kind):
    sides, tags = random_batch(7, seed=8, missing=0)
    tags["zh"] = torch.full_like(tags["zh"], MISSING)
    found = our_terms(make_loss(rank=0, world_size=1, kind=kind), sides, tags)
    assert found.counts == [0, 7, 0]
    assert found.losses[0] == found.losses[2] == 0
    assert_same(found, dense_terms(kind, sides, tags))


def test_one_caption_for_all_pictures_leaves_nothing_to_tell_apart():
    sides, _ = random_batch(6, seed=2)
    tags = {"zh": torch.zeros(6, dtype=torch.int64)}
    found = our_terms(make_loss(rank=0, world_size=1), sides, tags, pairs=PAIRS[:1])
    assert found.losses.item() == 0
    assert not any(gradient.any() for gradient in found.gradients)


# --- in several processes -----------------------------------------------------------------------


def errors_of_rank(rank, world_size, kind, batches, options, missing, texts):
    """The largest errors against the dense reference of losses, accuracies, features, numbers."""
    loss_fn = make_loss(rank=rank, world_size=world_size, kind=kind, tile=5, **options)
    sides, tags = random_batch(sum(batches), seed=21, missing=missing, texts=texts)
    groups = world_size // loss_fn.placement.group_ranks
    expected = dense_terms(kind, sides, tags, groups=groups)
    mine, my_tags = (
        {name: x.split(batches)[rank] for name, x in of.items()} for of in (sides, tags)
    )
    found = our_terms(loss_fn, mine, my_tags)
    assert found.counts == expected.counts
    features = zip(found.gradients[:3], expected.gradients[:3], strict=True)
    return (
        relative_error(found.losses, expected.losses),
        (found.accuracies - expected.accuracies).abs().max().item(),
        max(relative_error(x, world_size * y.split(batches)[rank]) for x, y in features),
        [x.item() for x in found.gradients[3:]],
        [x.item() for x in expected.gradients[3:]],
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batches", "options"),
    [
        ((9, 9), {"grid": "1x2"}),
        ((9, 9), {"grid": "2x1"}),
        ((8, 8, 8, 8), {"grid": "2x2"}),
        ((8, 8, 8, 8), {"grid": "4x1"}),
        ((8, 8, 8, 8), {"group_ranks": 2}),
        ((3, 11, 0, 6), {"grid": "2x2"}),
        ((5,) * 8, {"grid": "2x4"}),
    ],
)
@pytest.mark.parametrize(("missing", "texts"), [(0.3, 4), (0.9, 1000)])
def test_terms_across_processes_equal_the_dense_matrix(
    gloo, batches, options, kind, missing, texts
):
    ranks = gloo(len(batches)).run(errors_of_rank, kind, batches, options, missing, texts)
    for loss_error, accuracy_error, feature_error, *_ in ranks:
        assert loss_error < EXACT
        assert accuracy_error < 1e-6
        assert feature_error < EXACT
    found = torch.tensor([numbers for *_, numbers, _ in ranks], dtype=torch.float64).mean(dim=0)
    expected = torch.tensor(ranks[0][-1], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
