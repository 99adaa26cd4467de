"""open_clip's models behind the Encoder: equal to its own outputs, saved, refused.

Not for transformers' (tests/test_foreign.py). Runs in the environment that holds the peers.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_duals import clip
from tiny_models import TEXTS, pictures, randomise, wordpiece
from transformers import AutoImageProcessor

from m2encoder.compat import import_open_clip
from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, ConfigError
from m2encoder.eval.suite import evaluate
from m2encoder.foreign import is_foreign, open_foreign
from m2encoder.foreign_open_clip import CONFIG_NAME, WEIGHTS_NAME, open_open_clip
from m2encoder.foreign_transformers import PILLOW
from m2encoder.index import build_index

CPU = torch.device("cpu")
VISION = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
CLIP = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
SIGLIP = {
    "embed_dim": 32, "init_logit_bias": -10, "custom_text": True,
    "vision_cfg": {**VISION, "pool_type": "avg", "final_ln_after_pool": True},
    "text_cfg": {
        **TEXT, "vocab_size": 90, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
        "hf_tokenizer_name": "nobody/nowhere", "tokenizer_kwargs": {"clean": "canonicalize"},
    },
}  # fmt: skip
TIMM = {
    **CLIP, "vision_cfg": {
        "timm_model_name": "test_vit", "timm_model_pretrained": True, "timm_pool": "",
        "timm_proj": "linear", "image_size": 64,
    },
}  # fmt: skip
STATISTICS = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": (CLIP, {**STATISTICS, "interpolation": "bicubic", "resize_mode": "shortest"}),
    "quick_gelu": ({**CLIP, "quick_gelu": True}, {**STATISTICS, "resize_mode": "longest"}),
    "siglip": (SIGLIP, {**STATISTICS, "interpolation": "bilinear", "resize_mode": "squash"}),
    "timm": (TIMM, STATISTICS),
}


def write(folder: Path, kind: str) -> Path:
    """Write a folder as open_clip's hub repositories are."""
    model_cfg, preprocess = KINDS[kind]
    folder.mkdir(parents=True)
    about = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    (folder / CONFIG_NAME).write_text(json.dumps(about))
    if "hf_tokenizer_name" in model_cfg["text_cfg"]:
        wordpiece().save_pretrained(folder)
    cls = import_open_clip().model.CLIP
    cls = import_open_clip().CustomTextCLIP if model_cfg.get("custom_text") else cls
    settings = json.loads(json.dumps(model_cfg))
    settings.pop("custom_text", None)
    settings["vision_cfg"].pop("timm_model_pretrained", None)
    model = cls(**settings)
    randomise(model)
    from safetensors.torch import save_file

    save_file(model.state_dict(), folder / WEIGHTS_NAME, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("open_clip") / request.param, request.param)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return open_foreign(folder, device=CPU)


def own_outputs(folder: Path, texts: list[str]) -> tuple[Any, Any, Any]:
    """open_clip's own way: its factory, transform and tokenizer. Image, text, logits."""
    open_clip = import_open_clip()
    handlers = list(logging.getLogger().handlers)
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    logging.getLogger().handlers[:] = handlers
    model.eval()
    with torch.no_grad():
        image = model.encode_image(torch.stack([transform(p) for p in pictures()]), normalize=True)
        text = model.encode_text(tokenizer(texts), normalize=True)
        logits = model.logit_scale.exp() * image @ text.T
        return image, text, logits + (0 if model.logit_bias is None else model.logit_bias)


def test_vectors_are_open_clips_own(folder: Path, encoder: Encoder) -> None:
    image, text, _ = own_outputs(folder, TEXTS)
    np.testing.assert_allclose(encoder.encode_image(pictures()), image, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_text(TEXTS), text, atol=1e-6)
    assert encoder.encode_text(TEXTS).shape == (len(TEXTS), encoder.dim)
    assert np.linalg.norm(text - text[0], axis=1)[1:].min() > 1e-4  # the texts do differ
    assert np.linalg.norm(image - image[0], axis=1)[1:].min() > 1e-4
    alone = encoder.encode_text(TEXTS, batch_size=1)
    np.testing.assert_allclose(alone, text, atol=1e-6)


def test_probabilities_are_a_softmax_or_with_a_bias_a_sigmoid(
    folder: Path, encoder: Encoder
) -> None:
    labels = ["猫", "a red cat", "long"]
    logits = own_outputs(folder, labels)[2]
    found = encoder.classify(pictures(), labels, templates=["{}"])
    want = logits.sigmoid() if folder.name == "siglip" else logits.softmax(dim=1)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_long_texts_are_truncated_with_one_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = open_foreign(folder, device=CPU)
    encoder.encode_text(["a red cat!", "猫"])
    assert caplog.records == []
    encoder.encode_text(["long " * 300])
    encoder.encode_text(["long " * 300])
    assert [r.getMessage() for r in caplog.records] == [
        "a text fills all 20 tokens; longer ones lose their end"
    ]


def test_opening_sets_up_no_logging(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip logs to the root logger, which then gets a handler if it has none."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    open_foreign(folder, device=CPU)
    assert root.handlers == []
    assert root.manager.disable == logging.NOTSET


def test_pictures_of_transformers_models_go_through_pillow_beside_torchvision_too(
    tmp_path: Path,
) -> None:
    folder = clip(tmp_path / "model")
    encoder = open_foreign(folder, device=CPU)
    picture = pictures()[1]
    other = {"use_fast": True} if "use_fast" in PILLOW else {"backend": "torchvision"}
    torchvision, pillow = (
        AutoImageProcessor.from_pretrained(folder, **options)(
            images=picture, do_normalize=False, return_tensors="pt"
        )["pixel_values"][0].numpy()
        for options in (other, PILLOW)
    )
    assert np.abs(torchvision - pillow).max() > 1e-3
    np.testing.assert_array_equal(encoder.image_processor.to_pixels(picture), pillow)


def test_a_saved_model_opens_here_and_in_open_clip(
    folder: Path, encoder: Encoder, tmp_path: Path
) -> None:
    out = tmp_path / folder.name
    encoder.save_pretrained(out)
    again = open_foreign(out, device=CPU)
    image, text, _ = own_outputs(out, TEXTS)
    for found in (encoder, again):
        np.testing.assert_allclose(found.encode_image(pictures()), image, atol=1e-6)
        np.testing.assert_allclose(found.encode_text(TEXTS), text, atol=1e-6)
    assert again.fingerprint == encoder.fingerprint
    assert is_foreign(out)


def test_half_precision_is_near_and_still_float32_of_unit_norm(encoder: Encoder) -> None:
    half = open_foreign(encoder.folder, device=CPU, dtype="bfloat16")
    found, want = half.encode_text(TEXTS), encoder.encode_text(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert (found * want).sum(axis=1).min() > 0.98


def test_index_retrieval_and_zero_shot_take_it(
    encoder: Encoder, tiny_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for i, picture in enumerate(pictures()):
        picture.save(tmp_path / "photos" / f"{i}.png")
    index = build_index(encoder, tmp_path / "photos", tmp_path / "index")
    hit = index.search(encoder.encode_image(pictures()[1]), 1)[0][0]
    assert hit.name == "1.png"
    assert encoder.fingerprint in json.dumps(evaluate(encoder, tiny_shards / "test"))


# ── by name ─────────────────────────────────────────────────────────────────────────────────────


def test_a_name_with_a_file_of_weights_equals_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "clip", "clip")
    (tmp_path / "m2-test-clip.json").write_text(json.dumps(CLIP))
    import_open_clip().add_model_config(tmp_path / "m2-test-clip.json")
    by_name = open_open_clip("open-clip:m2-test-clip", device=CPU, weights=folder / WEIGHTS_NAME)
    by_folder = open_foreign(folder, device=CPU)
    np.testing.assert_allclose(by_name.encode_text(TEXTS), by_folder.encode_text(TEXTS), atol=1e-6)
    assert by_name.name == "m2-test-clip/open_clip_model"
    by_name.save_pretrained(tmp_path / "saved")
    again = open_foreign(tmp_path / "saved", device=CPU)
    np.testing.assert_allclose(again.encode_text(TEXTS), by_name.encode_text(TEXTS), atol=1e-6)
    image = by_name.encode_image(pictures())
    np.testing.assert_allclose(again.encode_image(pictures()), image, atol=1e-6)
    with pytest.raises(ConfigError, match="open_clip lists no weights for m2-test-clip"):
        open_open_clip("open-clip:m2-test-clip", device=CPU)


def test_a_name_never_gives_random_weights_and_its_errors_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "weights.safetensors"
    damaged.write_bytes(b"x" * 100)
    cases: list[tuple[str, Path | None, type[Exception], str]] = [
        ("open-clip:ViT-B-61", None, ConfigError, "has no model 'ViT-B-61'; did you mean ViT-B-16"),
        ("open-clip:ViT-B-16/nope", None, ConfigError, "no such weights, expected one of openai,"),
        ("open-clip:RN50", None, CheckpointError, "open-clip:RN50: open_clip cannot open it (Fail"),
        ("open-clip:RN50/cc12m", None, CheckpointError, "check the files, or the network"),
        ("open-clip:m2-none", damaged, ConfigError, "has no model 'm2-none'"),
        ("open-clip:RN50", damaged, CheckpointError, "open-clip:RN50: open_clip cannot open it ("),
    ]
    for spec, weights, kind, words in cases:
        with pytest.raises(kind) as caught:
            open_open_clip(spec, device=CPU, weights=weights)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


# ── damage, in one line ─────────────────────────────────────────────────────────────────────────


def _cut(name: str, size: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def _model_cfg(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        about = json.loads((folder / CONFIG_NAME).read_text())
        about["model_cfg"].update(values)
        (folder / CONFIG_NAME).write_text(json.dumps(about))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config is no JSON": (_cut(CONFIG_NAME, 30), f"{CONFIG_NAME}: damaged, expected model_cfg"),
    "no model_cfg": (lambda f: (f / CONFIG_NAME).write_text("{}"), "(KeyError: 'model_cfg')"),
    "no weights": (lambda f: (f / WEIGHTS_NAME).unlink(), f"no {WEIGHTS_NAME}, expected a folder"),
    "truncated weights": (_cut(WEIGHTS_NAME, 5000), "open_clip cannot open it ("),
    "another width": (_model_cfg(embed_dim=24), "open_clip cannot open it (Error(s) in loading"),
    "no tokenizer": (
        lambda f: (f / "tokenizer_config.json").unlink(),
        f"no tokenizer_config.json, but {CONFIG_NAME} needs it",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_one_line(what: str, tmp_path: Path) -> None:
    change, words = DAMAGE[what]
    folder = write(tmp_path / "model", "siglip")
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        open_foreign(folder, device=CPU)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_a_text_tower_of_transformers_cannot_be_saved(tmp_path: Path) -> None:
    encoder = open_foreign(write(tmp_path / "model", "clip"), device=CPU)
    encoder.model.config["text_cfg"]["hf_model_name"] = "xlm-roberta-base"
    with pytest.raises(CheckpointError, match="its text tower xlm-roberta-base is built from"):
        encoder.save_pretrained(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing half-written
