"""`m2enc convert`: what it writes opens, what it cannot use gives one line and leaves nothing.

Not for the numbers (test_released.py).
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from released_model import TEXTS, small_model
from torch import Tensor

from m2encoder.cli import main
from m2encoder.convert import convert_released
from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, ConfigError
from m2encoder.load import load_model
from m2encoder.model.configuration_m2encoder import M2EncoderConfig
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.presets import preset
from m2encoder.released import extra_shapes, key_map
from m2encoder.released_config import VERSIONS, preset_of, shape_from_config, shape_from_tensors

FORMATS = Path(__file__).parent / "fixtures/official/formats"
SETTINGS = {
    "beit_version": "base", "encoder_embed_dim": 16, "out_embed_dim": 12,
    "encoder_attention_heads": 2, "encoder_layers": 1, "beit3_vl_layers": 1,
    "image_size": 32, "vocab_size": 400,
}  # fmt: skip
PICTURE = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)

POSITIONS = "backbone.encoder.embed_positions.A.weight"
Weights = dict[str, Tensor]


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A folder as it would come from a hub: checkpoint, configuration and tokenizer."""
    folder = tmp_path / "released"
    folder.mkdir()
    weights = torch.load(FORMATS / "bare.ckpt", weights_only=True)
    rows = torch.randn(SETTINGS["vocab_size"], 16, generator=torch.Generator().manual_seed(5))
    torch.save({"state_dict": {**weights, "backbone.text_embed.weight": rows}}, folder / "m.ckpt")
    (folder / "config.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    (folder / "sp.model").write_bytes(small_model())
    return folder


def test_a_converted_folder_gives_the_vectors_of_the_checkpoint(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ours"
    words = ["convert", str(released / "m.ckpt"), str(out)]
    assert main([*words, "--config", str(released / "config.json")]) == 0
    said = capsys.readouterr().out
    assert "105 tensors = 75 used + 30 kept beside + 0 dropped" in said
    assert f"model folder written: {out}" in said
    assert (out / "sp.model").read_bytes() == small_model()
    straight = load_model(released / "m.ckpt", config=released / "config.json", device="cpu")
    again = load_model(out, device="cpu")
    texts = [text for text in TEXTS if text.strip()]
    pairs = (
        (again.encode_text(texts), straight.encode_text(texts)),
        (again.encode_image([PICTURE]), straight.encode_image([PICTURE])),
    )
    for found, want in pairs:  # the same weights elsewhere in memory: sums may be ordered otherwise
        np.testing.assert_allclose(found, want, atol=1e-6, rtol=0)
    again.save_pretrained(out)  # keeps what only the released layout needs
    assert main(["convert", str(out), str(tmp_path / "back.ckpt"), "--to", "released"]) == 0
    want = torch.load(released / "m.ckpt", weights_only=True)["state_dict"]
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert back.keys() == want.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in want.items())


def test_text_normalization_is_saved_only_when_asked_for(released: Path, tmp_path: Path) -> None:
    words = ["convert", str(released / "m.ckpt"), "--config", str(released / "config.json")]
    assert main([*words, str(tmp_path / "plain")]) == 0
    assert main([*words, str(tmp_path / "low"), "--text-normalization", "lower-quotes"]) == 0
    plain, low = (load_model(tmp_path / name, device="cpu") for name in ("plain", "low"))
    assert (plain.text_normalization, low.text_normalization) == ("none", "lower-quotes")
    loud, clean = "A RED “CAT” 一只红色的猫", 'a red "cat" 一只红色的猫'
    np.testing.assert_array_equal(low.encode_text(loud), plain.encode_text(clean))
    assert np.abs(plain.encode_text(loud) - plain.encode_text(clean)).max() > 1e-3


def test_without_a_tokenizer_pictures_work_and_texts_say_why_not(
    released: Path, tmp_path: Path
) -> None:
    (released / "sp.model").unlink()
    convert_released(released / "m.ckpt", tmp_path / "ours", config=released / "config.json")
    for encoder in (
        load_model(released / "m.ckpt", config=released / "config.json", device="cpu"),
        load_model(tmp_path / "ours", device="cpu"),
    ):
        assert encoder.encode_image([PICTURE]).shape == (1, 12)
        with pytest.raises(CheckpointError, match="no tokenizer"):
            encoder.encode_text("一只猫")


# ── sizes ───────────────────────────────────────────────────────────────────────────────────────


def blank_weights(name: str, **changes: Any) -> Weights:
    """Return the released tensors of a preset without memory behind them."""
    shape = replace(preset(name), **changes)
    with torch.device("meta"):
        parameters = dict(M2Encoder(M2EncoderConfig(**vars(shape))).named_parameters())
    weights: Weights = {}
    for ours, theirs in key_map(shape).items():
        size = list(parameters[ours].shape)
        for one in theirs:
            part = [size[0] // len(theirs) + 2 * one.count("positions"), *size[1:]] if size else []
            weights[one] = torch.empty(part, device="meta")
    weights |= {n: torch.empty(s, device="meta") for n, s in extra_shapes(shape).items()}
    return weights


@pytest.mark.parametrize("name", sorted(VERSIONS.values()))
@pytest.mark.parametrize("image_size", [224, 384])
def test_released_sizes_are_known_by_their_tensors_alone(name: str, image_size: int) -> None:
    shape = shape_from_tensors(blank_weights(name, image_size=image_size), where="x.ckpt")
    assert shape == replace(preset(name), image_size=image_size)
    assert preset_of(shape) == name


@pytest.mark.parametrize(("version", "name"), VERSIONS.items())
def test_a_bare_released_configuration_means_its_preset(
    version: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"beit_version": version, "loss_names": {"itc": 1}}), "utf-8")
    assert shape_from_config(path, text_positions=1022) == preset(name)


def test_other_sizes_need_a_configuration(released: Path) -> None:
    message = r"width 16, 1 \+ 1 layers, 400 pieces\) are no released size.*config=.*--config"
    with pytest.raises(CheckpointError, match=message):
        load_model(released / "m.ckpt", device="cpu")


# ── bad input ───────────────────────────────────────────────────────────────────────────────────


def edited(edit: Callable[[Weights], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = torch.load(folder / "m.ckpt", weights_only=True)
        edit(content["state_dict"])
        torch.save(content, folder / "m.ckpt")

    return change


def configured(**changes: Any) -> Callable[[Path], Any]:
    text = json.dumps({**SETTINGS, **changes})
    return lambda folder: (folder / "config.json").write_text(text, encoding="utf-8")


def cut(folder: Path) -> None:
    (folder / "m.ckpt").write_bytes((folder / "m.ckpt").read_bytes()[:50_000])


def renamed(weights: Weights) -> None:
    for name in list(weights):
        weights[f"visual.{name}"] = weights.pop(name)


def fewer_rows(folder: Path) -> None:
    name = "backbone.text_embed.weight"
    edited(lambda w: w.update({name: w[name][:100].clone()}))(folder)
    configured(vocab_size=100)(folder)


BAD = {
    "truncated": (cut, 3, "m.ckpt: truncated at 50,000 bytes, expected a whole torch file"),
    "another model": (
        edited(renamed), 3, "no M2-Encoder checkpoint: found visual.logit_scale",
    ),
    "missing": (
        edited(lambda w: w.pop("backbone.encoder.layers.0.ffn.B.fc1.bias")), 3,
        "m.ckpt: lacks backbone.encoder.layers.0.ffn.B.fc1.bias, which the model needs",
    ),
    "misshapen": (
        configured(encoder_embed_dim=24, encoder_attention_heads=3), 3,
        "cls_token is (1, 1, 16), the configuration asks for (1, 1, 24); give the configuration",
    ),
    "extra of another shape": (
        edited(lambda w: w.update({"pooler.dense.bias": torch.ones(3)})), 3,
        "m.ckpt: pooler.dense.bias is (3,), the configuration asks for (16,)",
    ),
    "no square of patches": (
        edited(lambda w: w.update({POSITIONS: torch.ones(9, 16)})),
        3, "embed_positions.A.weight has 9 rows, expected 3 and a square number of patches",
    ),
    "no tensors": (
        lambda folder: torch.save([1, 2], folder / "m.ckpt"), 3,
        "m.ckpt: holds a list, expected a mapping of tensors by name",
    ),
    "no checkpoint": (
        lambda folder: (folder / "m.ckpt").unlink(), 3, "m.ckpt: no such model folder",
    ),
    "no version": (
        configured(beit_version="small"), 2, "beit_version is 'small', expected one of base",
    ),
    "misspelled key": (
        configured(image_sise=32), 2, "unknown key 'image_sise'; did you mean 'image_size'?",
    ),
    "no number": (
        configured(encoder_layers="9"), 2, "image_layers is '9', expected a whole number",
    ),
    "sizes that do not fit": (
        configured(encoder_attention_heads=5), 2, "num_heads 5 does not divide width 16",
    ),
    "configuration is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"), 2, "config.json: not JSON",
    ),
    "tokenizer is too large": (
        fewer_rows, 3, "pieces, the model 100 rows for them; give the sp.model that belongs to m.",
    ),
    "tokenizer is none": (
        lambda folder: (folder / "sp.model").write_bytes(b"nothing"), 3,
        "not a SentencePiece model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_what_cannot_be_converted_gives_one_line_and_leaves_nothing(
    case: str, released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, code, message = BAD[case]
    change(released)
    words = [str(released / "m.ckpt"), str(tmp_path / "ours")]
    assert main(["convert", *words, "--config", str(released / "config.json")]) == code
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.glob("ours*"))


def test_an_existing_folder_of_others_is_never_replaced(released: Path, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "ours/thesis.txt").write_text("mine", encoding="utf-8")
    words = ["convert", str(released / "m.ckpt"), str(tmp_path / "ours")]
    assert main([*words, "--config", str(released / "config.json")]) == 3
    assert (tmp_path / "ours/thesis.txt").read_text(encoding="utf-8") == "mine"


def test_config_and_tokenizer_are_for_checkpoint_files(tiny_model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="config and tokenizer serve a checkpoint file"):
        load_model(tiny_model_folder, config="config.json")


def test_a_model_with_no_place_in_the_released_layout_says_so(
    tiny_encoder: Encoder,
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["convert", str(tiny_model_folder), str(tmp_path / "back.ckpt"), "--to", "released"]
    assert tiny_encoder.model.config.patch_stem == "conv"
    assert main(words) == 3
    assert "tiny: has a convolutional patch stem" in capsys.readouterr().err
    assert not list(tmp_path.glob("back*"))


def test_a_folder_of_ours_needs_no_conversion(tiny_model_folder: Path, tmp_path: Path) -> None:
    assert main(["convert", str(tiny_model_folder), str(tmp_path / "copy")]) == 2
    assert not list(tmp_path.glob("copy*"))


def test_going_back_never_replaces_a_file(released: Path, tmp_path: Path) -> None:
    ours, back = tmp_path / "ours", released / "m.ckpt"
    convert_released(released / "m.ckpt", ours, config=released / "config.json")
    before = back.read_bytes()
    assert main(["convert", str(ours), str(back), "--to", "released"]) == 3
    assert back.read_bytes() == before


def test_a_checkpoint_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"m\.ckpt: no such checkpoint file"):
        load_model(tmp_path / "m.ckpt", tokenizer="sp.model")
