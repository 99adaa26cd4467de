"""The terms of the loss on a real tiny model: missing captions, weights, grouping by length.

Not the contrastive formula itself: test_loss.py.
"""

from copy import deepcopy

import pytest
import torch

from m2encoder.batch import Batch, Captions
from m2encoder.config import Objective
from m2encoder.loss import info_nce
from m2encoder.objectives import compute_losses, encode_by_length, languages_of

ZH, EN = Objective("image-zh", weight=0.3), Objective("image-en", weight=2.0)


@pytest.fixture(scope="module")
def model(tiny_encoder):
    """A copy whose parameters take gradients."""
    return deepcopy(tiny_encoder.model).requires_grad_(True)


def random_ids(rows, *, shortest=3, longest=20, seed=0):
    """Ids and mask (rows, L): a start and an end token around random pieces, right-padded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (rows,), generator=generator).tolist()
    ids = torch.zeros(rows, max(lengths, default=0), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        pieces = torch.randint(4, 300, (length - 2,), generator=generator)
        ids[row, :length] = torch.cat([torch.tensor([2]), pieces, torch.tensor([3])])
        mask[row, :length] = 1
    return ids, mask


def make_batch(pictures, **rows):
    """Random pictures; `zh=[0, 2]` gives pictures 0 and 2 a Chinese caption."""
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (pictures, 3, 32, 32), dtype=torch.uint8, generator=generator)
    captions = {
        language: Captions(
            *random_ids(len(places), seed=seed), torch.tensor(places, dtype=torch.int64)
        )
        for seed, (language, places) in enumerate(rows.items())
    }
    return Batch(pixels, captions, [f"k{i}" for i in range(pictures)])


def dense_loss(model, batch, language):
    """Only the pictures that have a caption, and each caption encoded by itself, unpadded."""
    ids, mask, rows = batch.captions[language]
    image = model.encode_image(batch.pixels[rows].float() / 255)
    text = [
        model.encode_text(i[m.bool()][None], m[m.bool()][None])
        for i, m in zip(ids, mask, strict=True)
    ]
    return info_nce(image, torch.cat(text), model.logit_scale.exp())


@pytest.mark.parametrize(
    ("zh", "en"),
    [
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
        ([0, 2, 5], [1, 2, 3, 4]),
        ([0, 1, 2], [3, 4, 5]),
        ([1, 4], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_missing_captions_equal_the_loss_of_those_that_are_there(model, zh, en):
    batch = make_batch(6, zh=zh, en=en)
    losses = compute_losses(model, batch, (ZH, EN))
    expected = {language: dense_loss(model, batch, language) for language in ("zh", "en")}
    # float32: sums over other paddings and batch sizes; logits reach 14
    for language, value in expected.items():
        torch.testing.assert_close(
            losses.terms[f"loss/image-{language}"], value, atol=1e-5, rtol=1e-5
        )
    total = 0.3 * expected["zh"] + 2.0 * expected["en"]
    torch.testing.assert_close(losses.total, total, atol=2e-5, rtol=1e-5)


def test_gradients_equal_those_of_the_dense_reference(model):
    batch = make_batch(6, zh=[0, 2, 5], en=[1, 2, 3, 4])
    parameters = list(model.parameters())
    found = torch.autograd.grad(compute_losses(model, batch, (ZH, EN)).total, parameters)
    total = 0.3 * dense_loss(model, batch, "zh") + 2.0 * dense_loss(model, batch, "en")
    expected = torch.autograd.grad(total, parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_a_picture_without_a_caption_has_no_influence_on_that_language(model):
    batch = make_batch(6, zh=[0, 2, 5], en=[0, 1, 2, 3, 4, 5])
    before = compute_losses(model, batch, (ZH, EN)).terms
    batch.pixels[3] = 255 - batch.pixels[3]
    after = compute_losses(model, batch, (ZH, EN)).terms
    assert after["loss/image-zh"] == before["loss/image-zh"]
    assert after["loss/image-en"] != before["loss/image-en"]


def test_one_objective_reads_one_language_alone(model):
    batch = make_batch(4, zh=[0, 1, 2, 3], en=[0, 1, 2, 3])
    losses = compute_losses(model, batch, (EN,))
    assert set(losses.terms) == {"loss/image-en", "accuracy/image-en"}
    torch.testing.assert_close(losses.total, 2.0 * losses.terms["loss/image-en"])


@pytest.mark.parametrize("zh", [[], [3]])
def test_a_language_with_fewer_than_two_captions_is_left_out(model, zh):
    batch = make_batch(4, zh=zh, en=[0, 1, 2, 3])
    losses = compute_losses(model, batch, (ZH, EN))
    assert set(losses.terms) == {"loss/image-en", "accuracy/image-en"}
    torch.testing.assert_close(losses.total, 2.0 * dense_loss(model, batch, "en"))


@pytest.mark.parametrize(
    ("pictures", "zh", "en"), [(0, [], []), (1, [0], [0]), (2, [0], [1]), (3, [], [2])]
)
def test_a_batch_with_nothing_to_compare_gives_zero_and_still_a_gradient(model, pictures, zh, en):
    losses = compute_losses(model, make_batch(pictures, zh=zh, en=en), (ZH, EN))
    assert losses.terms == {}
    assert losses.total.item() == 0
    (gradient,) = torch.autograd.grad(losses.total, [model.logit_scale])
    assert gradient.item() == 0


def test_terms_carry_no_gradient(model):
    losses = compute_losses(model, make_batch(3, zh=[0, 1, 2], en=[0, 1, 2]), (ZH, EN))
    assert losses.total.requires_grad
    assert not any(term.requires_grad for term in losses.terms.values())


def test_accuracy_counts_the_nearest_partner_in_both_directions(model):
    batch = make_batch(8, zh=[0, 1, 3, 4, 6], en=[0, 1])
    ids, mask, rows = batch.captions["zh"]
    image = model.encode_image(batch.pixels[rows].float() / 255)
    sim = (image @ model.encode_text(ids, mask).T).tolist()
    columns = list(zip(*sim, strict=True))
    hits = sum(row.index(max(row)) == i for side in (sim, columns) for i, row in enumerate(side))
    found = compute_losses(model, batch, (ZH,)).terms["accuracy/image-zh"]
    assert found.item() == pytest.approx(hits / 10)


def test_the_largest_scale_is_used_as_it_is(model):
    batch = make_batch(4, zh=[0, 1, 2, 3], en=[0, 1, 2, 3])
    hot = deepcopy(model)
    hot.logit_scale.data.fill_(torch.tensor(100.0).log())
    found = compute_losses(hot, batch, (ZH,)).terms["loss/image-zh"]
    torch.testing.assert_close(found, dense_loss(hot, batch, "zh"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [2, 31, 150])
def test_captions_in_groups_of_similar_length_come_back_in_their_order(model, rows):
    ids, mask = random_ids(rows, longest=40, seed=rows)
    with torch.no_grad():
        expected = model.encode_text(ids, mask)
        found = encode_by_length(model, ids, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # other paddings, float32


def test_languages_are_named_once_and_in_the_order_of_the_objectives():
    assert languages_of([EN, ZH]) == ("en", "zh")
    assert languages_of([ZH, ZH, EN]) == ("zh", "en")
    assert languages_of([EN]) == ("en",)
