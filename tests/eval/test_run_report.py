"""The page about a training run says what the run folder holds, whatever state the run is in.

Not for its looks: those are for eyes. Curves that other pages show too: test_report.py.
"""

import json

import pytest
from read_pages import Page

from m2encoder.cli import main
from m2encoder.errors import DataError
from m2encoder.eval.charts import Line, Mark, line_chart, stacked_chart
from m2encoder.eval.run_report import read_run, render_run
from m2encoder.log import RunLog

FACTS = {"world_size": 2, "device": "cpu", "total_steps": 40}
CONFIG = "epochs: 4\nsteps: null\nobjectives:\n- name: image-zh # <b>猫</b>\n"


def row_of(step, **changes):
    row = {
        "loss": 5 / step, "loss/image-zh": 4 / step, "loss/image-en": 6 / step,
        "accuracy/image-zh": step / 100, "accuracy/image-en": step / 80,
        "lr": 1e-3, "grad_norm": 2.5, "logit_scale": 14.3, "epoch": step / 10,
        "samples": 16 * step, "dropped": 3, "samples_per_s": 120.0, "seconds": 2.0 * step,
        "waiting": 0.5, "waiting/read": 0.4, "waiting/decode": 0.1, "waiting/other": 0.0,
    }  # fmt: skip
    return row | changes


EVALUATION = {
    "eval/val/zh/i2t_r1": 0.25, "eval/val/zh/t2i_r1": 0.35, "eval/val/en/i2t_r1": 0.45,
    "eval/val/en/t2i_r1": 0.55, "eval/val/zh/zero_shot/颜色": 0.125,
}  # fmt: skip


def make_run(folder, *, last=20, facts=FACTS, config=CONFIG):
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        (folder / "config.yaml").write_text(config, encoding="utf-8")
    with RunLog(folder, from_step=0, writers=(), facts=facts) as log:
        for step in range(2, last + 1, 2):
            log.write(step, row_of(step))
        if last >= 10:
            log.write(10, EVALUATION)
            log.write(last, {name: value + 0.125 for name, value in EVALUATION.items()})
    return folder


def page_about(folder):
    return Page(render_run(read_run(folder)))


def titles(page):
    return [attributes["aria-label"].split(".")[0] for attributes in page.all("svg")]


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "试跑 <1>")


def test_the_page_shows_every_curve(run):
    assert titles(page_about(run)) == [
        "R@1, mean of both directions",
        "Zero-shot accuracy, mean of tasks",
        "Loss",
        "Accuracy within the batch",
        "Gradient norm, before clipping",
        "Learning rate",
        "Scale (1 / temperature)",
        "Speed",
        "Waiting for batches, share of the time (legend: mean)",
    ]


def test_the_page_is_safe_and_needs_no_other_file(run):
    html = render_run(read_run(run))
    page = Page(html)
    policies = [attributes.get("content", "") for attributes in page.all("meta")]
    assert any(policy.startswith("default-src 'none'") for policy in policies)
    assert page.all("script") == page.all("link") == page.all("img") == []
    assert "image-zh # <b>猫</b>" in page.text()
    assert "<b>猫</b>" not in html


def test_an_unfinished_run_says_so(run):
    text = page_about(run).text()
    assert "Training run 试跑 <1>" in text
    assert "Unfinished: 20 of 40 steps (50 %); last started at 20" in text


def test_a_finished_run_says_so(tmp_path):
    text = page_about(make_run(tmp_path / "r", last=40)).text()
    assert "Finished: 40 of 40 steps." in text
    assert "pairs seen 640" in text
    assert "1 min 20 s" in text


@pytest.mark.parametrize(
    ("facts", "config", "said"),
    [
        ({}, CONFIG, "Unfinished: 20 of 40 steps"),  # 10 steps per epoch
        ({}, "steps: 25\nepochs: 4\n", "Unfinished: 20 of 25 steps"),
        ({}, "", "Unfinished: 20 steps; last started"),
        ({"total_steps": 20}, CONFIG, "Finished: 20 of 20 steps"),
    ],
)
def test_how_long_the_run_is_comes_from_what_is_there(tmp_path, facts, config, said):
    assert said in page_about(make_run(tmp_path / "r", facts=facts, config=config)).text()


def test_measures_stand_beside_each_other_with_the_newest_and_the_best(tmp_path):
    folder = make_run(tmp_path / "r")
    with RunLog(folder, from_step=20, writers=()) as log:
        log.write(22, {"eval/val/zh/t2i_r1": 0.125, "eval/val/both/x": 1.0})
    text = page_about(folder).text()
    assert "text to image, R@1 12.5 67.5 47.5 (20) 67.5 (20)" in text
    assert "image to text, R@1 37.5 57.5 37.5 (20) 57.5 (20)" in text
    assert "zero-shot, 颜色 25.0 – 25.0 (20) –" in text


def test_several_data_sets_are_told_apart(tmp_path):
    folder = make_run(tmp_path / "r")
    with RunLog(folder, from_step=20, writers=()) as log:
        log.write(22, {"eval/验证/zh/mean_recall": 0.5})
    text = page_about(folder).text()
    assert "验证: mean recall 50.0" in text
    assert "val: text to image, R@1" in text


def test_what_waiting_was_for_is_said(run):
    text = page_about(run).text()
    assert "On average waiting 50 % of the time, for read; most at step 2" in text
    assert "Reading: faster storage" in text
    assert "read 40 %" in text
    assert "decode 10 %" in text


def test_a_run_that_hardly_waits_says_so(tmp_path):
    folder = make_run(tmp_path / "r", last=2)
    with RunLog(folder, from_step=0, writers=()) as log:
        log.write(1, row_of(1, **{"waiting": 0.01, "waiting/read": 0.01, "waiting/decode": 0.0}))
    assert "hardly waited" in page_about(folder).text()


def test_resumes_and_bad_steps_are_marked_and_told(run):
    with RunLog(run, from_step=10, writers=(), facts=FACTS | {"world_size": 1}) as log:
        log.event(12, "bad step", rank=1, reason="loss nan", keys=["图1", "b", "c", "d", "e", "f"])
        for step in range(12, 21, 2):
            log.write(step, row_of(step))
    with RunLog(run, from_step=20, writers=(), facts=FACTS | {"world_size": 1}):
        pass
    page = page_about(run)
    styles = [attributes.get("class") for attributes in page.all("path")]
    charts = len(page.all("svg"))
    assert styles.count("mark bad") == charts - 2  # evaluations end at step 10
    text = page.text()
    assert "12 bad step rank 1, reason loss nan, keys 图1 b c d e …" in text
    assert "10 resumed world size 1 " in text
    assert "20 resumed as before" in text
    assert "resumed here. something went wrong" in text
    assert "starts 3" in text


def test_saves_are_counted_and_not_listed(run):
    with RunLog(run, from_step=20, writers=(), facts=FACTS) as log:
        for stall_s in (0.25, 0.5, 1.0):
            log.event(20, "saved", stall_s=stall_s)
    text = page_about(run).text()
    assert "checkpoints 3 written; training stood still 0.5 s for one" in text
    assert "20 saved" not in text


def test_a_run_that_has_not_logged_a_step_has_a_page(tmp_path):
    page = page_about(make_run(tmp_path / "r", last=0))
    assert "it has begun and not logged a step yet" in page.text()
    assert not page.all("svg")


def test_a_run_of_one_row_has_a_page(tmp_path):
    assert "Loss" in titles(page_about(make_run(tmp_path / "r", last=2)))


def test_a_row_that_is_not_finite_is_passed_over(tmp_path):
    folder = make_run(tmp_path / "r", last=4)
    with RunLog(folder, from_step=4, writers=()) as log:
        log.write(6, row_of(6, loss=float("nan"), grad_norm=float("inf")))
    assert "NaN" not in render_run(read_run(folder))


def test_a_folder_of_an_earlier_version_has_a_page(tmp_path):
    folder = make_run(tmp_path / "r")
    (folder / "events.jsonl").unlink()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    old = [{k: v for k, v in row.items() if not k.startswith("waiting")} for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    page = page_about(folder)
    assert "Unfinished: 20 of 40 steps (50 %)." in page.text()
    assert "What happened" not in page.text()
    assert "Waiting" not in page.text()


@pytest.mark.parametrize("name", ["none", "."])
def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys, name):
    assert main(["report", str(tmp_path / name)]) == 3
    told = capsys.readouterr().err
    assert "no metrics.jsonl, so no run that has begun; give the folder (out) of a training" in told
    assert told.count("\n") == 1


def test_files_that_are_no_text_are_one_line(run):
    (run / "config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"cannot be read .* expected a run's files"):
        read_run(run)


def test_the_command_writes_beside_the_run_or_where_it_is_told(run, tmp_path, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "training.html")
    assert main(["report", str(run), "--out", str(tmp_path / "深/p.html")]) == 0
    assert (tmp_path / "深/p.html").read_bytes() == (run / "training.html").read_bytes()


# --- charts ---


def test_stacked_areas_lie_on_one_another():
    lines = [Line("read", [(0, 0.1), (10, 0.2)], "read"), Line("x", [(0, 0.3), (10, 0.4)], "other")]
    chart = stacked_chart("Waiting", lines, y_text=lambda y: f"{y:.2f}", y_at_least=1.0)
    page = Page(chart)
    lower, upper = [a["d"] for a in page.all("path") if a["class"].startswith("area")]
    edge = lower.removeprefix("M").removesuffix("Z").split("L")[:2]
    assert upper.removesuffix("Z").split("L")[2:] == edge[::-1]
    assert "read 0.15" in page.text()  # the mean


@pytest.mark.parametrize("lines", [[], [Line("read", [], "read")]])
def test_a_stack_of_nothing_is_no_chart(lines):
    assert stacked_chart("Waiting", lines) is None


def test_marks_outside_the_curves_are_left_out():
    marks = [Mark(5, "step 5: resumed", "resumed"), Mark(50, "step 50: hang", "bad")]
    page = Page(line_chart("L", [Line("l", [(0, 1), (10, 2)], "other")], marks=marks))
    assert [a["class"] for a in page.all("path") if "mark" in a["class"]] == ["mark resumed"]
    assert "step 5: resumed" in page.text()
