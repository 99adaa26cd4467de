"""Several processes on one machine: the losses of one, one line per mistake, none left behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from saved_runs import TIMES, weights_of

from m2encoder.checkpoint import list_checkpoints
from m2encoder.cli import main
from m2encoder.cli.configuration import to_yaml
from m2encoder.cli.launch import launch
from m2encoder.config import Guard, Loss, Objective, Save, TokenizerConfig
from m2encoder.errors import ConfigError
from m2encoder.load import load_model
from m2encoder.log import read_metrics


@pytest.fixture
def write_config(tiny_config, tiny_model_folder, tmp_path):
    """Write a configuration file; returns its path and its `out`."""

    def write(name, **changes):
        own = TokenizerConfig(path=str(tiny_model_folder / "sp.model"))
        out = tmp_path / name
        cfg = replace(tiny_config, **{"tokenizer": own, "out": str(out)} | changes)
        path = tmp_path / f"{name}.yaml"
        path.write_text(to_yaml(cfg), encoding="utf-8")
        return str(path), out

    return write


def m2enc(*words, **options):
    command = [sys.executable, "-m", "m2encoder", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def rows_of(out):
    """Rows of metrics.jsonl without the times."""
    rows = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def assert_same_losses(ours, theirs, *, steps):
    """Rows of two runs, to 1e-5: float32 sums in another order, step after step."""
    rows, others = map(rows_of, (ours, theirs))
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    assert rows[-1]["step"] == steps
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            if "loss" in name or name == "logit_scale":
                assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name
            elif name == "grad_norm":  # of many small numbers that nearly cancel
                assert row[name] == pytest.approx(other[name], rel=1e-3), name
            elif "accuracy" in name or name in ("samples", "dropped", "epoch", "lr"):
                assert row[name] == other[name], name


BILINGUAL = (Objective("image-zh"), Objective("image-en"), Objective("zh-en", weight=0.2))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objectives": BILINGUAL, "accumulate": 2, "patch_dropout": 0.5, "unmasked_tail": 0.3},
        {"loss": Loss(kind="sigmoid")},
    ],
    ids=["plain", "accumulated, masked, zh-en", "sigmoid"],
)
def test_two_processes_train_to_the_same_losses_as_one(write_config, changes):
    alone, alone_out = write_config("alone", **changes)
    both, both_out = write_config("both", **changes)
    assert main(["pretrain", "--config", alone]) == 0
    ran = m2enc("pretrain", "--config", both, "--nproc", "2")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(both_out / "model")
    assert "Warning" not in ran.stderr
    assert_same_losses(both_out, alone_out, steps=10)
    vectors = load_model(both_out / "model", device="cpu").encode_text(["一只猫", "a cat"])
    expected = load_model(alone_out / "model", device="cpu").encode_text(["一只猫", "a cat"])
    assert abs(vectors - expected).max() < 1e-3


def test_a_run_goes_on_with_another_number_of_processes(write_config):
    """One global order of samples, so the world size may change between stops."""
    changes = {"epochs": 2, "save": Save(every_steps=5)}
    whole, whole_out = write_config("whole", **changes)
    assert main(["pretrain", "--config", whole]) == 0
    path, out = write_config("moved", **changes)
    first = out / "checkpoints" / "step-00000010"
    with subprocess.Popen([sys.executable, "-m", "m2encoder", "pretrain", "--config", path]) as run:
        wait_for(first, run)
        run.kill()
    ran = m2enc("pretrain", "--config", path, "--nproc", "2")
    assert ran.returncode == 0, ran.stderr
    assert "resumed from" in ran.stderr
    assert_same_losses(out, whole_out, steps=20)


def wait_for(path, process):
    for _ in range(6000):
        if path.exists():
            return
        assert process.poll() is None
        time.sleep(0.01)
    pytest.fail(f"{path} did not appear in 60 s")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--data.train", "no/such/folder"], 3, "no/such/folder"),
        (["--data.batch-size", "15"], 2, "data.batch_size 15 is no multiple of the 2 processes"),
        (["--loss.grid", "3x2"], 2, "grid 3x2 has 6 places, expected 2"),
        (["--loss.group-ranks", "4"], 2, "group_ranks 4 does not divide world_size 2"),
    ],
)
def test_a_mistake_is_one_line_however_many_processes_make_it(write_config, words, code, said):
    path, _ = write_config("run")
    ran = m2enc("pretrain", "--config", path, *words, "--nproc", "2")
    assert ran.returncode == code
    assert said in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_no_processes_are_refused():
    with pytest.raises(ConfigError, match="nproc is -1, expected at least 1"):
        launch(["--help"], -1)


def children_of(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def is_alive(pid):
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


# A shell starts background jobs with SIGINT ignored, and children inherit that.
INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from m2encoder.cli import main
sys.exit(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
@pytest.mark.parametrize(
    ("signal_sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_signal_to_the_first_process_ends_all(write_config, signal_sent, code):
    path, out = write_config("run", epochs=500, save=Save(every_steps=5))
    words = ["pretrain", "--config", path, "--nproc", "2"]
    with subprocess.Popen([sys.executable, "-c", INTERRUPTIBLE, *words], stderr=-1) as run:
        wait_for(out / "checkpoints" / "step-00000005", run)
        workers = children_of(run.pid)
        assert len(workers) == 2
        os.kill(run.pid, signal_sent)
        run.communicate(timeout=60)
    assert run.returncode == code
    until = time.monotonic() + 30
    while any(map(is_alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_a_process_that_dies_ends_the_others_with_its_code(write_config):
    path, out = write_config("run", epochs=500, save=Save(every_steps=5))
    words = ["pretrain", "--config", path, "--nproc", "2"]
    with subprocess.Popen([sys.executable, "-m", "m2encoder", *words], stderr=-1) as run:
        wait_for(out / "checkpoints" / "step-00000005", run)
        os.kill(children_of(run.pid)[1], signal.SIGKILL)
        _, shown = run.communicate(timeout=90)
    assert run.returncode == 128 + signal.SIGKILL
    assert b"rank 1 of 2 was ended by SIGKILL; was the machine out of memory?" in shown


def test_sigusr1_saves_and_goes_on_and_sigterm_saves_and_stops(write_config):
    path, out = write_config("run", steps=100_000, save=Save(every_steps=10**6))
    words = ["pretrain", "--config", path, "--nproc", "2"]
    with subprocess.Popen([sys.executable, "-m", "m2encoder", *words], stderr=-1) as run:
        wait_for(out / "metrics.jsonl", run)
        while not read_metrics(out / "metrics.jsonl"):
            time.sleep(0.01)
        run.send_signal(signal.SIGUSR1)
        while not (saved := list_checkpoints(out / "checkpoints")):
            time.sleep(0.01)
            assert run.poll() is None
        reached = read_metrics(out / "metrics.jsonl")[-1]["step"]
        while read_metrics(out / "metrics.jsonl")[-1]["step"] <= reached:
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        _, shown = run.communicate(timeout=90)
    assert run.returncode == 143
    *others, last = list_checkpoints(out / "checkpoints")
    assert len(others) == 1  # ranks that see the signal in different steps may save twice
    assert saved[0] < last
    step = int(last.name.removeprefix("step-"))
    assert f"stopped by SIGTERM after step {step} of 100000, which is saved".encode() in shown
    assert read_metrics(out / "metrics.jsonl")[-1]["step"] == step


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_a_rank_that_hangs_is_named(write_config):
    path, out = write_config("run", steps=100_000, guard=Guard(hang_timeout_s=4))
    words = ["pretrain", "--config", path, "--nproc", "2"]
    with subprocess.Popen([sys.executable, "-m", "m2encoder", *words], stderr=-1) as run:
        wait_for(out / "metrics.jsonl", run)
        while not read_metrics(out / "metrics.jsonl"):
            time.sleep(0.01)
        os.kill(children_of(run.pid)[1], signal.SIGSTOP)
        _, shown = run.communicate(timeout=120)
    assert run.returncode == 1
    assert b"rank 1 is missing: last seen in step" in shown
    assert (out / "ranks/rank-00000.txt").is_file()


def test_torchrun_starts_it_too(write_config, tmp_path):
    path, out = write_config("torchrun")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "-m", "m2encoder", "pretrain", "--config", path]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(out / "model")
    weights = weights_of(out / "checkpoints/step-00000010")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
