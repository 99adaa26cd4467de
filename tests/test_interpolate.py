"""Weights between two models: exact at both ends, by hand in the middle, refused across shapes."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import tensor

from m2encoder.cli import main
from m2encoder.errors import CheckpointError, ConfigError
from m2encoder.interpolate import interpolate, write_interpolated
from m2encoder.load import load_model
from m2encoder.model_folder import save_model_folder


@pytest.fixture(scope="module")
def moved_folder(tiny_encoder, tiny_model_folder, tmp_path_factory):
    """The tiny model after a made-up training."""
    encoder = deepcopy(tiny_encoder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.02
    folder = tmp_path_factory.mktemp("moved") / "训练后"
    save_model_folder(
        encoder, folder, sp_model=(tiny_model_folder / "sp.model").read_bytes(), golden=False
    )
    return folder


def test_the_middle_worked_by_hand():
    start = {"w": tensor([0.0, 4.0]), "n": tensor(3)}
    end = {"w": tensor([1.0, 8.0]), "n": tensor(5)}
    found = interpolate(start, end, 0.25)
    assert found["w"].tolist() == [0.25, 5.0]
    assert found["n"].item() == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_both_ends_are_exact_and_the_dtype_is_the_second_ones(dtype):
    start, end = {"w": torch.randn(50)}, {"w": torch.randn(50).to(dtype)}
    assert torch.equal(interpolate(start, end, 1.0)["w"], end["w"])
    assert torch.equal(interpolate(start, end, 0.0)["w"], start["w"].to(dtype))
    assert interpolate(start, end, 0.5)["w"].dtype == dtype


def test_neither_model_is_changed():
    start, end = {"w": torch.ones(3)}, {"w": torch.zeros(3), "n": tensor(1)}
    start["n"] = tensor(0)
    interpolate(start, end, 0.5)["n"] += 7
    assert (start["w"].sum(), end["w"].sum(), end["n"]) == (3, 0, 1)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(ConfigError, match=r"share must lie in \[0, 1\], got"):
        interpolate({}, {}, share)


def test_other_names_and_shapes_are_named():
    with pytest.raises(CheckpointError, match="a is in one alone, and 1 more"):
        interpolate({"a": tensor(0.0), "w": tensor(0.0)}, {"b": tensor(0.0), "w": tensor(0.0)}, 0.5)
    with pytest.raises(CheckpointError, match=r"w is \(2,\) in the first model and \(3,\)"):
        interpolate({"w": torch.zeros(2)}, {"w": torch.zeros(3)}, 0.5)


def test_a_folder_between_two_opens_and_gives_the_vectors_between(
    tiny_model_folder, moved_folder, tmp_path
):
    write_interpolated(tiny_model_folder, moved_folder, tmp_path / "mixed", share=0.3)
    mixed, start, end = (
        load_model(where, device="cpu")
        for where in (tmp_path / "mixed", tiny_model_folder, moved_folder)
    )
    for name, value in mixed.model.state_dict().items():
        before, after = (e.model.state_dict()[name] for e in (start, end))
        torch.testing.assert_close(value, before + 0.3 * (after - before), atol=1e-6, rtol=1e-6)
    texts = ["一只猫", "ＡＢＣ 繁體貓🐱", "long " * 2000]
    vectors = mixed.encode_text(texts)
    assert vectors.shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert (tmp_path / "mixed" / "sp.model").read_bytes() == (
        tiny_model_folder / "sp.model"
    ).read_bytes()
    assert "mixed" in (tmp_path / "mixed" / "README.md").read_text("utf-8")


def test_the_command_writes_the_second_model_at_share_one(
    tiny_model_folder, moved_folder, tmp_path, capsys
):
    out = tmp_path / "结果"
    words = ["models", "interpolate", str(tiny_model_folder), str(moved_folder), str(out)]
    assert main([*words, "--share", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    found, end = (
        load_model(where, device="cpu").model.state_dict() for where in (out, moved_folder)
    )
    assert all(torch.equal(found[name], end[name]) for name in end)


@pytest.mark.parametrize("share", ["2", "-1"])
def test_the_command_refuses_a_wrong_share_in_one_line(tiny_model_folder, tmp_path, capsys, share):
    folder, out = str(tiny_model_folder), tmp_path / "out"
    assert main(["models", "interpolate", folder, folder, str(out), "--share", share]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("m2enc: share must lie in [0, 1], got")
    assert "\n" not in error
    assert not out.exists()


def test_a_folder_of_other_files_is_not_replaced(tiny_model_folder, moved_folder, tmp_path, capsys):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    words = ["models", "interpolate", str(tiny_model_folder), str(moved_folder), str(tmp_path)]
    assert main(words) == 3
    assert "photo.jpg" in capsys.readouterr().err
    assert [path.name for path in Path(tmp_path).iterdir()] == ["photo.jpg"]
