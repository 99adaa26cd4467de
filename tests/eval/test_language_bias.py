"""Labels of two languages in one list, and mixed texts: by hand, by loops, by property.

Not for parallel captions (test_bilingual.py) nor the command (test_bilingual_cli.py).
"""

import numpy as np
import pytest

from m2encoder.embed import embed_pairs
from m2encoder.errors import DataError
from m2encoder.eval.language_bias import (
    colour_pairs,
    language_bias,
    measure_language_bias,
    mix_codes,
    mixed_task,
)
from m2encoder.eval.result_facts import labelled_pictures
from m2encoder.shards import ShardReader
from m2encoder.zero_shot import ZeroShotClass, ZeroShotTask, load_tasks

DRAWS = 50
TASK = ZeroShotTask(
    "animal",
    "animal",
    (
        ZeroShotClass("cat", {"zh": ("猫", "貓咪"), "en": ("cat",)}),
        ZeroShotClass("dog", {"zh": ("狗",), "en": ("dog", "hound")}),
    ),
    {"zh": ("一张{}的图片", "{}"), "en": ("a picture of a {}",)},
)


def unit(rng, *shape):
    vectors = rng.standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def measured(*arguments, **options):
    return language_bias(*arguments, draws=DRAWS, **options).metrics


def test_worked_by_hand():
    """Two classes. The second picture is taken for the first class, in English."""
    image = np.asarray([[1, 0], [0, 1]], np.float32)
    zh = np.asarray([[1, 0], [0, 0.5]], np.float32)
    en = np.asarray([[0, 1], [0.5, 0]], np.float32)
    found = measured(image, np.asarray([0, 1]), zh, en)
    assert found["share_zh"].value == 0.5  # the first picture's best is zh, the second's en
    assert found["accuracy_together"].value == 0.5
    assert found["accuracy_zh"].value == 1
    assert found["accuracy_en"].value == 0
    assert found["own_class_prefers_zh"].value == 1  # 1 > 0 and 0.5 > 0
    assert found["score_offset_own_class"].value == 0.75
    assert found["score_offset_all_classes"].value == pytest.approx(0.0)


def test_shares_equal_loops():
    rng = np.random.default_rng(0)
    image, targets = unit(rng, 60, 6), rng.integers(0, 5, 60)
    zh, en = unit(rng, 5, 6), unit(rng, 5, 6)
    best = np.argmax(image @ np.concatenate([zh, en]).T, axis=1)
    found = measured(image, targets, zh, en)
    assert found["share_zh"].value == pytest.approx(np.mean(best < 5))
    assert found["accuracy_together"].value == pytest.approx(np.mean(best % 5 == targets))
    assert found["accuracy_en"].value == pytest.approx(np.mean((image @ en.T).argmax(1) == targets))
    output = language_bias(image, targets, zh, en, draws=DRAWS)
    shares = output.details["share_zh_by_class"]
    assert shares == pytest.approx([np.mean(best[targets == k] < 5) for k in range(5)])


def test_equal_rows_in_both_languages_are_fair():
    rng = np.random.default_rng(1)
    image, rows = unit(rng, 40, 6), unit(rng, 5, 6)
    found = measured(image, rng.integers(0, 5, 40), rows, rows)
    for name in ("share_zh", "own_class_prefers_zh"):
        assert found[name].value == 0.5
        assert (found[name].tie_low, found[name].tie_high) == (0, 1)
    assert found["score_offset_own_class"].value == 0
    assert found["accuracy_together"].value == found["accuracy_zh"].value


def test_one_row_for_everything_gives_chance():
    rng = np.random.default_rng(2)
    rows = np.tile(unit(rng, 1, 6), (5, 1))
    found = measured(unit(rng, 40, 6), rng.integers(0, 5, 40), rows, rows)
    assert found["share_zh"].value == 0.5
    assert found["accuracy_together"].value == pytest.approx(1 / 5)
    assert found["accuracy_zh"].value == pytest.approx(1 / 5)


def test_swapping_the_languages_turns_the_shares_round():
    rng = np.random.default_rng(3)
    image, targets = unit(rng, 40, 6), rng.integers(0, 5, 40)
    zh, en = unit(rng, 5, 6), unit(rng, 5, 6)
    there, back = measured(image, targets, zh, en), measured(image, targets, en, zh)
    for name in ("share_zh", "own_class_prefers_zh"):
        assert back[name].value == pytest.approx(1 - there[name].value)
    for name in ("score_offset_own_class", "score_offset_all_classes"):
        assert back[name].value == pytest.approx(-there[name].value)
    assert back["accuracy_together"].value == pytest.approx(there["accuracy_together"].value)


def test_vectors_that_are_no_numbers_and_other_shapes_are_refused():
    image, rows = np.ones((2, 2), np.float32), np.eye(2, dtype=np.float32)
    with pytest.raises(DataError, match="NaN"):
        language_bias(image * np.nan, np.zeros(2, np.int64), rows, rows)
    with pytest.raises(ValueError, match="classifiers have shapes"):
        language_bias(image, np.zeros(2, np.int64), rows, rows[:1])


def test_classes_without_pictures_have_no_share():
    image, rows = np.ones((1, 2), np.float32), np.eye(2, dtype=np.float32)
    output = language_bias(image, np.asarray([1]), rows, rows, draws=DRAWS)
    assert output.details["share_zh_by_class"] == [None, 0.5]


# ── mixed texts ─────────────────────────────────────────────────────────────────────────────────


def test_mixed_prompts_hold_names_of_the_other_language():
    assert mixed_task(TASK, "zh", "en").prompts("zh") == [
        ["一张cat的图片", "cat"],
        ["一张dog的图片", "dog", "一张hound的图片", "hound"],
    ]
    assert mixed_task(TASK, "en", "zh").prompts("en")[1] == ["a picture of a 狗"]


def test_a_task_without_one_of_the_languages_is_refused():
    with pytest.raises(DataError, match="'animal': no ja templates"):
        mixed_task(TASK, "ja", "zh")


@pytest.mark.parametrize(
    ("language", "text", "mixed"),
    [
        ("zh", "一只红色的鸟", "一只 red 的鸟"),
        ("zh", "红色", "red"),
        ("zh", "绿色的树和红色的花", "green 的树和红色的花"),
        ("zh", "一隻紅色的鳥", "一隻紅色的鳥"),  # the pairs are simplified
        ("zh", "没有颜色，😀！", "没有颜色，😀！"),
        ("en", "A Red bird", "A 红色 bird"),
        ("en", "a bird that is hundred", "a bird that is hundred"),
        ("en", "ｒｅｄ", "ｒｅｄ"),
        ("en", "", ""),
        ("zh", "猫" * 10_000 + "红色", "猫" * 10_000 + " red"),
    ],
)
def test_the_first_known_word_is_put_in_the_other_language(language, text, mixed):
    assert mix_codes(text, language, colour_pairs()) == mixed


def test_without_pairs_nothing_is_mixed():
    assert mix_codes("一只红色的鸟", "zh", []) == "一只红色的鸟"


def test_the_longest_word_is_taken():
    assert mix_codes("粉红色的花", "zh", [("红色", "red"), ("粉红色", "pink")]) == "pink 的花"


# ── with a model ────────────────────────────────────────────────────────────────────────────────


def test_a_task_is_measured_pure_and_mixed(tiny_encoder, tiny_shards):
    pairs = embed_pairs(tiny_encoder, ShardReader(tiny_shards / "test"), languages=())
    task = next(task for task in load_tasks(tiny_shards / "test") if task.name == "colour")
    rows, targets = labelled_pictures(pairs, task)
    output = measure_language_bias(tiny_encoder, pairs.image[rows], targets, task, draws=DRAWS)
    found = output.metrics
    assert found["share_zh"].n == len(rows) > 0
    for sentence, name in (("zh", "en"), ("en", "zh")):
        key = f"accuracy_{sentence}_with_{name}_names"
        change = found[key].value - found[f"accuracy_{sentence}"].value
        assert found[f"{key}_change"].value == pytest.approx(change)
    assert output.details["task"] == "colour"


def test_names_that_read_the_same_in_both_languages_change_nothing(tiny_encoder):
    numbers = ZeroShotTask(
        "number",
        "number",
        tuple(ZeroShotClass(n, {"zh": (n,), "en": (n,)}) for n in ("1", "２", "③")),
        {"zh": ("数字{}", "{}"), "en": ("the number {}",)},
    )
    image = tiny_encoder.encode_text(["猫", "a cat", "😀"])
    output = measure_language_bias(tiny_encoder, image, np.arange(3), numbers, draws=DRAWS)
    assert output.metrics["accuracy_zh_with_en_names_change"].value == 0
    assert output.metrics["accuracy_en_with_zh_names_change"].value == 0
