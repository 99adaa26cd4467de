"""SugarCrepe and Winoground: their files as released, and scores by hand, by loops, by property.

Not for captions made wrong by our rules (test_hard_negatives.py).
"""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2encoder.errors import DataError
from m2encoder.eval.fine_grained import (
    measure_fine_grained,
    read_fine_grained,
    score_two_way,
    score_winoground,
)

DRAWS = 50
LONG = "一只很长很长的猫" * 1_250
CREPE = {
    "0": {"filename": "000.jpg", "caption": "一只红色的猫", "negative_caption": "一只蓝色的猫"},
    "2": {"filename": "sub/狗.png", "caption": "a dog 😀", "negative_caption": "a cat 😀"},
    "7": {"filename": "000.jpg", "caption": LONG, "negative_caption": "繁體：貓"},
}
WINO = [
    {
        "id": 0,
        "image_0": "ex_0_img_0",
        "image_1": "ex_0_img_1",
        "caption_0": "an old person kisses a young person",
        "caption_1": "a young person kisses an old person",
        "tag": "Adjective-Age",
        "secondary_tag": "",
        "num_main_preds": 1,
        "collapsed_tag": "Object",
    },
    {
        "id": 1,
        "image_0": "ex_1_img_0",
        "image_1": "ex_1_img_1",
        "caption_0": "猫在狗的左边",
        "caption_1": "狗在猫的左边",
        "tag": "Spatial",
        "secondary_tag": "Symbolic",
        "collapsed_tag": "Relation",
    },
]


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def draw(path: Path, colour) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 30), colour).save(path)


# ── reading ─────────────────────────────────────────────────────────────────────────────────────


def test_sugarcrepe_is_read_as_released(tmp_path):
    items = read_fine_grained(write(tmp_path / "swap_att.json", CREPE))
    assert items.format == "sugarcrepe"
    assert items.names == ("swap_att/0", "swap_att/2", "swap_att/7")
    assert items.kinds == (("swap_att",),) * 3
    assert items.pictures == (("000.jpg",), ("sub/狗.png",), ("000.jpg",))
    assert items.captions[0] == ("一只红色的猫", "一只蓝色的猫")
    assert items.captions[2][0] == LONG
    assert items.language == "zh"


def test_a_folder_is_all_of_its_categories(tmp_path):
    write(tmp_path / "swap_att.json", CREPE)
    write(tmp_path / "add_obj.json", {"5": CREPE["2"]})
    items = read_fine_grained(tmp_path)
    assert items.names == ("add_obj/5", "swap_att/0", "swap_att/2", "swap_att/7")
    assert items.content() != read_fine_grained(tmp_path / "swap_att.json").content()


@pytest.mark.parametrize("form", ["lines", "list", "one line"])
def test_winoground_is_read_as_lines_or_a_list(tmp_path, form):
    path = tmp_path / "examples.jsonl"
    content = WINO[:1] if form == "one line" else WINO
    lines = "\n".join(json.dumps(item, ensure_ascii=False) for item in content) + "\n"
    path.write_text(json.dumps(WINO) if form == "list" else lines, encoding="utf-8")
    items = read_fine_grained(path)
    assert items.format == "winoground"
    assert items.kinds[0] == ("Adjective-Age", "Object")
    assert items.pictures[0] == ("ex_0_img_0", "ex_0_img_1")
    if form != "one line":
        assert items.captions[1] == ("猫在狗的左边", "狗在猫的左边")
        assert items.kinds[1] == ("Spatial", "Symbolic", "Relation")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"0": {"filename": "a.jpg", "caption": "猫"}}', "negative_caption' is missing"),
        ('{"0": {"filename": "", "caption": "a", "negative_caption": "b"}}', "filename is ''"),
        ('{"0": {"filename": "a", "caption": "　", "negative_caption": "b"}}', "caption is"),
        ('[{"image_0": "a"}]', "is missing"),
        ('["a"]', "neither SugarCrepe nor Winoground"),
        ("{}", "holds no items"),
        ("[]", "holds no items"),
        ("no json", "neither SugarCrepe nor Winoground"),
        ("", "holds no items"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content, said):
    path = tmp_path / "文件.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=said) as found:
        read_fine_grained(path)
    assert str(found.value).startswith(str(path))
    assert "\n" not in str(found.value)


def test_missing_files_wrong_encodings_and_mixed_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_fine_grained(tmp_path / "absent.json")
    with pytest.raises(DataError, match=r"holds no \.json"):
        read_fine_grained(tmp_path)
    (tmp_path / "a.json").write_bytes("狗".encode("gb18030"))
    with pytest.raises(DataError, match="not UTF-8 at byte 0"):
        read_fine_grained(tmp_path / "a.json")
    write(tmp_path / "a.json", CREPE)
    write(tmp_path / "b.json", WINO)
    with pytest.raises(DataError, match="two formats"):
        read_fine_grained(tmp_path)


# ── scores ──────────────────────────────────────────────────────────────────────────────────────


def test_two_way_worked_by_hand():
    right, wrong = np.asarray([0.9, 0.5, 0.1, 0.3]), np.asarray([0.1, 0.5, 0.2, 0.2])
    kinds = [["add"], ["add"], ["swap"], ["swap"]]
    found = score_two_way(right, wrong, kinds, draws=DRAWS).metrics
    assert found["accuracy"].value == 2.5 / 4  # the second is a tie
    assert (found["accuracy"].tie_low, found["accuracy"].tie_high) == (2 / 4, 3 / 4)
    assert found["accuracy_add"].value == 0.75
    assert found["accuracy_swap"].value == 0.5
    assert found["accuracy_swap"].tie_low is None
    assert found["mean_accuracy"].value == 0.625


def test_collapsed_towers_score_half_of_two_ways():
    flat = np.full(9, 0.3)
    found = score_two_way(flat, flat, [["x"]] * 9, draws=DRAWS).metrics["accuracy"]
    assert (found.value, found.tie_low, found.tie_high) == (0.5, 0, 1)


def test_winoground_equals_the_paper_s_definition_on_every_order():
    """Over all 24 orders of four scores, the shares are the chances that the paper states."""
    orders = [np.asarray(order, np.float64).reshape(2, 2) for order in set(_orders())]
    output = score_winoground(np.stack(orders), [[]] * len(orders), draws=DRAWS)
    expected = {"text_score": [], "image_score": [], "group_score": []}
    for s in orders:
        text = s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
        image = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]
        for name, hit in zip(expected, (text, image, text and image), strict=True):
            expected[name].append(hit)
    for name, hits in expected.items():
        assert output.metrics[name].value == pytest.approx(np.mean(hits))
        assert output.metrics[name].value == pytest.approx(output.details["chance"][name])
        assert output.metrics[name].tie_low is None


def _orders():
    return (order for order in product(range(4), repeat=4) if len(set(order)) == 4)


def test_winoground_takes_a_tie_for_a_miss_and_says_what_it_would_be_as_a_hit():
    scores = np.asarray([[[0.5, 0.1], [0.5, 0.9]], [[0.9, 0.1], [0.2, 0.8]]])
    found = score_winoground(scores, [["a"], ["b"]], draws=DRAWS).metrics
    assert found["text_score"].value == 0.5
    assert (found["text_score"].tie_low, found["text_score"].tie_high) == (0.5, 1)
    assert found["image_score"].value == 1
    assert found["group_score"].value == 0.5
    assert (found["text_score_a"].value, found["text_score_b"].value) == (0, 1)
    flat = score_winoground(np.full((3, 2, 2), 0.2), [[]] * 3, draws=DRAWS).metrics
    assert (flat["group_score"].value, flat["group_score"].tie_high) == (0, 1)


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"expected \(N, 2, 2\)"):
        score_winoground(np.zeros((3, 2)), [[]] * 3)
    with pytest.raises(ValueError, match="1 kinds for 2 items"):
        score_two_way(np.zeros(2), np.zeros(2), [["a"]])
    with pytest.raises(DataError, match="NaN"):
        score_two_way(np.asarray([np.nan]), np.zeros(1), [["a"]])
    with pytest.raises(DataError, match="no scores"):
        score_winoground(np.zeros((0, 2, 2)), [])


# ── with a model ────────────────────────────────────────────────────────────────────────────────


def test_sugarcrepe_equals_scoring_each_item_by_hand(tiny_encoder, tmp_path):
    draw(tmp_path / "images" / "000.jpg", "red")
    draw(tmp_path / "images" / "sub" / "狗.png", "blue")
    items = read_fine_grained(write(tmp_path / "swap_att.json", CREPE))
    output, skipped = measure_fine_grained(tiny_encoder, items, tmp_path / "images", draws=DRAWS)
    hits = []
    for item in CREPE.values():
        image = tiny_encoder.encode_image(tmp_path / "images" / item["filename"])
        texts = tiny_encoder.encode_text([item["caption"], item["negative_caption"]])
        right, wrong = (image @ texts.T)[0]
        hits.append(right > wrong)
    assert output.metrics["accuracy"].value == pytest.approx(np.mean(hits))
    assert skipped == []


def test_winoground_finds_pictures_without_their_suffix(tiny_encoder, tmp_path):
    for i, j in product((0, 1), repeat=2):
        draw(tmp_path / "images" / f"ex_{i}_img_{j}.png", (200 * i, 200 * j, 90))
    items = read_fine_grained(write(tmp_path / "examples.json", WINO))
    output, _ = measure_fine_grained(tiny_encoder, items, tmp_path / "images", draws=DRAWS)
    hits = []
    for i, item in enumerate(WINO):
        paths = [tmp_path / "images" / f"ex_{i}_img_{j}.png" for j in (0, 1)]
        s = tiny_encoder.encode_text([item["caption_0"], item["caption_1"]]) @ (
            tiny_encoder.encode_image(paths).T
        )
        hits.append(s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1])
    assert output.metrics["text_score"].value == np.mean(hits)
    assert output.metrics["text_score_Spatial"].n == 1


def test_missing_pictures_stop_or_are_listed(tiny_encoder, tmp_path):
    draw(tmp_path / "images" / "000.jpg", "red")
    items = read_fine_grained(write(tmp_path / "swap_att.json", CREPE))
    with pytest.raises(DataError, match=r"狗\.png"):
        measure_fine_grained(tiny_encoder, items, tmp_path / "images", draws=DRAWS)
    output, skipped = measure_fine_grained(
        tiny_encoder, items, tmp_path / "images", on_error="skip", draws=DRAWS
    )
    assert [bad.name for bad in skipped] == ["sub/狗.png"]
    assert output.metrics["accuracy"].n == 2
    with pytest.raises(DataError, match="no item has all of its pictures"):
        measure_fine_grained(tiny_encoder, items, tmp_path / "empty", on_error="skip")
