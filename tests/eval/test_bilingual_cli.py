"""The commands eval bilingual, fine-grained, prompts and calibrate, on the tiny model and shards.

Not for what they measure: test_bilingual.py and its kin.
"""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from m2encoder.calibration import load_calibration, read_calibration
from m2encoder.cli import main
from m2encoder.eval.results import load, load_many
from m2encoder.load import load_model
from m2encoder.shards import ShardReader, write_shards


@pytest.fixture
def model(tiny_model_folder: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(tiny_model_folder, tmp_path / "模型"))


@pytest.fixture(scope="module")
def shards(tiny_shards: Path) -> str:
    return str(tiny_shards / "test")


def run(*words: object) -> int:
    return main([str(word) for word in words])


def changed_shards(source, folder, change):
    """Write the pairs of `source` anew, each changed by `change(position, pair)`."""
    pairs = list(ShardReader(source))
    for position, pair in enumerate(pairs):
        change(position, pair)
    write_shards(pairs, folder)
    return folder


# ── bilingual ───────────────────────────────────────────────────────────────────────────────────


def test_bilingual_prints_tables_and_writes_a_result_per_measure(model, shards, tmp_path, capsys):
    assert run("eval", "bilingual", model, shards, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    for words in ("parallel captions", "retrieval and gap", "both languages in one list: colour",
                  "zh captions written otherwise", "truncated: 0.0 %"):  # fmt: skip
        assert words in printed
    results = load_many([tmp_path / "out"])
    tasks = [(result.task, result.language) for result in results]
    assert tasks.count(("bilingual", "zh+en")) == 1
    assert tasks.count(("language-bias", "zh+en")) == 5
    assert {("robustness", "zh"), ("robustness", "en")} <= set(tasks)
    count = len(ShardReader(shards))
    bilingual = next(result for result in results if result.task == "bilingual")
    assert bilingual.data["images"] == count
    assert bilingual.data["texts"] == sum(
        len(texts) for pair in ShardReader(shards) for texts in pair.captions.values()
    )
    assert bilingual.metrics["t2i_r1_gap"].ci95 is not None
    assert bilingual.settings["seed"] == 0


def test_bilingual_as_json_is_a_list_of_results(model, shards, capsys):
    assert run("eval", "bilingual", model, shards, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert {each["task"] for each in content} == {"bilingual", "language-bias", "robustness"}
    assert {each["schema_version"] for each in content} == {1}


def test_bilingual_needs_both_languages(model, shards, tmp_path, capsys):
    def strip(_, pair):
        del pair.captions["en"]

    assert run("eval", "bilingual", model, changed_shards(shards, tmp_path / "d", strip)) == 3
    assert "no captions in en" in capsys.readouterr().err


def test_bilingual_without_tasks_measures_captions_alone(model, shards, tmp_path, capsys):
    folder = changed_shards(shards, tmp_path / "d", lambda position, pair: None)
    assert run("eval", "bilingual", model, folder) == 0
    assert "in one list" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["bilingual", "calibrate", "fine-grained", "prompts"])
def test_skipped_items_give_exit_code_4_and_are_named(command, model, shards, tmp_path, capsys):
    def spoil(position, pair):
        pair.image = b"no picture" if position == 1 else pair.image

    folder = changed_shards(shards, tmp_path / "d", spoil)
    shutil.copy(Path(shards) / "zero_shot.json", folder)
    assert run("eval", command, model, folder) == 3
    assert run("eval", command, model, folder, "--on-error", "skip") == 4
    assert ShardReader(folder).keys[1] in capsys.readouterr().err


# ── prompts ─────────────────────────────────────────────────────────────────────────────────────


def test_prompts_lists_the_most_doubtful_classes(model, shards, tmp_path, capsys):
    assert run("eval", "prompts", model, shards, "--classes", 2, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert printed.count("most doubtful class") == 5
    results = load_many([tmp_path / "out"])
    assert {result.details["task"] for result in results} >= {"colour", "object"}
    colour = next(result for result in results if result.details["task"] == "colour")
    assert len(colour.details["classes"]) == 8  # the file has them all
    assert "accuracy_gap" in colour.metrics
    doubtful = colour.details["classes"][0]["label"]
    assert f"\n{doubtful} " in printed


def test_prompts_takes_a_task_file_without_pictures(model, shards, capsys):
    assert run("eval", "prompts", model, f"{shards}/zero_shot.json", "--classes", 0) == 0
    printed = capsys.readouterr().out
    assert "task colour" in printed
    assert "accuracy" not in printed
    assert "most doubtful" not in printed


def test_prompts_needs_a_task_in_both_languages(model, tmp_path, capsys):
    classes = [{"label": "a", "zh": ["猫"]}, {"label": "b", "zh": ["狗"]}]
    task = {"name": "动物", "label": "x", "classes": classes, "templates": {"zh": ["{}"]}}
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps({"tasks": [task]}), encoding="utf-8")
    assert run("eval", "prompts", model, path) == 3
    assert "no task has templates in both zh and en" in capsys.readouterr().err


def test_prompts_joins_lists_of_names_and_takes_labelled_pictures(model, tmp_path, capsys):
    (tmp_path / "中文.txt").write_text("红色\n绿色\n蓝色\n", encoding="utf-8")
    (tmp_path / "en.json").write_text('[["red", "crimson"], "green", "blue"]', encoding="utf-8")
    lists = ["--zh", tmp_path / "中文.txt", "--en", tmp_path / "en.json"]
    assert run("eval", "prompts", model, *lists) == 0
    printed = capsys.readouterr().out
    assert "red, crimson" in printed
    assert "accuracy" not in printed
    for colour in ("red", "green", "blue"):
        (tmp_path / "pictures" / colour).mkdir(parents=True)
        Image.new("RGB", (9, 9), colour).save(tmp_path / "pictures" / colour / "a.png")
    out = tmp_path / "out"
    assert run("eval", "prompts", model, tmp_path / "pictures", *lists, "--out", out) == 0
    result = load(next(out.glob("*.json")))
    assert result.metrics["accuracy_gap"].n == 3
    assert result.data["images"] == 3
    assert {row["label"] for row in result.details["classes"]} == {"0", "1", "2"}


def test_prompts_says_which_lists_it_lacks(model, tmp_path, capsys):
    assert run("eval", "prompts", model) == 2
    assert run("eval", "prompts", model, "--zh", "cifar10/zh") == 2
    assert "names in both languages" in capsys.readouterr().err
    assert run("eval", "prompts", model, "--zh", "cifar10/en", "--en", "cifar10/en") == 2
    assert "names classes in en, expected zh" in capsys.readouterr().err
    (tmp_path / "two.txt").write_text("猫\n狗\n", encoding="utf-8")
    assert run("eval", "prompts", model, "--zh", tmp_path / "two.txt", "--en", "cifar10/en") == 3
    assert "numbers of classes differ" in capsys.readouterr().err


def test_prompts_audits_the_names_of_two_protocols(model, capsys):
    assert run("eval", "prompts", model, "--zh", "cifar10/zh", "--en", "cifar10/en") == 0
    assert "task cifar10/zh and cifar10/en" in capsys.readouterr().out


# ── calibrate ───────────────────────────────────────────────────────────────────────────────────


def test_calibrate_keeps_what_it_found_beside_the_model(model, shards, tmp_path, capsys):
    before = load_model(model, device="cpu").fingerprint
    assert run("eval", "calibrate", model, shards, "--precision", 0.5, "--out", tmp_path / "o") == 0
    assert f"kept in {model}/calibration.json" in capsys.readouterr().out
    opened = load_model(model, device="cpu")
    assert opened.fingerprint == before
    found = load_calibration(opened)
    assert found is not None
    assert found.precision == 0.5
    assert found.threshold("zh") is not None
    results = {result.language: result for result in load_many([tmp_path / "o"])}
    assert results["en"].metrics["threshold"].value == found.threshold("en")
    assert results["zh"].settings == {"seed": 0, "precision": 0.5}


def test_calibrate_says_what_was_reached_where_the_precision_is_not(model, shards, capsys):
    assert run("eval", "calibrate", model, shards) == 0
    assert "zh: no score reaches a precision of 95 %, the best is" in capsys.readouterr().out
    found = read_calibration(Path(model))
    assert found is not None
    assert found.languages["zh"].threshold is None
    assert 0 < found.languages["zh"].precision < 0.95


@pytest.mark.parametrize("precision", ["0", "95"])
def test_calibrate_refuses_a_precision_that_is_no_share(precision, model, shards, capsys):
    assert run("eval", "calibrate", model, shards, "--precision", precision) == 2
    assert f"precision is {precision}, expected more than 0" in capsys.readouterr().err
    assert read_calibration(Path(model)) is None


# ── fine-grained ────────────────────────────────────────────────────────────────────────────────


def test_fine_grained_takes_the_captions_that_shards_carry(model, shards, tmp_path, capsys):
    assert run("eval", "fine-grained", model, shards, "--out", tmp_path / "out") == 0
    assert "zh, captions given" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.jsonl"))
    results = {result.language: result for result in load_many([tmp_path / "out"])}
    assert results["zh"].task == "hard-negatives"
    assert results["zh"].metrics["accuracy"].n == len(ShardReader(shards))


def test_fine_grained_makes_captions_by_rules_and_writes_them(model, shards, tmp_path, capsys):
    def strip(_, pair):
        pair.meta = {}

    folder = changed_shards(shards, tmp_path / "d", strip)
    assert run("eval", "fine-grained", model, folder, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "en, captions rules" in printed
    assert "position: left out" in printed
    lines = (tmp_path / "out" / "hard-negatives-zh.jsonl").read_text("utf-8").splitlines()
    row = json.loads(lines[0])
    assert row["caption"] == ShardReader(folder)[0].captions["zh"][0]
    assert {each["kind"] for each in row["hard_negatives"]} <= {
        "colour",
        "count",
        "position",
        "swap",
    }


def test_fine_grained_says_where_no_rule_applies(model, shards, tmp_path, capsys):
    def blank(_, pair):
        pair.meta, pair.captions = {}, {"zh": ["没有"], "en": ["nothing"]}

    folder = changed_shards(shards, tmp_path / "d", blank)
    assert run("eval", "fine-grained", model, folder) == 3
    assert "rules made none of its captions" in capsys.readouterr().err


def test_fine_grained_reads_sugarcrepe(model, tmp_path, capsys):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    item = {"filename": "a.png", "caption": "红色", "negative_caption": "蓝色"}
    path = tmp_path / "replace_att.json"
    path.write_text(json.dumps({"0": item}), encoding="utf-8")
    out = tmp_path / "out"
    assert run("eval", "fine-grained", model, path, "--images", tmp_path, "--out", out) == 0
    assert "chance: accuracy 50.0 %" in capsys.readouterr().out
    result = load(next(out.glob("*.json")))
    assert (result.task, result.language) == ("sugarcrepe", "zh")
    assert result.metrics["accuracy_replace_att"].n == 1


def test_fine_grained_asks_for_what_is_missing(model, shards, tmp_path, capsys):
    assert run("eval", "fine-grained", model, shards, "--images", tmp_path) == 2
    assert "leave out --images" in capsys.readouterr().err
    assert run("eval", "fine-grained", model, tmp_path / "absent.json") == 3
    assert "no such file" in capsys.readouterr().err
    item = {"filename": "a.png", "caption": "红色", "negative_caption": "蓝色"}
    path = tmp_path / "swap.json"
    path.write_text(json.dumps({"0": item}), encoding="utf-8")
    assert run("eval", "fine-grained", model, path) == 2
    assert "--images DIR" in capsys.readouterr().err
    assert run("eval", "fine-grained", model, path, "--images", tmp_path, "--on-error", "skip") == 3
