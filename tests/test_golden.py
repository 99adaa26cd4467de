"""Golden vectors and the published anchor: equal models pass, a changed one is named.

Not for model cards (test_card.py) nor for other consumers (test_consumers.py).
"""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from m2encoder.anchor import LABELS, PUBLISHED, check_anchor, compare, released_name
from m2encoder.cli.options import call_with_options
from m2encoder.cli.verify import verify
from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, ConfigError
from m2encoder.golden import GOLDEN, TEXTS, check_golden, golden_pictures, write_golden
from m2encoder.load import load_model
from m2encoder.model.configuration_m2encoder import M2EncoderConfig
from m2encoder.model.image_processing_m2encoder import M2EncoderImageProcessor
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.model_folder import save_model_folder
from m2encoder.presets import preset
from m2encoder.released_tokenizer import ReleasedTokenizer

RELEASED = Path(__file__).resolve().parents[2] / "shared/data/official/sp.model"


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny model folder, to be changed."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "模型"))


def opened(folder: Path, **options) -> Encoder:
    return load_model(folder, device="cpu", **options)


def golden_of(folder: Path) -> dict:
    return json.loads((folder / GOLDEN).read_text(encoding="utf-8"))


def change_golden(folder: Path, edit) -> None:
    golden = golden_of(folder)
    edit(golden)
    (folder / GOLDEN).write_text(json.dumps(golden), encoding="utf-8")


def change_weight(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][0, 0] += 0.5  # of one input: all of them are normed and so sum to nothing
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ── what is written ─────────────────────────────────────────────────────────────────────────────


def test_a_saved_folder_holds_its_vectors_to_the_bit(folder: Path) -> None:
    golden, encoder = golden_of(folder), opened(folder)
    assert tuple(golden["text"]) == TEXTS
    want = encoder.encode_text(list(TEXTS))
    assert np.array_equal(np.array(list(golden["text"].values()), np.float32), want)
    want = encoder.encode_image(list(golden_pictures().values()))
    assert np.array_equal(np.array(list(golden["image"].values()), np.float32), want)
    assert golden["logit_scale"] == encoder.logit_scale
    made = golden["made_with"]
    assert (made["precision"], made["device"]) == ("float32", "cpu")
    assert made["torch"] == torch.__version__


def test_the_texts_are_of_all_kinds_and_one_is_too_long(tiny_encoder: Encoder) -> None:
    assert tiny_encoder.tokenizer is not None
    lengths = [len(ids) for ids in tiny_encoder.tokenizer(list(TEXTS))["input_ids"]]
    assert [n > tiny_encoder.tokenizer.model_max_length for n in lengths].count(True) == 1
    assert {"猫"} <= set(TEXTS)
    assert any("貓" in text for text in TEXTS)
    assert any("Ｆ" in text for text in TEXTS)
    assert any("🐱" in text for text in TEXTS)


def test_the_pictures_are_the_same_bytes_everywhere() -> None:
    pictures = golden_pictures()
    assert {name: p.size for name, p in pictures.items()} == {
        "gradient": (64, 48), "checks": (41, 97), "disc": (300, 200), "noise": (224, 224),
    }  # fmt: skip
    raw = b"".join(np.asarray(picture).tobytes() for picture in pictures.values())
    assert hashlib.sha256(raw).hexdigest()[:16] == "2687d668089a9214"


def test_writing_leaves_the_one_warning_of_truncation_to_the_user(folder, tmp_path, caplog):
    encoder = opened(folder)
    write_golden(encoder, tmp_path)
    assert caplog.messages == []
    encoder.encode_text("长 long " * 100)
    assert len(caplog.messages) == 1


def test_a_model_in_training_is_measured_without_dropout_and_goes_on_training(folder, tmp_path):
    encoder = opened(folder)
    encoder.model.train()
    encoder.model.image.eval()  # as where one tower is frozen
    encoder.model.text.stack.register_forward_hook(
        lambda module, _, hidden: torch.nn.functional.dropout(hidden, training=module.training)
    )
    before = [module.training for module in encoder.model.modules()]
    write_golden(encoder, tmp_path)
    assert golden_of(tmp_path) == golden_of(folder)
    assert [module.training for module in encoder.model.modules()] == before


# ── what is compared ────────────────────────────────────────────────────────────────────────────


def test_an_equal_model_is_ok(folder: Path) -> None:
    report = check_golden(opened(folder), folder)
    assert report.ok
    assert set(report.differences) == {"text", "image", "logit_scale"}
    assert max(report.differences.values()) < 1e-6
    assert report.tolerance == 1e-5


@pytest.mark.parametrize(
    ("weight", "kind", "same"),
    [
        ("text_projection.weight", "text", "image"),
        ("image_projection.weight", "image", "text"),
    ],
)
def test_a_changed_weight_names_the_worst_item_of_its_tower(folder, weight, kind, same):
    change_weight(folder, weight)
    report = check_golden(opened(folder), folder)
    assert not report.ok
    assert report.worst.startswith(kind + " '")
    assert report.differences[kind] > report.tolerance > report.differences[same]


def test_a_changed_scale_is_off(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["logit_scale"] += 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = check_golden(opened(folder), folder)
    assert (report.ok, report.worst) == (False, "logit scale")


def test_a_vector_that_is_not_a_number_is_off(folder: Path) -> None:
    change_golden(folder, lambda g: g["text"]["猫"].__setitem__(0, float("nan")))
    report = check_golden(opened(folder), folder)
    assert (report.ok, report.worst) == (False, "text '猫'")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 2e-2)]
)
def test_half_precision_is_allowed_more_on_either_side(folder, tmp_path, dtype, tolerance):
    half = opened(folder, dtype=dtype)
    report = check_golden(half, folder)
    assert (report.ok, report.tolerance) == (True, tolerance)
    write_golden(half, tmp_path)
    report = check_golden(opened(folder), tmp_path)
    assert (report.ok, report.tolerance) == (True, tolerance)


@pytest.mark.parametrize(("towers", "kinds"), [("image", {"image"}), ("text", {"text"})])
def test_one_tower_has_and_checks_its_own(folder, tmp_path, towers, kinds):
    one = opened(folder, towers=towers)
    assert check_golden(one, folder).differences.keys() == kinds | {"logit_scale"}
    save_model_folder(one, tmp_path / towers)
    assert {kind for kind in ("text", "image") if golden_of(tmp_path / towers)[kind]} == kinds


def test_a_model_without_a_tokenizer_has_golden_pictures(folder, tmp_path):
    encoder = opened(folder)
    encoder.tokenizer = None
    write_golden(encoder, tmp_path)
    assert golden_of(tmp_path)["text"] == {}
    assert len(golden_of(tmp_path)["image"]) == 4
    assert check_golden(opened(folder), tmp_path).ok


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / GOLDEN).unlink(), "模型: no golden.json, so there is nothing to compare"),
        (lambda f: (f / GOLDEN).write_text("{"), "golden.json: damaged (Expecting"),
        (lambda f: (f / GOLDEN).write_text("[]"), "golden.json: damaged ("),
        (lambda f: change_golden(f, lambda g: g.pop("image")), "golden.json: damaged ('image')"),
        (
            lambda f: change_golden(f, lambda g: g["text"].update(猫=["x"])),
            "golden.json: damaged (could not convert",
        ),
        (
            lambda f: change_golden(f, lambda g: g["text"].update(猫=[1.0, 2.0])),
            "text '猫' has 2 components, this model gives 16",
        ),
    ],
)
def test_missing_or_damaged_vectors_are_one_line(folder, damage, words):
    encoder = opened(folder)
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        check_golden(encoder, folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# ── the published figures ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_figures_agree_with_themselves(name: str) -> None:
    assert sum(PUBLISHED[name]) == pytest.approx(1, abs=1e-5)
    report = compare(name, PUBLISHED[name])
    assert report.ok
    assert report.found == report.published == dict(zip(LABELS, PUBLISHED[name], strict=True))


@pytest.mark.parametrize(
    ("factors", "off"),
    [
        ((1.9, 0.55, 1.3, 1.0), []),
        ((2.1, 1.0, 1.0, 1.0), ["杰尼龟"]),
        ((1.0, 1.0, 0.4, 1.0), ["小火龙"]),
        ((1.0, 0.0, 1.0, 1.0), ["妙蛙种子"]),
        ((1.0, 1.0, float("nan"), 1.0), ["小火龙"]),
        ((1.0, 1.0, 1.0, 0.9998), ["皮卡丘"]),
    ],
)
def test_small_figures_may_differ_by_a_factor_and_large_ones_hardly(factors, off):
    published = np.array(PUBLISHED["m2-encoder-0.4b"])
    report = compare("m2-encoder-0.4b", list(published * factors))
    assert (report.off, report.ok) == (off, not off)


def test_a_released_model_is_known_by_shape_and_vocabulary(tiny_encoder: Encoder) -> None:
    assert released_name(tiny_encoder) is None
    for name in PUBLISHED:
        with torch.device("meta"):
            model = M2Encoder(M2EncoderConfig(**asdict(preset(name))))
        encoder = Encoder(model, tiny_encoder.image_processor, tiny_encoder.tokenizer)
        assert released_name(encoder) == name
        model.config.vocab_size = 4000
        assert released_name(encoder) is None


def test_the_anchor_is_a_softmax_over_bare_labels(tiny_encoder: Encoder) -> None:
    picture = golden_pictures()["disc"]
    report = check_anchor(tiny_encoder, picture, "m2-encoder-0.4b")
    want = tiny_encoder.classify(picture, LABELS, templates=["{}"])[0]
    np.testing.assert_allclose(list(report.found.values()), want, atol=1e-6)
    assert not report.ok


# ── the command ─────────────────────────────────────────────────────────────────────────────────


def run(*words: object) -> int:
    return call_with_options(verify, "models verify", [str(word) for word in words])


def test_the_command_says_ok(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--device", "cpu") == 0
    line = capsys.readouterr().out
    assert line.startswith("golden vectors: largest difference text ")
    assert line.endswith("(allowed 1e-05): ok\n")


def test_the_command_names_the_worst_item(folder: Path, capsys) -> None:
    change_weight(folder, "text_projection.weight")
    assert run(folder, "--device", "cpu") == 1
    assert "(allowed 1e-05): OFF, most of all text '" in capsys.readouterr().out


def test_the_command_prints_json(folder: Path, capsys) -> None:
    assert run(folder, "--device", "cpu", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["golden"]["ok"], found["anchor"]) == (True, True, None)
    assert set(found["golden"]) == {"differences", "worst", "tolerance", "ok"}


def test_a_picture_is_refused_for_a_model_without_published_figures(folder, tmp_path):
    Image.new("RGB", (30, 30)).save(tmp_path / "pokemon.jpeg")
    with pytest.raises(ConfigError, match=r"only m2-encoder-0\.4b, m2-encoder-1b, "):
        run(folder, "--device", "cpu", "--image", tmp_path / "pokemon.jpeg")


@pytest.mark.slow
@pytest.mark.skipif(not RELEASED.is_file(), reason="no released tokenizer here")
def test_random_weights_of_a_released_shape_are_off_the_published_figures(tmp_path, capsys):
    """Weights of 1 GB, saved without golden vectors as they may come from elsewhere."""
    tokenizer = ReleasedTokenizer(RELEASED.read_bytes())
    model = M2Encoder(M2EncoderConfig(**asdict(preset("m2-encoder-0.4b"))))
    encoder = Encoder(model, M2EncoderImageProcessor(224), tokenizer.to_fast())
    save_model_folder(encoder, tmp_path / "model", golden=False)
    Image.new("RGB", (224, 224), (250, 220, 40)).save(tmp_path / "pokemon.jpeg")
    assert run(tmp_path / "model", "--device", "cpu", "--image", tmp_path / "pokemon.jpeg") == 1
    first, second, *lines = capsys.readouterr().out.splitlines()
    assert first == "golden vectors: none here"
    assert second == "published figures of m2-encoder-0.4b:"
    assert [line.split(":")[0].strip() for line in lines] == list(LABELS)
    assert lines[3].endswith("published 0.99999928: OFF")
