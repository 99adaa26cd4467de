"""ImageNet as a whole: 1,000 classes in two lists, killed and resumed, on one and two processes.

The pictures are noise, one for each class; the real ones are read in the same way.
"""

import json
import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m2encoder.cli.evaluate import zero_shot
from m2encoder.distributed import World
from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.class_names import ClassList
from m2encoder.eval.datasets import read_labelled
from m2encoder.eval.label_matching import match_labels
from m2encoder.eval.results import load_many
from m2encoder.eval.tasks import Running, run_zero_shot
from m2encoder.load import load_model
from m2encoder.shards import Pair, write_shards
from m2encoder.vector_store import VectorStore

CLASSES = 1000
LISTS = {
    "wukong": [f"第{k}种东西；类别{k}" for k in range(CLASSES)],
    "cnclip": [f"第{k}种" for k in range(CLASSES)],
}
TEMPLATES = ["一张{}的照片", "{}的图片。"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """One picture of noise for each class, in an order that is not that of the classes."""
    folder = tmp_path_factory.mktemp("imagenet") / "val"
    rng = np.random.default_rng(0)

    def pairs():
        for k in rng.permutation(CLASSES).tolist():
            stream = BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(stream, "png")
            yield Pair(f"val-{k:05d}", stream.getvalue(), {}, {"class": str(k)})

    write_shards(pairs(), folder, pairs_per_shard=300)
    return folder


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """A text file and a JSON file of names, and a file of templates."""
    folder = tmp_path_factory.mktemp("lists")
    (folder / "wukong.txt").write_text("\n".join(LISTS["wukong"]), encoding="utf-8")
    content = {"names": LISTS["cnclip"], "templates": TEMPLATES}
    (folder / "cnclip.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "templates.txt").write_text("\n".join(TEMPLATES), encoding="utf-8")
    return folder


def run(folder, model, names, **running):
    """One list on one model; every number and every rank."""
    classes = ClassList("zh", tuple((name,) for name in LISTS[names]), tuple(TEMPLATES), names)
    data = read_labelled(folder, label_key="class")
    protocol = match_labels("custom", classes, len(data.pictures))
    encoder = load_model(model, device="cpu")
    return run_zero_shot(encoder, data, classes, protocol, running=Running(**running))


def _list_of(result):
    return os.path.basename(result.settings["class_names"].split(" + ")[0])


def numbers(result):
    """All that must not depend on how a task was run."""
    metrics = {name: repr(metric) for name, metric in result.metrics.items()}
    return metrics, {name: array.tolist() for name, array in result.ranks.items()}


@pytest.fixture(scope="module")
def undisturbed(shards, tiny_model_folder):
    return numbers(run(shards, tiny_model_folder, "wukong"))


def test_both_lists_run_from_files_on_the_command_line(
    shards, lists, tiny_model_folder, tmp_path, capsys
):
    common: dict[str, Any] = {
        "protocol": "custom",
        "label": "class",
        "language": "zh",
        "out": tmp_path,
    }
    words: dict[str, Any] = {
        "wukong.txt": {"templates": lists / "templates.txt"},
        "cnclip.json": {},
    }
    for file, more in words.items():
        model = str(tiny_model_folder)
        assert zero_shot(model, shards, classes=str(lists / file), **common, **more) == 0
    assert "top-1" in capsys.readouterr().out
    by_list = {_list_of(r): r for r in load_many([tmp_path])}
    assert set(by_list) == set(words)
    for result in by_list.values():
        assert result.metrics["top1"].n == CLASSES
        assert result.data["images"] == CLASSES
        assert 0 <= result.metrics["top1"].value < 0.02  # noise: chance is 0.001
        assert result.metrics["top1"].value <= result.metrics["top5"].value
    assert by_list["wukong.txt"].protocol["id"] != by_list["cnclip.json"].protocol["id"]


def test_a_list_of_another_length_is_refused(shards, tiny_model_folder, lists, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("\n".join(LISTS["wukong"][:-1]), encoding="utf-8")
    options: dict[str, Any] = {
        "templates": lists / "templates.txt",
        "language": "zh",
        "label": "class",
    }
    with pytest.raises(DataError, match="the data has a class 999, the list of names ends at 998"):
        zero_shot(str(tiny_model_folder), shards, classes=str(short), **options)


def test_a_list_that_calls_two_classes_the_same_is_refused(shards, tiny_model_folder, tmp_path):
    twice = tmp_path / "twice.json"
    content = {"names": [*LISTS["wukong"][:-1], LISTS["wukong"][6]], "templates": TEMPLATES}
    twice.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match="belongs to classes 6 and 999, which nothing can tell"):
        zero_shot(str(tiny_model_folder), shards, classes=str(twice), language="zh", label="class")


def test_classes_of_an_unknown_language_are_refused(shards, tiny_model_folder, lists):
    with pytest.raises(ConfigError, match="does not say its language; say it with --language"):
        zero_shot(str(tiny_model_folder), shards, classes=str(lists / "cnclip.json"))


def test_a_thousand_pictures_are_not_imagenet(shards, tiny_model_folder, lists):
    options: dict[str, Any] = {"classes": str(lists / "cnclip.json"), "label": "class"}
    with pytest.raises(DataError, match="imagenet-cn/wukong80: "):
        zero_shot(str(tiny_model_folder), shards, protocol="imagenet-cn/wukong80", **options)


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from test_imagenet import run
from m2encoder.vector_store import VectorStore
store = VectorStore(Path(sys.argv[5]), flush_s=0)
run(Path(sys.argv[3]), sys.argv[4], "wukong", store=store, batch_size=16)
"""


def test_a_run_that_was_killed_goes_on_and_gives_the_same(
    shards, tiny_model_folder, tmp_path, undisturbed
):
    here = os.path.dirname(__file__)
    store = tmp_path / "vectors"
    command = [sys.executable, "-c", KILLED, here, os.path.dirname(here)]
    command += [str(shards), str(tiny_model_folder), str(store)]
    process = subprocess.Popen(command)
    until = time.monotonic() + 120
    while not list(store.rglob("*.part")) and process.poll() is None:
        assert time.monotonic() < until, "nothing was stored"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = VectorStore(store).size_bytes()
    assert kept > 0
    resumed = run(shards, tiny_model_folder, "wukong", store=VectorStore(store), batch_size=16)
    assert numbers(resumed) == undisturbed
    assert VectorStore(store).size_bytes() > kept
    assert (
        numbers(run(shards, tiny_model_folder, "wukong", store=VectorStore(store))) == undisturbed
    )


def of_rank(rank, world_size, folder, model):
    return numbers(run(folder, model, "wukong", world=World(rank, world_size)))


def test_two_processes_give_what_one_gives(gloo, shards, tiny_model_folder, undisturbed):
    assert gloo(2).run(of_rank, shards, tiny_model_folder) == [undisturbed] * 2
