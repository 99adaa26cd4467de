"""A run that is killed (SIGKILL) at any moment and resumed trains on the same samples, to the bit.

Not for resuming under other numbers of processes (test_engine.py).
"""

import json
import logging
import os
import random
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from saved_runs import TIMES, tensors_of

from m2encoder.checkpoint import list_checkpoints
from m2encoder.cli.configuration import to_yaml
from m2encoder.config import Log, Save, TokenizerConfig
from m2encoder.log import read_metrics

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

logger = logging.getLogger(__name__)

STEPS = 12
LOOP = {"waiting for data", "training", "saving", "after saving"}
PHASES = LOOP | {"writing", "renaming", "renamed"}  # and those of the thread that saves


class Trainer:
    """The process of engine_killer.py."""

    def __init__(self):
        script = Path(__file__).with_name("engine_killer.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == "ready"

    def _answer(self):
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def run(self, config, *, ranks=1, phase=None, delay_s=0.0, victims=(0,)):
        """Train, killed at rank 0's phase number `phase`; returns its phases and exit statuses."""
        request = {"config": str(config), "ranks": ranks, "phase": phase, "delay_s": delay_s}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request | {"victims": list(victims)}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self):
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def trainer():
    trainer = Trainer()
    yield trainer
    trainer.close()


@pytest.fixture(scope="module")
def write_config(tiny_config, tiny_model_folder, tmp_path_factory):
    """Write a configuration file of a short run; returns its path and its `out`."""
    folder = tmp_path_factory.mktemp("killed")

    def write(name):
        cfg = replace(
            tiny_config,
            tokenizer=TokenizerConfig(path=str(tiny_model_folder / "sp.model")),
            out=str(folder / name),
            steps=STEPS,
            log=Log(every_steps=1, writers=(), samples=True),
            save=Save(every_steps=3),
            ema_decay=0.9,
            patch_dropout=0.5,
        )
        path = folder / f"{name}.yaml"
        path.write_text(to_yaml(cfg), encoding="utf-8")
        return path, folder / name

    return write


@pytest.fixture(scope="module")
def undisturbed(write_config, trainer):
    """By number of ranks: the folder of a run that was never stopped, and rank 0's phases."""
    found = {}

    def of(ranks):
        if ranks not in found:
            config, out = write_config(f"whole-{ranks}")
            ran = trainer.run(config, ranks=ranks)
            assert ran["statuses"] == [0] * ranks
            found[ranks] = out, ran["phases"]
        return found[ranks]

    return of


def trained_keys(out):
    """Per step the keys of the global batch, in order of the ranks."""
    steps = {}
    for path in sorted((out / "samples").glob("rank-*.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            steps.setdefault(row["step"], []).append(row["keys"])
    return {step: list(chain(*keys)) for step, keys in sorted(steps.items())}


def losses(out):
    rows = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def assert_same(out, whole):
    keys = trained_keys(out)
    assert list(keys) == list(range(1, STEPS + 1))
    assert all(len(batch) == 16 for batch in keys.values())
    assert keys == trained_keys(whole)
    assert losses(out) == losses(whole)
    # a run killed after its last rename keeps one checkpoint more
    for one in list_checkpoints(whole / "checkpoints"):
        found, expected = map(tensors_of, (out / "checkpoints" / one.name, one))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    exported = "model/model.safetensors"
    assert (out / exported).read_bytes() == (whole / exported).read_bytes()


def killed_until_done(trainer, config, phases, moments, *, ranks, chance):
    """Kill at each moment's phase and then let it finish; returns where it was killed."""
    where = []
    for moment in moments:
        victims = [chance.randrange(ranks)] if chance.random() < 0.5 else list(range(ranks))
        delay_s = 0.0 if chance.random() < 0.7 else chance.random() / 20
        ran = trainer.run(config, ranks=ranks, phase=moment, delay_s=delay_s, victims=victims)
        if ran["statuses"][0] == 0:
            return where  # it finished before
        assert len(ran["phases"]) >= moment
        where.append(f"{ran['phases'][moment - 1]} +{1000 * delay_s:.0f} ms, ranks {victims}")
    ran = trainer.run(config, ranks=ranks)
    assert ran["statuses"] == [0] * ranks
    return where


def test_an_undisturbed_run_goes_through_every_phase(undisturbed):
    _, phases = undisturbed(1)
    assert set(phases) == PHASES


@pytest.mark.parametrize(("seed", "ranks"), [(0, 1), (1, 1), (2, 2)])
def test_a_killed_run_goes_on_to_the_bit(trainer, write_config, undisturbed, seed, ranks):
    whole, phases = undisturbed(ranks)
    chance = random.Random(seed)
    config, out = write_config(f"killed-{seed}")
    kinds = sorted(PHASES)[seed::3]  # each seed its own kinds, all three together all
    moments = [chance.choice([i for i, p in enumerate(phases, 1) if p == kind]) for kind in kinds]
    # the second kill counts the phases of a run that resumes, which has fewer left
    moments = [moments[0], max(1, moments[1] // 2)]
    where = killed_until_done(trainer, config, phases, moments, ranks=ranks, chance=chance)
    logger.info("seed %d: killed at %s", seed, where)
    assert where
    assert_same(out, whole)


@pytest.mark.slow
def test_twenty_kills_over_every_phase(trainer, write_config, undisturbed, tmp_path):
    chance, count, log = random.Random(20), 0, []
    for round_ in range(40):
        ranks = chance.choice([1, 1, 2])
        whole, phases = undisturbed(ranks)
        config, out = write_config(f"slow-{round_}")
        kinds = chance.sample(sorted(PHASES), 2)
        moments = [
            chance.choice([i for i, p in enumerate(phases, 1) if p == kind]) for kind in kinds
        ]
        moments = [moments[0], max(1, moments[1] // 2)]
        where = killed_until_done(trainer, config, phases, moments, ranks=ranks, chance=chance)
        log += where
        assert_same(out, whole)
        count += len(where)
        kinds_seen = {point.split(" +")[0] for point in log}
        if count >= 20 and kinds_seen == PHASES:
            break
    logger.info("killed at:\n%s", "\n".join(log))
    assert count >= 20
    assert {point.split(" +")[0] for point in log} == PHASES
