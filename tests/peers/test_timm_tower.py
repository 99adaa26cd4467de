"""timm image towers in M2Encoder: equal to timm's own pooled features, saved, resized, trained.

Not for text towers (tests/test_towers.py). Runs in the environment that holds the peers.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import TEXTS, pictures, wordpiece
from transformers import BertConfig, BertModel

from m2encoder.batch import Batch, Captions
from m2encoder.compat import import_timm
from m2encoder.config import Objective
from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, ConfigError
from m2encoder.load import load_model
from m2encoder.loss import make_loss
from m2encoder.model.architecture import Architecture
from m2encoder.model_folder import save_model_folder
from m2encoder.towers import build_encoder
from m2encoder.training_step import StepSettings, Towers, backward_step

OWN_TEXT = Architecture(
    width=24, num_heads=3, image_layers=1, text_layers=1, shared_layers=0, max_text_length=20
)
MODELS: dict[str, dict[str, Any]] = {
    "test_vit": {"img_size": 64},
    "test_vit3": {},  # mean pooling, other statistics
    "test_resnet": {},  # BatchNorm: buffers that are saved
    "test_efficientnet": {},  # the width before the classifier is not the trunk's
    "mobilenetv3_small_050": {},
    "swin_tiny_patch4_window7_224": {  # tables that are computed, not saved
        "img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2),
    },
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 1},  # rotary positions, never saved
}  # fmt: skip


def build(name: str, options: dict[str, Any]) -> Encoder:
    torch.manual_seed(0)
    encoder = build_encoder(
        image=f"timm:{name}", text=OWN_TEXT, tokenizer=wordpiece(max_length=20),
        image_options=options, pretrained=False, projection_dim=16,
    )  # fmt: skip
    with torch.no_grad():  # timm starts some layers at zero: nothing that is skipped stays unseen
        for parameter in encoder.model.image.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return encoder


@pytest.fixture(params=MODELS)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return build(request.param, MODELS[request.param])


def expected(encoder: Encoder) -> np.ndarray:
    """timm's own model with the same weights, its own statistics, our pixels, the projection."""
    timm = import_timm()
    tower = encoder.model.config.image_tower
    model = timm.create_model(tower["name"], num_classes=0, **tower["options"]).eval()
    size = encoder.model.config.image_size
    created_for = tower["options"].get("img_size", model.pretrained_cfg["input_size"][1])
    if size != created_for and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    model.load_state_dict(encoder.model.image.model.state_dict())
    data = timm.data.resolve_model_data_config(model)
    pixels = np.stack([encoder.image_processor.to_pixels(picture) for picture in pictures()])
    mean, std = (np.float32(data[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        features = encoder.model.image_projection(model(torch.from_numpy((pixels - mean) / std)))
    return torch.nn.functional.normalize(features).numpy()


def assert_equal(a: Encoder, b: Encoder) -> None:
    """Same weights in other places of memory: sums may differ by float32 noise."""
    np.testing.assert_allclose(a.encode_image(pictures()), b.encode_image(pictures()), atol=1e-6)
    np.testing.assert_allclose(a.encode_text(TEXTS), b.encode_text(TEXTS), atol=1e-6)


def test_vectors_are_timms_own_features_projected(encoder: Encoder) -> None:
    found = encoder.encode_image(pictures())
    want = expected(encoder)
    np.testing.assert_allclose(found, want, atol=1e-6)
    assert np.linalg.norm(want - want[0], axis=1)[1:].min() > 1e-5  # the pictures do differ


def test_a_saved_encoder_opens_offline_and_gives_equal_vectors(
    encoder: Encoder, tmp_path: Path
) -> None:
    save_model_folder(encoder, tmp_path / "model")
    again = load_model(tmp_path / "model", device="cpu")
    assert_equal(again, encoder)
    assert again.fingerprint == encoder.fingerprint
    buffers = dict(encoder.model.named_buffers())
    for name, buffer in again.model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.filterwarnings("ignore::UserWarning")  # Swin resizes in old ways
def test_another_picture_size_is_timms_to_take(encoder: Encoder, tmp_path: Path) -> None:
    size = 2 * encoder.model.config.image_size
    encoder.model.set_image_size(size)
    encoder.image_processor.size_px = size
    found = encoder.encode_image(pictures())
    np.testing.assert_allclose(found, expected(encoder), atol=1e-6)
    save_model_folder(encoder, tmp_path / "model")
    again = load_model(tmp_path / "model", device="cpu")
    assert_equal(again, encoder)


def test_a_size_that_timm_cannot_take_is_one_line() -> None:
    too_small = r"^timm's test_vit takes no pictures of 8 pixels \("
    one_size = "^timm's gmixer_12_224 takes pictures of one size, not 96 pixels$"
    cases = [("test_vit", {"img_size": 64}, 8, too_small), ("gmixer_12_224", {}, 96, one_size)]
    for name, options, size, words in cases:
        encoder = build(name, options)
        before = encoder.model.config.image_size
        with pytest.raises(ValueError, match=words) as caught:
            encoder.model.set_image_size(size)
        assert "\n" not in str(caught.value)
        assert encoder.model.config.image_size == before


def test_timm_starts_its_own_way() -> None:
    """Not as transformers would start every linear layer."""
    timm = import_timm()
    torch.manual_seed(3)
    encoder = build_encoder(
        image="timm:test_vit", text=OWN_TEXT, tokenizer=wordpiece(), pretrained=False
    )
    torch.manual_seed(3)
    fresh = timm.create_model("test_vit", num_classes=0)
    for name, tensor in encoder.model.image.model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


def test_timm_and_transformers_together_train(tmp_path: Path) -> None:
    bert = BertConfig(
        vocab_size=80, hidden_size=32, intermediate_size=64, max_position_embeddings=40,
        num_hidden_layers=1, num_attention_heads=2, hidden_dropout_prob=0,
    )  # fmt: skip
    folder = tiny_models.save(tmp_path / "text", BertModel(bert), wordpiece())
    torch.manual_seed(0)
    encoder = build_encoder(
        image="timm:test_vit", text=folder, image_options={"img_size": 32}, pretrained=False
    )
    given = encoder.tokenizer(
        ["一只猫", "a red cat", "long", "繁體"], padding=True, return_tensors="pt"
    )
    pixels = torch.randint(0, 256, (4, 3, 1, 1), dtype=torch.uint8).expand(4, 3, 32, 32)
    rows = torch.arange(4)
    captions = Captions(given["input_ids"], given["attention_mask"], rows, keys=rows)
    batch = Batch(pixels, {"zh": captions}, ["a", "b", "c", "d"], positions=rows)
    model = encoder.model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers 5.23 prefers a name that 4.57 lacks
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.image.model.grad_checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = StepSettings([Objective("image-zh")], make_loss(rank=0, world_size=1))
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        losses.append(backward_step(Towers(model), batch, settings).total.item())
        optimizer.step()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert losses[-1] < 0.5 * losses[0]
    save_model_folder(encoder, tmp_path / "model")
    encoder.model.eval()
    again = load_model(tmp_path / "model", device="cpu")
    assert_equal(again, encoder)


def test_a_model_on_the_meta_device_has_no_weights_but_is_described() -> None:
    from m2encoder.model.modeling_m2encoder import M2Encoder

    config = build("test_vit", {}).model.config
    with torch.device("meta"):
        model = M2Encoder(config)
    assert model.image_projection.weight.is_meta
    assert model.image_projection.in_features == 64


FRESH_PROCESS = """
import sys
sys.modules["timm"] = None  # as where it is not installed
sys.modules["m2encoder"] = None
from transformers import AutoModel
try:
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    print(str(error).strip())
"""


def test_without_timm_transformers_says_what_to_install(tmp_path: Path) -> None:
    save_model_folder(build("test_vit", {}), tmp_path / "model")
    ran = subprocess.run(
        [sys.executable, "-c", MEND + FRESH_PROCESS, tmp_path / "model"],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert ran.stdout.startswith(
        "the image tower test_vit needs timm, which cannot be imported ("
    ), ran.stderr
    assert ran.stdout.endswith("install it with: pip install timm\n")
    assert ran.stdout.count("\n") == 1


OWN_PROCESS = """
import sys
import numpy as np
from m2encoder import load_model
encoder = load_model(sys.argv[1], device="cpu")
np.save(sys.argv[2], encoder.encode_text(["一只红色的猫"]))
"""


def test_a_process_of_its_own_opens_it_beside_a_torchvision_that_does_not_load(
    tmp_path: Path,
) -> None:
    encoder = build("test_vit", {})
    save_model_folder(encoder, tmp_path / "model")
    given = [tmp_path / "model", tmp_path / "found.npy"]
    subprocess.run([sys.executable, "-c", OWN_PROCESS, *given], check=True, capture_output=True)
    found, want = np.load(tmp_path / "found.npy"), encoder.encode_text(["一只红色的猫"])
    np.testing.assert_allclose(found, want, atol=1e-6)


MEND = """
from m2encoder.compat import mend_torchvision
mend_torchvision()
"""


def test_what_timm_does_not_know_is_one_line() -> None:
    cases: list[tuple[str, dict[str, Any], bool, type[Exception], str]] = [
        (
            "timm:no_such_model",
            {},
            False,
            ConfigError,
            "has no model 'no_such_model'; see timm.list",
        ),
        ("timm:test_resnet", {"img_size": 64}, False, ConfigError, "timm cannot build test_resnet"),
        (
            "timm:test_vit",
            {},
            True,
            CheckpointError,
            "timm:test_vit: timm cannot load its weights (",
        ),
    ]
    for image, options, pretrained, kind, words in cases:
        with pytest.raises(kind) as caught:
            build_encoder(
                image=image, text=OWN_TEXT, tokenizer=wordpiece(), image_options=options,
                pretrained=pretrained,
            )  # fmt: skip
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
