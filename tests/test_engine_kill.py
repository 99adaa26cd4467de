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

    def run(self, config, *, ranks=1, phase=None, count=1, delay_s=0.0, victims=(0,)):
        """Train, killed when rank 0 comes to a phase for the count-th time, or so much later.

        Returns rank 0's phases and the exit statuses.
        """
        request = {"config": str(config), "ranks": ranks, "phase": phase, "count": count}
        request |= {"delay_s": delay_s, "victims": list(victims)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
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


def killed_and_finished(trainer, config, kills, *, ranks, chance):
    """Kill at each (phase, count), then let it finish; returns the phases of the kills.

    One rank or all, at the very moment or within 50 ms of it. A run that has finished is killed no
    more.
    """
    done = []
    for phase, count in kills:
        victims = [chance.randrange(ranks)] if chance.random() < 0.5 else list(range(ranks))
        delay_s = 0.0 if chance.random() < 0.7 else chance.random() / 20
        moment = {"phase": phase, "count": count, "delay_s": delay_s}
        ran = trainer.run(config, ranks=ranks, **moment, victims=victims)
        if ran["statuses"] == [0] * ranks:
            break
        assert ran["phases"].count(phase) >= count
        where = f"{phase} {count} +{1000 * delay_s:.0f} ms, ranks {victims} of {ranks}"
        logger.info("killed at %s", where)
        done.append(phase)
    ran = trainer.run(config, ranks=ranks)
    assert ran["statuses"] == [0] * ranks
    return done


def test_an_undisturbed_run_goes_through_every_phase(undisturbed):
    _, phases = undisturbed(1)
    assert set(phases) == PHASES


@pytest.mark.parametrize(
    ("seed", "ranks", "kills"),
    [
        (0, 1, [("writing", 2), ("waiting for data", 2)]),
        (1, 1, [("renaming", 1), ("training", 4)]),
        (2, 2, [("renamed", 1), ("saving", 1), ("after saving", 1)]),
    ],
)
def test_a_killed_run_goes_on_to_the_bit(trainer, write_config, undisturbed, seed, ranks, kills):
    """Read, step, save, rename: the three runs together are killed in every phase."""
    config, out = write_config(f"killed-{seed}")
    done = killed_and_finished(trainer, config, kills, ranks=ranks, chance=random.Random(seed))
    assert done == [phase for phase, _ in kills]
    assert_same(out, undisturbed(ranks)[0])


@pytest.mark.slow
def test_twenty_kills_over_every_phase(trainer, write_config, undisturbed):
    chance, done = random.Random(20), []
    for number in range(40):
        ranks = chance.choice([1, 1, 2])
        whole, phases = undisturbed(ranks)
        config, out = write_config(f"slow-{number}")
        kinds = chance.sample(sorted(PHASES), 2)
        kills = [(kind, chance.randint(1, max(1, phases.count(kind) // 2))) for kind in kinds]
        done += killed_and_finished(trainer, config, kills, ranks=ranks, chance=chance)
        assert_same(out, whole)
        if len(done) >= 20 and set(done) == PHASES:
            break
    assert len(done) >= 20
    assert set(done) == PHASES
