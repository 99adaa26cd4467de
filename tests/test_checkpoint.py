"""Checkpoints: exact, complete or absent, and clear about damage.

Not resuming a run from them: test_train.py.
"""

import json
import shutil

import pytest
import torch
from torch import nn

from m2encoder.checkpoint import Progress, list_checkpoints, load_checkpoint, save_checkpoint
from m2encoder.errors import CheckpointError


def make_model(width=4):
    model = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3, generator=generator)).square().sum().backward()
        optimizer.step()


def progress(step=3):
    return Progress(step, samples=step * 5, dropped=1, seconds=0.5, steps_per_epoch=2)


@pytest.fixture
def saved(tmp_path):
    """The path of a checkpoint after three steps, and what was saved."""
    model, optimizer = make_model()
    train(model, optimizer, 3)
    return save_checkpoint(tmp_path, model, optimizer, progress(), keep=2), model, optimizer


def test_weights_optimizer_and_progress_come_back_to_the_bit(saved):
    path, model, optimizer = saved
    torch.manual_seed(99)
    other, other_optimizer = make_model()
    assert load_checkpoint(path, other, other_optimizer) == progress()
    for continued, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        train(continued, its_optimizer, 4, seed=1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[ours].items():
            assert torch.equal(other_optimizer.state[theirs][key], value), key


def test_a_checkpoint_holds_no_pickle(saved):
    names = {path.name for path in saved[0].iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "progress.json"}


def test_transposed_weights_are_saved_by_their_values(tmp_path):
    model = nn.Linear(3, 4)
    model.weight.data = torch.arange(12.0).reshape(3, 4).T  # not contiguous
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    other = nn.Linear(3, 4)
    path = save_checkpoint(tmp_path, model, optimizer, progress(), keep=1)
    load_checkpoint(path, other, torch.optim.AdamW(other.parameters(), fused=True))
    assert torch.equal(other.weight, model.weight)


def test_the_newest_are_kept(tmp_path):
    model, optimizer = make_model()
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, model, optimizer, progress(step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000011"]


def test_a_folder_that_does_not_exist_holds_no_checkpoints(tmp_path):
    assert list_checkpoints(tmp_path / "none") == []


def test_a_half_written_checkpoint_is_ignored_and_written_over(saved):
    path, model, optimizer = saved
    half = path.parent / ".step-00000004.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert list_checkpoints(path.parent) == [path]
    written = save_checkpoint(path.parent, model, optimizer, progress(4), keep=2)
    assert list_checkpoints(path.parent) == [path, written]
    assert not half.exists()
    assert load_checkpoint(written, *make_model()).step == 4


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
def test_damage_says_which_checkpoint_and_what_to_do(saved, name, damage):
    file = saved[0] / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(saved[0], *make_model())
    assert str(error.value).startswith(f"{saved[0]}: damaged checkpoint (")
    assert str(error.value).endswith("; delete it to go on from an earlier one")


@pytest.mark.parametrize("content", ["[]", '{"step": 3}', "null"])
def test_progress_of_another_kind_is_refused(saved, content):
    (saved[0] / "progress.json").write_text(content)
    with pytest.raises(CheckpointError, match=str(saved[0])):
        load_checkpoint(saved[0], *make_model())


def test_a_checkpoint_of_a_later_format_is_refused_by_its_number(saved):
    file = saved[0] / "progress.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2, "ranks": 8}))
    with pytest.raises(CheckpointError, match="checkpoint format 2, this version reads 1"):
        load_checkpoint(saved[0], *make_model())


def test_another_models_checkpoint_names_tensor_and_both_shapes(saved):
    with pytest.raises(CheckpointError, match=r"'0\.bias' is \(4,\), the model expects \(6,\)"):
        load_checkpoint(saved[0], *make_model(width=6))


def test_a_checkpoint_of_a_deeper_model_names_what_is_too_much(saved):
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(CheckpointError, match=r"'2\.bias' is \(4,\), .* no such tensor"):
        load_checkpoint(saved[0], model, torch.optim.AdamW(model.parameters(), fused=True))


def test_a_refused_checkpoint_leaves_the_model_as_it_was(saved):
    model, optimizer = make_model(width=6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_checkpoint(saved[0], model, optimizer)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not optimizer.state


def test_a_place_that_cannot_be_written_says_so_and_keeps_earlier_checkpoints(saved, tmp_path):
    path, model, optimizer = saved
    (path.parent / ".step-00000004.tmp").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"cannot write .* earlier checkpoints stand"):
        save_checkpoint(path.parent, model, optimizer, progress(4), keep=2)
    assert list_checkpoints(path.parent) == [path]
    shutil.rmtree(path)
