"""The page about results is one safe file that says what the results say, zh beside en.

Not for its looks: those are for eyes.
"""

import math
import re
from itertools import pairwise
from typing import Any

import pytest
from made_results import CUSTOM, FLICKR_CN, made_result
from read_pages import Page, example, page_of, picture_folder

from m2encoder.cli import main
from m2encoder.eval.metric import Metric, undefined
from m2encoder.eval.result_numbers import chance_of
from m2encoder.eval.result_report import ResultReport, render_results

EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=y>"
CHECKED = {"checked": True, "hits": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return picture_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def results(folder):
    data = {"path": str(folder), "images": 4, "texts": 8, "captions_per_image": {"2": 4}}
    zh = {
        "t2i": [
            example("一颗红色的星星", 7.5, ["红.png"], ["b.png", "大.jpg"]),
            example("蓝", 1.0, ["b.png"], ["b.png"]),
        ],
        "i2t": [example("红.png", 3.0, ["红色的星"], ["蓝色的圆", "红色的星"])],
    }
    en = {"t2i": [example("a red star", 2.0, ["红.png"], ["c.png", "红.png"])]}
    both: dict[str, Any] = {"protocol": CUSTOM, "data": data, "ranks": {}}
    return [
        made_result(language="en", details={"examples": en}, contamination=CHECKED, **both),
        made_result(language="zh", details={"examples": zh}, **both),
    ]


@pytest.fixture(scope="module")
def classified():
    names = {"zh": ["狗", "狼", "猫"], "en": ["dog", "wolf", "cat"]}

    def of(language, shares):
        labels = names[language]
        classes = [
            {"name": name, "n": 10, "top1": share, "confused_with": labels[1], "confused_n": 3}
            for name, share in zip(labels, shares, strict=True)
        ]
        pairs = [{"true": labels[0], "predicted": labels[1], "n": 3}]
        matrix = [[7, 3, 0], [0, 10, 0], [1, 0, 9]]
        details = {"classes": classes, "confusions": pairs, "confusion": matrix}
        return made_result(
            task="zero-shot",
            language=language,
            protocol=CUSTOM,
            metrics={"top1": Metric(0.8, 30, (0.7, 0.9))},
            details={**details, "chance": {"top1": 1 / 3}},
            ranks={},
        )

    return [of("zh", [0.7, None, 0.9]), of("en", [0.8, 1.0, 0.1])]


# --- the page as a whole -------------------------------------------------------------------------


def test_the_page_is_well_formed_and_needs_nothing_else(results, classified):
    html = render_results(ResultReport([*results, *classified], title="结果"))
    page = Page(html)
    sources = [a[key] for _, a in page.elements for key in ("src", "srcset", "action") if key in a]
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert all(link["href"].startswith("#") for link in page.all("a"))
    assert not re.search(r"url\(|@import|https?://|<script", html)
    policy = next(a for a in page.all("meta") if "http-equiv" in a)
    assert policy["content"].startswith("default-src 'none'")


def test_ids_are_unique_and_every_link_leads_somewhere(results, classified):
    page = page_of(*results, *classified)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids) == 2
    assert [link["href"] for link in page.all("a")] == [f"#{each}" for each in ids]


def test_every_picture_has_a_text_and_headings_come_in_order(results, classified):
    page = page_of(*results, *classified)
    assert page.all("img")
    assert all(image["alt"] for image in page.all("img"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 or after == 4 for before, after in pairwise(levels))


def test_nothing_that_a_result_says_becomes_markup(folder):
    shown = {"query": EVIL, "rank": 9, "right": [EVIL], "found": [{"name": EVIL, "score": 0.1}]}
    texts = {"query": EVIL, "rank": 9, "right": [EVIL], "found": [{"text": EVIL, "score": 0.1}]}
    details = {
        "examples": {"t2i": [shown], "i2t": [texts]},
        "classes": [{"name": EVIL, "n": 1, "top1": 0.5, "confused_with": EVIL}],
        "confusions": [{"true": EVIL, "predicted": EVIL, "n": 1}],
        EVIL: {EVIL: [{EVIL: EVIL}], "list": [EVIL], "rows": {"a": {EVIL: 1}, "b": {EVIL: 2}}},
    }
    evil = made_result(
        task=EVIL,
        language=EVIL,
        protocol={"id": EVIL, "status": "custom", "checksum": EVIL, "notes": [EVIL]},
        data={"path": str(folder / "x"), "skipped": [{"name": EVIL, "reason": EVIL}]},
        model={"name": EVIL, "fingerprint": EVIL},
        metrics={EVIL: Metric(0.5, 1)},
        preprocessing={EVIL: EVIL},
        settings={EVIL: [EVIL]},
        environment={EVIL: EVIL},
        details=details,
    )
    page = page_of(evil, made_result(), title=EVIL)
    assert not page.all("script")
    assert not page.all("img")
    assert not [a for _, a in page.elements if any(key.startswith("on") for key in a)]
    assert page.text().count("<script>") > 10


def test_the_same_results_give_the_same_page(results):
    report = ResultReport(results)
    assert render_results(report) == render_results(report)


# --- what it says --------------------------------------------------------------------------------


def test_languages_of_one_data_set_share_a_section_chinese_first(results):
    page = page_of(*results)
    assert len(page.all("section")) == 1
    heads = [attributes["lang"] for attributes in page.all("span") if "lang" in attributes]
    assert heads[:2] == ["zh", "en"]


def test_what_was_measured_twice_is_shown_twice(results):
    page = page_of(results[0], results[0], results[1])
    assert len(page.all("section")) == 2


def test_sets_of_classes_of_one_folder_have_sections_of_their_own(classified):
    for_task = [
        made_result(task="zero-shot", protocol=CUSTOM, settings={"task": name}, language=tag)
        for name in ("colour", "形状")
        for tag in ("en", "zh")
    ]
    page = page_of(*for_task)
    assert len(page.all("section")) == 2
    assert "Zero-shot classes: 形状" in page.text()


def test_numbers_stand_with_interval_ties_and_chance(classified):
    text = page_of(*classified).text()
    assert "80.0 ±10.0" in text
    assert "The notch on a bar is chance" in text
    tied = made_result(metrics={"t2i_r1": Metric(0.5, 4, None, 0.25, 0.75), "x": undefined()})
    page = page_of(tied)
    assert "50.0 (25.0–75.0)" in page.text()
    assert "nan" not in page.text().lower().split()


@pytest.mark.parametrize(
    ("contamination", "said"),
    [
        ({"checked": False}, "Not checked for contamination."),
        (CHECKED, "No test picture found in the training data."),
        ({"checked": True, "hits": 50}, "50 test pictures found in the training data."),
    ],
)
def test_contamination_is_said_under_the_heading(contamination, said):
    assert said in page_of(made_result(contamination=contamination)).text()


def test_protocol_preprocessing_and_environment_are_told():
    text = page_of(made_result()).text()
    for part in (
        *("flickr30k-cn/5k", "verified", "c0ffee", "905 of its 1,000 pictures", "坏.jpg"),
        *("squash", "224", "truncated texts", "2.13.0", "float32", "1.5 s", "a1" * 32),
    ):
        assert part in text


def test_worst_classes_come_first_with_both_names_and_what_they_are_taken_for(classified):
    page = page_of(*classified)
    text = page.text()
    assert text.index("猫 cat") < text.index("狗 dog") < text.index("狼 wolf")
    assert "狗 → 狼" in text
    assert "狼 3×" in text
    assert "wolf 3×" in text
    cells = [a for a in page.all("td") if a.get("class") in ("right", "wrong")]
    assert [cell["class"] for cell in cells[:3]] == ["right", "wrong", "wrong"]
    assert cells[1]["style"] == "--share:0.300"


def test_long_class_names_are_cut_and_kept_whole_as_titles():
    names = ["狗 / 犬", "长" * 100]
    classes = [{"name": name, "n": 1, "top1": 0.5} for name in names]
    details = {"classes": classes, "confusion": [[1, 0], [0, 1]]}
    page = page_of(made_result(task="zero-shot", details=details))
    assert "犬" not in page.text()
    assert "长" * 29 not in page.text()
    titles = [span["title"] for span in page.all("span") if "title" in span]
    assert set(titles) == set(names)


def test_two_models_are_compared_in_a_table_first(results):
    other = made_result(model={"name": "other", "fingerprint": "c" * 64}, protocol=CUSTOM)
    page = page_of(*results, other)
    text = page.text()
    assert text.index("retrieval: ") < text.rindex("Retrieval, m2-tiny")
    assert len(page.all("nav")) == 1


def test_published_figures_are_shown_where_asked_for():
    result = made_result(protocol=FLICKR_CN)
    assert "CN-CLIP" in page_of(result, published=True).text()
    assert "CN-CLIP" not in page_of(result).text()


def test_details_of_any_shape_are_shown_and_chinese_marked():
    details = {
        "reached": True,
        "share": 0.123456,
        "left_out": {"zh": 3, "en": 0},
        "thresholds": [{"language": "zh", "threshold": 0.21, "names": ["狗", "犬"]}],
        "examples": {"width": [["ＡＢ", "AB"]]},
        "by_class": {"狗": {"n": 3}, "猫": {"n": 4}},
        "deep": {"a": {"b": {"c": {"d": {"e": 1}}}}},
        "nothing": None,
        "long": list(range(100)),
        "empty": {},
        "nan": math.nan,
    }
    page = page_of(made_result(task="calibration", details=details))
    text = page.text()
    for part in ("reached yes", "0.1235", "狗 · 犬", "ＡＢ AB", "100 in all", "Calibration"):
        assert part in text
    assert {"lang": "zh"} in page.all("span")


def test_long_texts_surrogates_and_emoji_are_taken(tmp_path, folder):
    details = {"examples": {"t2i": [example("长" * 10_000, 2, ["\udcff.png"], ["😀.png"])]}}
    data = {"path": str(folder)}
    saved = made_result(details=details, data=data).save(tmp_path / "r")
    out = tmp_path / "page.html"
    assert main(["eval", "report", str(saved), "--out", str(out)]) == 0
    page = Page(out.read_text("utf-8"))
    assert "2 pictures are not shown" in page.text()
    assert not page.all("img")


def test_failures_show_what_was_found_and_wanted_in_both_languages(results):
    page = page_of(*results)
    text = page.text()
    assert "right answer at rank 7.5" in text
    assert "found first" in text
    queries = [a for a in page.all("p") if a.get("class") == "query"]
    assert [query["lang"] for query in queries] == ["zh", "zh", "en"]
    alts = [image["alt"] for image in page.all("img")]
    assert alts[:3] == ["picture b.png", "picture 大.jpg", "right picture 红.png"]
    assert "蓝色的圆" in text


def test_chance_is_that_of_drawing_candidates():
    data = {"path": "x", "images": 4, "texts": 5, "captions_per_image": {"0": 1, "1": 1, "2": 2}}
    metrics = {name: Metric(0.5, 4) for name in ("t2i_r1", "i2t_r1", "i2t_r5", "mean_recall")}
    result = made_result(data=data, metrics=metrics)
    chances = [chance_of(result, name) for name in metrics]
    assert chances == [0.25, pytest.approx((1 / 5 + 2 * 2 / 5) / 3), 1.0, None]
    classes = made_result(task="zero-shot", details={"chance": 0.1, "fair": 0.5})
    names = ("top1", "top5", "mean_per_class_recall", "accuracy_zh_change", "share_zh", "gap")
    assert [chance_of(classes, name) for name in names] == [0.1, 0.5, 0.1, None, 0.5, None]


# --- the command ---------------------------------------------------------------------------------


def test_the_command_writes_one_page(tmp_path, results, capsys):
    for result in results:
        result.save(tmp_path / "results")
    out = tmp_path / "new" / "page.html"
    assert main(["eval", "report", str(tmp_path / "results"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert [each.name for each in out.parent.iterdir()] == ["page.html"]
    assert "一颗红色的星星" in Page(out.read_text("utf-8")).text()


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    saved = made_result().save(tmp_path)
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "page.html"
    assert main(["eval", "report", str(saved), "--out", str(out)]) == 3
    assert "cannot be written" in capsys.readouterr().err
