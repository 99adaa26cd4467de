"""Checkpoints in one process: exact, complete or absent, and clear about damage.

Not under sharding (test_checkpoint_resharding.py), not resuming a run from them (test_train.py).
"""

import json
import logging
import os
import shutil
import threading

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from m2encoder.checkpoint import Checkpoints, Progress, TrainState, list_checkpoints
from m2encoder.ema import Ema
from m2encoder.errors import CheckpointError


def make_state(width=4, *, decay: float | None = 0.9):
    model = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    return TrainState(model, optimizer, Ema(model, decay) if decay else None)


def train(state, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        state.optimizer.zero_grad()
        state.model(torch.randn(5, 3, generator=generator)).square().sum().backward()
        state.optimizer.step()
        if state.ema:
            state.ema.update()


def progress(step=3):
    return Progress(step, samples=step * 5, dropped=1, seconds=0.5, steps_per_epoch=2)


def copies(state):
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def saved(tmp_path):
    """Checkpoints with one after three steps; its path; what was saved."""
    checkpoints, state = Checkpoints(tmp_path / "checkpoints"), make_state()
    train(state, 3)
    checkpoints.save(state, progress(), wait=True)
    path = checkpoints.latest()
    assert path is not None
    return checkpoints, path, state


# ── what comes back ─────────────────────────────────────────────────────────────────────────────


def test_weights_optimizer_average_and_progress_come_back_to_the_bit(saved):
    checkpoints, path, state = saved
    torch.manual_seed(99)
    other = make_state()
    assert checkpoints.load(path, other) == progress()
    assert_equal(copies(other), copies(state))
    for continued in (state, other):
        train(continued, 4, seed=1)
    assert_equal(copies(other), copies(state))


def test_a_state_that_trained_on_can_go_back(saved):
    checkpoints, path, state = saved
    expected = copies(state)
    train(state, 2, seed=1)
    checkpoints.load(path, state)
    assert_equal(copies(state), expected)


def test_types_scalars_and_strided_tensors_are_saved_by_their_values(tmp_path):
    model = nn.Linear(3, 4)
    model.weight.data = torch.arange(12.0).reshape(3, 4).T  # not contiguous
    kinds = {
        "short": torch.ones(2, dtype=torch.float16), "brain": torch.ones(3, dtype=torch.bfloat16),
        "number": torch.tensor(2.5, dtype=torch.float64), "counter": torch.tensor(2**40),
        "flags": torch.tensor([True, False]), "empty": torch.zeros(0, 4),
        "small": torch.arange(5, dtype=torch.uint8),
    }  # fmt: skip
    other = nn.Linear(3, 4)
    for name, value in kinds.items():
        model.register_buffer(name, value)
        other.register_buffer(name, torch.zeros_like(value))
    states = [TrainState(m, torch.optim.AdamW(m.parameters())) for m in (model, other)]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(states[0], progress(), wait=True)
    checkpoints.load(tmp_path / "step-00000003", states[1])
    assert_equal(copies(states[1]), copies(states[0]))


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_gets_its_state_where_it_needs_it(saved, fused):
    checkpoints, path, _ = saved
    state = make_state()
    optimizer = torch.optim.AdamW(state.model.parameters(), fused=fused)
    checkpoints.load(path, TrainState(state.model, optimizer))
    train(TrainState(state.model, optimizer), 1)
    assert {float(found["step"]) for found in optimizer.state.values()} == {4}


def test_a_parameter_that_was_locked_has_no_state_and_loses_what_it_has(tmp_path):
    state = make_state()
    locked = [state.model.get_parameter(name) for name in ("0.weight", "0.bias")]
    for parameter in locked:
        parameter.requires_grad_(False)
    train(state, 2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, progress(), wait=True)
    other = make_state()
    train(other, 1)
    checkpoints.load(tmp_path / "step-00000003", other)
    assert_equal(copies(other), copies(state))
    assert len(other.optimizer.state) == len(list(other.model.parameters())) - len(locked)


def test_an_average_that_a_checkpoint_lacks_starts_at_its_weights(tmp_path, caplog):
    state, other = make_state(decay=None), make_state()
    train(state, 2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, progress(), wait=True)
    checkpoints.load(tmp_path / "step-00000003", other)
    assert other.ema is not None
    assert_equal(other.ema.tensors, state.model.state_dict())
    assert "step-00000003: has no average: it starts at its weights" in caplog.text


def test_an_average_that_nobody_asks_for_is_left_out(saved, caplog):
    checkpoints, path, state = saved
    other = make_state(decay=None)
    checkpoints.load(path, other)
    assert_equal(other.model.state_dict(), state.model.state_dict())
    assert "average left out" in caplog.text


# ── the files ───────────────────────────────────────────────────────────────────────────────────

FILES = ["manifest.json", "progress.json", "tensors-00000-of-00001.safetensors"]


def test_a_checkpoint_holds_no_pickle(saved):
    _, path, state = saved
    assert sorted(file.name for file in path.iterdir()) == FILES
    assert_equal(load_file(path / FILES[2]), copies(state))


def test_torchs_own_reader_opens_a_checkpoint(saved):
    _, path, state = saved
    found = {name: torch.zeros_like(tensor) for name, tensor in state.tensors().items()}
    with pytest.warns(UserWarning, match="intent is to load in a single process"):
        dcp.load(found, storage_reader=HuggingFaceStorageReader(str(path)))
    assert_equal(found, copies(state))


def test_progress_can_be_read_by_eye(saved):
    raw = json.loads((saved[1] / "progress.json").read_text())
    assert (raw["step"], raw["samples"], raw["format"]) == (3, 15, 2)


# ── in the background ───────────────────────────────────────────────────────────────────────────


def test_training_goes_on_while_what_was_there_is_written(saved):
    checkpoints, _, state = saved
    expected = copies(state)
    checkpoints.save(state, progress(4))
    train(state, 3, seed=5)
    checkpoints.finish()
    other = make_state()
    checkpoints.load(checkpoints.latest(), other)
    assert_equal(copies(other), expected)


def test_a_save_waits_for_the_one_before(tmp_path):
    checkpoints, state = Checkpoints(tmp_path, keep_last=9), make_state()
    for step in range(5):
        train(state, 1)
        checkpoints.save(state, progress(step))
        assert sum(thread.name == "checkpoint" for thread in threading.enumerate()) <= 1
    checkpoints.finish()
    assert len(list_checkpoints(tmp_path)) == 5
    assert 0 < checkpoints.stall_s < 5
    assert 0 < checkpoints.write_s < 5


def test_a_save_that_fails_is_told_once_and_training_goes_on(saved, caplog):
    checkpoints, path, state = saved
    half = path.parent / ".step-00000004.tmp"
    half.write_text("a file where the folder should be")
    checkpoints.save(state, progress(4))
    told = wait_and_poll(checkpoints, caplog)
    assert len(told) == 1
    assert told[0].startswith(f"{path.parent}/step-00000004: cannot write (Not a directory); ")
    assert "the last good checkpoint, step-00000003, stands; " in told[0]
    with pytest.raises(CheckpointError, match="step-00000004: cannot write"):
        checkpoints.finish()
    half.unlink()
    checkpoints.save(state, progress(5))
    checkpoints.finish()
    assert [found.name[-1] for found in list_checkpoints(path.parent)] == ["3", "5"]


def wait_and_poll(checkpoints, caplog):
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            checkpoints.poll()
    return [record.getMessage() for record in caplog.records if "cannot" in record.getMessage()]


def test_a_first_save_that_fails_says_that_there_is_no_other(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"cannot write \(.*there is no earlier one"):
        checkpoints.save(make_state(), progress(), wait=True)


# ── which are kept ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("keep_last", "keep_every_steps", "kept"),
    [(2, None, [10, 12]), (1, None, [12]), (2, 4, [4, 8, 10, 12]), (1, 5, [10, 12]), (9, 2, ...)],
)
def test_the_newest_and_those_of_round_steps_are_kept(tmp_path, keep_last, keep_every_steps, kept):
    checkpoints = Checkpoints(tmp_path, keep_last=keep_last, keep_every_steps=keep_every_steps)
    state, steps = make_state(), [2, 4, 6, 8, 10, 12]
    for step in steps:
        checkpoints.save(state, progress(step), wait=True)
    expected = steps if kept is ... else kept
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == expected
    assert sorted(os.listdir(tmp_path)) == [f"step-{step:08d}" for step in expected]


def test_a_folder_that_does_not_exist_holds_no_checkpoints(tmp_path):
    assert list_checkpoints(tmp_path / "none") == []
    assert Checkpoints(tmp_path / "none").latest() is None


def test_half_written_checkpoints_are_ignored_and_cleared_away(saved):
    checkpoints, path, state = saved
    for name in (".step-00000004.tmp", ".step-00000002.old.tmp"):
        (path.parent / name).mkdir()
        (path.parent / name / "progress.json").write_bytes(b"half")
    assert checkpoints.latest() == path
    checkpoints.save(state, progress(4), wait=True)
    assert sorted(os.listdir(path.parent)) == ["step-00000003", "step-00000004"]
    assert checkpoints.load(checkpoints.latest(), make_state()).step == 4


def test_a_step_that_was_saved_before_is_written_anew(saved):
    checkpoints, path, state = saved
    train(state, 1, seed=8)
    checkpoints.save(state, progress(), wait=True)
    other = make_state()
    checkpoints.load(path, other)
    assert_equal(copies(other), copies(state))
    assert os.listdir(path.parent) == [path.name]


# ── damage ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "one byte"])
def test_damage_says_which_checkpoint_and_what_to_do(saved, name, damage):
    checkpoints, path, _ = saved
    content = (path / name).read_bytes()
    (path / name).unlink()
    changed = {
        "cut": content[: len(content) // 2],
        "empty": b"",
        "one byte": content.replace(b"5", b"6") if name[-4:] == "json" else content[:-1] + b"!",
    }
    if damage != "missing":
        (path / name).write_bytes(changed[damage])
    assert damage == "missing" or changed[damage] != content
    state = make_state()
    before = copies(state)
    with pytest.raises(CheckpointError) as error:
        checkpoints.load(path, state)
    assert str(error.value).startswith(f"{path}: damaged checkpoint (")
    assert str(error.value).endswith("; delete it to go on from an earlier one")
    assert "\n" not in str(error.value)
    assert_equal(copies(state), before)


def test_a_file_that_is_not_of_it_is_damage_too(saved):
    checkpoints, path, _ = saved
    shutil.copy(path / FILES[2], path / "tensors-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"tensors-00001-of-00002.* is not in manifest.json"):
        checkpoints.load(path, make_state())


@pytest.mark.parametrize("name", FILES[:2])
@pytest.mark.parametrize("content", ["[]", "null", '{"format": 2, "step": 3, "files": {"a": 1}}'])
def test_json_of_another_kind_is_refused(saved, name, content):
    checkpoints, path, _ = saved
    (path / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{path}: damaged checkpoint"):
        checkpoints.load(path, make_state())


@pytest.mark.parametrize("number", [1, 3, None])
def test_a_checkpoint_of_another_format_is_refused_by_its_number(saved, number):
    checkpoints, path, _ = saved
    file = path / "progress.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": number, "ranks": 8}))
    with pytest.raises(CheckpointError, match=f"checkpoint format {number}, this version reads 2"):
        checkpoints.load(path, make_state())


def test_another_models_checkpoint_names_tensor_and_both_shapes(saved):
    checkpoints, path, _ = saved
    with pytest.raises(CheckpointError, match=r"'0\.bias' is \(4,\), the model expects \(6,\)"):
        checkpoints.load(path, make_state(width=6))


def test_a_checkpoint_of_a_deeper_model_names_what_is_too_much(saved):
    checkpoints, path, _ = saved
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(CheckpointError, match=r"'2\.bias' is \(4,\), .* no such tensor; was this"):
        checkpoints.load(path, TrainState(model, torch.optim.AdamW(model.parameters())))


def test_a_checkpoint_of_a_shallower_model_names_what_is_missing(saved):
    checkpoints, path, _ = saved
    state = make_state()
    model = nn.Sequential(*state.model.children(), nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"'4\.bias' is missing, the model expects \(2,\)"):
        checkpoints.load(path, TrainState(model, torch.optim.AdamW(model.parameters())))


def test_a_refused_checkpoint_leaves_all_as_it_was(saved):
    checkpoints, path, _ = saved
    state = make_state(width=6)
    before = copies(state)
    with pytest.raises(CheckpointError):
        checkpoints.load(path, state)
    assert_equal(copies(state), before)
    assert not state.optimizer.state


# ── a GPU ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_tensors_are_copied_before_training_goes_on(tmp_path):
    checkpoints, state, other = (
        Checkpoints(tmp_path),
        make_state(decay=None),
        make_state(decay=None),
    )
    for one in (state, other):
        one.model.cuda()
    train_on_gpu(state, 3)
    expected = copies(state)
    for step in (1, 2):  # the second into the same pinned memory
        checkpoints.save(state, progress(step))
        train_on_gpu(state, 5)
    checkpoints.finish()
    checkpoints.load(tmp_path / "step-00000001", other)
    assert_equal(copies(other), expected)
    assert {tensor.device.type for tensor in other.tensors().values()} == {"cuda"}
    train_on_gpu(other, 5)
    expected = copies(other)
    checkpoints.load(tmp_path / "step-00000002", other)
    assert_equal(copies(other), expected)


def train_on_gpu(state, steps):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        state.optimizer.zero_grad()
        state.model(torch.randn(5, 3, generator=generator).cuda()).square().sum().backward()
        state.optimizer.step()
