"""timm's towers in training: their layers' rates, their locked statistics, their FLOPs.

Not their pictures and folders: test_timm_tower.py.
"""

import pytest
import torch
from tiny_batches import make_model
from torch.utils.flop_counter import FlopCounterMode

from m2encoder.config import Locked, Optim
from m2encoder.flops import image_flops
from m2encoder.locked import apply_locks
from m2encoder.optim import layer_depths, parameter_groups


def model_with(name: str):
    tower = {"library": "timm", "name": name, "options": {}}
    return make_model(shared_layers=0, image_size=64, patch_size=1, image_tower=tower)


@pytest.mark.parametrize(
    ("name", "first", "last", "depth"),
    [
        ("test_vit", "patch_embed.proj.weight", "norm.weight", None),
        ("resnet18", "conv1.weight", "layer4.1.conv2.weight", 9),
        ("convnext_atto", "stem.0.weight", "head.norm.weight", 14),
    ],
)
def test_layers_are_counted_as_timm_counts_them(name, first, last, depth):
    model = model_with(name)
    depths = layer_depths(model)
    assert set(depths) == {found for found, _ in model.named_parameters()}
    assert depths[f"image.model.{last}"] == 1
    lowest = depths[f"image.model.{first}"]
    assert lowest == max(value for key, value in depths.items() if key.startswith("image."))
    assert depth is None or lowest == depth


def test_positions_of_a_timm_tower_do_not_decay():
    model = model_with("test_vit")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {
        names[id(parameter)]
        for group in parameter_groups(model, Optim())
        for parameter in group["params"]
        if group["weight_decay"]
    }
    assert {"image.model.pos_embed", "image.model.cls_token"} & decayed == set()
    assert "image.model.patch_embed.proj.weight" in decayed


def test_a_locked_tower_keeps_the_statistics_of_its_batch_normalisation():
    model = model_with("resnet18").train()
    apply_locks(model, [Locked("image.*")], step=0, total_steps=1)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.encode_image(torch.rand(4, 3, 64, 64))
    assert before
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())


def test_flops_of_a_timm_tower_are_what_torch_counts():
    model = model_with("resnet18")
    with FlopCounterMode(display=False) as counter:
        model.encode_image(torch.rand(2, 3, 64, 64))
    assert image_flops(model) == counter.get_total_flops() / 2
