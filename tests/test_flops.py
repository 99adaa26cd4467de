"""FLOPs against torch's own counter, and MFU by hand.

Not for measured time: benchmarks/.
"""

import pytest
import torch
from tiny_batches import make_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig

from m2encoder.config import Locked
from m2encoder.flops import mfu, peak_flops_per_s, training_flops
from m2encoder.locked import apply_locks

BERT = BertConfig(
    vocab_size=50, hidden_size=12, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=40,
)  # fmt: skip
BERT_TOWER = {"library": "transformers", "config": BERT.to_diff_dict(), "pooling": "cls"}
MODELS = {
    "shared": {},
    "deep": {"image_layers": 3, "text_layers": 2, "shared_layers": 0},
    "convolutions": {"patch_stem": "conv", "width": 48},
}


def counted(model, lengths, *, kept=None):
    """One picture and captions, forward and backward, as torch counts them."""
    # the plain way of attention: the fused one of CPUs is not counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pixels = torch.rand(1, 3, 32, 32).requires_grad_()  # or the first layer has less to do
        total = model.encode_image(pixels, kept).sum()
        for length in lengths:
            ids, mask = torch.full((1, length), 7), torch.ones(1, length)
            total = total + model.encode_text(ids, mask).sum()
        forward = counter.get_total_flops()
        if total.requires_grad:
            total.backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", [[30], [10, 21], []])
def test_flops_equal_what_torch_counts(name, lengths):
    model = make_model(**MODELS[name])
    _, both = counted(model, lengths)
    assert training_flops(model, text_lengths=lengths) == both


def test_left_out_patches_are_embedded_and_no_more():
    model = make_model()
    kept = torch.tensor([[0, 3, 9, 12]])
    _, both = counted(model, [10], kept=kept)
    assert training_flops(model, text_lengths=[10], kept_patches=4) == both


def test_a_transformers_tower_is_counted_from_its_matrices():
    model = make_model(shared_layers=0, text_tower=BERT_TOWER)
    assert training_flops(model, text_lengths=[10, 21]) == counted(model, [10, 21])[1]


@pytest.mark.parametrize(
    ("locked", "forward_share", "most"),
    [(["image.*"], 1, 3), (["image.*", "text.*", "shared.*"], 1, 1), (["shared.*"], 1, 3)],
)
def test_locked_parts_cost_less(locked, forward_share, most):
    model = make_model()
    whole = training_flops(model, text_lengths=[10])
    apply_locks(model, [Locked(pattern) for pattern in locked], step=0, total_steps=1)
    found = training_flops(model, text_lengths=[10])
    assert whole / 3 * forward_share <= found < whole
    if most == 1:
        assert found == pytest.approx(whole / 3)


def test_locked_layers_under_trained_ones_pass_no_gradient_and_above_them_do():
    model = make_model(image_layers=1, text_layers=1, shared_layers=1)
    apply_locks(model, [Locked("shared.*")], step=0, total_steps=1)
    shared_locked = training_flops(model, text_lengths=[])
    apply_locks(model, [Locked("image.*")], step=0, total_steps=1)
    image_locked = training_flops(model, text_lengths=[])
    apply_locks(model, [], step=0, total_steps=1)
    block = 17 * (24 * 24**2 + 4 * 17 * 24)
    whole = training_flops(model, text_lengths=[])
    assert whole - shared_locked == block  # the gradient of its weights
    assert whole - image_locked == 2 * (block + 2 * 3 * 64 * 24 * 16 + 2 * 24 * 12)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307e12),
        ("cpu", None),
        ("", None),
    ],
)
def test_peaks_are_found_by_the_names_that_torch_gives(name, peak):
    assert peak_flops_per_s(name) == peak


def test_mfu_worked_by_hand():
    assert mfu(1000.0, 156e9, "NVIDIA A100-SXM4-80GB") == pytest.approx(0.5)
    assert mfu(1000.0, 156e9, "a toaster") is None
