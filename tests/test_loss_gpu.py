"""The loss on a GPU: the plain matrix's values in every precision, Triton's kernels like PyTorch's.

One process; run by hand where there is a GPU: python -m pytest -m gpu tests/test_loss_gpu.py
"""

import pytest
import torch
import torch.nn.functional as F
from dense_loss import info_nce, sigmoid

from m2encoder import tiles
from m2encoder.loss import make_loss
from m2encoder.measure import peak_allocated_bytes
from m2encoder.patch_dropout import kept_patches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_inputs(rows, width, dtype, *, noise=1.0):
    """Unit-norm pairs on the GPU; less noise makes partners alike."""
    generator = torch.Generator().manual_seed(0)
    image, other = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    text = image + noise * other
    return [F.normalize(x, dim=1).to("cuda", dtype).requires_grad_() for x in (image, text)]


def gradients(loss_fn, inputs, *numbers):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    numbers = [
        torch.tensor(x, dtype=torch.float64, device="cuda").requires_grad_() for x in numbers
    ]
    loss = loss_fn(*leaves, *numbers)
    return loss.detach(), torch.autograd.grad(loss, [*leaves, *numbers])


def exact(function, inputs, *numbers):
    def on_cpu(image, text, *rest):
        return function(image.cpu(), text.cpu(), *(x.cpu() for x in rest))

    return gradients(on_cpu, [x.detach().double() for x in inputs], *numbers)


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("tile", [7, 64, None])
@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_values_and_gradients_equal_one_matrix(kind, tile, dtype, limit):
    inputs = make_inputs(150, 40, dtype)
    numbers = (14.3,) if kind == "infonce" else (14.3, -10.0)
    reference = info_nce if kind == "infonce" else sigmoid
    loss, found = gradients(make_loss(rank=0, world_size=1, kind=kind, tile=tile), inputs, *numbers)
    expected_loss, expected = exact(reference, inputs, *numbers)
    assert error(loss, expected_loss) < limit
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) < limit


@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_compared_exactly(dtype, scale):
    """Values as of the same rounded features in float64; gradients to their own precision."""
    inputs = make_inputs(3000, 256, dtype, noise=4.0)  # at scale 100 a loss of order 1
    loss, found = gradients(make_loss(rank=0, world_size=1, tile=1024), inputs, scale)
    expected_loss, expected = exact(info_nce, inputs, scale)
    assert error(loss, expected_loss) < 1e-5
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours.dtype == dtype
        assert error(ours, theirs) < (4e-3 if dtype == torch.bfloat16 else 1e-3)
    assert error(found[2], expected[2]) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_solved_batch_with_duplicates_stays_finite_at_scale_100(dtype):
    inputs = make_inputs(512, 64, dtype, noise=0.0)
    with torch.no_grad():
        for x in inputs:
            x[100:200] = x[0]
    loss, found = gradients(make_loss(rank=0, world_size=1, tile=100), inputs, 100.0)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(x).all() for x in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_and_pytorch_agree(monkeypatch, dtype):
    inputs = make_inputs(1000, 64, dtype)
    loss_fn = make_loss(rank=0, world_size=1, tile=333)
    assert tiles.fused_kernels(torch.zeros(1, device="cuda")) is not None
    loss, found = gradients(loss_fn, inputs, 50.0)
    monkeypatch.setattr(tiles, "fused_kernels", lambda _: None)
    plain_loss, plain = gradients(loss_fn, inputs, 50.0)
    assert error(loss, plain_loss.double()) < 1e-6
    for ours, theirs in zip(found, plain, strict=True):
        assert error(ours, theirs.double()) < (1e-5 if dtype == torch.float32 else 4e-3)


def test_memory_is_that_of_features_and_tiles():
    rows, width, tile = 16_384, 512, 1024
    image, text = make_inputs(rows, width, torch.float32)
    loss_fn = make_loss(rank=0, world_size=1, tile=tile)
    peak = peak_allocated_bytes(lambda: loss_fn(image, text, 14.3).backward(), "cuda")
    features, one_tile = rows * width * 4, tile * tile * 4
    assert peak < 5 * features + 4 * one_tile + 2**24
    assert peak < rows * rows * 4 / 4


def test_the_same_patches_stay_on_every_device():
    positions = torch.arange(0, 10**12, 10**10 + 1)
    settings = {"num_patches": 196, "share": 0.5, "seed": 3}
    on_cpu = kept_patches(positions, **settings)
    on_gpu = kept_patches(positions.cuda(), **settings)
    assert on_cpu is not None
    assert on_gpu is not None
    assert torch.equal(on_cpu, on_gpu.cpu())
