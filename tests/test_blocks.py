"""Compiled blocks and recomputed activations: the same gradients and names, less memory.

Not for how much faster they are: benchmarks/.
"""

from copy import deepcopy

import pytest
import torch
from tiny_batches import (
    BILINGUAL,
    bilingual_texts,
    gradients_of,
    make_batch,
    make_model,
    shares_of,
    whole_difference,
)
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import BertConfig

from m2encoder.blocks import prepare_blocks
from m2encoder.distributed import World
from m2encoder.loss import make_loss
from m2encoder.measure import peak_allocated_bytes
from m2encoder.model.layers import FeedForward
from m2encoder.sharding import shard, sync_plain_gradients
from m2encoder.training_step import StepSettings, Towers, backward_step

KINDS = ("selective", "full")
BERT = BertConfig(
    vocab_size=300, hidden_size=24, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=3, max_position_embeddings=40,
)  # fmt: skip
BERT_TOWER = {"library": "transformers", "config": BERT.to_diff_dict(), "pooling": "cls"}


def gradients(model, *, accumulate=1, count=16, autocast=False):
    model.zero_grad()
    settings = StepSettings(
        BILINGUAL, make_loss(rank=0, world_size=1), accumulate=accumulate, patch_dropout=0.5
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = backward_step(Towers(model), make_batch(bilingual_texts(count)), settings)
    return gradients_of(model), losses.total.item()


class Dropping(nn.Module):
    """A feed-forward whose output is dropped at random."""

    def __init__(self, inner: FeedForward) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return F.dropout(self.inner(x), 0.3, self.training)


def dropping_model():
    model = make_model()
    for module in list(model.modules()):
        if isinstance(feed_forward := getattr(module, "ffn", None), FeedForward):
            module.ffn = Dropping(feed_forward)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_activations_give_the_same_gradients(kind, accumulate, autocast):
    model = make_model(image_layers=2)
    expected, loss = gradients(model, accumulate=accumulate, autocast=autocast)
    prepare_blocks(model, compile=False, checkpoint_activations=kind)
    found, value = gradients(model, accumulate=accumulate, autocast=autocast)
    assert whole_difference(found, expected) == 0
    assert value == loss


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_falls_alike_when_activations_are_computed_again(kind):
    model = dropping_model()
    expected, _ = gradients(model)
    prepare_blocks(model, compile=False, checkpoint_activations=kind)
    assert whole_difference(gradients(model)[0], expected) < 1e-6
    for module in model.modules():
        if isinstance(module, Dropping):
            module.eval()
    assert whole_difference(gradients(model)[0], expected) > 0.1  # it did fall


# torch.compile's own, where it looks at torch.jit
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_names_stay(kind, compile):
    model = make_model()
    names = list(model.state_dict())
    prepare_blocks(model, compile=compile, checkpoint_activations=kind)
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_trains_weights_of_its_own(kind):
    """An average of weights or a model for evaluation is a copy of a prepared model."""
    model = make_model()
    prepare_blocks(model, compile=False, checkpoint_activations=kind)
    copy = deepcopy(model)
    gradients(copy)
    assert all(parameter.grad is None for parameter in model.parameters())


def peak_of(kind):
    model = make_model(width=48, image_layers=4, image_size=64, max_text_length=30)
    prepare_blocks(model, compile=False, checkpoint_activations=kind)
    pixels = torch.rand(32, 3, 64, 64)

    def work():
        model.encode_image(pixels).sum().backward()

    work()
    model.zero_grad()
    return peak_allocated_bytes(work)


def test_each_kind_keeps_less_than_the_one_before():
    none, selective, full = (peak_of(kind) for kind in ("none", "selective", "full"))
    assert full < 0.6 * selective
    assert selective < 0.75 * none


@pytest.mark.parametrize("kind", KINDS)
def test_a_transformers_tower_recomputes_too(kind):
    torch.manual_seed(0)
    model = make_model(shared_layers=0, text_tower=BERT_TOWER)
    expected, _ = gradients(model)
    prepare_blocks(model, compile=False, checkpoint_activations=kind)
    assert model.text is not None
    assert any(getattr(part, "gradient_checkpointing", False) for part in model.text.modules())
    assert whole_difference(gradients(model)[0], expected) < 1e-6


def sharded_gradients(rank, world_size, kind, accumulate):
    model, world = make_model(), World(rank, world_size, torch.device("cpu"))
    prepare_blocks(model, compile=False, checkpoint_activations=kind)
    towers = shard(Towers(model), world, sharding="ggg")
    loss = make_loss(rank=rank, world_size=world_size)
    share = shares_of(make_batch(bilingual_texts(16)), [8, 8])[rank]
    settings = StepSettings(BILINGUAL, loss, accumulate=accumulate, patch_dropout=0.5)
    backward_step(towers, share, settings)
    sync_plain_gradients(towers, world)
    return {
        name: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).double().numpy()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize(("kind", "accumulate"), [("selective", 1), ("full", 2)])
def test_sharded_blocks_recompute_too(gloo, kind, accumulate):
    expected, _ = gradients(make_model())
    for found in gloo(2).run(sharded_gradients, kind, accumulate):
        assert whole_difference(found, expected) < 1e-6


@pytest.mark.filterwarnings("ignore")  # of the compiler's looks at tensors
@pytest.mark.slow  # the compiler takes a minute
@pytest.mark.parametrize("kind", ["none", "selective"])
def test_compiled_blocks_give_the_same_gradients_for_texts_of_any_length(kind):
    model = make_model()
    prepare_blocks(model, compile=True, checkpoint_activations=kind)
    for count in (16, 12, 9):
        expected, _ = gradients(make_model(), count=count, accumulate=2)
        found, _ = gradients(model, count=count, accumulate=2)
        assert 0 < whole_difference(found, expected) < 1e-5  # 0: nothing was compiled
