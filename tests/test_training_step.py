"""The gradients of a step: on several processes, in micro-batches, with dropout, as if all at once.

Not the terms of the loss (test_objectives.py) nor the loop around the step (test_train.py).
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_batches import (
    BILINGUAL,
    bilingual_texts,
    dense_total,
    gradients_of,
    largest_difference,
    make_batch,
    make_model,
    rows_of,
    shares_of,
    whole_difference,
)

from m2encoder.distributed import World
from m2encoder.loss import make_loss
from m2encoder.measure import SentBytes
from m2encoder.model.layers import FeedForward
from m2encoder.objectives import compare
from m2encoder.patch_dropout import kept_patches
from m2encoder.training_step import StepSettings, Towers, backward_step, cut

FIRST, SEED, PATCH_DROPOUT = 1600, 3, 0.5
# Float32 sums in another order: the whole gradient holds 1e-6. One parameter's own, as small and
# cancelling as some are, does so where the towers compute in float64; features stay float32.
ROUNDING = 1e-6


def global_batch(count=16, *, first=FIRST, missing=()):
    """missing: (language, rows), so many of the first pictures lack a caption in it."""
    texts = bilingual_texts(count)
    for language, rows in missing:
        texts[language] = [None] * rows + [*texts[language][rows:]]
    return make_batch(texts, first=first)


def settings_of(
    rank=0,
    world_size=1,
    *,
    accumulate=1,
    duplicates: Any = "mask",
    patch_dropout=PATCH_DROPOUT,
    seed=SEED,
    **placement,
):
    loss = make_loss(rank=rank, world_size=world_size, **placement)
    return StepSettings(BILINGUAL, loss, duplicates, accumulate, patch_dropout, seed)


def step(model, batch, settings):
    """The gradients and the loss of one step in this process alone."""
    model.zero_grad()
    losses = backward_step(Towers(model), batch, settings)
    return gradients_of(model), losses.total.item()


@cache
def dense_step(dtype, count=16, *, kind="infonce", missing=(), first=FIRST, **options):
    """The same without pieces, processes or tiles."""
    model = make_model(has_logit_bias=kind == "sigmoid").to(dtype)
    options = {"patch_dropout": PATCH_DROPOUT, "seed": SEED, **options}
    batch = global_batch(count, missing=missing, first=first)
    total = dense_total(model, batch, BILINGUAL, **options)
    total.backward()
    return gradients_of(model), total.item()


def test_missing_and_repeated_captions_make_a_difference():
    """Else nothing below would show that they are treated right."""
    for captions in global_batch().captions.values():
        assert len(captions.keys.unique()) < len(captions.keys) < 16
    masked, kept = (dense_step(torch.float32, duplicates=x)[0] for x in ("mask", "keep"))
    assert whole_difference(kept, masked) > 1000 * ROUNDING


# ── on several processes ────────────────────────────────────────────────────────────────────────


def step_of_rank(rank, world_size, sizes, missing, accumulate, options, dtype):
    batch = shares_of(global_batch(sum(sizes), missing=missing), sizes)[rank]
    model = make_model(has_logit_bias=options.get("kind") == "sigmoid").to(dtype)
    towers = World(rank, world_size).wrap(Towers(model))
    settings = settings_of(rank, world_size, accumulate=accumulate, **options)
    losses = backward_step(towers, batch, settings)
    return gradients_of(model), losses.total.item(), sorted(losses.terms)


def assert_ranks_agree(gloo, sizes, accumulate, expected, *, missing=(), **options):
    """Each rank has the gradient of every parameter, and the loss, of the whole batch."""
    args = sizes, missing, accumulate, options, torch.float64
    for found, loss, _ in gloo(len(sizes)).run(step_of_rank, *args):
        assert largest_difference(found, expected[0]) < ROUNDING
        assert loss == pytest.approx(expected[1], rel=ROUNDING)


PLACEMENTS: dict[str, tuple[int, dict[str, Any]]] = {
    "2 ranks": (2, {}),
    "2x1": (2, {"grid": "2x1"}),
    "groups of 1": (2, {"group_ranks": 1}),
    "duplicates kept": (2, {"duplicates": "keep"}),
    "4 ranks": (4, {}),
    "4x1": (4, {"grid": "4x1"}),
    "groups of 2": (4, {"group_ranks": 2}),
    "sigmoid": (4, {"kind": "sigmoid"}),
}


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradients_are_those_of_the_whole_batch_in_one_process(gloo, placement, accumulate):
    world_size, options = PLACEMENTS[placement]
    dense: dict[str, Any] = {k: options[k] for k in ("kind", "duplicates") if k in options}
    dense["groups"] = world_size // options.get("group_ranks", world_size)
    sizes = [16 // world_size] * world_size
    expected = dense_step(torch.float32, **dense)
    args = sizes, (), accumulate, options, torch.float32
    for found, loss, _ in gloo(world_size).run(step_of_rank, *args):
        assert whole_difference(found, expected[0]) < ROUNDING
        assert loss == pytest.approx(expected[1], rel=ROUNDING)
    expected = dense_step(torch.float64, **dense)
    assert_ranks_agree(gloo, sizes, accumulate, expected, **options)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("sizes", [[0, 6], [2, 3], [0, 64], [5, 0, 7, 2]])
def test_small_and_empty_shares_are_part_of_one_batch(gloo, sizes, accumulate):
    expected = dense_step(torch.float64, sum(sizes))
    assert expected[1] > 0.1
    assert_ranks_agree(gloo, sizes, accumulate, expected)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "missing", [(("zh", 4),), (("zh", 8),), (("zh", 4), ("en", 4))],
    ids=["no zh on rank 0", "no zh at all", "nothing on rank 0"],
)  # fmt: skip
def test_a_language_may_be_missing_here_or_everywhere(gloo, missing, accumulate):
    expected = dense_step(torch.float64, 8, missing=missing)
    assert_ranks_agree(gloo, [4, 4], accumulate, expected, missing=missing)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("sizes", [[3, 3], [0, 0]])
def test_where_nothing_can_be_compared_gradients_are_zero(gloo, sizes, accumulate):
    missing = (("zh", sum(sizes)), ("en", sum(sizes)))
    args = sizes, missing, accumulate, {}, torch.float32
    for found, loss, terms in gloo(2).run(step_of_rank, *args):
        assert (loss, terms) == (0, [])
        assert not any(gradient.any() for gradient in found.values())


def two_steps_of_rank(rank, world_size, accumulate):
    """Both without zero_grad in between; after its first step DDP orders its buckets anew."""
    model = make_model().double()
    towers = World(rank, world_size).wrap(Towers(model))
    for first in (FIRST, FIRST + 16):
        batch = shares_of(global_batch(first=first), [8, 8])[rank]
        backward_step(towers, batch, settings_of(rank, world_size, accumulate=accumulate))
    return gradients_of(model)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_added_to_those_that_are_there(gloo, accumulate):
    one, two = (dense_step(torch.float64, first=first)[0] for first in (FIRST, FIRST + 16))
    expected = {name: one[name] + two[name] for name in one}
    assert whole_difference(one, two) > 0.01  # other patches
    for found in gloo(2).run(two_steps_of_rank, accumulate):
        assert largest_difference(found, expected) < ROUNDING


def sharded_step_of_rank(rank, world_size, accumulate):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    towers = Towers(model)
    mesh = init_device_mesh("cpu", (world_size,))
    # it shards no scalars; whoever uses it averages that one's gradient
    fully_shard(towers, mesh=mesh, ignored_params={model.logit_scale})
    batch = shares_of(global_batch(), [8, 8])[rank]
    backward_step(towers, batch, settings_of(rank, world_size, accumulate=accumulate))
    assert model.logit_scale.grad is not None
    dist.all_reduce(model.logit_scale.grad)
    model.logit_scale.grad /= world_size
    gradients: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    return {
        name: (g if name == "logit_scale" else g.full_tensor()).double().numpy()
        for name, g in gradients.items()
    }


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_model_sharded_by_fsdp2_has_the_same_gradients(gloo, accumulate):
    expected, _ = dense_step(torch.float32)
    for found in gloo(2).run(sharded_step_of_rank, accumulate):
        assert whole_difference(found, expected) < ROUNDING


def bytes_of_rank(rank, world_size, accumulate):
    """What a step sends; what its comparison alone sends; the size of all gradients."""
    model, batch = make_model(), shares_of(global_batch(), [8, 8])[rank]
    towers = World(rank, world_size).wrap(Towers(model))
    settings = settings_of(rank, world_size, accumulate=accumulate)
    for _ in range(3):  # DDP tells the others its order of buckets in the second
        with SentBytes() as step_sent:
            backward_step(towers, batch, settings)
    image, *texts = (
        F.normalize(torch.randn(n, 12)).requires_grad_()
        for n in (8, *(len(captions.ids) for captions in batch.captions.values()))
    )
    with SentBytes() as comparison_sent:
        compare(
            image, dict(zip(batch.captions, texts, strict=True)), batch, BILINGUAL, settings.loss,
            scale=torch.tensor(9.0), bias=None, duplicates="mask",
        ).total.backward()  # fmt: skip
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    return step_sent.total, comparison_sent.total, gradients


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_step_exchanges_features_once_and_gradients_once(gloo, accumulate):
    for sent, comparison, gradients in gloo(2).run(bytes_of_rank, accumulate):
        assert comparison > 0
        assert sent == comparison + gradients  # an all-reduce of two sends 2 (2 - 1) / 2 of it


# ── two passes in one process ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("patch_dropout", [0.0, PATCH_DROPOUT])
@pytest.mark.parametrize("accumulate", [1, 3, 16, 40])
def test_micro_batches_give_the_gradients_of_the_whole_batch(accumulate, patch_dropout):
    expected, loss = dense_step(torch.float64, patch_dropout=patch_dropout)
    settings = settings_of(accumulate=accumulate, patch_dropout=patch_dropout)
    found, value = step(make_model().double(), global_batch(), settings)
    assert largest_difference(found, expected) < ROUNDING
    assert value == pytest.approx(loss, rel=ROUNDING)


def drop(module, given, found):
    return F.dropout(found, 0.3)


def dropping_model():
    """A model whose layers drop at random, as those of many text models do."""
    model = make_model()
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.register_forward_hook(drop)
    return model


def one_pass(model, batch, settings):
    """Pieces cut and seeded as in two passes, but all kept until one backward pass."""
    pieces = cut(batch, Towers(model), settings)
    images, texts = [], []
    for pixels, kept, key in pieces.images:
        torch.manual_seed(key)
        images.append(model.encode_image(pixels.float() / 255, kept))
    for ids, mask, key in pieces.texts:
        torch.manual_seed(key)
        texts.append(model.encode_text(ids, mask))
    sizes = [len(captions.ids) for captions in batch.captions.values()]
    parts = torch.cat(texts)[pieces.place].split(sizes)
    losses = compare(
        torch.cat(images), dict(zip(batch.captions, parts, strict=True)), batch, BILINGUAL,
        settings.loss, scale=model.logit_scale.exp(), bias=None, duplicates="mask",
    )  # fmt: skip
    losses.total.backward()
    return gradients_of(model), losses.total.item()


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_dropout_falls_alike_in_both_passes(accumulate):
    batch, settings = global_batch(), settings_of(accumulate=accumulate)
    expected, loss = one_pass(dropping_model(), batch, settings)
    found, value = step(dropping_model(), batch, settings)
    assert whole_difference(found, expected) < ROUNDING
    assert value == pytest.approx(loss, rel=ROUNDING)
    assert whole_difference(expected, dense_step(torch.float32)[0]) > 0.1  # it did fall


def test_the_second_pass_has_the_features_of_the_first():
    towers, seen = Towers(dropping_model()), []
    towers.register_forward_hook(lambda _, given, found: seen.append(found))
    backward_step(towers, global_batch(), settings_of(accumulate=4))
    images = [found.image for found in seen if found.image is not None]
    texts = [vectors for found in seen for vectors in found.texts]
    for features in (images, texts):
        first = [x for x in features if x.grad_fn is None]
        second = [x for x in features if x.grad_fn is not None]
        assert len(first) == len(second) == 4
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_generator_of_torch_is_neither_read_nor_moved(accumulate):
    model, settings, results = dropping_model(), settings_of(accumulate=accumulate), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(step(model, global_batch(), settings))
        assert torch.equal(torch.get_rng_state(), before)
    assert whole_difference(results[0][0], results[1][0]) == 0


def test_every_piece_of_every_rank_and_step_draws_anew():
    towers, keys = Towers(make_model()), []
    for first in (0, FIRST):
        for share in shares_of(global_batch(first=first), [8, 8]):
            for seed in (3, 4):
                pieces = cut(share, towers, settings_of(accumulate=4, seed=seed))
                keys += [piece.random_key for piece in (*pieces.images, *pieces.texts)]
    assert len(set(keys)) == len(keys) == 2 * 2 * 2 * 8


# ── patches ─────────────────────────────────────────────────────────────────────────────────────


def test_the_model_sees_the_kept_patches_alone():
    batch, model = global_batch(), make_model()
    kept = kept_patches(batch.positions, num_patches=16, share=PATCH_DROPOUT, seed=SEED)
    assert kept is not None
    is_kept = torch.zeros(16, 16, dtype=torch.bool).scatter_(1, kept, True).view(16, 1, 4, 4)
    is_kept = is_kept.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    found, unseen, seen = (
        step(model, replace(batch, pixels=pixels), settings_of(accumulate=2))[0]
        for pixels in (
            batch.pixels,
            torch.where(is_kept, batch.pixels, 255 - batch.pixels),
            torch.where(is_kept, 255 - batch.pixels, batch.pixels),
        )
    )
    assert all(np.array_equal(unseen[name], found[name]) for name in found)
    assert whole_difference(seen, found) > 0.1


@pytest.mark.parametrize("sizes", [[16], [8, 8], [5, 0, 7, 4]])
def test_a_picture_keeps_its_patches_on_any_number_of_ranks(sizes):
    towers, batch = Towers(make_model()), global_batch()
    expected = kept_patches(batch.positions, num_patches=16, share=PATCH_DROPOUT, seed=SEED)
    pieces = [cut(share, towers, settings_of(accumulate=2)) for share in shares_of(batch, sizes)]
    found = [image.kept for rank in pieces for image in rank.images]
    assert expected is not None
    assert torch.equal(torch.cat([kept for kept in found if kept is not None]), expected)


# ── pieces ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [0, 1, 16, 80])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_pieces_hold_everything_once_captions_by_length(count, accumulate):
    batch = global_batch(count)
    pieces = cut(batch, Towers(make_model()), settings_of(accumulate=accumulate))
    assert torch.equal(torch.cat([piece.pixels for piece in pieces.images]), batch.pixels)
    rows = [i[m == 1].tolist() for p in pieces.texts for i, m in zip(p.ids, p.mask, strict=True)]
    captions = batch.captions.values()
    expected = [i[m == 1].tolist() for c in captions for i, m in zip(c.ids, c.mask, strict=True)]
    assert [rows[place] for place in pieces.place.tolist()] == expected
    assert len(rows) == len(expected)
    lengths = [len(row) for row in rows]
    assert lengths == sorted(lengths)
    for _, mask, _ in pieces.texts:
        assert mask.shape[1] == max(mask.sum(dim=1).tolist(), default=1)  # no more padding


@pytest.mark.parametrize(("accumulate", "expected"), [(1, (1, 4)), (3, (3, 4)), (6, (6, 6))])
def test_the_number_of_pieces_does_not_depend_on_what_is_missing(accumulate, expected):
    unreadable = replace(rows_of(global_batch(80), range(9)), dropped=[("k", "broken")] * 71)
    batches = [global_batch(80, missing=m) for m in ((), (("zh", 80),), (("zh", 80), ("en", 80)))]
    for batch in (*batches, unreadable):
        pieces = cut(batch, Towers(make_model()), settings_of(accumulate=accumulate))
        assert (len(pieces.images), len(pieces.texts)) == expected
