"""Processes that Slurm's srun started find each other as those of torchrun do."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from m2encoder.cli.configuration import to_yaml
from m2encoder.cli.slurm import adopt_slurm, first_host
from m2encoder.config import TokenizerConfig
from m2encoder.errors import ConfigError
from m2encoder.log import read_metrics

STEP = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "4242",
}


def test_a_task_of_srun_becomes_a_rank():
    environment = dict(STEP)
    adopt_slurm(environment)
    assert {name: environment[name] for name in environment.keys() - STEP.keys()} == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "24242",
    }


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"},  # the batch script itself
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        STEP | {"RANK": "3"},  # torchrun inside a task
    ],
    ids=["no Slurm", "batch script", "one task", "torchrun"],
)
def test_all_else_is_left_alone(environment):
    before = dict(environment)
    adopt_slurm(environment)
    assert environment == before


def test_an_address_that_is_given_stays():
    environment = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    adopt_slurm(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("a-b[1-2]-ib.example.org", "a-b1-ib.example.org"),
        ("n1,n2", "n1"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_the_first_host_leads(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST"])
def test_what_is_missing_is_named(missing):
    environment = {name: value for name, value in STEP.items() if name != missing}
    with pytest.raises(ConfigError, match=f"{missing} is not set; start it with torchrun"):
        adopt_slurm(environment)


def test_two_tasks_train_together(tiny_config, tiny_model_folder, tmp_path):
    own = TokenizerConfig(path=str(tiny_model_folder / "sp.model"))
    cfg = replace(tiny_config, tokenizer=own, out=str(tmp_path / "run"), steps=3)
    (tmp_path / "c.yaml").write_text(to_yaml(cfg), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "m2encoder", "pretrain", "--config", tmp_path / "c.yaml"]
    tasks = []
    for rank in range(2):
        step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
        step |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "MASTER_PORT": port}
        environment = os.environ | step | {"SLURM_STEP_NODELIST": "127.0.0.1"}
        tasks.append(subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True))
    shown = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], shown
    assert [out.strip() for out, _ in shown] == [str(tmp_path / "run/model"), ""]
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]


def test_the_example_script_hands_its_words_on(tmp_path):
    script = Path(__file__).resolve().parents[1] / "configs/slurm/pretrain.sbatch"
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    srun.chmod(0o755)
    ran = subprocess.run(
        ["bash", str(script), "--config", "m2-1b", "--out", "/共享 文件/run"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = ["m2enc", "pretrain", "--config", "m2-1b", "--out", "/共享 文件/run"]
    assert ran.stdout.splitlines() == ["--kill-on-bad-exit=1", *words]
