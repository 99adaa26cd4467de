"""Sharded training: the same run as in one process, whatever lives where.

Not for checkpoints of it (test_checkpoint_resharding.py).
"""

from functools import cache

import pytest
import torch
from sharded_runs import MAX_NORM, Run, by_hand, global_batch
from torch.distributed.tensor import DTensor

from m2encoder.distributed import World
from m2encoder.errors import PlacementError
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.sharding import (
    check_sharding,
    clip_grad_norm,
    evaluation_model,
    full_state,
    shard,
    sync_plain_gradients,
)
from m2encoder.training_step import Towers, backward_step

STEPS = 20
FEW_STEPS = 6  # where the two passes of a step are not what is tested
TOLERANCE = 1e-5  # what sums in another order leave after so many steps of AdamW in float32


@cache
def expected_run(has_logit_bias):
    return list(by_hand(STEPS, has_logit_bias=has_logit_bias))


def run_of_rank(rank, world_size, sharding, accumulate, has_logit_bias):
    run = Run(rank, world_size, sharding, accumulate=accumulate, has_logit_bias=has_logit_bias)
    row = run.train(0, STEPS if accumulate > 1 else FEW_STEPS)
    return row, {k: v for k, v in run.whole().items() if not k.startswith("optimizer")}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("sharding", ["nnn", "ggg", "iii"])
def test_a_run_on_four_ranks_is_the_run_of_one_process(gloo, sharding, accumulate):
    """Shared layers, two passes, clipping, an average: losses, norms, weights and averages."""
    expected = expected_run(False)[: STEPS if accumulate > 1 else FEW_STEPS]
    assert all(norm > MAX_NORM for _, norm, _ in expected)
    for row, state in gloo(4).run(run_of_rank, sharding, accumulate, False):
        for (loss, norm), (expected_loss, expected_norm, _) in zip(row, expected, strict=True):
            assert loss == pytest.approx(expected_loss, abs=TOLERANCE)
            assert norm == pytest.approx(expected_norm, rel=TOLERANCE * 10)
        assert state.keys() == expected[-1][2].keys()
        for name, tensor in expected[-1][2].items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("sharding", ["ggg", "iii"])
def test_both_scalars_are_averaged_by_hand(gloo, sharding):
    expected = expected_run(True)[2]
    for _, state in gloo(4).run(some_steps_of_rank, sharding, {"has_logit_bias": True}):
        for name in ("model/logit_scale", "model/logit_bias", "model/image_projection.weight"):
            torch.testing.assert_close(state[name], expected[2][name], rtol=0, atol=TOLERANCE)


def some_steps_of_rank(rank, world_size, sharding, changes):
    run = Run(rank, world_size, sharding, **changes)
    return run.train(0, 3), run.whole()


def test_a_text_tower_of_transformers_is_sharded_too(gloo):
    config = {
        "model_type": "bert", "vocab_size": 300, "hidden_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 48, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    tower = {"library": "transformers", "config": config, "pooling": "mean"}
    changes = {"shared_layers": 0, "text_tower": tower}
    expected = list(by_hand(3, **changes))[-1]
    for row, state in gloo(4).run(some_steps_of_rank, "ggg", changes):
        assert row[-1][0] == pytest.approx(expected[0], abs=TOLERANCE)
        for name, tensor in expected[2].items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=TOLERANCE)


# ── what lives where ────────────────────────────────────────────────────────────────────────────


def held_of_rank(rank, world_size, sharding):
    """Numbers that this rank holds of weights, gradients, moments and average, as a share."""
    run = Run(rank, world_size, sharding)
    run.train(0, 1)
    moments = [s["exp_avg"] for s in run.optimizer.state.values()]
    gradients = [p.grad for p in run.model.parameters()]
    kinds = [list(run.model.parameters()), gradients, moments, list(run.ema.tensors.values())]
    return [sum(map(held, tensors)) / sum(t.numel() for t in tensors) for tensors in kinds]


def held(tensor):
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()


@pytest.mark.parametrize(("sharding", "share"), [("nnn", 1), ("ggg", 1 / 4), ("iii", 1 / 2)])
def test_between_steps_a_rank_holds_its_share_of_everything(gloo, sharding, share):
    for kinds in gloo(4).run(held_of_rank, sharding):
        assert kinds == pytest.approx([share] * 4, rel=0.1)  # uneven rows, and scalars


def start_of_rank(rank, world_size, sharding):
    """Weights that differ by rank before they are wrapped."""
    run_model = Run(0, 1, "nnn").model
    with torch.no_grad():
        for parameter in run_model.parameters():
            parameter += rank
    towers = shard(Towers(run_model), World(rank, world_size), sharding=sharding, shard_ranks=None)
    return full_state(run_model), type(towers).__name__


@pytest.mark.parametrize("sharding", ["nnn", "ggg", "iii"])
def test_all_ranks_start_with_the_weights_of_the_first(gloo, sharding):
    """shard_ranks None: all four are of one machine."""
    expected = Run(0, 1, "nnn").model.state_dict()
    for state, _ in gloo(4).run(start_of_rank, sharding):
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def bfloat16_of_rank(rank, world_size):
    run = Run(rank, world_size, "ggg", bfloat16=True)
    seen = set()
    block = run.model.shared.blocks[0]
    block.register_forward_hook(lambda *found: seen.add(found[2].dtype))
    row = run.train(0, 3)
    kinds = [run.model.parameters(), run.ema.tensors.values()]
    return row, seen, {tensor.dtype for tensors in kinds for tensor in tensors}


def test_in_bfloat16_layers_compute_and_weights_stay_float32(gloo):
    """The first loss is that of a model whose weights are rounded, but for the scale."""
    rounded = Run(0, 1, "nnn")
    scale = rounded.model.logit_scale
    rounded.model.bfloat16()
    assert isinstance(scale, torch.nn.Parameter)
    scale.data = scale.data.float()
    expected = backward_step(rounded.towers, global_batch(0), rounded.settings).total.item()
    in_float32 = [loss for loss, *_ in expected_run(False)[:3]]
    for row, computed, kept in gloo(2).run(bfloat16_of_rank):
        assert (computed, kept) == ({torch.bfloat16}, {torch.float32})
        losses = [loss for loss, _ in row]
        assert losses[0] == pytest.approx(expected, rel=1e-4)
        assert losses[0] != pytest.approx(in_float32[0], rel=1e-4)
        assert losses == pytest.approx(in_float32, rel=0.03)


# ── a whole model from a sharded one ────────────────────────────────────────────────────────────


def evaluation_of_rank(rank, world_size, sharding, averaged):
    """The ranks run the model unevenly: rank 0 twice, the last not at all."""
    run = Run(rank, world_size, sharding)
    run.train(0, 2)
    random_state = torch.get_rng_state()
    model = evaluation_model(run.model, run.ema if averaged else None)
    assert torch.equal(torch.get_rng_state(), random_state)
    pixels = global_batch(7).pixels.float() / 255
    with torch.no_grad():
        found = [model.encode_image(pixels) for _ in range([2, 1, 1, 0][rank])]
    first = full_state(run.model, only_first=True)
    return model is run.model, found, run.whole(), first


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("sharding", ["nnn", "iii"])
def test_each_rank_can_evaluate_by_itself(gloo, sharding, averaged):
    answers = gloo(4).run(evaluation_of_rank, sharding, averaged)
    prefix, plain = "ema/" if averaged else "model/", Run(0, 1, "nnn").model
    whole = answers[0][2]
    plain.load_state_dict({name: whole[prefix + name] for name in plain.state_dict()})
    with torch.no_grad():
        expected = plain.encode_image(global_batch(7).pixels.float() / 255)
    for rank, (is_same, found, _, first) in enumerate(answers):
        assert is_same == (sharding == "nnn" and not averaged)
        for vectors in found:
            torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-6)
        assert first.keys() == (plain.state_dict().keys() if rank == 0 else set())
    weights = answers[0][3]
    assert all(torch.equal(weights[name], whole[f"model/{name}"]) for name in weights)


def test_what_full_state_gives_does_not_change_with_the_model():
    model = Run(0, 1, "nnn").model
    state = full_state(model)
    before = model.logit_scale.item()
    with torch.no_grad():
        model.logit_scale.add_(1)
    assert state["logit_scale"] == before


# ── one process ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sharding", ["nnn", "ggg", "iii"])
def test_a_world_of_one_shards_nothing(sharding):
    towers = Towers(Run(0, 1, "nnn").model)
    assert shard(towers, World(), sharding=sharding) is towers
    assert isinstance(towers.model, M2Encoder)


@pytest.mark.parametrize("max_norm", [0.1, 1000.0])
def test_clipping_plain_gradients_is_torchs(max_norm):
    models = [Run(0, 1, "nnn").model for _ in range(2)]
    for model in models:
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        model.logit_scale.grad = None
    expected = torch.nn.utils.clip_grad_norm_(models[0].parameters(), max_norm)
    torch.testing.assert_close(clip_grad_norm(models[1].parameters(), max_norm), expected)
    for theirs, ours in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_gradient_that_is_not_finite_gives_a_norm_that_is_not():
    for value in (float("nan"), float("inf")):
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.tensor([1.0, value, 2.0])
        assert not torch.isfinite(clip_grad_norm([weight], 1.0))


def test_without_gradients_there_is_nothing_to_clip_or_average():
    model = torch.nn.Linear(2, 2)
    assert clip_grad_norm(model.parameters(), 1.0) == 0
    sync_plain_gradients(model, World())
    assert model.weight.grad is None


@pytest.mark.parametrize(
    ("sharding", "world_size", "shard_ranks", "local", "message"),
    [
        ("ggg", 8, 4, 8, "shard_ranks is 4, but sharding ggg has no groups; leave"),
        ("nnn", 1, 1, 1, "shard_ranks is 1, but sharding nnn has no groups"),
        ("iii", 8, 3, 8, "8 ranks cannot be cut in groups of shard_ranks, 3; .* of 1, 2, 4, 8"),
        ("iii", 8, 0, 8, "groups of shard_ranks, 0"),
        ("iii", 8, 16, 8, "groups of shard_ranks, 16"),
        ("iii", 6, None, 4, "6 ranks cannot be cut in groups of one machine, 4; .* 1, 2, 3, 6"),
    ],
)
def test_an_impossible_sharding_says_what_is_possible(
    sharding, world_size, shard_ranks, local, message
):
    with pytest.raises(PlacementError, match=message) as error:
        check_sharding(sharding, world_size, shard_ranks=shard_ranks, local_world_size=local)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sharding", "world_size", "shard_ranks", "local"),
    [("nnn", 8, None, 4), ("ggg", 3, None, 3), ("iii", 16, None, 8), ("iii", 1, 8, 1),
     ("iii", 8, 8, 8), ("iii", 8, 1, 8)],
)  # fmt: skip
def test_what_can_be_arranged_is_taken(sharding, world_size, shard_ranks, local):
    check_sharding(sharding, world_size, shard_ranks=shard_ranks, local_world_size=local)
