"""The parts of M2Encoder: how weights start, patch stems, positions of other sizes, checkpointing.

Not for the whole forward pass (test_model.py).
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m2encoder.model.architecture import Architecture
from m2encoder.model.configuration_m2encoder import M2EncoderConfig
from m2encoder.model.layers import (
    ImageTower,
    Stack,
    TextTower,
    make_patch_stem,
    resize_positions,
)
from m2encoder.model.modeling_m2encoder import M2Encoder


def make_model(**changes: Any) -> M2Encoder:
    shape: dict[str, Any] = {
        "width": 32, "num_heads": 4, "image_layers": 1, "text_layers": 1, "shared_layers": 1,
        "projection_dim": 16, "image_size": 32, "patch_size": 8, "vocab_size": 100,
        "max_text_length": 8, "text_positions": 10,
    }  # fmt: skip
    return M2Encoder(M2EncoderConfig(**{**shape, **changes}))


# ── how weights start ───────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def wide_model() -> M2Encoder:
    """Wide enough for standard deviations to tell, of three depths."""
    torch.manual_seed(0)
    return make_model(
        width=256, num_heads=4, image_layers=3, text_layers=2, shared_layers=4,
        projection_dim=256, image_size=64, vocab_size=1000, text_positions=500,
        position_init_std=0.5,
    )  # fmt: skip


def assert_uniform(weight: Tensor, gain: float) -> None:
    """weight fills U(-b, b), b = gain / sqrt(fan in): torch's default for linears, times gain."""
    bound = gain / weight.flatten(1).shape[1] ** 0.5
    assert bound * 0.99 < float(weight.detach().abs().max()) <= bound * 1.000001
    assert float(weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize(("stack", "layers"), [("image.stack", 3), ("text.stack", 2)])
def test_value_output_and_feed_forward_layers_start_wider_by_their_towers_depth(
    wide_model: M2Encoder, stack: str, layers: int
) -> None:
    _assert_sub_layer_norm_gains(wide_model.get_submodule(stack), layers)


def test_the_shared_layers_start_by_their_own_depth(wide_model: M2Encoder) -> None:
    _assert_sub_layer_norm_gains(wide_model.shared, 4)


def _assert_sub_layer_norm_gains(stack: nn.Module, layers: int) -> None:
    assert isinstance(stack, Stack)
    assert len(stack.blocks) == layers
    gain = math.sqrt(math.log(2 * layers))
    for block in stack.blocks:
        block: Any
        query, key, value = block.attention.qkv.weight.chunk(3)
        assert_uniform(query, 1)
        assert_uniform(key, 1)
        for weight in (value, block.attention.out.weight, block.ffn.fc1.weight):
            assert_uniform(weight, gain)
        assert_uniform(block.ffn.fc2.weight, gain)
        bound = gain / 256**0.5
        for bias in (block.attention.qkv.bias[512:], block.attention.out.bias, block.ffn.fc1.bias):
            assert bound * 0.9 < float(bias.detach().abs().max()) <= bound
        assert 0.9 / 16 < float(block.attention.qkv.bias[:512].detach().abs().max()) <= 1 / 16


def test_embeddings_positions_and_projections_start_as_released(wide_model: M2Encoder) -> None:
    assert isinstance(wide_model.image, ImageTower)
    assert isinstance(wide_model.text, TextTower)
    for weight, std in (
        (wide_model.text.token_embed.weight, 256**-0.5),
        (wide_model.text.positions, 0.5),
        (wide_model.image.positions, 0.5),
        (wide_model.image_projection.weight, 0.02),
        (wide_model.text_projection.weight, 0.02),
    ):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.03)
        assert abs(float(weight.detach().mean())) < std * 0.03
    assert not wide_model.image.cls_token.any()
    assert_uniform(wide_model.image.patch_embed.weight, 1)  # pyright: ignore[reportArgumentType]


def test_positions_start_at_the_released_deviation_unless_told_otherwise() -> None:
    released = make_model(text_positions=2000).text
    assert isinstance(released, TextTower)
    assert float(released.positions.detach().std()) == pytest.approx(1.0, rel=0.03)


def test_the_scale_starts_at_one_over_0_07_and_norms_at_one(wide_model: M2Encoder) -> None:
    assert float(wide_model.logit_scale.detach()) == pytest.approx(math.log(1 / 0.07))
    norms = [m for m in wide_model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 4 * (3 + 2 + 4) + 3
    for norm in norms:
        assert norm.eps == 1e-5
        assert (norm.weight == 1).all()
        assert not norm.bias.any()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in make_model().parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


# ── patch stems ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("patch", [2, 4, 8, 16])
def test_a_conv_stem_gives_the_grid_with_at_most_four_convolutions(patch: int) -> None:
    shape = Architecture(
        width=48, num_heads=4, image_size=4 * patch, patch_size=patch, patch_stem="conv"
    )
    stem = make_patch_stem(shape)
    convolutions = [module for module in stem.modules() if isinstance(module, nn.Conv2d)]
    assert 1 <= len(convolutions) <= 4
    assert stem(torch.rand(2, 3, shape.image_size, shape.image_size)).shape == (2, 48, 4, 4)
    assert isinstance(convolutions[-1], nn.Conv2d)
    assert list(stem.children())[-1] is convolutions[-1]  # no norm, no GELU after the last


def test_a_linear_stem_is_one_convolution_of_the_patchs_size() -> None:
    stem = make_patch_stem(Architecture(image_size=48, patch_size=12))
    assert isinstance(stem, nn.Conv2d)
    assert (stem.kernel_size, stem.stride, stem.padding) == ((12, 12), (12, 12), (0, 0))
    assert stem.bias is not None


@pytest.mark.parametrize("patch", [1, 3, 12, 32])
def test_a_conv_stem_refuses_patches_that_four_halvings_cannot_make(patch: int) -> None:
    with pytest.raises(ValueError, match=f"needs patch_size 2, 4, 8 or 16, found {patch}"):
        Architecture(image_size=96, patch_size=patch, patch_stem="conv")


def test_a_conv_stem_treats_every_picture_alone() -> None:
    """As a norm over the batch would not; the loss would then depend on the number of processes."""
    model = make_model(patch_stem="conv").train()
    pixels = torch.rand(4, 3, 32, 32)
    alone = torch.cat([model.encode_image(picture[None]) for picture in pixels])
    torch.testing.assert_close(model.encode_image(pixels), alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 30, "num_heads": 4}, "num_heads 4 does not divide width 30"),
        ({"image_size": 50, "patch_size": 16}, "patch_size 16 does not divide image_size 50"),
        ({"max_text_length": 1}, "max_text_length 1 must lie between 2 and text_positions 1022"),
        ({"max_text_length": 1023}, "1023 must lie between 2 and text_positions 1022"),
        ({"patch_size": 0}, "patch_size must be at least 1, found 0"),
        ({"num_heads": 0}, "num_heads must be at least 1, found 0"),
        ({"text_layers": -1}, "layer counts must not be negative"),
        ({"shared_layers": 0, "text_layers": 0}, "each tower needs at least one layer of its own"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(change: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Architecture(**change)  # pyright: ignore[reportArgumentType]


# ── positions for other picture sizes ───────────────────────────────────────────────────────────


def area_reference(table: Tensor, grid: int) -> Tensor:
    """Each new cell is the mean of the old cells that it touches: adaptive average pooling."""
    old = math.isqrt(len(table) - 1)
    cells = table[1:].reshape(old, old, -1)
    rows = [table[0]]
    for i in range(grid):
        for j in range(grid):
            top, bottom = i * old // grid, -(-(i + 1) * old // grid)
            left, right = j * old // grid, -(-(j + 1) * old // grid)
            rows.append(cells[top:bottom, left:right].flatten(0, 1).mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize("grid", [1, 2, 3, 5, 7, 8, 9])
def test_positions_are_resized_by_area_up_and_down_and_the_cls_row_is_kept(grid: int) -> None:
    table = torch.randn(1 + 4**2, 6)
    resized = resize_positions(table, grid)
    assert torch.equal(resized[0], table[0])
    torch.testing.assert_close(resized, area_reference(table, grid))


def test_positions_of_the_same_size_stay_as_they_are() -> None:
    table = torch.randn(1 + 4**2, 6)
    assert torch.equal(resize_positions(table, 4), table)


def test_positions_in_half_precision_are_averaged_in_float32() -> None:
    table = torch.randn(1 + 4**2, 6).bfloat16()
    resized = resize_positions(table, 2)
    assert resized.dtype == torch.bfloat16
    assert torch.equal(resized, area_reference(table.float(), 2).bfloat16())


@pytest.mark.parametrize("size", [16, 64, 72])
def test_a_model_takes_pictures_of_another_size_after_set_image_size(size: int) -> None:
    model = make_model().eval()
    assert isinstance(model.image, ImageTower)
    table = model.image.positions.detach().clone()
    model.set_image_size(size)
    assert model.config.architecture.grid == size // 8
    torch.testing.assert_close(model.image.positions.detach(), area_reference(table, size // 8))
    assert model.encode_image(torch.rand(1, 3, size, size)).shape == (1, 16)
    with pytest.raises(ValueError, match=rf"expected \(B, 3, {size}, {size}\)"):
        model.encode_image(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("size", [0, -8, 20])
def test_set_image_size_refuses_what_patches_cannot_tile(size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size is {size}, expected a multiple of .* 8"):
        make_model().set_image_size(size)


# ── gradient checkpointing ──────────────────────────────────────────────────────────────────────


def test_gradient_checkpointing_changes_no_gradient() -> None:
    """And it does recompute: each block runs twice, once again in the backward pass."""
    model = make_model(image_layers=2).train()
    runs = [0]
    model.shared.blocks[0].register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        out = model(torch.arange(15).view(3, 5), torch.arange(3072.0).view(1, 3, 32, 32) / 3072)
        out.logits_per_image.sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, plain_runs = gradients(), runs[0]
    switch = getattr(model, "activation_checkpointing_enable", None)  # its name since 5.23
    (switch or model.gradient_checkpointing_enable)()
    runs[0] = 0
    saved, saved_runs = gradients(), runs[0]
    assert (plain_runs, saved_runs) == (2, 4)
    assert len(plain) == len(list(model.parameters()))
    for a, b in zip(plain, saved, strict=True):
        assert torch.equal(a, b)
