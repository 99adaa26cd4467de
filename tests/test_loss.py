"""The contrastive loss in one process: against a loop, by hand, for any input, in every precision.

Across processes: test_loss_grid.py. Several terms, missing and repeated captions:
test_loss_terms.py. Against open_clip: peers/test_clip_loss.py.
"""

import math

import pytest
import torch
from dense_loss import info_nce, info_nce_by_leads, relative_error, sigmoid, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from m2encoder.errors import ConfigError, FeatureError, M2EncoderError, PlacementError
from m2encoder.loss import make_loss

EXACT = 1e-12  # float64, where only the order of sums differs
infonce_loss = make_loss(rank=0, world_size=1)
sigmoid_loss = make_loss(rank=0, world_size=1, kind="sigmoid")


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def with_gradients(loss_fn, *inputs):
    """The loss, and its gradient for every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = loss_fn(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def accuracy_of(image, text, **options):
    loss_fn = make_loss(rank=0, world_size=1, **options)
    found = loss_fn.terms({"image": image, "text": text}, [("image", "text")], 1.0)
    return found.accuracies.item()


# --- values -------------------------------------------------------------------------------------


def info_nce_in_a_loop(image, text, scale):
    """Each query by itself: minus the log of its partner's share of all exponentials."""
    losses = []
    for queries, candidates in ((image, text), (text, image)):
        for i, query in enumerate(queries):
            logits = [scale * sum(a * b for a, b in zip(query, c, strict=True)) for c in candidates]
            losses.append(math.log(sum(math.exp(x - logits[i]) for x in logits)))
    return sum(losses) / len(losses)


def sigmoid_in_a_loop(image, text, scale, bias):
    """Each entry by itself: minus the log of the probability that it is or is no pair."""
    total = 0.0
    for i, query in enumerate(image):
        for j, candidate in enumerate(text):
            logit = scale * sum(a * b for a, b in zip(query, candidate, strict=True)) + bias
            total += math.log1p(math.exp(-logit if i == j else logit))
    return total / len(image)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_infonce_equals_a_loop_over_queries(rows, scale):
    image, text = unit_rows(rows, 5, seed=1), unit_rows(rows, 5, seed=2)
    expected = info_nce_in_a_loop(image.tolist(), text.tolist(), scale)
    found = infonce_loss(image, text, number(scale)).item()
    assert found == pytest.approx(expected, rel=EXACT, abs=EXACT)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (14.3, -10.0), (100.0, 3.0)])
def test_sigmoid_equals_a_loop_over_entries(rows, scale, bias):
    image, text = unit_rows(rows, 5, seed=1), unit_rows(rows, 5, seed=2)
    expected = sigmoid_in_a_loop(image.tolist(), text.tolist(), scale, bias)
    found = sigmoid_loss(image, text, number(scale), number(bias)).item()
    assert found == pytest.approx(expected, rel=EXACT, abs=EXACT)


def test_loss_of_two_pairs_worked_by_hand():
    image = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # cosines [[1, 0], [.6, .8]], times 10: partners lead by 10 and 2 (rows), 4 and 8 (columns)
    expected = sum(math.log(1 + math.exp(-lead)) for lead in (10, 2, 4, 8)) / 4
    assert infonce_loss(image, text, 10.0).item() == pytest.approx(expected, rel=1e-6)


def test_sigmoid_loss_of_two_pairs_worked_by_hand():
    image = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # the same cosines, times 10, minus 3: pairs 7 and 5, others -3 and 3
    expected = sum(math.log(1 + math.exp(x)) for x in (-7, -5, -3, 3)) / 2
    assert sigmoid_loss(image, text, 10.0, -3.0).item() == pytest.approx(expected, rel=1e-6)


def test_accuracy_counts_both_directions_worked_by_hand():
    image = torch.eye(3)
    text = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    # pictures: all three right; texts: the second lies nearer to picture 0
    assert accuracy_of(image, text) == pytest.approx(5 / 6)
    assert accuracy_of(image, text, kind="sigmoid", tile=2) == pytest.approx(5 / 6)


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 3, None])
def test_infonce_gradients_equal_finite_differences(tile):
    loss_fn = make_loss(rank=0, world_size=1, tile=tile)
    leaves = [unit_rows(4, 3, seed=1), unit_rows(4, 3, seed=2), number(3.0)]
    assert torch.autograd.gradcheck(loss_fn, [x.requires_grad_() for x in leaves])


@pytest.mark.parametrize("tile", [1, 3, None])
def test_sigmoid_gradients_equal_finite_differences(tile):
    loss_fn = make_loss(rank=0, world_size=1, kind="sigmoid", tile=tile)
    leaves = [unit_rows(4, 3, seed=1), unit_rows(4, 3, seed=2), number(3.0), number(-2.0)]
    assert torch.autograd.gradcheck(loss_fn, [x.requires_grad_() for x in leaves])


def test_accuracy_takes_no_part_in_the_gradient():
    image = torch.eye(3, requires_grad=True)
    found = infonce_loss.terms({"image": image, "text": image}, [("image", "text")], 1.0)
    assert found.losses.requires_grad
    assert not found.accuracies.requires_grad


def test_nothing_asks_for_a_gradient_under_no_grad():
    image, text = unit_rows(5, 4, seed=1).requires_grad_(), unit_rows(5, 4, seed=2)
    with torch.no_grad():
        loss = infonce_loss(image, text, 14.3)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(info_nce(image, text, 14.3).item(), rel=EXACT)


def test_only_one_side_may_ask_for_a_gradient():
    image, text = unit_rows(5, 4, seed=1).requires_grad_(), unit_rows(5, 4, seed=2)
    (found,) = torch.autograd.grad(infonce_loss(image, text, 14.3), image)
    (expected,) = torch.autograd.grad(info_nce(image, text, 14.3), image)
    assert relative_error(found, expected) < EXACT


def test_vectors_may_lie_in_memory_in_any_way():
    image, text = unit_rows(4, 7, seed=1).T, unit_rows(1, 4, seed=2).expand(7, 4)
    found = with_gradients(make_loss(rank=0, world_size=1, tile=3), image, text, number(9.0))
    expected = with_gradients(info_nce, image, text, number(9.0))
    errors = [relative_error(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]
    assert max(errors) < EXACT


# --- properties ---------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 20),
    tile=st.integers(1, 50) | st.none(),
    scale=st.floats(0.01, 100),
    bias=st.floats(-20, 20) | st.none(),
    seed=st.integers(0, 2**31),
)
def test_tiles_never_change_values_or_gradients(rows, width, tile, scale, bias, seed):
    kind, reference = ("infonce", info_nce_by_leads) if bias is None else ("sigmoid", sigmoid)
    numbers = [number(scale)] if bias is None else [number(scale), number(bias)]
    inputs = [unit_rows(rows, width, seed=seed), unit_rows(rows, width, seed=seed + 1), *numbers]
    loss_fn = make_loss(rank=0, world_size=1, kind=kind, tile=tile)
    found, expected = with_gradients(loss_fn, *inputs), with_gradients(reference, *inputs)
    for ours, theirs in zip(found, expected, strict=True):
        # 1e-12 of the gradient's natural size, because that of the scale may cancel to nothing
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 * max(1.0, scale))


def test_order_of_the_pairs_does_not_matter():
    image, text = unit_rows(9, 4, seed=1), unit_rows(9, 4, seed=2)
    order = torch.randperm(9)
    expected = infonce_loss(image, text, 20.0)
    torch.testing.assert_close(infonce_loss(image[order], text[order], 20.0), expected)
    assert infonce_loss(image, text.roll(1, dims=0), 20.0) != expected


def test_pictures_and_texts_can_change_places():
    image, text = unit_rows(6, 4, seed=1), unit_rows(6, 4, seed=2)
    swapped = infonce_loss(text, image, 20.0)
    torch.testing.assert_close(infonce_loss(image, text, 20.0), swapped)


def test_a_collapsed_model_loses_the_logarithm_of_the_batch_size():
    same = unit_rows(1, 8, seed=0, dtype=torch.float32).expand(16, 8)
    # float32 resolves logits of 100 to 8e-6
    assert infonce_loss(same, same, 100.0).item() == pytest.approx(math.log(16), abs=8e-6)


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_a_collapsed_model_is_never_right(kind):
    same = torch.eye(8)[:1].expand(16, 8)  # products without rounding: all are equal
    assert accuracy_of(same, same, kind=kind, tile=5) == 0


@pytest.mark.parametrize("loss_fn", [infonce_loss, sigmoid_loss])
def test_a_batch_of_nothing_has_loss_zero_and_empty_gradients(loss_fn):
    found = with_gradients(loss_fn, torch.zeros(0, 4), torch.zeros(0, 4), number(5.0))
    assert [x.tolist() for x in found] == [0, [], [], 0]


# --- precision ----------------------------------------------------------------------------------


def test_a_python_number_keeps_all_its_digits():
    image, text = unit_rows(7, 5, seed=1), unit_rows(7, 5, seed=2)
    assert infonce_loss(image, text, 14.3).item() == pytest.approx(
        info_nce(image, text, 14.3).item(), rel=EXACT
    )
    assert sigmoid_loss(image, text, 14.3, -3.3).item() == pytest.approx(
        sigmoid(image, text, 14.3, -3.3).item(), rel=EXACT
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_vectors_are_compared_in_float32(dtype):
    image, text = (unit_rows(6, 16, seed=seed, dtype=dtype) for seed in (1, 2))
    loss = infonce_loss(image, text, 50.0)
    assert loss.dtype == torch.float32
    assert loss == infonce_loss(image.float(), text.float(), 50.0)


@pytest.mark.parametrize("wire_dtype", ["bfloat16", "float16"])
def test_one_process_sends_nothing_and_so_rounds_nothing(wire_dtype):
    image, text = (unit_rows(9, 16, seed=seed, dtype=torch.float32) for seed in (1, 2))
    rounded = make_loss(rank=0, world_size=1, wire_dtype=wire_dtype)
    assert rounded(image, text, 50.0) == infonce_loss(image, text, 50.0)


@pytest.mark.parametrize("loss_fn", [infonce_loss, sigmoid_loss])
def test_autocast_does_not_touch_the_loss(loss_fn):
    inputs = [unit_rows(9, 16, seed=seed, dtype=torch.float32) for seed in (1, 2)]
    expected = with_gradients(loss_fn, *inputs, number(50.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(loss_fn, *inputs, number(50.0))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def hard_batch(name, dtype):
    """Pairs where exponentials overflow, or cancel, unless care is taken."""
    image = unit_rows(24, 16, seed=1, dtype=torch.float32)
    text = {
        "solved": image,
        "everything wrong": image.roll(1, dims=0),
        "opposite": -image,
        "repeated": image,
        "collapsed": image[:1].expand(24, 16),
    }[name]
    if name == "repeated":
        image = text = image[torch.arange(24) // 3]
    return image.to(dtype), text.to(dtype)


HARD = ("solved", "everything wrong", "opposite", "repeated", "collapsed")


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [7, None])
def test_hard_batches_at_scale_100_have_the_values_of_float64(name, dtype, tile):
    inputs = [*hard_batch(name, dtype), number(100.0)]
    found = with_gradients(make_loss(rank=0, world_size=1, tile=tile), *inputs)
    expected = with_gradients(info_nce_by_leads, *(x.double() for x in inputs))
    # Logits of 100 are rounded to 6e-6 in float32; the gradients then to the features' own dtype.
    # Where they cancel the limit is that of the terms, each of size scale / rows.
    own = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(found[0].double(), expected[0], rtol=2e-5, atol=1e-30)
    for ours, theirs in zip(found[1:3], expected[1:3], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=own, atol=own * 100 / 24)
    torch.testing.assert_close(found[3], expected[3], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hard_batches_stay_finite_in_the_sigmoid_loss(name, dtype):
    found = with_gradients(sigmoid_loss, *hard_batch(name, dtype), number(100.0), number(-10.0))
    assert all(x.isfinite().all() for x in found)


def test_loss_is_the_scale_when_every_answer_is_wrong():
    image = torch.eye(8)
    loss = infonce_loss(image, image.roll(1, dims=0), 100.0)
    assert loss.item() == pytest.approx(100.0, rel=1e-6)


def test_a_solved_batch_keeps_the_digits_of_its_tiny_loss():
    image = torch.eye(8)
    found = with_gradients(infonce_loss, image, image, number(50.0))
    assert found[0].item() == pytest.approx(7 * math.exp(-50), rel=1e-5)
    assert found[3].item() == pytest.approx(-7 * math.exp(-50), rel=1e-5)


# --- options and mistakes -----------------------------------------------------------------------


def test_options_may_be_text():
    text = {"group_ranks": "none", "tile": "8", "grid": "1x1", "kind": "infonce"}
    loss_fn = make_loss(rank=0, world_size=1, **text)
    assert loss_fn.tile == 8
    image, other = unit_rows(20, 4, seed=1), unit_rows(20, 4, seed=2)
    assert loss_fn(image, other, 9.0).item() == pytest.approx(info_nce(image, other, 9.0).item())
    assert make_loss(rank=0, world_size=1, group_ranks="1", tile="None").tile is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "triplet"}, "kind is 'triplet', expected one of infonce, sigmoid"),
        (
            {"wire_dtype": "int8"},
            "wire_dtype is 'int8', expected one of float32, float16, bfloat16",
        ),
        ({"tile": "big"}, "tile is 'big', expected a whole number of at least 1"),
        ({"tile": 0}, "tile is 0, expected a whole number of at least 1"),
        ({"group_ranks": "-2"}, "group_ranks is '-2', expected a whole number of at least 1"),
        ({"group_ranks": 2}, "group_ranks 2 does not divide world_size 1; expected a divisor"),
        ({"grid": "2by2"}, "grid is '2by2', expected auto or RxC, for example 2x4"),
        ({"grid": "2x"}, "grid is '2x', expected auto or RxC, for example 2x4"),
        ({"grid": "-1x-1"}, "grid is '-1x-1', expected auto or RxC, for example 2x4"),
        (
            {"grid": "1x2"},
            "grid 1x2 has 2 places, expected 1: as many as ranks share negatives",
        ),
        ({"rank": 1}, "rank 1 of world_size 1, expected 0 to 1-1"),
        ({"rank": -1}, "rank -1 of world_size 1, expected 0 to 1-1"),
        ({"world_size": 0}, "rank 0 of world_size 0, expected 0 to 0-1"),
        (
            {"world_size": 2},
            "world_size is 2, but torch.distributed is not initialised; call "
            "torch.distributed.init_process_group first, or start the program with torchrun",
        ),
    ],
)
def test_an_option_that_does_not_fit_is_refused_in_one_line(options, message):
    with pytest.raises(PlacementError) as refusal:
        make_loss(**{"rank": 0, "world_size": 1} | options)
    assert str(refusal.value) == message
    assert isinstance(refusal.value, ConfigError)
    assert isinstance(refusal.value, ValueError)


@pytest.mark.parametrize("text_shape", [(3, 4), (2, 5)])
def test_batches_of_different_shape_are_refused_with_both_shapes(text_shape):
    with pytest.raises(FeatureError, match=r"_features are \(2, 4\) float32, text_.*\(.*expected"):
        infonce_loss(torch.zeros(2, 4), torch.zeros(text_shape), 1.0)


@pytest.mark.parametrize("shape", [(), (4,), (2, 4, 3)])
def test_anything_but_a_matrix_is_refused(shape):
    message = f"rank 0: text_features has {len(shape)} dimensions, expected \\(b, d\\)"
    with pytest.raises(FeatureError, match=message):
        infonce_loss(torch.zeros(2, 4), torch.zeros(shape), 1.0)


def test_whole_numbers_are_refused():
    with pytest.raises(FeatureError, match="image_features are not of a floating dtype"):
        infonce_loss(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4), 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_named(value):
    image, text = unit_rows(6, 4, seed=1), unit_rows(6, 4, seed=2)
    text[3, 2] = text[5, 0] = value
    with pytest.raises(FeatureError, match="rank 0: row 3 of text_features is not finite") as found:
        infonce_loss(image, text, 1.0)
    assert (found.value.rank, found.value.row) == (0, 3)
    assert isinstance(found.value, M2EncoderError)
    assert isinstance(found.value, ValueError)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(FeatureError, match=rf"logit_scale is {scale:g}, expected a finite number"):
        infonce_loss(torch.eye(2), torch.eye(2), scale)
