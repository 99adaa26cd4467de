"""A killed change leaves an index that opens and is wholly the old one or wholly the new one.

Not for damage by other hands (test_index.py).
"""

import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from indexed import write_photos

from m2encoder.errors import DataError
from m2encoder.index import ImageIndex, IndexSettings, build_index, is_finished, update_index
from m2encoder.shards import ShardReader

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

# So small that an update of a few pictures goes through every phase.
SETTINGS = {"kind": "ivf", "slack_rows": 2}
UPDATE_PHASES = [
    *["vectors written", "staging", "staged"] * 3,
    *("finishing", "finished", "cleaned"),
    *("vectors copied", "index written", "switching", "switched", "cleaned"),
]
BUILD_PHASES = [
    *["vectors written", "staging", "staged"] * 6,
    *("finishing", "finished", "cleaned", "trained", "index written"),
    *("switching", "switched", "cleaned"),
]


class Killer:
    """The process of index_killer.py."""

    def __init__(self, model_folder):
        script = Path(__file__).with_name("index_killer.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(model_folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def _answer(self):
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def kill(self, folder, phase, *, delay_s=0.0, source=None):
        """Change the index and kill at phase number `phase`; returns the phases reached."""
        request = {"folder": str(folder), "phase": phase, "delay_s": delay_s, "stage_rows": 3}
        request |= {"source": source and str(source), "settings": SETTINGS}
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self._answer()
        assert answer["status"] == (signal.SIGKILL if delay_s == 0 else answer["status"])
        assert answer["status"] in (0, signal.SIGKILL)
        return answer["phases"]

    def close(self):
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def killer(tiny_model_folder):
    found = Killer(tiny_model_folder)
    yield found
    found.close()


class Scene:
    """A folder of pictures with an index of what it held before it changed."""

    def __init__(self, folder, encoder, shards):
        self.encoder, self.photos, self.index = encoder, folder / "照片", folder / "index"
        write_photos(self.photos, shards)
        self.before = self.vectors_of_files()
        build_index(encoder, self.photos, self.index, settings=IndexSettings(**SETTINGS)).close()
        reader = ShardReader(shards)
        for i in range(4):
            (self.photos / f"新 {i}.png").write_bytes(reader[20 + i].image)
        for i in range(3):  # the same name, other bytes, other size
            (self.photos / f"图 {(1, 2, 4)[i]:02d}.png").write_bytes(reader[30 + i].image + b"0")
        (self.photos / "图 05.png").unlink()
        self.after = self.vectors_of_files()

    def vectors_of_files(self):
        """Return name -> vector of every readable picture as it is now."""
        paths = sorted(self.photos.rglob("*.png"))
        vectors = self.encoder.encode_image(paths)
        names = [path.relative_to(self.photos).as_posix() for path in paths]
        return dict(zip(names, vectors, strict=True))

    def holds(self, expected, folder=None):
        """Open the index, check it, and say whether it holds exactly these pictures."""
        with ImageIndex.open(folder or self.index, encoder=self.encoder) as index:
            index.check()
            if set(index.names) != expected.keys():
                return False
            # Each picture's own vector finds it with a cosine of 1, so the vector is the right one.
            found = index.search(np.stack(list(expected.values())), 3)
        scores = [
            [hit.score for hit in hits if hit.name == name]
            for name, hits in zip(expected, found, strict=True)
        ]
        return all(own and abs(own[0] - 1) < 1e-4 for own in scores)


@pytest.fixture(scope="module")
def scene(tiny_encoder, tiny_shards, tmp_path_factory):
    return Scene(tmp_path_factory.mktemp("scene"), tiny_encoder, tiny_shards / "test")


def kill_and_check(killer, scene, tmp_path, phase, delay_s):
    """Kill an update of a copy of the scene's index; returns the phase it had reached last."""
    folder = tmp_path / f"index-{phase}-{delay_s}"
    shutil.copytree(scene.index, folder)
    phases = killer.kill(folder, phase, delay_s=delay_s)
    assert phases == UPDATE_PHASES[: len(phases)]
    is_before, is_after = scene.holds(scene.before, folder), scene.holds(scene.after, folder)
    assert is_before != is_after
    if delay_s == 0:  # killed there and nowhere else
        assert is_after == ("finished" in phases)
    update_index(scene.encoder, folder)
    assert scene.holds(scene.after, folder)
    assert len(list(folder.glob("vectors-*"))) == len(list(folder.glob("ann-*"))) == 1
    shutil.rmtree(folder)
    return phases[-1]


def test_the_scene_changes_pictures(scene):
    assert scene.holds(scene.before)
    assert not scene.holds(scene.after)
    changed = [n for n in scene.before.keys() & scene.after.keys()
               if not np.allclose(scene.before[n], scene.after[n], atol=1e-4)]  # fmt: skip
    assert len(changed) == 3


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_update_leaves_the_old_or_the_new_index(killer, scene, tmp_path, seed):
    chance = random.Random(seed)
    phase = chance.randint(1, len(UPDATE_PHASES))
    reached = kill_and_check(killer, scene, tmp_path, phase, 0)
    logging.getLogger(__name__).info("seed %d: killed at phase %d, %s", seed, phase, reached)


def test_a_database_that_was_killed_while_it_wrote_is_mended_by_a_reader(scene, tmp_path):
    """SQLite leaves a journal then; to undo it, the next reader must be allowed to write."""
    folder = shutil.copytree(scene.index, tmp_path / "index")
    db = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
    db.execute("PRAGMA cache_size = 1")  # so that changed pages reach the file before the end
    db.execute("BEGIN")
    filler = [("猫" * 4_000 + str(i),) for i in range(50)]
    db.executemany("INSERT INTO excluded VALUES (?)", filler)
    db.execute("DELETE FROM items")
    killed = shutil.copytree(folder, tmp_path / "killed")
    db.close()
    assert (killed / "index.sqlite-journal").stat().st_size
    assert (killed / "index.sqlite").read_bytes() != (scene.index / "index.sqlite").read_bytes()
    assert scene.holds(scene.before, killed)


def test_an_update_that_is_not_killed_goes_through_every_phase(scene, tmp_path, caplog):
    folder = shutil.copytree(scene.index, tmp_path / "index")
    with caplog.at_level(logging.DEBUG, logger="m2encoder.index_files"):
        update_index(scene.encoder, folder)
    phases = [r.getMessage().removeprefix("phase: ") for r in caplog.records if "phase:" in r.msg]
    one_batch = [*UPDATE_PHASES[:3], *UPDATE_PHASES[9:]]
    assert phases == one_batch
    assert set(one_batch) == set(UPDATE_PHASES)


def test_an_update_goes_on_with_what_was_embedded(killer, scene, tmp_path):
    folder = shutil.copytree(scene.index, tmp_path / "index")
    killer.kill(folder, 6)  # two of three batches are staged: two pictures and three
    changes = update_index(scene.encoder, folder)
    assert len(changes.added) + len(changes.changed) == 7
    assert changes.embedded == 2
    assert scene.holds(scene.after, folder)


def test_a_killed_first_build_is_no_index_yet_and_goes_on(killer, scene, tmp_path):
    folder = tmp_path / "index"
    assert killer.kill(folder, 9, source=scene.photos) == BUILD_PHASES[:9]
    assert not is_finished(folder)
    with pytest.raises(DataError, match="half-written index, nothing is finished yet; go on with"):
        ImageIndex.open(folder, encoder=scene.encoder)
    with pytest.raises(DataError, match="never finished; go on with: m2enc index"):
        update_index(scene.encoder, folder)
    killer.kill(folder, 3, source=scene.photos)
    build_index(scene.encoder, scene.photos, folder, settings=IndexSettings(**SETTINGS)).close()
    assert scene.holds(scene.after, folder)


@pytest.mark.parametrize("phase", [1, 18, 19, 20, 22, 23, 24])
def test_a_killed_build_over_an_index_leaves_one_that_opens(killer, scene, tmp_path, phase):
    folder = shutil.copytree(scene.index, tmp_path / "index")
    phases = killer.kill(folder, phase, source=scene.photos)
    assert phases == BUILD_PHASES[:phase]
    assert scene.holds(scene.after if "finished" in phases else scene.before, folder)
    build_index(scene.encoder, scene.photos, folder).close()
    assert scene.holds(scene.after, folder)


@pytest.mark.slow
def test_a_hundred_killed_updates_leave_the_old_or_the_new_index(killer, scene, tmp_path):
    log = []
    for seed in range(100):
        chance = random.Random(1_000 + seed)
        # Half of them exactly at a phase, each in turn; half at any moment after one.
        phase = 1 + seed // 2 % len(UPDATE_PHASES)
        delay_s = 0.0 if seed % 2 == 0 else chance.expovariate(1 / 0.003)
        reached = kill_and_check(killer, scene, tmp_path, phase, delay_s)
        log.append((seed, phase, round(delay_s, 4), reached))
    path = tmp_path / "kill-points.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in log))
    logging.getLogger(__name__).info("kill points: %s", path.read_text())
    assert {reached for _, _, delay_s, reached in log if delay_s == 0} == set(UPDATE_PHASES)
