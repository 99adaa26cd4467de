"""Which parameters decay, and the learning rate of every step.

Not the training loop: test_train.py.
"""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from m2encoder.config import Optim
from m2encoder.optim import learning_rate, make_optimizer, parameter_groups

BLOCK_WEIGHTS = ("attention.qkv", "attention.out", "ffn.fc1", "ffn.fc2")
DECAYED = {
    *(f"image.patch_embed.{i}.weight" for i in (0, 3, 6, 9)),  # convolutions; norms lie between
    *(f"image.stack.blocks.0.{name}.weight" for name in BLOCK_WEIGHTS),
    "image_projection.weight",
    "text.token_embed.weight",
    *(f"text.stack.blocks.0.{name}.weight" for name in BLOCK_WEIGHTS),
    "text_projection.weight",
    *(f"shared.blocks.0.{name}.weight" for name in BLOCK_WEIGHTS),
}


@pytest.fixture(scope="module")
def model(tiny_encoder):
    return deepcopy(tiny_encoder.model).requires_grad_(True)


def names_of(model, group):
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def test_only_weight_matrices_convolutions_and_token_embeddings_decay(model):
    decayed, others = parameter_groups(model, 0.1)
    assert names_of(model, decayed) == DECAYED
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_positions_cls_token_and_scale_never_decay(model):
    others = names_of(model, parameter_groups(model, 0.1)[1])
    assert {"image.positions", "text.positions", "image.cls_token", "logit_scale"} <= others


def test_every_parameter_is_in_exactly_one_group(model):
    decayed, others = (names_of(model, group) for group in parameter_groups(model, 0.1))
    assert decayed & others == set()
    assert decayed | others == {name for name, _ in model.named_parameters()}


def test_a_frozen_parameter_is_not_optimised(model):
    model.text.positions.requires_grad_(False)
    try:
        groups = parameter_groups(model, 0.1)
        found = set().union(*(names_of(model, group) for group in groups))
    finally:
        model.text.positions.requires_grad_(True)
    assert {name for name, _ in model.named_parameters()} - found == {"text.positions"}


def test_one_step_is_adamw_worked_by_hand():
    linear = nn.Linear(1, 1)
    with torch.no_grad():
        linear.weight.fill_(2.0)
        linear.bias.fill_(3.0)
    settings = Optim(lr=0.5, weight_decay=0.1, beta1=0.9, beta2=0.98, eps=1e-6)
    optimizer = make_optimizer(linear, settings)
    linear.weight.grad, linear.bias.grad = torch.tensor([[4.0]]), torch.tensor([-4.0])
    optimizer.step()
    # first step: both running means are unbiased to g and g^2, so the update is lr * sign(g)
    assert linear.weight.item() == pytest.approx(2.0 * (1 - 0.5 * 0.1) - 0.5, abs=1e-6)
    assert linear.bias.item() == pytest.approx(3.0 + 0.5, abs=1e-6)


def test_learning_rates_worked_by_hand():
    settings = Optim(lr=2.0, warmup_steps=4)
    found = [learning_rate(step, total_steps=12, settings=settings) for step in range(13)]
    half = math.sqrt(0.5)
    assert found[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert found[6] == pytest.approx(1 + half)
    assert found[8] == pytest.approx(1.0)
    assert found[10] == pytest.approx(1 - half)
    assert found[12] == pytest.approx(0.0)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 50), (1, 50), (10, 50), (49, 50)])
def test_rate_rises_to_its_peak_then_falls_and_is_never_zero_in_training(warmup, total):
    settings = Optim(lr=0.3, warmup_steps=warmup)
    rates = [learning_rate(step, total_steps=total, settings=settings) for step in range(total)]
    rising, falling = rates[: warmup + 1], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert max(rates) == pytest.approx(0.3)
    assert min(rates) > 0


@pytest.mark.parametrize("warmup", [50, 80])
def test_a_warmup_longer_than_the_run_only_rises(warmup):
    settings = Optim(lr=1.0, warmup_steps=warmup)
    rates = [learning_rate(step, total_steps=50, settings=settings) for step in range(50)]
    assert rates == [(step + 1) / warmup for step in range(50)]


def test_rate_after_the_end_stays_zero():
    settings = Optim(lr=1.0, warmup_steps=2)
    assert learning_rate(99, total_steps=10, settings=settings) == pytest.approx(0.0)
