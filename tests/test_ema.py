"""The average of weights: its formula, and what it leaves alone. Sharded: test_sharding.py."""

import pytest
import torch
from torch import nn

from m2encoder.ema import Ema


def make_model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


def moved(model, seed):
    """Change every parameter and buffer."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.train()(torch.randn(5, 3))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_parameters_follow_the_formula(decay):
    model = make_model()
    ema = Ema(model, decay)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    for seed in range(5):
        moved(model, seed)
        ema.update()
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    for name, value in expected.items():
        torch.testing.assert_close(ema.tensors[name].double(), value, rtol=1e-6, atol=1e-6)


def test_buffers_are_the_models():
    model = make_model()
    ema = Ema(model, 0.9)
    moved(model, 0)
    ema.update()
    assert ema.tensors["1.num_batches_tracked"] == 1
    assert torch.equal(ema.tensors["1.running_mean"], model.state_dict()["1.running_mean"])


def test_it_has_every_tensor_of_the_model_and_shares_none():
    model = make_model()
    ema = Ema(model, 0.9)
    before = {name: tensor.clone() for name, tensor in ema.tensors.items()}
    assert before.keys() == model.state_dict().keys()
    moved(model, 0)
    assert all(torch.equal(ema.tensors[name], before[name]) for name in before)


def test_it_opens_as_a_model():
    model, other = make_model(), make_model()
    ema = Ema(model, 0.9)
    moved(model, 0)
    ema.update()
    other.load_state_dict(ema.tensors)
    assert torch.equal(other.state_dict()["0.weight"], ema.tensors["0.weight"])


def test_it_can_start_again_at_the_weights():
    model = make_model()
    ema = Ema(model, 0.9)
    moved(model, 0)
    ema.restart()
    state = model.state_dict()
    assert all(torch.equal(ema.tensors[name], state[name]) for name in state)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match="expected 0 <= decay < 1"):
        Ema(make_model(), decay)
