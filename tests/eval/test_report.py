"""The report is one safe, self-contained page that says what it was given, in both languages.

Not for its looks: those are for eyes.
"""

import base64
import io
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from read_pages import Page

from m2encoder.errors import DataError
from m2encoder.eval.charts import Line, line_chart, nice_ticks
from m2encoder.eval.markup import element
from m2encoder.eval.report import FoundPicture, ReportData, Search, render, write_report
from m2encoder.eval.suite import evaluate


def picture(colour="red", size=(64, 64), kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


@pytest.fixture(scope="module")
def results(tiny_encoder, tiny_shards):
    return evaluate(tiny_encoder, tiny_shards / "test", candidates=20)


@pytest.fixture(scope="module")
def metrics():
    rows = [
        {
            "step": step,
            "loss": 5 / step,
            "loss/image-zh": 4 / step,
            "loss/image-en": 6 / step,
            "lr": 1e-3 * step,
            "samples_per_s": 500.0 + step,
        }
        for step in range(1, 101)
    ]
    rows[50]["loss"] = None  # what a loss that is not finite is written as
    evaluations = [
        {"step": step, "eval/val/zh/i2t_r1": step / 200, "eval/val/zh/t2i_r1": step / 100}
        | {"eval/val/en/i2t_r1": 0.25, "eval/val/en/t2i_r1": 0.35}
        for step in (50, 100)
    ]
    return rows + evaluations


@pytest.fixture(scope="module")
def run(results, metrics):
    red, blue = picture("red"), picture("blue", (900, 600), "JPEG")
    zh = Search(
        "一颗红色的星星",
        [FoundPicture(red, 0.5, "红星", fits=True), FoundPicture(blue, 0.25, "蓝")],
    )
    en = Search("a red star", [FoundPicture(red, 0.45, "a red star")])
    return ReportData(
        title="A small model",
        summary="It learned.",
        glance=[("160", "pairs")],
        results=results,
        metrics=metrics,
        searches=[(zh, en)],
        attribution="Pictures by A & B, CC BY 4.0",
        facts=[("command", "make demo")],
        next_steps=[('m2enc search photos "雪山日落"', "Search:")],
    )


def test_the_page_is_well_formed_and_needs_nothing_else(run):
    html = render(run)
    page = Page(html)
    links = [value for _, attributes in page.elements for key, value in attributes.items()
             if key in ("src", "href", "xlink:href", "srcset", "action")]  # fmt: skip
    assert links
    assert all(link.startswith("data:image/") for link in links)
    assert not re.search(r"url\(|@import|https?://|<script", html)


def test_both_languages_are_marked_and_side_by_side(run):
    page = Page(render(run))
    sides = [attributes for attributes in page.all("h3") if "lang" in attributes]
    assert [attributes["lang"] for attributes in sides] == ["zh", "en"]
    assert all(query in page.text() for query in ("一颗红色的星星", "a red star"))


def test_every_picture_says_what_it_shows_in_its_language(run):
    images = Page(render(run)).all("img")
    assert [(image["alt"], image["lang"]) for image in images] == [
        ("红星", "zh"),
        ("蓝", "zh"),
        ("a red star", "en"),
    ]


def test_pictures_are_small_and_upright(run):
    sources = [image["src"] or "" for image in Page(render(run)).all("img")]
    shown = [Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))) for src in sources]
    assert [image.size for image in shown] == [(64, 64), (256, 171), (64, 64)]
    assert shown[0].getpixel((5, 5)) == (255, 0, 0)


def test_headline_numbers_are_shown_in_percent_for_both_languages(run, results):
    text = Page(render(run)).text()
    for language in ("zh", "en"):
        for key in ("i2t_r1", "i2t_r5", "t2i_r10"):
            assert f"{100 * results['retrieval'][language][key]:.1f}" in text
        assert f"{100 * results['hard_negatives'][language]['accuracy']:.1f}" in text
        assert f"{100 * results['zero_shot']['colour'][language]['top1']:.1f}" in text


def test_curves_are_drawn_for_each_objective_and_evaluation(run):
    page = Page(render(run))
    labels = [svg["aria-label"] or "" for svg in page.all("svg")]
    assert len(labels) == 4
    assert labels[0].startswith("Loss. At the end: image-zh 0.04, image-en 0.06, total 0.05")
    assert "中文 75 %, English 30 %" in labels[1]


def test_evaluation_rows_without_a_data_set_name_are_drawn_too(run):
    rows = [{"step": 5, "eval/zh/i2t_r1": 0.5, "eval/zh/t2i_r1": 0.7}]
    assert "中文 60 %" in render(replace(run, metrics=rows))


def test_attribution_command_and_next_steps_are_shown(run):
    text = Page(render(run)).text()
    for part in ("Pictures by A & B, CC BY 4.0", "make demo", 'm2enc search photos "雪山日落"'):
        assert part in text


def test_pictures_found_in_both_languages_are_counted(run):
    assert "1 of 2 pictures found in both languages" in render(run)


def test_nothing_that_was_given_becomes_markup(run):
    evil = "<script>alert(1)</script>\"'&<img src=x onerror=y>"
    hits = [FoundPicture(picture(), 0.1, evil)]
    html = render(
        ReportData(
            title=evil,
            summary=evil,
            glance=[(evil, evil)],
            metrics=[{"step": 1, f"loss/{evil}": 1.0}],
            searches=[(Search(evil, hits), Search(evil, hits))],
            attribution=evil,
            facts=[(evil, evil)],
            next_steps=[(evil, evil)],
        )
    )
    page = Page(html)
    assert not page.all("script")
    assert not [a for _, a in page.elements if any(key.startswith("on") for key in a)]
    assert {len(image["src"] or "") > 20 for image in page.all("img")} == {True}


def test_an_almost_empty_report_is_still_a_page(tmp_path):
    write_report(tmp_path / "new" / "report.html", run=ReportData(title="空"))
    page = Page((tmp_path / "new" / "report.html").read_text("utf-8"))
    assert page.all("section") == []
    assert "空" in page.text()


def test_writing_leaves_one_file(run, tmp_path):
    write_report(tmp_path / "report.html", run=run)
    write_report(tmp_path / "report.html", run=run)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_same_run_gives_the_same_page(run):
    assert render(run) == render(run)


def test_an_unreadable_picture_is_an_error(run):
    broken = Search("x", [FoundPicture(b"no picture", 0.1, "x")])
    with pytest.raises(DataError, match="search result: not a picture"):
        render(replace(run, searches=[(broken, broken)]))


# --- charts --------------------------------------------------------------------------------------


def paths(chart, style):
    return [a["d"] or "" for a in Page(chart).all("path") if style in (a["class"] or "").split()]


def test_a_curve_rises_where_its_values_rise():
    chart = line_chart("Up", [Line("up", [(0, 0), (1, 1), (2, 5)], "zh")])
    (path,) = paths(chart, "curve")
    places = [tuple(map(float, point.split())) for point in path[1:].split("L")]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)


def test_values_that_are_not_finite_are_left_out():
    points = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]
    (path,) = paths(line_chart("Gaps", [Line("gaps", points, "en")]), "curve")
    assert path.count("L") == 1
    assert "nan" not in path


def test_a_chart_without_points_is_left_out():
    assert (
        line_chart("Nothing", [Line("nothing", [], "zh"), Line("nan", [(0, math.nan)], "en")])
        is None
    )


@pytest.mark.parametrize(
    "points", [[(7, 3.0)], [(0, 0.0)], [(0, 2.0), (5, 2.0)], [(1, -3.0), (2, -1.0)]]
)
def test_odd_ranges_give_finite_places(points):
    chart = line_chart("Odd", [Line("odd", points, "zh")])
    assert chart is not None
    assert not re.search(r"nan|inf", chart)


def test_long_curves_are_thinned_and_keep_their_mean_and_end():
    values = np.random.default_rng(0).normal(5, 1, 20_000)
    chart = line_chart("Long", [Line("long", list(enumerate(values)), "zh")])
    assert chart is not None
    assert len(chart) < 20_000
    assert len(paths(chart, "raw")) == 1


def test_a_reference_is_drawn_dashed_and_named():
    chart = line_chart("R", [Line("r", [(0, 0.5), (1, 1)], "zh")], reference=("chance", 0.1))
    assert chart is not None
    assert len(paths(chart, "reference")) == 1
    assert "chance" in Page(chart).text()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 0.62, [0, 0.2, 0.4, 0.6, 0.8]),
        (0, 5.3, [0, 2, 4, 6]),
        (0, 3750, [0, 1000, 2000, 3000, 4000]),
        (0, 0.001, [0, 0.0005, 0.001]),
        (-3, 1, [-3, -2, -1, 0, 1]),
    ],
)
def test_ticks_are_round_and_enclose_the_range(low, high, expected):
    assert nice_ticks(low, high) == pytest.approx(expected)


def test_an_element_escapes_text_and_attributes_and_keeps_markup():
    inner = element("b", "a<b", title='"')
    assert element("p", inner, "&", None, [inner], class_="x", hidden=None) == (
        '<p class="x"><b title="&quot;">a&lt;b</b>&amp;<b title="&quot;">a&lt;b</b></p>'
    )
