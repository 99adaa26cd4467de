"""Locked parameters: which patterns lock what, for how long, alone, under DDP and under FSDP2.

Not how rates differ between layers: test_optim.py.
"""

import pytest
import torch
import torch.distributed as dist
from tiny_batches import bilingual_texts, make_batch, make_model, shares_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from m2encoder.config import Locked, Objective, Optim
from m2encoder.distributed import World
from m2encoder.errors import ConfigError
from m2encoder.locked import apply_locks, check_locks
from m2encoder.loss import make_loss
from m2encoder.model.layers import Block
from m2encoder.optim import make_optimizer
from m2encoder.training_step import StepSettings, Towers, backward_step

STAGES = (Locked("image.*", until=0.5), Locked("text.token_embed.*"))
OBJECTIVES = (Objective("image-zh"), Objective("image-en"))
STEPS = 4


def locked_names(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def test_a_lock_holds_until_its_share_of_the_steps():
    model = make_model()
    image = {name for name, _ in model.named_parameters() if name.startswith("image.")}
    embeddings = {"text.token_embed.weight"}
    found, changed = [], []
    for step in range(10):
        changed.append(apply_locks(model, STAGES, step=step, total_steps=10))
        found.append(locked_names(model))
    assert found == [image | embeddings] * 5 + [embeddings] * 5
    assert changed == [True] + [False] * 4 + [True] + [False] * 4


def test_image_does_not_lock_the_projection_beside_the_tower():
    model = make_model()
    apply_locks(model, [Locked("image.*")], step=0, total_steps=1)
    assert "image_projection.weight" not in locked_names(model)


def test_a_resumed_run_has_the_locks_of_its_step():
    model = make_model()
    assert apply_locks(model, STAGES, step=7, total_steps=10)
    assert locked_names(model) == {"text.token_embed.weight"}


def test_without_locks_everything_trains_even_a_model_opened_for_inference():
    model = make_model().requires_grad_(False)
    assert apply_locks(model, [], step=0, total_steps=1)
    assert locked_names(model) == set()
    assert not apply_locks(model, [], step=1, total_steps=2)


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("imgae.*", "image*"),
        ("vision.*", "for example"),
        ("text.stack.block.0.*", "text.stack.blocks"),
        ("猫", "image.*, text.*"),
        ("", "image.*, text.*"),
    ],
)
def test_a_pattern_that_matches_nothing_is_one_line_with_near_names(pattern, near):
    with pytest.raises(ConfigError) as caught:
        check_locks(make_model(), [Locked("image.*"), Locked(pattern)])
    assert repr(pattern) in str(caught.value)
    assert near in str(caught.value)
    assert "\n" not in str(caught.value)


def test_locking_everything_to_the_end_is_an_error_and_a_stage_of_it_is_not():
    with pytest.raises(ConfigError, match="every parameter"):
        check_locks(make_model(), [Locked("*")])
    check_locks(make_model(), [Locked("*", until=0.5)])
    check_locks(make_model(), STAGES)


def test_locked_batch_normalisation_keeps_its_statistics():
    model = make_model()
    assert model.image is not None
    model.image.add_module("normalised", nn.BatchNorm2d(3))
    for locks, trains in (((Locked("image.*"),), False), ((), True)):
        model.train()
        apply_locks(model, locks, step=0, total_steps=1)
        assert model.image.get_submodule("normalised").training is trains
        assert model.image.training


# ── several processes ───────────────────────────────────────────────────────────────────────────


def trained(towers, model, shares, settings, rewrap=None):
    """Train STEPS steps, the image tower locked for the first half; returns whole weights."""
    # a large eps: AdamW's first steps would blow up the rounding of gradients near zero
    optimizer = make_optimizer(model, Optim(lr=0.5, eps=0.1))
    for step in range(STEPS):
        if apply_locks(towers, STAGES, step=step, total_steps=STEPS) and rewrap:
            towers = rewrap()
        optimizer.zero_grad()
        for part in shares:
            backward_step(towers, part, settings)
        if isinstance(next(iter(model.image.parameters())), DTensor):
            dist.all_reduce(model.logit_scale.grad)
            model.logit_scale.grad /= dist.get_world_size()
        optimizer.step()
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def rank_work(rank, world_size, how, accumulate):
    model = make_model()
    loss = make_loss(rank=rank, world_size=world_size)
    settings = StepSettings(OBJECTIVES, loss, accumulate=accumulate)
    share = shares_of(make_batch(bilingual_texts(8)), [8 // world_size] * world_size)[rank]
    world = World(rank, world_size, torch.device("cpu"))
    apply_locks(model, STAGES, step=0, total_steps=STEPS)
    if how == "ddp":
        return trained(
            world.wrap(Towers(model)), model, [share], settings, lambda: world.wrap(Towers(model))
        )
    towers, mesh = Towers(model), init_device_mesh("cpu", (world_size,))
    for part in (*model.modules(),):
        if isinstance(part, Block):
            fully_shard(part, mesh=mesh)
    fully_shard(towers, mesh=mesh, ignored_params={model.logit_scale})
    return trained(towers, model, [share], settings)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_stages_on_two_ranks_equal_those_of_one_process(gloo, how, accumulate):
    alone = make_model()
    settings = StepSettings(OBJECTIVES, make_loss(rank=0, world_size=1))
    batch = make_batch(bilingual_texts(8))
    expected = trained(Towers(alone), alone, [batch], settings)
    start = make_model().state_dict()
    assert torch.equal(expected["text.token_embed.weight"], start["text.token_embed.weight"])
    assert not torch.equal(expected["image.positions"], start["image.positions"])
    for found in gloo(2).run(rank_work, how, accumulate):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4, msg=name)
