"""M2Encoder: equal to an obvious slow reference, and what follows from it.

Not for the released code's outputs (test_released.py), its parts (test_layers.py), sizes
(test_presets.py) or opening folders (test_load.py).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from m2encoder.model.configuration_m2encoder import M2EncoderConfig
from m2encoder.model.modeling_m2encoder import M2Encoder, mask_up_to_end

END = 3
SHAPE: dict[str, Any] = {
    "width": 24, "num_heads": 3, "image_layers": 2, "text_layers": 1, "shared_layers": 2,
    "projection_dim": 10, "image_size": 16, "patch_size": 8, "vocab_size": 50,
    "max_text_length": 8, "text_positions": 12,
}  # fmt: skip

Weights = dict[str, np.ndarray]


def make_model(**changes: Any) -> M2Encoder:
    """Return a small model whose every parameter is random: nothing skipped stays unseen."""
    model = M2Encoder(M2EncoderConfig(**{**SHAPE, **changes})).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def some_pixels(count: int = 3, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def some_texts() -> tuple[Tensor, Tensor]:
    """Return ids and mask of four texts of 5, 2, 7 and 3 tokens."""
    ids = torch.randint(4, 50, (4, 7), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 2
    mask = (torch.arange(7) < torch.tensor([5, 2, 7, 3])[:, None]).long()
    ids[torch.arange(4), mask.sum(1) - 1] = END
    return ids * mask, mask


# ── the reference: one picture or text at a time, one head at a time, in float64 ────────────────


def layer_norm(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    spread = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    return (x - x.mean(axis=-1, keepdims=True)) / spread * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def reference_block(x: np.ndarray, w: Weights, name: str, heads: int) -> np.ndarray:
    """x: (L, D), real tokens only."""
    query, key, value = np.split(
        linear(layer_norm(x, w, f"{name}.attention_norm"), w, f"{name}.attention.qkv"), 3, axis=1
    )
    size = x.shape[1] // heads
    mixed = np.zeros_like(x)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for row in range(len(x)):
            odds = np.exp(key[:, part] @ query[row, part] / math.sqrt(size))
            mixed[row, part] = (odds / odds.sum()) @ value[:, part]
    mixed = layer_norm(mixed, w, f"{name}.attention.inner_norm")
    x = x + linear(mixed, w, f"{name}.attention.out")
    wide = linear(layer_norm(x, w, f"{name}.ffn_norm"), w, f"{name}.ffn.fc1")
    wide = wide * 0.5 * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
    return x + linear(layer_norm(wide, w, f"{name}.ffn.inner_norm"), w, f"{name}.ffn.fc2")


def reference_stack(x: np.ndarray, w: Weights, name: str, layers: int) -> np.ndarray:
    for layer in range(layers):
        x = reference_block(x, w, f"{name}.blocks.{layer}", SHAPE["num_heads"])
    return layer_norm(x, w, f"{name}.norm") if layers else x


def reference_image(pixels: np.ndarray, w: Weights, config: M2EncoderConfig) -> np.ndarray:
    """pixels: (3, S, S) in 0..1. Returns (P,), not normalised."""
    shape, patch = config.architecture, config.architecture.patch_size
    rows = [w["image.cls_token"][0, 0]]
    for top in range(0, shape.image_size, patch):
        for left in range(0, shape.image_size, patch):
            cut = pixels[:, top : top + patch, left : left + patch].copy()
            for channel in range(3):
                cut[channel] = (cut[channel] - config.image_mean[channel]) / config.image_std[
                    channel
                ]
            kernel = w["image.patch_embed.weight"].reshape(shape.width, -1)
            rows.append(kernel @ cut.ravel() + w["image.patch_embed.bias"])
    x = np.stack(rows) + w["image.positions"]
    x = reference_stack(x, w, "image.stack", shape.image_layers)
    x = reference_stack(x, w, "shared", shape.shared_layers)
    return w["image_projection.weight"] @ x[0]


def reference_text(ids: list[int], w: Weights, config: M2EncoderConfig) -> np.ndarray:
    """ids: real tokens only. Returns (P,), not normalised."""
    shape = config.architecture
    x = np.stack([w["text.token_embed.weight"][i] for i in ids]) + w["text.positions"][: len(ids)]
    x = reference_stack(x, w, "text.stack", shape.text_layers)
    x = reference_stack(x, w, "shared", shape.shared_layers)
    return w["text_projection.weight"] @ x[0]


@pytest.mark.parametrize("shared_layers", [0, 1, 2])
def test_both_towers_equal_an_obvious_slow_reference(shared_layers: int) -> None:
    statistics = {"image_mean": (0.48, 0.46, 0.41), "image_std": (0.27, 0.26, 0.28)}
    model = make_model(shared_layers=shared_layers, **statistics).double()
    w = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    config = model.config
    assert isinstance(config, M2EncoderConfig)
    pixels, (ids, mask) = some_pixels().double(), some_texts()
    with torch.no_grad():
        image = model.get_image_features(pixels).pooler_output
        text = model.get_text_features(ids, mask).pooler_output
    want = [reference_image(picture, w, config) for picture in pixels.numpy()]
    np.testing.assert_allclose(np.asarray(image), want, atol=1e-12)  # float64 on both sides
    real = [row[:length].tolist() for row, length in zip(ids, mask.sum(1), strict=True)]
    want = [reference_text(row, w, config) for row in real]
    np.testing.assert_allclose(np.asarray(text), want, atol=1e-12)


def test_vectors_are_the_features_at_unit_norm_in_float32() -> None:
    model, (ids, mask) = make_model(), some_texts()
    with torch.no_grad():
        pairs = (
            (model.encode_image(some_pixels()), model.get_image_features(some_pixels())),
            (model.encode_text(ids, mask), model.get_text_features(ids, mask)),
        )
    for vectors, features in pairs:
        raw = features.pooler_output
        assert raw is not None
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
        torch.testing.assert_close(vectors * raw.norm(dim=1, keepdim=True), raw)


# ── shared layers ───────────────────────────────────────────────────────────────────────────────


def vectors_of(model: M2Encoder) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model.encode_image(some_pixels()), model.encode_text(*some_texts())


def moved_by(model: M2Encoder, name: str) -> tuple[bool, bool]:
    """Return whether picture and text vectors move when the parameter `name` does."""
    image, text = vectors_of(model)
    parameter = model.get_parameter(name)
    with torch.no_grad():
        parameter.add_(torch.randn_like(parameter))
    new_image, new_text = vectors_of(model)
    return not torch.equal(image, new_image), not torch.equal(text, new_text)


def test_a_shared_weight_moves_both_towers_and_an_own_weight_one() -> None:
    model = make_model()
    first = "blocks.0.ffn.fc1.weight"
    for name, expected in (
        (f"shared.{first}", (True, True)),
        ("shared.norm.bias", (True, True)),
        (f"image.stack.{first}", (True, False)),
        (f"text.stack.{first}", (False, True)),
    ):
        assert moved_by(model, name) == expected, name


def test_both_towers_give_gradients_to_the_shared_layers() -> None:
    model = make_model()
    grads = []
    for vectors in (model.encode_image(some_pixels()), model.encode_text(*some_texts())):
        model.zero_grad()
        vectors[:, 0].sum().backward()
        grads.append([p.grad for p in model.shared.parameters()])
    assert all(g is not None and g.abs().sum() > 0 for side in grads for g in side)


def test_without_shared_layers_no_weight_serves_both_towers() -> None:
    model = make_model(shared_layers=0)
    assert list(model.shared.parameters()) == []
    assert isinstance(model.shared.norm, torch.nn.Identity)
    for name, _ in list(model.named_parameters()):
        expected = (name.startswith("image"), name.startswith("text"))
        assert moved_by(model, name) == expected, name


# ── padding and masks ───────────────────────────────────────────────────────────────────────────


def test_padding_never_changes_a_texts_vector() -> None:
    model, (ids, mask) = make_model(), some_texts()
    with torch.no_grad():
        want = model.encode_text(ids, mask)
        filled = torch.where(mask.bool(), ids, torch.randint(0, 50, ids.shape))
        assert not torch.equal(filled, ids)
        # Masked keys have weight zero, so nothing but the order of sums may differ: float32 noise.
        torch.testing.assert_close(model.encode_text(filled, mask), want, atol=1e-6, rtol=0)
        longer = torch.nn.functional.pad(ids, (0, 5), value=9)
        longer_mask = torch.nn.functional.pad(mask, (0, 5))
        torch.testing.assert_close(model.encode_text(longer, longer_mask), want, atol=1e-6, rtol=0)
        for row in range(len(ids)):
            alone = model.encode_text(ids[row : row + 1, : int(mask[row].sum())])
            torch.testing.assert_close(alone[0], want[row], atol=1e-6, rtol=0)


def test_a_mask_is_derived_from_ids_up_to_the_first_end_token() -> None:
    ids = torch.tensor([[2, 7, 3, 3, 3], [2, 3, 9, 3, 0], [2, 7, 8, 9, 5], [3, 2, 2, 2, 2]])
    want = [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert mask_up_to_end(ids, END).tolist() == want


@pytest.mark.parametrize("filler", [0, END, 17])
def test_a_derived_mask_gives_the_vectors_of_a_given_one(filler: int) -> None:
    model, (ids, mask) = make_model(), some_texts()
    ids = ids + (1 - mask) * filler
    with torch.no_grad():
        assert torch.equal(model.encode_text(ids), model.encode_text(ids, mask))


def test_a_mask_may_be_bool_int_or_float() -> None:
    model, (ids, mask) = make_model(), some_texts()
    with torch.no_grad():
        want = model.encode_text(ids, mask)
        for other in (mask.bool(), mask.float(), mask.to(torch.uint8)):
            assert torch.equal(model.encode_text(ids, other), want)


# ── outputs and bad shapes ──────────────────────────────────────────────────────────────────────


def test_logits_are_the_exponential_of_the_scale_times_the_cosine() -> None:
    model, (ids, mask) = make_model(), some_texts()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(20))
        out = model(input_ids=ids, pixel_values=some_pixels(), attention_mask=mask)
        image, text = model.encode_image(some_pixels()), model.encode_text(ids, mask)
    assert torch.equal(out.image_embeds, image)
    assert torch.equal(out.text_embeds, text)
    cosine = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(out.logits_per_image, 20 * cosine, atol=2e-5, rtol=0)
    assert torch.equal(out.logits_per_text, out.logits_per_image.T)


def test_one_modality_alone_fills_its_own_fields_only() -> None:
    model, (ids, mask) = make_model(), some_texts()
    with torch.no_grad():
        text = model(input_ids=ids, attention_mask=mask)
        image = model(pixel_values=some_pixels())
    assert list(text.keys()) == ["text_embeds"]
    assert list(image.keys()) == ["image_embeds"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.encode_image(torch.zeros(2, 3, 16, 8)), "are (2, 3, 16, 8), expected (B, 3, "),
        (lambda m: m.encode_image(torch.zeros(2, 1, 16, 16)), "expected (B, 3, 16, 16)"),
        (lambda m: m.encode_image(torch.zeros(3, 16, 16)), "pixel_values are (3, 16, 16)"),
        (lambda m: m.encode_text(torch.zeros(2, 13).long()), "(2, 13), expected (M, L) with L at"),
        (lambda m: m.encode_text(torch.zeros(5).long()), "input_ids are (5,), expected (M, L)"),
        (lambda m: m.encode_text(torch.zeros(2, 5).long(), torch.ones(2, 4)), "attention_mask is"),
        (lambda m: m.encode_text(torch.zeros(2, 5).long(), torch.ones(5)), "is (5,), expected the"),
    ],
)
def test_a_bad_shape_is_a_value_error_with_found_and_expected(
    call: Callable[[M2Encoder], Any], words: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - its words are compared below
        call(make_model())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_tower_alone_refuses_the_other_and_says_how_to_load_it() -> None:
    with pytest.raises(ValueError, match="towers='image'; load it with towers='both'"):
        make_model(towers="image").encode_text(some_texts()[0])
    with pytest.raises(ValueError, match="towers='text'; load it with towers='both'"):
        make_model(towers="text").encode_image(some_pixels())
