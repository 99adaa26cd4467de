"""What one shard folder gives: every measure, in each language, equal to its parts done by hand.

Not for the measures themselves: test_retrieval.py, test_zero_shot.py.
"""

import json

import numpy as np
import pytest

from m2encoder.cli.configuration import find_config, read_yaml
from m2encoder.cli.evaluate import retrieval, suite, zero_shot
from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.results import load_many
from m2encoder.eval.retrieval import retrieval_metrics
from m2encoder.eval.suite import evaluate, flat_metrics, format_table
from m2encoder.eval.suites import suite_from
from m2encoder.eval.tasks import draw_candidates
from m2encoder.shards import Pair, ShardReader, write_shards


@pytest.fixture(scope="module")
def shards(tiny_shards):
    return tiny_shards / "test"


@pytest.fixture(scope="module")
def results(tiny_encoder, shards):
    return evaluate(tiny_encoder, shards)


@pytest.fixture
def model_folder(tiny_model_folder):
    return str(tiny_model_folder)


def copy_shards(source, folder, change):
    """Write the pairs of `source` anew, each changed by `change(position, pair)`."""
    pairs = list(ShardReader(source))
    for position, pair in enumerate(pairs):
        change(position, pair)
    write_shards(pairs, folder)
    return folder


def test_retrieval_equals_its_parts_done_by_hand(tiny_encoder, shards, results):
    pairs = list(ShardReader(shards))
    image = tiny_encoder.encode_image([pair.image for pair in pairs])
    for language, metrics in results["retrieval"].items():
        texts = [(i, text) for i, pair in enumerate(pairs) for text in pair.captions[language]]
        vectors = tiny_encoder.encode_text([text for _, text in texts])
        expected = retrieval_metrics(image, vectors, [i for i, _ in texts])
        assert metrics == pytest.approx(expected, abs=2 / len(pairs))


def test_both_languages_are_measured(results):
    assert set(results["retrieval"]) == {"zh", "en"}
    assert all(set(found) == {"zh", "en"} for found in results["zero_shot"].values())
    assert set(results["hard_negatives"]) == {"zh", "en"}


def test_hard_negatives_equal_a_loop(tiny_encoder, shards, results):
    right = []
    for pair in ShardReader(shards):
        image = tiny_encoder.encode_image(pair.image)
        texts = [pair.captions["zh"][0], *pair.meta["hard_negatives"]["zh"]]
        own, *wrong = tiny_encoder.similarity(image, tiny_encoder.encode_text(texts))[0]
        right.append(own > max(wrong))
    found = results["hard_negatives"]["zh"]
    assert found["n"] == len(right)
    assert found["accuracy"] == pytest.approx(np.mean(right))


def test_hard_negatives_by_kind_count_every_wrong_caption(shards, results):
    kinds = [kind for pair in ShardReader(shards) for kind in pair.meta["hard_negative_kinds"]]
    by_kind = results["hard_negatives"]["en"]["by_kind"]
    assert {kind: found["n"] for kind, found in by_kind.items()} == {
        kind: kinds.count(kind) for kind in kinds
    }


def test_candidates_restrict_pictures_and_their_captions(tiny_encoder, shards):
    metrics = evaluate(tiny_encoder, shards, candidates=10)["retrieval"]["zh"]
    chosen = draw_candidates(len(ShardReader(shards)), 10, 0)
    texts = sum(len(ShardReader(shards)[i].captions["zh"]) for i in chosen)
    assert (metrics["images"], metrics["texts"]) == (10, texts)


def test_candidates_depend_on_the_seed_alone():
    assert draw_candidates(100, 10, 3) == draw_candidates(100, 10, 3)
    assert draw_candidates(100, 10, 3) != draw_candidates(100, 10, 4)
    assert draw_candidates(10, 10, 0) == list(range(10))


@pytest.mark.parametrize("candidates", [0, 1, 10_000])
def test_candidates_out_of_range_are_refused(tiny_encoder, shards, candidates):
    with pytest.raises(ConfigError, match=f"candidates is {candidates:,}, expected 2 to"):
        evaluate(tiny_encoder, shards, candidates=candidates)


def test_results_are_json_and_say_what_was_measured(tiny_encoder, shards, results):
    assert json.loads(json.dumps(results)) == results
    assert results["model"]["fingerprint"] == tiny_encoder.fingerprint
    assert results["data"]["count"] == len(ShardReader(shards))


def test_one_language_alone_can_be_measured(tiny_encoder, shards):
    found = evaluate(tiny_encoder, shards, languages=["zh"])
    assert set(found["retrieval"]) == {"zh"}
    assert all(set(task) == {"zh"} for task in found["zero_shot"].values())


def test_data_without_labels_or_hard_negatives_gives_retrieval_alone(
    tiny_encoder, shards, tmp_path
):
    def strip(_, pair: Pair):
        pair.meta = {}

    found = evaluate(tiny_encoder, copy_shards(shards, tmp_path, strip))
    assert found["hard_negatives"] == {}
    assert "zero_shot" not in found
    assert set(found["retrieval"]) == {"zh", "en"}


def test_pairs_without_captions_are_counted(tiny_encoder, shards, tmp_path):
    def strip(position, pair):
        pair.captions = {} if position < 3 else {"zh": pair.captions["zh"]}

    found = evaluate(tiny_encoder, copy_shards(shards, tmp_path, strip))["retrieval"]
    assert set(found) == {"zh"}
    assert found["zh"]["images_without_text"] == 3


def test_no_captions_at_all_is_an_error(tiny_encoder, shards, tmp_path):
    def strip(_, pair):
        pair.captions = {}

    with pytest.raises(DataError, match="no captions in zh or en"):
        evaluate(tiny_encoder, copy_shards(shards, tmp_path, strip))


def test_an_unreadable_picture_stops_or_is_counted(tiny_encoder, shards, tmp_path):
    def spoil(position, pair):
        pair.image = b"no picture" if position == 2 else pair.image

    folder = copy_shards(shards, tmp_path, spoil)
    key = ShardReader(folder).keys[2]
    with pytest.raises(DataError, match=f"^{key}: not a picture"):
        evaluate(tiny_encoder, folder)
    found = evaluate(tiny_encoder, folder, on_error="skip")
    assert [bad["name"] for bad in found["data"]["skipped"]] == [key]
    assert found["retrieval"]["zh"]["images"] == len(ShardReader(folder)) - 1


def test_a_label_that_no_picture_has_is_an_error(tiny_encoder, shards, tmp_path):
    def strip(_, pair):
        pair.meta = {}

    folder = copy_shards(shards, tmp_path, strip)
    (folder / "zero_shot.json").write_bytes((shards / "zero_shot.json").read_bytes())
    with pytest.raises(DataError, match="no picture has a label"):
        evaluate(tiny_encoder, folder, tasks=["zero-shot"])


def test_log_values_are_named_by_language_and_measure(results):
    flat = flat_metrics(results)
    assert flat["zh/i2t_r1"] == results["retrieval"]["zh"]["i2t_r1"]
    assert flat["en/hard_negatives"] == results["hard_negatives"]["en"]["accuracy"]
    assert flat["zh/zero_shot/colour"] == results["zero_shot"]["colour"]["zh"]["top1"]
    assert all(0 <= value <= 1 for value in flat.values())


def test_the_table_shows_each_number_in_percent(results):
    table = format_table(results)
    rows = [line.split() for line in table.splitlines()]
    metrics = results["retrieval"]["zh"]
    row = next(row for row in rows if row[:1] == ["zh"])
    assert row[1] == f"{100 * metrics['i2t_r1']:.1f}"
    assert row[7:] == [f"{100 * metrics['mean_recall']:.1f}", f"{metrics['texts']}"]
    assert all(name in table for name in ("colour", "object", "chance"))


# --- the commands --------------------------------------------------------------------------------


def test_eval_retrieval_prints_a_table_and_writes_results(
    model_folder, shards, tmp_path, capsys, results
):
    out = tmp_path / "below"
    assert retrieval(model_folder, shards, out=out) == 0
    assert "R@1" in capsys.readouterr().out
    written = load_many([out])
    assert {result.language for result in written} == {"zh", "en"}
    for result in written:
        expected = results["retrieval"][result.language]
        assert result.metrics["i2t_r1"].value == expected["i2t_r1"]
        assert result.task == "retrieval"


def test_eval_zero_shot_prints_json(model_folder, shards, capsys, results):
    assert zero_shot(model_folder, shards, json=True) == 0
    for found in json.loads(capsys.readouterr().out):
        expected = results["zero_shot"][found["settings"]["task"]][found["language"]]
        assert found["metrics"]["top1"]["value"] == expected["top1"]


def test_eval_zero_shot_without_tasks_is_an_error(model_folder, shards, tmp_path):
    folder = copy_shards(shards, tmp_path, lambda position, pair: None)
    with pytest.raises(DataError, match=r"zero_shot\.json: no such file"):
        zero_shot(model_folder, folder)


def test_skipped_pictures_give_exit_code_4(model_folder, shards, tmp_path, capsys):
    def spoil(position, pair):
        pair.image = b"no picture" if position == 0 else pair.image

    folder = copy_shards(shards, tmp_path, spoil)
    assert retrieval(model_folder, folder, on_error="skip") == 4
    assert ShardReader(folder).keys[0] in capsys.readouterr().err


def test_eval_suite_runs_what_has_data_and_names_the_rest(
    model_folder, tiny_shards, tmp_path, capsys
):
    plan = tmp_path / "own.yaml"
    plan.write_text(
        "title: Own\ntasks:\n  - {data: test, candidates: 10}\n"
        "  - {protocol: flickr30k-cn/5k, data: not-there}\n"
    )
    assert suite(model_folder, str(plan), data=tiny_shards, out=tmp_path / "found") == 4
    assert "flickr30k-cn/5k: no data at" in capsys.readouterr().err
    tasks = {result.task for result in load_many([tmp_path / "found"])}
    assert tasks == {"retrieval", "hard-negatives", "zero-shot", "bilingual"}


def test_eval_suite_without_any_data_is_refused(model_folder, tmp_path):
    with pytest.raises(ConfigError, match="holds data of none of the 5 tasks"):
        suite(model_folder, "zh", data=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: []\ntitle: x", "no tasks, expected at least one"),
        ("title: x", "expected title and a list of tasks"),
        ("title: x\ntasks: [{protocol: a}]", "expected a mapping with data and protocol"),
        ("title: x\ntasks: [{data: a, size: 3}]", "no setting 'size' of a task; known: protocol"),
        ("title: x\ntasks: [{data: a, protocol: coco-cn/1054}]", "no protocol 'coco-cn/1054'"),
        ("title: x\ntasks: [{data: 7}]", "data is 7, expected a path or a list of some"),
    ],
)
def test_a_mistake_in_a_suite_is_named(model_folder, tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        suite(model_folder, str(tmp_path / "own.yaml"), data=tmp_path)


@pytest.mark.parametrize("name", ["smoke", "zh", "en", "bilingual", "full"])
def test_shipped_suites_are_well_formed(name):
    path = find_config(name, kind="eval")
    tasks = suite_from(read_yaml(path), str(path)).tasks
    assert all(task.protocol is None or task.known for task in tasks)
