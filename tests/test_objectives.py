"""The terms of the training loss by name: weights, languages, missing and repeated captions.

Not the contrastive formula (test_loss.py) nor the towers before it (test_training_step.py).
"""

from collections.abc import Sequence
from typing import Any

import dense_loss
import pytest
import torch
from dense_loss import unit_rows
from tiny_batches import make_batch

from m2encoder.batch import Batch
from m2encoder.config import Objective
from m2encoder.loss import make_loss
from m2encoder.objectives import Losses, compare, languages_of, sides_of

ZH, EN, BOTH = Objective("image-zh", 0.3), Objective("image-en", 2.0), Objective("zh-en", 0.7)
ALL = (ZH, EN, BOTH)
SCALE, DIM = torch.tensor(9.0, dtype=torch.float64), 8
TEXTS = {
    "zh": ["红色的房子", "红色的房子", None, "白貓", "白猫", None],
    "en": ["a red house", "Ａ RED  House", "a cat 🐈", None, "a white cat", None],
}


def features(batch, *, seed=1):
    """Random unit vectors of a batch's pictures and captions."""
    image = unit_rows(len(batch.keys), DIM, seed=seed)
    texts = {
        language: unit_rows(len(captions.rows), DIM, seed=seed + 1 + i)
        for i, (language, captions) in enumerate(batch.captions.items())
    }
    return image.requires_grad_(), {name: x.requires_grad_() for name, x in texts.items()}


def losses_of(
    batch: Batch,
    objectives: Sequence[Objective],
    *,
    image: Any = None,
    texts: Any = None,
    duplicates: Any = "mask",
) -> Losses:
    loss = make_loss(rank=0, world_size=1)
    given = features(batch)
    return compare(
        given[0] if image is None else image,
        given[1] if texts is None else texts,
        batch,
        objectives,
        loss,
        scale=SCALE,
        bias=None,
        duplicates=duplicates,
    )


def dense(batch, name, image, texts, *, duplicates):
    """One term by a whole matrix, over the pairs that have both sides."""
    sides, present, same = {"image": image}, {}, {}
    for language, captions in batch.captions.items():
        sides[language] = torch.zeros_like(image).index_copy(0, captions.rows, texts[language])
        present[language] = torch.zeros(len(image), dtype=torch.bool).index_fill(
            0, captions.rows, True
        )
        written = [None] * len(image)
        for row, key in zip(captions.rows.tolist(), captions.keys.tolist(), strict=True):
            written[row] = key
        same[language] = torch.tensor(
            [[a == b and duplicates == "mask" for b in written] for a in written]
        )
    first, second = name.split("-")
    languages = [side for side in (first, second) if side != "image"]
    return dense_loss.masked(
        sides[first],
        sides[second],
        SCALE,
        present=torch.stack([present[language] for language in languages]).all(0),
        same=torch.stack([same[language] for language in languages]).any(0),
    )


@pytest.mark.parametrize("duplicates", ["mask", "keep"])
def test_terms_total_and_gradients_equal_a_dense_matrix(duplicates):
    batch = make_batch(TEXTS)
    image, texts = features(batch)
    losses = losses_of(batch, ALL, image=image, texts=texts, duplicates=duplicates)
    expected = {o.name: dense(batch, o.name, image, texts, duplicates=duplicates) for o in ALL}
    for name, value in expected.items():
        torch.testing.assert_close(losses.terms[f"loss/{name}"], value.detach())
    total = torch.stack([o.weight * expected[o.name] for o in ALL]).sum()
    torch.testing.assert_close(losses.total, total)
    leaves = [image, *texts.values()]
    for ours, theirs in zip(
        torch.autograd.grad(losses.total, leaves), torch.autograd.grad(total, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_captions_that_say_the_same_are_no_negatives_unless_asked_for():
    batch = make_batch(TEXTS)
    masked, kept = (
        losses_of(batch, ALL, duplicates=duplicates).terms for duplicates in ("mask", "keep")
    )
    # full-width letters, case and white space do not tell captions apart; 貓 and 猫 do
    assert all(masked[f"loss/{o.name}"] < kept[f"loss/{o.name}"] for o in ALL)
    apart = make_batch({"zh": ["白貓", "白猫"], "en": ["a cat", "a dog"]})
    masked, kept = (
        losses_of(apart, ALL, duplicates=duplicates).total for duplicates in ("mask", "keep")
    )
    assert masked == kept


def test_one_objective_reads_one_language_alone():
    batch = make_batch({"zh": ["红", "蓝", "绿"], "en": ["red", "blue", "green"]})
    losses = losses_of(batch, (EN,))
    assert set(losses.terms) == {"loss/image-en", "accuracy/image-en"}
    torch.testing.assert_close(losses.total.detach(), 2.0 * losses.terms["loss/image-en"])


@pytest.mark.parametrize("zh", [[None] * 4, [None, None, None, "红"]])
def test_a_language_with_fewer_than_two_captions_is_left_out(zh):
    batch = make_batch({"zh": zh, "en": ["red", "blue", "green", "white"]})
    losses = losses_of(batch, ALL)
    assert set(losses.terms) == {"loss/image-en", "accuracy/image-en"}
    torch.testing.assert_close(losses.total.detach(), 2.0 * losses.terms["loss/image-en"])


@pytest.mark.parametrize(
    ("zh", "en"), [([], []), (["红"], ["red"]), (["红", None], [None, "red"]), ([None] * 3, "a")]
)
def test_a_batch_with_nothing_to_compare_gives_zero_and_still_a_gradient(zh, en):
    batch = make_batch({"zh": zh, "en": en})
    image, texts = features(batch)
    losses = losses_of(batch, ALL, image=image, texts=texts)
    assert losses.terms == {}
    assert losses.total.item() == 0
    (gradient,) = torch.autograd.grad(losses.total, [image])
    assert not gradient.any()


def test_terms_carry_no_gradient():
    losses = losses_of(make_batch(TEXTS), ALL)
    assert losses.total.requires_grad
    assert not any(term.requires_grad for term in losses.terms.values())


def test_accuracy_counts_the_nearest_partner_in_both_directions():
    batch = make_batch({"zh": ["红", "蓝", None, "绿", "白", None, "黑"]})
    image, texts = features(batch, seed=2)
    sim = (image[batch.captions["zh"].rows] @ texts["zh"].T).tolist()
    columns = list(zip(*sim, strict=True))
    hits = sum(row.index(max(row)) == i for side in (sim, columns) for i, row in enumerate(side))
    assert 0 < hits < 10
    found = losses_of(batch, (ZH,), image=image, texts=texts).terms["accuracy/image-zh"]
    assert found.item() == pytest.approx(hits / 10)


def test_languages_are_named_once_and_in_the_order_of_the_objectives():
    assert languages_of([EN, ZH]) == ("en", "zh")
    assert languages_of([ZH, ZH, EN]) == ("zh", "en")
    assert languages_of([BOTH]) == ("zh", "en")
    assert [sides_of(o) for o in ALL] == [("image", "zh"), ("image", "en"), ("zh", "en")]
