"""Writing model folders: complete or not at all, never over other files, in the saved precision.

Not for who opens them (test_load.py, test_consumers.py).
"""

import json
import resource
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, DataError, MissingExtraError
from m2encoder.load import load_model
from m2encoder.model.configuration_m2encoder import Towers
from m2encoder.model_folder import save_model_folder

TEXTS = ["一只红色的猫", "繁體", "a red cat", "Ｆｕｌｌ", "👨‍👩‍👧‍👦", "猫", "long 长文 " * 700]
PICTURE = Image.fromarray(
    np.arange(3 * 40 * 30, dtype=np.uint32).astype(np.uint8).reshape(30, 40, 3)
)


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "模型"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ── complete or not at all ──────────────────────────────────────────────────────────────────────


def test_saving_again_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    encoder = load_model(folder, device="cpu")
    encoder.encode_text(TEXTS)  # leaves padding and truncation set in the tokenizer
    save_model_folder(encoder, tmp_path / "again")
    again, before = files_of(tmp_path / "again"), files_of(folder)
    assert again.keys() == before.keys()
    changed = {name for name in again if again[name] != before[name]}
    # the card's title; and transformers notes how the tokenizer was opened
    assert changed <= {"README.md", "tokenizer_config.json", "special_tokens_map.json"}


def test_a_folder_is_replaced_by_the_model_that_was_opened_from_it(folder: Path) -> None:
    """Its weights are still mapped to the file that is replaced."""
    encoder = load_model(folder, device="cpu")
    want = encoder.encode_text(TEXTS)
    save_model_folder(encoder, folder, max_shard_size="300KB")
    assert not (folder / "model.safetensors").exists()
    assert np.array_equal(load_model(folder, device="cpu").encode_text(TEXTS), want)
    assert np.array_equal(encoder.encode_text(TEXTS), want)
    save_model_folder(encoder, folder)
    assert not list(folder.glob("model-*"))
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}


@pytest.mark.parametrize("other", ["notes.txt", ".git", "cat.png"])
def test_other_files_are_not_lost(folder: Path, tiny_encoder: Encoder, other: str) -> None:
    (folder / other).write_text("照片", encoding="utf-8")
    before = files_of(folder)
    message = f"模型: holds other files \\({other}\\), they would be lost; choose another folder"
    with pytest.raises(DataError, match=message):
        save_model_folder(tiny_encoder, folder)
    assert files_of(folder) == before


def test_a_folder_without_a_model_in_it_is_not_replaced(tiny_encoder, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds other files \(no config\.json\)"):
        save_model_folder(tiny_encoder, tmp_path)


def test_a_file_in_the_way_is_one_line(tiny_encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(DataError, match="model: is a file, expected a folder to write"):
        save_model_folder(tiny_encoder, tmp_path / "model")


def test_a_full_disk_leaves_the_older_folder_as_it_was(folder: Path, tiny_encoder: Encoder) -> None:
    """The limit on a file's size stands for the disk's."""
    before = files_of(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(DataError, match=r"模型: cannot be written \(") as caught:
            save_model_folder(tiny_encoder, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert files_of(folder) == before
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}


# ── what is in it ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_stored_and_float32_computed(
    folder: Path, tmp_path: Path, dtype: str, tiny_encoder: Encoder
) -> None:
    half = load_model(folder, device="cpu", dtype=dtype)  # pyright: ignore[reportArgumentType]
    save_model_folder(half, tmp_path / "half")
    stored = load_file(tmp_path / "half/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "float32"
    again = load_model(tmp_path / "half", device="cpu")
    assert again.model.dtype == torch.float32
    want = tiny_encoder.encode_text(TEXTS)
    np.testing.assert_allclose(again.encode_text(TEXTS), want, atol=2e-2)
    asked = load_model(tmp_path / "half", device="cpu", dtype=dtype)  # pyright: ignore[reportArgumentType]
    assert np.array_equal(asked.encode_text(TEXTS), half.encode_text(TEXTS))


def test_weights_can_be_read_by_whoever_can_read_the_rest(folder: Path) -> None:
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1


def test_the_tokenizer_model_for_training_comes_along(folder: Path, tmp_path: Path) -> None:
    encoder = load_model(folder, device="cpu")
    save_model_folder(encoder, tmp_path / "copy")
    assert (tmp_path / "copy/sp.model").read_bytes() == (folder / "sp.model").read_bytes()
    save_model_folder(encoder, tmp_path / "other", sp_model=b"another")
    assert (tmp_path / "other/sp.model").read_bytes() == b"another"


def test_a_model_without_a_tokenizer_is_saved_and_opened_for_pictures(
    folder: Path, tmp_path: Path
) -> None:
    encoder = load_model(folder, device="cpu")
    encoder.tokenizer = None
    save_model_folder(encoder, tmp_path / "textless")
    assert not list((tmp_path / "textless").glob("*token*"))
    assert not (tmp_path / "textless/modules.json").exists()
    assert not (tmp_path / "textless/sp.model").exists()
    again = load_model(tmp_path / "textless", device="cpu")
    assert again.tokenizer is None
    assert np.array_equal(again.encode_image(PICTURE), encoder.encode_image(PICTURE))
    with pytest.raises(CheckpointError, match="textless: this model has no tokenizer"):
        again.encode_text("猫")


def test_sentence_transformers_is_told_of_the_towers_that_there_are(folder, tmp_path):
    cases: list[tuple[Towers, list[str]]] = [
        ("both", ["text", "image"]), ("image", ["image"]), ("text", ["text"]),
    ]  # fmt: skip
    for towers, kinds in cases:
        save_model_folder(load_model(folder, towers=towers), tmp_path / towers)
        settings = json.loads((tmp_path / towers / "sentence_bert_config.json").read_text())
        assert list(settings["modality_config"]) == kinds


# ── several files ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def sharded(tiny_encoder: Encoder, tmp_path: Path) -> Path:
    save_model_folder(tiny_encoder, tmp_path / "sharded", max_shard_size="300KB")
    return tmp_path / "sharded"


def test_weights_in_several_files_open_to_the_bit(sharded: Path, tiny_encoder: Encoder) -> None:
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    found, want = (
        load_model(sharded, device="cpu").model.state_dict(),
        tiny_encoder.model.state_dict(),
    )
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: next(f.glob("model-00002*")).unlink(), "no model-00002-of-"),
        (lambda f: next(f.glob("model-00002*")).write_bytes(b"x" * 99), "damaged file ("),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "damaged (Expecting"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "names no files of"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
            "names no files of",
        ),
    ],
)
def test_a_damaged_set_of_files_is_one_line(sharded: Path, damage, words: str) -> None:
    damage(sharded)
    with pytest.raises(CheckpointError) as caught:
        load_model(sharded, device="cpu")
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(sharded))
    assert "\n" not in str(caught.value)


# ── long texts through transformers, which may not truncate ─────────────────────────────────────


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_cuts_ids_as_the_tokenizer_does(folder: Path, side: str) -> None:
    encoder = load_model(folder, device="cpu")
    assert encoder.tokenizer is not None
    encoder.tokenizer.truncation_side = side
    encoder.model.config.truncation_side = side
    whole = encoder.tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert whole["input_ids"].shape[1] > encoder.model.config.architecture.text_positions
    want = encoder.encode_text(TEXTS)
    with torch.inference_mode():
        found = encoder.model(**whole).text_embeds
        np.testing.assert_allclose(found, want, atol=1e-6)
        unmasked = encoder.model(input_ids=whole["input_ids"]).text_embeds
    np.testing.assert_allclose(unmasked, want, atol=1e-6)


@pytest.mark.skipif(find_spec("timm") is not None, reason="this environment holds timm")
def test_a_folder_with_a_tower_of_timm_names_what_to_install(folder: Path) -> None:
    tower = {"library": "timm", "name": "vit_tiny_patch16_224", "options": {}}
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings |= {"image_tower": tower, "shared_layers": 0}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(MissingExtraError, match=r"timm .*pip install 'm2encoder\[towers\]'"):
        load_model(folder, device="cpu")


def test_an_unchanged_model_keeps_what_its_card_says_of_training_and_results(
    folder: Path, tmp_path: Path
) -> None:
    said = "## Training\n\n12 pairs, 一些图片.\n\n## Results\n\n| R@1 | 0.5 |\n"
    card = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(card.replace("## Licence", said + "\n## Licence"), "utf-8")
    (folder / "results.json").write_text('{"R@1": 0.5}', encoding="utf-8")
    encoder = load_model(folder, device="cpu")
    encoder.save_pretrained(tmp_path / "same")
    again = (tmp_path / "same/README.md").read_text(encoding="utf-8")
    assert said in again
    assert again.count("## Licence") == 1
    assert (tmp_path / "same/results.json").is_file()
    encoder.model.requires_grad_(True)  # as training does
    encoder.save_pretrained(tmp_path / "trained")
    assert "## Results" not in (tmp_path / "trained/README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "trained/results.json").exists()
