"""Dual encoders of transformers behind the Encoder: equal to the library's own outputs.

Not for open_clip's (tests/peers/test_foreign_open_clip.py).
"""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from tiny_duals import altclip, chinese_clip, clip, metaclip_2, siglip
from tiny_models import TEXTS, pictures
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
)

from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, ConfigError, DataError
from m2encoder.eval.suite import evaluate
from m2encoder.foreign import is_foreign, open_foreign, save_foreign
from m2encoder.foreign_transformers import PILLOW
from m2encoder.index import ImageIndex, build_index

CPU = torch.device("cpu")
FAMILIES: dict[str, Callable[[Path], Path]] = {
    function.__name__: function for function in (clip, chinese_clip, siglip, altclip, metaclip_2)
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp("foreign") / request.param)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return open_foreign(folder, device=CPU)


def own_outputs(folder: Path, texts: list[str]) -> Any:
    """What the library itself gives: its processors, its whole forward pass, one batch."""
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, **PILLOW)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    siglip_like = folder.name == "siglip"
    limit = 22 if folder.name == "altclip" else 24
    given = tokenizer(
        texts, padding="max_length" if siglip_like else True, truncation=True, max_length=limit,
        return_tensors="pt",
    )  # fmt: skip
    names = ["input_ids"] if siglip_like else ["input_ids", "attention_mask"]
    given = {name: given[name] for name in names}
    pixels = processor(images=pictures(), return_tensors="pt")
    with torch.no_grad():
        return model(**given, **pixels)


# ── equal to the library ────────────────────────────────────────────────────────────────────────


def test_vectors_and_logits_are_the_librarys_own(folder: Path, encoder: Encoder) -> None:
    own = own_outputs(folder, TEXTS)
    image, text = encoder.encode_image(pictures()), encoder.encode_text(TEXTS)
    np.testing.assert_allclose(image, own.image_embeds, atol=1e-6)
    np.testing.assert_allclose(text, own.text_embeds, atol=1e-6)
    assert (image.shape, image.dtype) == ((3, encoder.dim), np.float32)
    bias = 0 if folder.name != "siglip" else float(encoder.model.logit_bias)
    logits = encoder.logit_scale * encoder.similarity(image, text) + bias
    np.testing.assert_allclose(logits, own.logits_per_image, rtol=1e-5, atol=1e-4)
    assert np.linalg.norm(text - text[0], axis=1)[1:].min() > 1e-4  # the texts do differ
    assert np.linalg.norm(image - image[0], axis=1)[1:].min() > 1e-4


def test_batches_and_order_change_nothing(encoder: Encoder) -> None:
    want = encoder.encode_text(TEXTS)
    np.testing.assert_allclose(encoder.encode_text(TEXTS, batch_size=1), want, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_text(TEXTS[::-1]), want[::-1], atol=1e-6)
    image = encoder.encode_image(pictures(), batch_size=1)
    np.testing.assert_allclose(encoder.encode_image(pictures()), image, atol=1e-6)


def test_texts_are_always_truncated_with_one_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = open_foreign(folder, device=CPU)
    encoder.encode_text(["a red cat", "猫"])
    assert caplog.records == []
    long, longer = encoder.encode_text(["long " * 30, "long " * 3000])
    np.testing.assert_allclose(long, longer, atol=1e-6)
    limit = 22 if folder.name == "altclip" else 24
    assert [r.getMessage() for r in caplog.records] == [
        f"a text fills all {limit} tokens; longer ones lose their end"
    ]
    with pytest.raises(DataError, match="text 0: empty"):
        encoder.encode_text("")


def test_probabilities_are_a_softmax_or_for_siglip_a_sigmoid_with_its_bias(
    folder: Path, encoder: Encoder
) -> None:
    labels = ["猫", "a red cat", "long"]
    own = own_outputs(folder, labels).logits_per_image
    found = encoder.classify(pictures(), labels, templates=["{}"])
    want = own.sigmoid() if folder.name == "siglip" else own.softmax(dim=1)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_half_precision_is_near_and_still_float32_of_unit_norm(
    folder: Path, encoder: Encoder
) -> None:
    half = open_foreign(folder, device=CPU, dtype="bfloat16")
    for found, want in (
        (half.encode_text(TEXTS), encoder.encode_text(TEXTS)),
        (half.encode_image(pictures()), encoder.encode_image(pictures())),
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        assert (found * want).sum(axis=1).min() > 0.98  # 8 bits of mantissa, large random weights
        assert not np.array_equal(found, want)


# ── saving, fingerprints ────────────────────────────────────────────────────────────────────────


def test_a_saved_model_opens_here_and_in_transformers(
    folder: Path, encoder: Encoder, tmp_path: Path
) -> None:
    out = tmp_path / folder.name
    encoder.save_pretrained(out)
    assert not [path for path in out.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    again = open_foreign(out, device=CPU)
    np.testing.assert_allclose(again.encode_text(TEXTS), encoder.encode_text(TEXTS), atol=1e-6)
    image = encoder.encode_image(pictures())
    np.testing.assert_allclose(again.encode_image(pictures()), image, atol=1e-6)
    assert again.fingerprint == encoder.fingerprint
    own = own_outputs(out, TEXTS)
    np.testing.assert_allclose(encoder.encode_text(TEXTS), own.text_embeds, atol=1e-6)
    assert is_foreign(out)


def test_a_fingerprint_follows_weights_and_settings(tmp_path: Path) -> None:
    folder = clip(tmp_path / "model")
    seen = {open_foreign(folder, device=CPU).fingerprint}
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert open_foreign(copy, device=CPU).fingerprint in seen
    for name, values in (
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"resample": 2}),
        ("tokenizer_config.json", {"truncation_side": "left"}),
    ):
        content = json.loads((copy / name).read_text(encoding="utf-8"))
        (copy / name).write_text(json.dumps({**content, **values}), encoding="utf-8")
        found = open_foreign(copy, device=CPU).fingerprint
        assert found not in seen
        seen.add(found)


def test_text_normalisation_can_be_set(tmp_path: Path) -> None:
    encoder = open_foreign(clip(tmp_path / "model"), device=CPU)
    assert encoder.text_normalization == "none"
    before = encoder.fingerprint
    encoder.text_normalization = "lower-quotes"
    assert encoder.fingerprint != before
    encoder.save_pretrained(tmp_path / "again")
    again = open_foreign(tmp_path / "again", device=CPU)
    assert again.text_normalization == "lower-quotes"


# ── a slow tokenizer ────────────────────────────────────────────────────────────────────────────


def siglip_with_sentencepiece(tmp_path: Path) -> Path:
    folder = siglip(tmp_path / "siglip")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["一只红色的猫 a red cat long words 繁體中文"] * 50),
        model_prefix=str(folder / "spiece"), vocab_size=80, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    settings = {"tokenizer_class": "SiglipTokenizer", "model_max_length": 24, "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.skipif(find_spec("google") is not None, reason="protobuf is installed")
def test_siglips_sentencepiece_tokenizer_names_what_transformers_lacks(tmp_path: Path) -> None:
    folder = siglip_with_sentencepiece(tmp_path)
    with pytest.raises(CheckpointError, match=r"install it with: pip install protobuf$") as caught:
        open_foreign(folder, device=CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(find_spec("google") is None, reason="protobuf is not installed")
def test_siglips_sentencepiece_tokenizer_is_used_as_it_is(tmp_path: Path) -> None:
    """It lower-cases, drops punctuation and pads with its end token."""
    folder = siglip_with_sentencepiece(tmp_path)
    encoder = open_foreign(folder, device=CPU)
    own = own_outputs(folder, TEXTS)
    np.testing.assert_allclose(encoder.encode_text(TEXTS), own.text_embeds, atol=1e-6)
    same = encoder.encode_text(["A Red Cat!", "a red cat"])
    np.testing.assert_allclose(same[0], same[1], atol=1e-6)
    encoder.save_pretrained(tmp_path / "again")
    again = open_foreign(tmp_path / "again", device=CPU)
    np.testing.assert_allclose(again.encode_text(TEXTS), encoder.encode_text(TEXTS), atol=1e-6)
    assert again.fingerprint == encoder.fingerprint
    assert encoder.text_normalization == "none"
    with pytest.raises(ConfigError, match="takes no text normalisation 'lower-quotes'"):
        encoder.text_normalization = "lower-quotes"


# ── the project's tools ─────────────────────────────────────────────────────────────────────────


def test_index_search_retrieval_and_zero_shot_take_a_foreign_model(
    encoder: Encoder, tiny_shards: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, picture in enumerate(pictures()):
        picture.save(photos / f"{i} 猫.png")
    built = build_index(encoder, photos, tmp_path / "index")
    opened = ImageIndex.open(tmp_path / "index", encoder=encoder)
    for i, picture in enumerate(pictures()):
        hit = opened.search(encoder.encode_image(picture), 1)[0][0]
        assert hit.name == f"{i} 猫.png"
        assert hit.score == pytest.approx(1, abs=1e-5)
    assert built.meta.dim == encoder.dim
    results = json.dumps(evaluate(encoder, tiny_shards / "test"))
    assert encoder.fingerprint in results
    assert "top1" in results


# ── damage, in one line ─────────────────────────────────────────────────────────────────────────


def _set(name: str, **values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**content, **values}), encoding="utf-8")

    return change


def _without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20_000])


def _drop_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["logit_scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unknown kind": (
        _set("config.json", model_type="blip"),
        "model_type is 'blip', expected m2_encoder or one of clip, chinese_clip, siglip, altclip,",
    ),
    "naflex": (_set("config.json", model_type="siglip2"), "model_type is 'siglip2', expected"),
    "no config": (lambda f: (f / "config.json").unlink(), "neither config.json with a model_type"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: damaged ("),
    "no tokenizer": (
        _without_tokenizer,
        "(no tokenizer, expected one of tokenizer.json, vocab.txt",
    ),
    "no picture settings": (
        lambda f: (f / "preprocessor_config.json").unlink(),
        "cannot open this clip model (",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot open this clip model ("),
    "truncated weights": (_cut_weights, "cannot open this clip model ("),
    "a missing weight": (
        _drop_weight,
        "cannot open this clip model (the weights lack logit_scale)",
    ),
    "two picture sizes": (
        _set("preprocessor_config.json", crop_size={"height": 64, "width": 64}),
        "makes pictures of 64 pixels, config.json expects 32; were they saved together?",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_one_line(
    what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, words = DAMAGE[what]
    folder = clip(tmp_path / "model")
    change(folder)
    capfd.readouterr()
    with pytest.raises(CheckpointError) as caught:
        open_foreign(folder, device=CPU)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_our_own_folders_are_not_foreign(tiny_model_folder: Path, tiny_encoder: Encoder) -> None:
    assert not is_foreign(tiny_model_folder)
    with pytest.raises(CheckpointError, match="M2Encoder is our own model"):
        save_foreign(tiny_encoder, tiny_model_folder.parent / "new")


def test_saving_never_replaces_files(tmp_path: Path) -> None:
    encoder = open_foreign(clip(tmp_path / "model"), device=CPU)
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    with pytest.raises(DataError, match="model: holds files, expected a new folder"):
        encoder.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_exif_is_left_to_the_models_own_processor(tmp_path: Path) -> None:
    """transformers ignores it, and so does the encoder; search turns pictures upright itself."""
    encoder = open_foreign(clip(tmp_path / "model"), device=CPU)
    picture, exif = pictures()[0], Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    found = encoder.encode_image([tmp_path / "turned.png", picture])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
