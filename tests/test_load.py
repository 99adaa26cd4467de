"""Model folders: what is saved opens to the bit, here and where m2encoder is not installed.

And what is damaged gives one line. Not for what an open Encoder does (test_encoder.py).
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, ConfigError
from m2encoder.load import load_model
from m2encoder.model.image_processing_m2encoder import M2EncoderImageProcessor
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.model_folder import save_model_folder

TEXTS = ["一只红色的猫", "繁體", "a red cat", "Ｆｕｌｌ", "👨‍👩‍👧‍👦", "long " * 200]


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(30, 40), (97, 21), (32, 32)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny model folder, to be damaged or changed."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


@pytest.fixture
def stderr(capfd: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    """Hold a test to printing nothing: the error's one line is all that a user should read."""
    yield capfd
    assert capfd.readouterr() == ("", "")


Change = Callable[[Path], Any]
"""What a test does to a copied folder before it opens it."""


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def cut(name: str, size: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def json_edit(name: str, edit: Callable[[dict[str, Any]], Any]) -> Change:
    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        edit(values)
        (folder / name).write_text(json.dumps(values), encoding="utf-8")

    return change


def config(**values: Any) -> Change:
    return json_edit("config.json", lambda settings: settings.update(values))


def text_settings(**values: Any) -> Change:
    return json_edit("tokenizer_config.json", lambda settings: settings.update(values))


def picture_settings(**values: Any) -> Change:
    def change(folder: Path) -> None:
        name = _picture_file(folder)
        json_edit(name, lambda c: c.get("image_processor", c).update(values))(folder)

    return change


def _picture_file(folder: Path) -> str:
    """Return where the settings lie: transformers 4.57 writes a file more than 5 does."""
    old = "preprocessor_config.json"
    return old if (folder / old).is_file() else "processor_config.json"


def weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


# ── saving and opening ──────────────────────────────────────────────────────────────────────────


def test_a_saved_model_opens_to_the_bit(tiny_encoder: Encoder, tmp_path: Path) -> None:
    save_model_folder(tiny_encoder, tmp_path / "again")
    again = load_model(tmp_path / "again", device="cpu")
    want = tiny_encoder.model.state_dict()
    assert list(again.model.state_dict()) == list(want)
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, want[name]), name
    assert np.array_equal(again.encode_text(TEXTS), tiny_encoder.encode_text(TEXTS))
    assert np.array_equal(again.encode_image(pictures()), tiny_encoder.encode_image(pictures()))
    assert (again.name, again.folder, again.dim) == ("again", tmp_path / "again", tiny_encoder.dim)


def test_a_fresh_model_with_random_norms_and_biases_survives_transformers_own_round_trip(
    tiny_encoder: Encoder, tmp_path: Path
) -> None:
    """Opening must not initialise anything again, whatever a fresh model's values look like."""
    model = M2Encoder(tiny_encoder.model.config)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    again = M2Encoder.from_pretrained(tmp_path)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_folder_holds_weights_preprocessing_code_and_nothing_pickled(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
        "tokenizer_config.json", "sp.model", "modeling_m2encoder.py", "processing_m2encoder.py",
    }  # fmt: skip
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_the_python_files_of_a_folder_import_nothing_of_m2encoder(folder: Path) -> None:
    files = {path.stem: path for path in folder.glob("*.py")}
    assert len(files) == 7
    for path in files.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert node.module in files  # what it imports beside itself came along
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] != "m2encoder"
            elif isinstance(node, ast.Import):
                assert "m2encoder" not in {alias.name.split(".")[0] for alias in node.names}


FRESH_PROCESS = """
import sys
import numpy as np
from PIL import Image
folder, out, *texts = sys.argv[1:]
picture = Image.fromarray(np.load(out + "/picture.npy"))
sys.modules["m2encoder"] = None  # as where it is not installed
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
given = processor(images=[picture], text=texts)
found = model(**given)
del sys.modules["m2encoder"]
from m2encoder import load_model
encoder = load_model(folder, device="cpu")
np.savez(
    out + "/found.npz",
    foreign_text=found.text_embeds.detach(), foreign_image=found.image_embeds.detach(),
    text=encoder.encode_text(texts), image=encoder.encode_image(picture),
    fingerprint=encoder.fingerprint,
)
"""


@pytest.fixture(scope="module")
def fresh(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one new process found: through transformers without m2encoder, then load_model."""
    out = tmp_path_factory.mktemp("fresh")
    np.save(out / "picture.npy", np.asarray(pictures()[0]))
    subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(tiny_model_folder), str(out), *TEXTS],
        env={**os.environ, "HF_MODULES_CACHE": str(out / "modules")},
        check=True,
        capture_output=True,
    )
    return dict(np.load(out / "found.npz"))


def test_a_fresh_process_gives_the_same_vectors(
    fresh: dict[str, Any], tiny_encoder: Encoder
) -> None:
    assert np.array_equal(fresh["text"], tiny_encoder.encode_text(TEXTS))
    assert np.array_equal(fresh["image"], tiny_encoder.encode_image(pictures()[0]))
    assert str(fresh["fingerprint"]) == tiny_encoder.fingerprint


def test_transformers_opens_a_folder_where_m2encoder_is_not_installed(
    fresh: dict[str, Any], tiny_encoder: Encoder
) -> None:
    np.testing.assert_allclose(fresh["foreign_text"], tiny_encoder.encode_text(TEXTS), atol=1e-6)
    want = tiny_encoder.encode_image(pictures()[0])
    np.testing.assert_allclose(fresh["foreign_image"], want, atol=1e-6)


# ── one tower, other sizes, other precisions ────────────────────────────────────────────────────


def test_one_tower_alone_is_smaller_and_gives_the_same_vectors(
    folder: Path, tiny_encoder: Encoder, stderr: object
) -> None:
    image = load_model(folder, device="cpu", towers="image")
    text = load_model(folder, device="cpu", towers="text")
    assert np.array_equal(image.encode_image(pictures()), tiny_encoder.encode_image(pictures()))
    assert np.array_equal(text.encode_text(TEXTS), tiny_encoder.encode_text(TEXTS))
    both = {name for name, _ in tiny_encoder.model.named_parameters()}
    names = [{name for name, _ in e.model.named_parameters()} for e in (image, text)]
    assert names[0] | names[1] == both
    assert all(n.startswith("shared") or n == "logit_scale" for n in names[0] & names[1])


def test_one_tower_saved_alone_opens_alone(folder: Path, tmp_path: Path) -> None:
    image = load_model(folder, device="cpu", towers="image")
    save_model_folder(image, tmp_path / "image")
    again = load_model(tmp_path / "image", device="cpu", towers="image")
    assert np.array_equal(again.encode_image(pictures()), image.encode_image(pictures()))
    with pytest.raises(CheckpointError, match=r"lacks text\.positions, .* and \d+ more"):
        load_model(tmp_path / "image", device="cpu")


def test_another_picture_size_resizes_positions_and_preprocessing(folder: Path) -> None:
    small, large = (load_model(folder, device="cpu", image_size=size) for size in (16, 64))
    assert small.image_processor.size_px == 16
    assert small.encode_image(pictures()).shape == large.encode_image(pictures()).shape == (3, 16)
    assert len({small.fingerprint, large.fingerprint, load_model(folder).fingerprint}) == 3
    with pytest.raises(ValueError, match="image_size is 40, expected a multiple of patch_size 16"):
        load_model(folder, device="cpu", image_size=40)


def test_half_precision_gives_nearly_the_same_float32_vectors(
    folder: Path, tiny_encoder: Encoder
) -> None:
    half = load_model(folder, device="cpu", dtype="bfloat16")
    for found, want in (
        (half.encode_text(TEXTS), tiny_encoder.encode_text(TEXTS)),
        (half.encode_image(pictures()), tiny_encoder.encode_image(pictures())),
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        assert (found * want).sum(axis=1).min() > 0.999  # 8 bits of mantissa over a few layers
        assert not np.array_equal(found, want)


def test_picture_settings_and_truncation_come_from_the_folder(folder: Path) -> None:
    picture_settings(resize_mode="shortest")(folder)
    text_settings(truncation_side="right")(folder)
    encoder = load_model(folder, device="cpu")
    want = M2EncoderImageProcessor(32, "shortest").to_pixels(pictures()[1])
    assert np.array_equal(encoder.image_processor.to_pixels(pictures()[1]), want)
    same_start = encoder.encode_text(["猫" * 300, "猫" * 300 + "a red cat"])
    np.testing.assert_allclose(same_start[0], same_start[1], atol=1e-6)


# ── fingerprint ─────────────────────────────────────────────────────────────────────────────────


CHANGES: dict[str, Change] = {
    "one weight": weights(lambda w: w["text.token_embed.weight"][7, 3].add_(1e-3)),
    "resize mode": picture_settings(resize_mode="shortest"),
    "image mean": config(image_mean=[0.4, 0.5, 0.5]),
    "truncation side": text_settings(truncation_side="right"),
    "text length": text_settings(model_max_length=40),
    "one merge": json_edit("tokenizer.json", lambda c: c["model"]["merges"].pop()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_fingerprint_changes_with_whatever_changes_vectors(
    folder: Path, tiny_encoder: Encoder, what: str
) -> None:
    CHANGES[what](folder)
    changed = load_model(folder, device="cpu").fingerprint
    assert len(changed) == 64
    assert changed != tiny_encoder.fingerprint


def test_a_fingerprint_stays_for_another_folder_name_use_and_copy(
    folder: Path, tiny_encoder: Encoder, tmp_path: Path
) -> None:
    encoder = load_model(folder, device="cpu")
    encoder.encode_text(TEXTS)  # leaves padding and truncation set in the tokenizer
    encoder.encode_image(pictures())
    assert encoder.fingerprint == tiny_encoder.fingerprint
    save_model_folder(encoder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("# 卡片", encoding="utf-8")
    assert load_model(tmp_path / "copy", device="cpu").fingerprint == tiny_encoder.fingerprint


# ── damage, in one line ─────────────────────────────────────────────────────────────────────────


SEVEN_ROWS = "(7, 32)"
DAMAGE: dict[str, tuple[Change, str]] = {
    "no config": (without("config.json"), "no config.json, expected a model folder"),
    "no weights": (without("model.safetensors"), "no model.safetensors, expected a model folder"),
    "no tokenizer": (without("tokenizer.json"), "no tokenizer.json, expected a model folder"),
    "no text settings": (without("tokenizer_config.json"), "no tokenizer_config.json, expected"),
    "no picture settings": (without("processor_config.json"), "no processor_config.json, expected"),
    "config is no JSON": (cut("config.json", 50), "config.json: damaged ("),
    "config is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "model_type is None, expected 'm2_encoder'",
    ),
    "another model": (
        config(model_type="bert"),
        "model_type is 'bert', expected m2_encoder or one of",
    ),
    "impossible shape": (config(width=33), "num_heads 4 does not divide width 33"),
    "a word for a number": (config(width="wide"), "cannot load its weights ("),
    "truncated weights": (cut("model.safetensors", 100_000), "model.safetensors: damaged file ("),
    "empty weights": (cut("model.safetensors", 0), "model.safetensors: damaged file ("),
    "a missing tensor": (
        weights(lambda w: w.pop("shared.norm.bias")),
        "model.safetensors lacks shared.norm.bias; was it saved by another model?",
    ),
    "an unknown tensor": (
        weights(lambda w: w.update(queue=torch.zeros(3))),
        "model.safetensors has unexpected queue; was it saved by another model?",
    ),
    "a wrong shape": (
        weights(lambda w: w.update({"image.positions": torch.zeros(7, 32)})),
        f"does not fit config.json: image.positions has shape {SEVEN_ROWS}, expected (5, 32);",
    ),
    "another width": (config(width=64), ", expected (1, 1, 64), image."),
    "tokenizer is no JSON": (cut("tokenizer.json", 50), "cannot read its preprocessing ("),
    "tokenizer is empty": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "cannot read its preprocessing (",
    ),
    "picture settings are no JSON": (
        lambda folder: cut(_picture_file(folder), 20)(folder),
        "cannot read its preprocessing (",
    ),
    "two picture sizes": (
        picture_settings(size_px=64),
        "processor_config.json makes pictures of 64 pixels, config.json expects 32;",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_one_line_that_says_what_was_found(
    what: str, folder: Path, stderr: object
) -> None:
    change, words = DAMAGE[what]
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, device="cpu")
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("runs/nowhere/模型", "runs/nowhere/模型: no such model folder or checkpoint; check the"),
        ("m2-encoder-tiny", "m2-encoder-tiny is a preset without weights; give the path of a"),
        (__file__, "test_load.py: not a torch checkpoint, or damaged"),
    ],
)
def test_what_is_no_model_is_one_line(name: str, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model(name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"dtype": "float8"}, "'float8' is unknown, expected one of float32"),
        ({"towers": "picture"}, "'picture' is unknown, expected one of both, image, text"),
    ],
)
def test_an_unknown_device_dtype_or_tower_is_one_line(tiny_model_folder, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(tiny_model_folder, **options)
    assert "\n" not in str(caught.value)
