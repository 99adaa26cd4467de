"""The calibration beside a model: kept, found, refused where it is another model's, taken along.

Not for measuring it: tests/eval/test_calibrate.py.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_duals
import torch

from m2encoder.calibration import (
    CALIBRATION,
    Calibration,
    LanguageCalibration,
    load_calibration,
    read_calibration,
)
from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, DataError
from m2encoder.load import load_model

ZH = LanguageCalibration(0.31, 0.951, 0.6, 0.94, 0.97, (0.95, 0.98), 5_000, 1_000)
EN = LanguageCalibration(None, 0.7, 0.9, None, 0.6, None, 12, 3)


def made(fingerprint: str) -> Calibration:
    return Calibration(fingerprint, 0.95, "数据 test 😀", {"zh": ZH, "en": EN})


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "模型"))


@pytest.fixture
def calibrated(folder: Path) -> Encoder:
    encoder = load_model(folder, device="cpu")
    made(encoder.fingerprint).save(folder)
    return encoder


def test_what_is_kept_comes_back(folder: Path) -> None:
    made("abc").save(folder)
    assert read_calibration(folder) == made("abc")
    assert not list(folder.glob("*.tmp"))


def test_scores_are_matched_from_the_threshold_on() -> None:
    found = made("abc")
    assert [found.is_match(score, "zh") for score in (0.3, 0.31, 0.9)] == [False, True, True]
    assert found.is_match(0.9, "en") is None  # no score was good enough
    assert found.is_match(0.9, "ja") is None  # never measured
    assert (found.threshold("zh"), found.threshold("ja")) == (0.31, None)


def test_a_model_finds_its_own_and_stays_what_it_was(calibrated: Encoder) -> None:
    assert calibrated.folder is not None
    opened = load_model(calibrated.folder, device="cpu")
    assert opened.fingerprint == calibrated.fingerprint
    assert load_calibration(opened) == made(calibrated.fingerprint)


def test_without_a_file_or_a_folder_there_is_none(folder: Path, tiny_encoder: Encoder) -> None:
    assert load_calibration(load_model(folder, device="cpu")) is None
    homeless = Encoder(tiny_encoder.model, tiny_encoder.image_processor, tiny_encoder.tokenizer)
    assert load_calibration(homeless) is None


def test_another_model_s_is_not_used_and_one_line_says_so(
    calibrated: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad():
        calibrated.model.logit_scale += 1
    assert load_calibration(calibrated) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "calibrate again with m2enc eval calibrate" in caplog.text


def test_other_text_settings_make_it_another_model_s(calibrated: Encoder) -> None:
    calibrated.text_normalization = "lower-quotes"
    assert load_calibration(calibrated) is None


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"fingerprint": "a", "precision": 0.9, "data": "x", "languages": {"zh": {}}}',
        '{"fingerprint": "a", "precision": 9, "data": "x", "languages": {}}',
        '{"fingerprint": "a", "precision": 0.9, "data": "x", "languages": []}',
    ],
)
def test_damage_is_told_in_one_line(folder: Path, content: str) -> None:
    (folder / CALIBRATION).write_text(content, encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"calibration\.json: damaged .*calibrate again"
    ) as found:
        read_calibration(folder)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("value", ["0.3", True, float("nan"), [1]])
def test_a_threshold_that_is_no_number_is_damage(folder: Path, value: object) -> None:
    path = made("abc").save(folder)
    content = json.loads(path.read_text("utf-8"))
    content["languages"]["zh"]["threshold"] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match="damaged"):
        read_calibration(folder)


def test_a_newer_format_says_to_upgrade(folder: Path) -> None:
    (folder / CALIBRATION).write_text('{"format": 2}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="format 2, this version reads 1; upgrade"):
        read_calibration(folder)


def test_a_field_of_a_later_version_is_passed_over(folder: Path) -> None:
    path = made("abc").save(folder)
    content = json.loads(path.read_text("utf-8"))
    content["languages"]["zh"]["later"] = "更多"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read_calibration(folder) == made("abc")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"calibration\.json: cannot be written"):
        made("abc").save(tmp_path / "absent")


@pytest.mark.parametrize("precision", [0, 1.5])
def test_a_precision_that_is_no_share_is_refused(precision: float) -> None:
    with pytest.raises(ValueError, match="expected more than 0, at most 1"):
        replace(made("abc"), precision=precision)


# ── model folders ───────────────────────────────────────────────────────────────────────────────


def test_saving_the_model_takes_it_along(calibrated: Encoder, tmp_path: Path) -> None:
    calibrated.save_pretrained(tmp_path / "copy")
    assert read_calibration(tmp_path / "copy") == made(calibrated.fingerprint)
    assert load_calibration(load_model(tmp_path / "copy", device="cpu")) is not None


def test_saving_over_its_own_folder_keeps_it(calibrated: Encoder) -> None:
    assert calibrated.folder is not None
    calibrated.save_pretrained(calibrated.folder)
    assert read_calibration(calibrated.folder) == made(calibrated.fingerprint)


def test_a_changed_model_leaves_it_behind(
    calibrated: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad():
        next(calibrated.model.parameters()).mul_(1.5)
    calibrated.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / CALIBRATION).exists()
    assert CALIBRATION not in caplog.text


def test_a_damaged_one_stays_behind_with_a_warning(
    calibrated: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert calibrated.folder is not None
    (calibrated.folder / CALIBRATION).write_text("{", encoding="utf-8")
    calibrated.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / CALIBRATION).exists()
    assert "damaged" in caplog.text


def test_a_model_of_another_family_takes_it_along(tmp_path: Path) -> None:
    encoder = load_model(tiny_duals.clip(tmp_path / "clip"), device="cpu")
    made(encoder.fingerprint).save(tmp_path / "clip")
    encoder.save_pretrained(tmp_path / "copy")
    assert load_calibration(load_model(tmp_path / "copy", device="cpu")) is not None
