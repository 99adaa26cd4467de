"""Which parameters decay, each layer's share of the rate, and the rate of every step.

Not the training loop: test_train.py.
"""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from tiny_batches import make_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import BertConfig

from m2encoder.config import Optim
from m2encoder.model.layers import Block
from m2encoder.optim import (
    layer_depths,
    learning_rate,
    lr_scales,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
)
from m2encoder.training_step import Towers

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


def decayed_of(model, **settings):
    groups = parameter_groups(model, Optim(weight_decay=0.1, **settings))
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
    return set().union(*(names_of(model, g) for g in groups if g["weight_decay"]))


@pytest.mark.parametrize("settings", [{}, {"layer_decay": 0.5, "text_lr": 0.1}])
def test_only_weight_matrices_convolutions_and_token_embeddings_decay(model, settings):
    assert decayed_of(model, **settings) == DECAYED


def test_positions_cls_token_and_scale_never_decay(model):
    never = {"image.positions", "text.positions", "image.cls_token", "logit_scale"}
    assert never & decayed_of(model) == set()
    assert never <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("settings", [{}, {"layer_decay": 0.5, "text_lr": 0.1}])
def test_every_parameter_is_in_exactly_one_group(model, settings):
    groups = [names_of(model, group) for group in parameter_groups(model, Optim(**settings))]
    assert sorted(name for group in groups for name in group) == sorted(
        name for name, _ in model.named_parameters()
    )


def test_scalars_have_a_group_of_their_own(model):
    groups = [names_of(model, group) for group in parameter_groups(model, Optim())]
    assert {"logit_scale"} in groups


def test_a_locked_parameter_keeps_its_group_and_its_value(model):
    model = deepcopy(model)
    before = parameter_groups(model, Optim())
    model.text.requires_grad_(False)
    assert [names_of(model, g) for g in parameter_groups(model, Optim())] == [
        names_of(model, g) for g in before
    ]
    optimizer = make_optimizer(model, Optim(lr=0.1))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.stack([(p**2).sum() for p in model.parameters() if p.requires_grad]).sum().backward()
    optimizer.step()
    moved = {k for k, value in model.state_dict().items() if not torch.equal(value, weights[k])}
    assert {name for name in moved if name.startswith("text.")} == set()
    assert "image.stack.blocks.0.ffn.fc1.weight" in moved


# ── each layer's share of the rate ──────────────────────────────────────────────────────────────


def test_layers_of_both_towers_are_counted_from_the_projections_down():
    depths = layer_depths(make_model(image_layers=2, text_layers=1, shared_layers=2))
    found = {name: depths[name] for name in (
        "logit_scale", "image_projection.weight", "shared.norm.weight",
        "shared.blocks.1.ffn.fc1.bias", "shared.blocks.0.ffn.fc1.bias", "image.stack.norm.bias",
        "image.stack.blocks.1.ffn.fc2.weight", "image.stack.blocks.0.ffn.fc2.weight",
        "image.positions", "image.cls_token", "image.patch_embed.weight",
        "text.stack.blocks.0.ffn.fc2.weight", "text.token_embed.weight", "text.positions",
    )}  # fmt: skip
    assert list(found.values()) == [0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 5, 3, 4, 4]


def test_without_shared_layers_towers_end_at_the_projections():
    depths = layer_depths(make_model(image_layers=3, text_layers=1, shared_layers=0))
    assert [depths[f"image.stack.blocks.{i}.ffn.fc1.weight"] for i in range(3)] == [3, 2, 1]
    assert (depths["image.positions"], depths["text.positions"]) == (4, 2)
    assert depths["text.stack.norm.weight"] == 1


def test_a_patch_stem_of_convolutions_is_one_layer(model):
    depths = layer_depths(model)
    stem = {depth for name, depth in depths.items() if ".patch_embed." in name}
    assert stem == {depths["image.positions"]} == {3}


def test_a_transformers_tower_is_counted_by_the_numbers_in_its_names():
    config = BertConfig(
        vocab_size=50, hidden_size=12, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=20,
    )  # fmt: skip
    tower = {"library": "transformers", "config": config.to_diff_dict(), "pooling": "cls"}
    model = make_model(shared_layers=0, image_layers=1, text_tower=tower)
    depths = layer_depths(model)
    found = {
        int(name.split(".")[4]): depth
        for name, depth in depths.items()
        if name.startswith("text.model.encoder.layer")
    }
    assert found == {0: 3, 1: 2, 2: 1}
    positions = "text.model.embeddings.position_embeddings.weight"
    assert depths[positions] == depths["text.model.embeddings.word_embeddings.weight"] == 4
    assert positions not in decayed_of(model)
    assert "text.model.embeddings.word_embeddings.weight" in decayed_of(model)


def test_the_rate_of_a_layer_is_the_product_of_depth_and_tower():
    model = make_model(image_layers=1, text_layers=1, shared_layers=1)
    settings = Optim(layer_decay=0.5, image_lr=0.1, text_lr=3.0)
    scales = lr_scales(model, settings)
    assert scales["image_projection.weight"] == scales["logit_scale"] == 1
    assert scales["shared.blocks.0.ffn.fc1.weight"] == 0.5
    assert scales["image.stack.blocks.0.ffn.fc1.weight"] == pytest.approx(0.25 * 0.1)
    assert scales["text.stack.blocks.0.ffn.fc1.weight"] == pytest.approx(0.25 * 3)
    assert scales["image.positions"] == pytest.approx(0.125 * 0.1)
    optimizer = make_optimizer(model, settings)
    set_learning_rate(optimizer, 2.0)
    rates = {name: g["lr"] for g in optimizer.param_groups for name in names_of(model, g)}
    assert rates == {name: 2.0 * scale for name, scale in scales.items()}


def test_a_wrapped_model_has_the_same_scales():
    model, settings = make_model(), Optim(layer_decay=0.5, image_lr=0.1)
    wrapped = lr_scales(Towers(model), settings)
    assert wrapped == {f"model.{k}": scale for k, scale in lr_scales(model, settings).items()}


def take_steps(model, optimizer):
    """Three steps, with gradients that depend on the weights."""
    for step in range(3):
        set_learning_rate(optimizer, 0.01 * (step + 1))
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.sin(parameter.detach() * 50 + i + step)
        optimizer.step()


def sharded_steps(rank, world_size, mesh_shape):
    """A few clipped AdamW steps of a sharded model; returns its whole weights."""
    names = ("replicate", "shard") if len(mesh_shape) == 2 else ("shard",)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    model = make_model()
    for part in (*model.modules(),):
        if isinstance(part, Block):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})
    optimizer = make_optimizer(model, Optim(layer_decay=0.5, weight_decay=0.1))
    take_steps(model, optimizer)
    whole = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().numpy()
        for name, p in model.named_parameters()
    }
    assert sum(isinstance(p, DTensor) for p in model.parameters()) == len(whole) - 1
    return whole


@pytest.mark.parametrize("mesh_shape", [(2,), (1, 2)])
def test_adamw_on_shards_equals_adamw_on_the_whole(gloo, mesh_shape):
    """Fused AdamW takes DTensors; the scalars that stay whole must not share a call with them."""
    model = make_model()
    optimizer = make_optimizer(model, Optim(layer_decay=0.5, weight_decay=0.1))
    take_steps(model, optimizer)
    for found in gloo(2).run(sharded_steps, mesh_shape):
        for name, parameter in model.named_parameters():
            np.testing.assert_allclose(found[name], parameter.detach().numpy(), atol=1e-5)


# ── the rate of every step ──────────────────────────────────────────────────────────────────────


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


def test_constant_rates_worked_by_hand():
    settings = Optim(lr=2.0, warmup_steps=2, schedule="constant", cooldown=0.4)
    found = [learning_rate(step, total_steps=10, settings=settings) for step in range(12)]
    assert found == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0]


def test_without_cooldown_a_constant_rate_stays():
    settings = Optim(lr=2.0, warmup_steps=0, schedule="constant", cooldown=0.0)
    assert {learning_rate(step, total_steps=9, settings=settings) for step in range(9)} == {2.0}


@pytest.mark.parametrize("cooldown", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("total", [1, 7, 100])
def test_a_constant_rate_is_at_its_peak_before_the_cooldown_and_never_zero(cooldown, total):
    settings = Optim(lr=0.3, warmup_steps=0, schedule="constant", cooldown=cooldown)
    rates = [learning_rate(step, total_steps=total, settings=settings) for step in range(total)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 0.3
    assert rates[-1] > 0


def test_a_longer_constant_run_repeats_the_shorter_one_up_to_its_cooldown():
    settings = Optim(lr=0.3, warmup_steps=5, schedule="constant", cooldown=0.25)
    short, long = (
        [learning_rate(step, total_steps=total, settings=settings) for step in range(total)]
        for total in (40, 80)
    )
    assert short[:31] == long[:31]
    assert short[31] < long[31]
