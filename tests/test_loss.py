"""The plain InfoNCE loss: against a loop in float64, by hand, and what must hold for any input.

Not against open_clip: peers/test_clip_loss.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from m2encoder.loss import in_batch_accuracy, info_nce


def unit_rows(rows, width, *, dtype=torch.float64, seed=0):
    """(rows, width) random vectors of length one."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=dtype), dim=1)


def info_nce_in_a_loop(image, text, scale):
    """Each query by itself: minus the log of its partner's share of all exponentials."""
    losses = []
    for queries, candidates in ((image, text), (text, image)):
        for i, query in enumerate(queries):
            logits = [scale * sum(a * b for a, b in zip(query, c, strict=True)) for c in candidates]
            losses.append(math.log(sum(math.exp(x - logits[i]) for x in logits)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_loss_equals_a_loop_over_queries(rows, scale):
    image, text = unit_rows(rows, 5, seed=1), unit_rows(rows, 5, seed=2)
    expected = info_nce_in_a_loop(image.tolist(), text.tolist(), scale)
    found = info_nce(image, text, torch.tensor(scale, dtype=torch.float64)).item()
    # float64 throughout, so only the order of sums differs
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_loss_of_two_pairs_worked_by_hand():
    image = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # cosines [[1, 0], [.6, .8]], times 10: partners lead by 10 and 2 (rows), 4 and 8 (columns)
    expected = sum(math.log(1 + math.exp(-lead)) for lead in (10, 2, 4, 8)) / 4
    assert info_nce(image, text, torch.tensor(10.0)).item() == pytest.approx(expected, rel=1e-6)


def test_gradients_equal_finite_differences():
    image = unit_rows(4, 3, seed=1).requires_grad_()
    text = unit_rows(4, 3, seed=2).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(info_nce, (image, text, scale))


def test_order_of_the_pairs_does_not_matter():
    image, text, scale = unit_rows(9, 4, seed=1), unit_rows(9, 4, seed=2), torch.tensor(20.0)
    order = torch.randperm(9)
    expected = info_nce(image, text, scale)
    torch.testing.assert_close(info_nce(image[order], text[order], scale), expected)
    assert info_nce(image, text.roll(1, dims=0), scale) != expected


def test_pictures_and_texts_can_change_places():
    image, text, scale = unit_rows(6, 4, seed=1), unit_rows(6, 4, seed=2), torch.tensor(20.0)
    torch.testing.assert_close(info_nce(image, text, scale), info_nce(text, image, scale))


def test_a_collapsed_model_loses_the_logarithm_of_the_batch_size():
    same = unit_rows(1, 8, dtype=torch.float32).expand(16, 8)
    loss = info_nce(same, same, torch.tensor(100.0)).item()
    assert loss == pytest.approx(math.log(16), rel=1e-6)


def test_loss_stays_finite_at_the_largest_scale_when_every_answer_is_wrong():
    image = torch.eye(8)
    loss = info_nce(image, image.roll(1, dims=0), torch.tensor(100.0))
    assert loss.item() == pytest.approx(100.0, rel=1e-6)


def test_half_precision_vectors_are_compared_in_float32():
    image = unit_rows(6, 16, dtype=torch.float32, seed=1).bfloat16()
    text = unit_rows(6, 16, dtype=torch.float32, seed=2).bfloat16()
    loss = info_nce(image, text, torch.tensor(50.0))
    assert loss.dtype == torch.float32
    assert loss == info_nce(image.float(), text.float(), torch.tensor(50.0))


@pytest.mark.parametrize("text_shape", [(3, 4), (2, 5), (2,)])
def test_batches_of_different_shape_are_refused_with_both_shapes(text_shape):
    with pytest.raises(ValueError, match=r"image is \(2, 4\), text \(.*expected the same"):
        info_nce(torch.zeros(2, 4), torch.zeros(text_shape), torch.tensor(1.0))


def test_accuracy_counts_both_directions_worked_by_hand():
    image = torch.eye(3)
    text = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    # pictures: all three right; texts: the second lies nearer to picture 0
    assert in_batch_accuracy(image, text).item() == pytest.approx(5 / 6)


def test_accuracy_takes_no_part_in_the_gradient():
    image = torch.eye(3, requires_grad=True)
    assert not in_batch_accuracy(image, image).requires_grad
