"""What a run writes to be read: rows, events, copies for viewers, and what a resume keeps of them.

Not which rows a run writes: test_train.py.
"""

import json
import subprocess
import sys
import time
from datetime import datetime
from importlib.util import find_spec

import pytest

from m2encoder.errors import MissingExtraError
from m2encoder.log import MetricsLog, RunLog, add_event, read_events, read_metrics


def write_steps(path, *steps):
    log = MetricsLog(path, from_step=0)
    for step in steps:
        log.write(step, {"loss": step / 4})


def steps_of(path):
    return [row["step"] for row in read_metrics(path)]


def test_rows_come_back_as_they_were_written(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", from_step=0)
    log.write(1, {"loss": 0.1 + 0.2, "lr": 1e-300})
    log.write(2, {"eval/验证/zh/i2t_r1": 0.5})
    assert read_metrics(tmp_path / "m.jsonl") == [
        {"step": 1, "loss": 0.1 + 0.2, "lr": 1e-300},
        {"step": 2, "eval/验证/zh/i2t_r1": 0.5},
    ]


def test_a_file_that_does_not_exist_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_json_cannot_hold_becomes_null(tmp_path, value):
    MetricsLog(tmp_path / "m.jsonl", from_step=0).write(1, {"loss": value})
    line = (tmp_path / "m.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None}


@pytest.mark.parametrize(("from_step", "kept"), [(0, []), (3, [1, 3]), (4, [1, 3]), (9, [1, 3, 5])])
def test_opening_at_a_step_drops_later_rows(tmp_path, from_step, kept):
    write_steps(tmp_path / "m.jsonl", 1, 3, 5)
    MetricsLog(tmp_path / "m.jsonl", from_step=from_step)
    assert steps_of(tmp_path / "m.jsonl") == kept


def test_rows_of_one_step_stay_together(tmp_path):
    write_steps(tmp_path / "m.jsonl", 1, 2, 2, 3)
    MetricsLog(tmp_path / "m.jsonl", from_step=2)
    assert steps_of(tmp_path / "m.jsonl") == [1, 2, 2]


def test_a_last_line_that_was_cut_off_is_dropped_and_written_over(tmp_path):
    path = tmp_path / "m.jsonl"
    write_steps(path, 1, 2)
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert steps_of(path) == [1, 2]
    MetricsLog(path, from_step=2).write(3, {"loss": 1.0})
    assert steps_of(path) == [1, 2, 3]


def test_nothing_but_the_log_is_left_behind(tmp_path):
    write_steps(tmp_path / "m.jsonl", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]


# --- a full disk ---


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    """The file may grow to 40 bytes: the second line would be cut off within."""
    path = tmp_path / "m.jsonl"
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from m2encoder.log import append_line\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))\n"
        "path = Path(sys.argv[1]); append_line(path, 'a' * 30)\n"
        "try: append_line(path, 'b' * 30)\n"
        "except OSError as error: print(error.strerror)\n"
        "append_line(path, 'c' * 5)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.stderr) == ("File too large", "")
    assert path.read_text() == "a" * 30 + "\n" + "c" * 5 + "\n"


def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path, caplog):
    with RunLog(tmp_path, from_step=0, writers=()) as log:
        log.write(1, {"loss": 1.0})
        path = tmp_path / "metrics.jsonl"
        path.rename(tmp_path / "kept")
        path.symlink_to("/dev/full")
        for step in (2, 3):
            log.write(step, {"loss": 1.0})
        path.unlink()
        (tmp_path / "kept").rename(path)
        log.write(4, {"loss": 1.0})
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("step 2: ")
    assert said[0].endswith(
        "cannot be written (No space left on device); training goes on, rows are missing"
    )
    assert steps_of(path) == [1, 4]


# --- events ---


def events_of(out):
    return [json.loads(line) for line in (out / "events.jsonl").read_text("utf-8").splitlines()]


def test_events_are_the_history_of_a_run_and_nothing_drops_them(tmp_path):
    with RunLog(tmp_path, from_step=0, writers=(), facts={"world_size": 2}) as log:
        log.event(30, "bad step", key="图 1", reason="loss nan")
    with RunLog(tmp_path, from_step=20, writers=(), facts={"world_size": 1}):
        pass
    found = events_of(tmp_path)
    assert all(datetime.fromisoformat(event.pop("time")).tzinfo for event in found)
    assert found == [
        {"step": 0, "event": "started", "world_size": 2},
        {"step": 30, "event": "bad step", "key": "图 1", "reason": "loss nan"},
        {"step": 20, "event": "resumed", "world_size": 1},
    ]


def test_events_that_cannot_be_written_are_a_warning(tmp_path, caplog):
    (tmp_path / "events.jsonl").mkdir()
    add_event(tmp_path, 3, "rewound")
    assert "events.jsonl: cannot be written (Is a directory); the event is lost" in caplog.text


def test_events_come_back_without_a_last_line_that_was_cut_off(tmp_path):
    add_event(tmp_path, 1, "started", text="\u2028\ud800")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"step": 3, "ev')
    assert [event["step"] for event in read_events(tmp_path)] == [1]
    assert read_events(tmp_path)[0]["text"] == "\u2028\ud800"
    assert read_events(tmp_path / "none") == []


# --- viewers ---


def scalars_in(folder):
    """What TensorBoard shows: tag to (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def test_tensorboard_shows_the_rows_and_a_resume_hides_what_it_does_again(tmp_path):
    with RunLog(tmp_path, from_step=0) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss/image-zh": step / 4, "eval/验证/zh/i2t_r1": 0.5})
    time.sleep(1.1)  # their files are named by the second
    with RunLog(tmp_path, from_step=2) as log:
        log.write(3, {"loss/image-zh": 2.5})
    assert scalars_in(tmp_path / "tensorboard") == {
        "loss/image-zh": [(1, 0.25), (2, 0.5), (3, 2.5)],
        "eval/验证/zh/i2t_r1": [(1, 0.5), (2, 0.5)],
    }
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_tensorboard_that_is_not_installed_is_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with RunLog(tmp_path, from_step=0) as log:
        log.write(1, {"loss": 1.0})
    assert len(caplog.records) == 1
    assert "pip install 'm2encoder[train]'" in caplog.text
    assert steps_of(tmp_path / "metrics.jsonl") == [1]
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_that_is_not_installed_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        MissingExtraError, match=r"wandb is not .* pip install 'm2encoder\[wandb\]'"
    ):
        RunLog(tmp_path, from_step=0, writers=("tensorboard", "wandb"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_goes_on_with_the_same_run_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for from_step in (0, 2):
        config = {"seed": 3}
        writers = ("wandb",)
        with RunLog(tmp_path, from_step=from_step, writers=writers, resolved_config=config) as log:
            log.write(from_step + 1, {"loss": 1.0})
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    own = (tmp_path / "wandb-id").read_text()
    assert folders
    assert all(folder.name.endswith(own) for folder in folders)
