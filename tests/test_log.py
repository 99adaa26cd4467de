"""metrics.jsonl: rows as written, and what opening it again keeps.

Not which rows a run writes: test_train.py.
"""

import json

import pytest

from m2encoder.log import MetricsLog, read_metrics


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
