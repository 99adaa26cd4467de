"""Tables hold each model's figures where they belong, and say what sets a row apart."""

import csv
import io
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_results import CUSTOM, FLICKR_CN, made_result

from m2encoder.cli import main
from m2encoder.eval.metric import Metric, undefined
from m2encoder.eval.protocols import Published, Source, known_protocols
from m2encoder.eval.table import Column, Notes, make_tables, published_rows
from m2encoder.eval.table_formats import to_csv, to_html, to_markdown
from m2encoder.eval.text_table import display_width, markdown_table

EVIL = "<script>alert(1)</script>|\"'&*`[x](y)\n# 标题"


def model(name, fingerprint):
    return {"name": name, "fingerprint": fingerprint * 64}


def cells(markdown):
    """Return the table's rows as lists of plain cells, the rule between head and body left out."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines]
    return [row for row in rows if set(row[-1]) != set("-:")]


# --- what is in a table --------------------------------------------------------------------------


def test_rows_are_models_and_columns_metrics_in_published_order():
    one, two = made_result(model=model("甲", "a")), made_result(model=model("乙", "b"))
    (table,) = make_tables([one, two])
    assert [row.model for row in table.rows] == ["甲", "乙"]
    assert [column.metric for column in table.columns] == [
        "t2i_r1",
        "t2i_r5",
        "t2i_median_rank",
        "i2t_r1",
        "mean_recall",
    ]
    assert table.rows[0].values[Column("zh", "t2i_r1")] == one.metrics["t2i_r1"]


def test_each_task_and_protocol_is_a_table_of_its_own():
    other = made_result(protocol=FLICKR_CN | {"id": "coco-cn/1053"})
    probe = made_result(task="probe", metrics={"top1": Metric(0.5, 4)})
    titles = [table.title for table in make_tables([made_result(), other, probe])]
    assert titles == [
        "retrieval: flickr30k-cn/5k, zh",
        "retrieval: coco-cn/1053, zh",
        "probe: flickr30k-cn/5k, zh",
    ]


def test_languages_of_one_data_set_stand_side_by_side():
    zh = made_result(protocol=CUSTOM)
    en = made_result(
        protocol=CUSTOM | {"id": "custom:ffffffffffff", "checksum": "f" * 64},
        language="en",
        metrics={"t2i_r1": Metric(0.25, 8)},
    )
    (table,) = make_tables([zh, en])
    assert len(table.rows) == 1
    assert table.heading(table.columns[0]) == "zh T2I R@1"
    assert table.heading(table.columns[-1]) == "en T2I R@1"
    reasons = [reason for _, reason in table.notes]
    assert "custom data (en), comparable only at checksum ffffffffffff" in reasons


def test_several_sets_of_classes_of_one_folder_are_tables_of_their_own():
    def named(task, language):
        protocol = CUSTOM | {"id": f"custom:{task}"}
        settings = {"task": task, "seed": 0}
        return made_result(
            task="zero-shot", protocol=protocol, settings=settings, language=language
        )

    tables = make_tables([named(task, tag) for task in ("colour", "形状") for tag in ("zh", "en")])
    assert [table.title for table in tables] == [
        "zero-shot: 数据/测试 colour",
        "zero-shot: 数据/测试 形状",
    ]
    assert [len(table.rows) for table in tables] == [1, 1]


def test_custom_data_that_changed_between_runs_is_marked():
    changed = {"id": "custom:ffffffffffff", "status": "custom", "checksum": "f" * 64}
    one = made_result(protocol=CUSTOM, model=model("a", "a"), data={"path": "x"})
    two = made_result(protocol=changed, model=model("b", "b"), data={"path": "x"})
    (table,) = make_tables([one, two])
    texts = {mark: reason for mark, reason in table.notes if mark}
    assert [texts[mark] for mark in table.rows[1].marks] == [
        "custom data, comparable only at checksum ffffffffffff",
        "measured on custom:ffffffffffff, the first row on custom:0123456789ab",
    ]


def test_two_models_of_one_name_are_told_apart_by_fingerprint():
    results = [made_result(model=model("m2", letter)) for letter in "ab"]
    names = [row.model for row in make_tables(results)[0].rows]
    assert names == ["m2 (aaaaaaaa)", "m2 (bbbbbbbb)"]


def test_runs_with_other_settings_are_rows_of_their_own_and_say_so():
    settings = [{"gt": "index", "batch_size": 1}, {"gt": "string", "batch_size": 2}]
    results = [made_result(settings=each) for each in [*settings, settings[0]]]
    (table,) = make_tables(results)
    names = [row.model for row in table.rows]
    assert names == ["m2-tiny [gt index]", "m2-tiny [gt string]", "m2-tiny [gt index] (run 2)"]
    marked = dict(table.notes)
    assert marked[table.rows[1].marks[0]] == "right answers by gt string, not by index"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"protocol": FLICKR_CN | {"status": "unverified"}}, "protocol unverified"),
        ({"protocol": CUSTOM}, "custom data, comparable only at checksum 0123456789ab"),
        ({"settings": {"candidates": 100}}, "ranked among 100 drawn candidates only"),
        ({"contamination": {"checked": True, "hits": 50}}, "50 test pictures found in the train"),
        ({"data": {"path": "x", "skipped": [{"name": "a", "reason": "b"}] * 3}}, "3 unreadable"),
    ],
)
def test_what_sets_a_row_apart_is_marked(fields, reason):
    clean = {"data": {"path": "x"}, "contamination": {"checked": True, "hits": 0}}
    plain_result = made_result(**clean)
    (table,) = make_tables([made_result(**clean | fields)])
    marked = {mark: text for mark, text in table.notes if mark}
    assert marked[table.rows[0].marks[0]].startswith(reason)
    assert make_tables([plain_result])[0].rows[0].marks == ()


def test_results_that_were_not_checked_for_contamination_are_named():
    seen = made_result(contamination={"checked": True, "hits": 0}, model=model("seen", "a"))
    not_seen = made_result(model=model("not seen", "b"))
    notes = [text for mark, text in make_tables([seen, not_seen])[0].notes if not mark]
    assert "Not checked for test pictures in the training data: not seen." in notes


# --- published rows ------------------------------------------------------------------------------

PAPER = Source("A paper, table 3", second_hand=False)
COLUMNS = [Column("zh", "t2i_r1"), Column("zh", "mean_recall")]


def published(**fields):
    known: dict[str, Any] = {
        "dataset": "d",
        "language": "zh",
        "model": "M",
        "values": {"t2i_r1": 72.5},
        "protocol": "d/5k",
    }
    return Published(**{**known, "sources": (PAPER,), **fields})


def test_published_percents_stand_beside_ours_with_their_source():
    (row,) = published_rows([published()], "d/5k", COLUMNS, Notes())
    assert row.values[COLUMNS[0]].value == pytest.approx(0.725)
    assert (row.model, row.source, row.marks) == ("M", "A", ())
    assert row.facts == {
        "protocol": {"zh": "d/5k"},
        "status": {"zh": "published"},
        "source": "A paper, table 3",
    }


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"protocol": "d/1k"}, "published under d/1k, not d/5k"),
        ({"protocol": None}, "published without saying under which protocol, perhaps not d/5k"),
        ({"note": "printed exchanged"}, "printed exchanged"),
        ({"sources": (Source("A page", second_hand=True),)}, "second-hand"),
        (
            {"values": {"mean_recall": 80.0}, "computed": ("mean_recall",)},
            "mean recall computed from the printed figures",
        ),
    ],
)
def test_a_published_row_that_differs_is_marked_with_the_reason(fields, reason):
    notes = Notes()
    (row,) = published_rows([published(**fields)], "d/5k", COLUMNS, notes)
    assert [notes.mark(reason)] == list(row.marks)


def test_published_rows_without_a_shown_metric_are_left_out():
    assert published_rows([published(values={"i2t_r1": 1.0})], "d/5k", COLUMNS, Notes()) == []


def test_the_registry_gives_rows_and_marks_those_of_other_protocols():
    protocols = known_protocols()
    name = next(
        each.id
        for each in protocols.values()
        if each.task == "retrieval"
        and {row.protocol for row in each.published} - {each.id, None}
        and {row.protocol for row in each.published} >= {each.id}
    )
    result = made_result(protocol=FLICKR_CN | {"id": name, "status": "unverified"})
    (table,) = make_tables([result], published=True)
    (ours, *theirs) = table.rows
    assert not ours.source
    assert theirs
    reasons = dict(table.notes)
    for row in theirs:
        other = row.facts is not None and name not in row.facts["protocol"].values()
        assert other == any(reasons[m].startswith("published ") for m in row.marks)
        assert all(letter in reasons for letter in row.source.split(", "))
    assert make_tables([result])[0].rows == (ours,)


# --- Markdown ------------------------------------------------------------------------------------


def test_a_cell_has_value_interval_and_tie_bounds_only_where_they_show():
    result = made_result(
        metrics={
            "t2i_r1": Metric(0.725, 8, (0.7, 0.75), 0.72503, 0.72504),
            "t2i_r5": Metric(0.5, 8, None, 0.1, 0.9),
            "i2t_r1": undefined(),
        }
    )
    head, row = cells(to_markdown(make_tables([result])))
    assert head == ["model", "T2I R@1", "T2I R@5", "I2T R@1"]
    assert row[1:] == ["72.5 ±2.5", "50.0 (10.0–90.0)", "–"]


def test_chinese_names_keep_the_columns_aligned():
    names = ["m2", "中文模型", "全角ＡＢ，", "é", "😀 emoji"]
    text = markdown_table(["模型", "R@1"], [[name, "87.9"] for name in names])
    assert len({display_width(line) for line in text.splitlines()}) == 1
    assert display_width("中文，a😀é") == 2 + 2 + 2 + 1 + 2 + 1


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_no_text_breaks_the_table(texts):
    lines = markdown_table(["a", "b"], [[text, text] for text in texts]).split("\n")
    assert len(lines) == 2 + len(texts)
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {3}


def test_many_metrics_become_rows():
    metrics = {f"accuracy_{letter}": Metric(i / 20, 4) for i, letter in enumerate("abcdefghijklm")}
    results = [made_result(metrics=metrics, model=model(name, name)) for name in "xy"]
    tables = make_tables(results)
    rows = cells(to_markdown(tables))
    assert rows[0][1:] == ["x †", "y †"]
    assert len(rows) == 14
    assert rows[2] == ["accuracy b", "5.0", "5.0"]
    heads = [attributes for tag, attributes in Tags(to_html(tables)).tags if tag == "th"]
    assert [each["scope"] for each in heads] == ["col", "col", *["row"] * 13]


def test_many_metrics_in_two_languages_stand_side_by_side():
    metrics = {f"accuracy_{letter}": Metric(i / 20, 4) for i, letter in enumerate("abcdefg")}
    zh = made_result(metrics=metrics, protocol=CUSTOM)
    en = made_result(metrics={"accuracy_b": Metric(1, 4)}, protocol=CUSTOM, language="en")
    other = made_result(metrics=metrics, protocol=CUSTOM, model=model("x", "x"), language="en")
    rows = cells(to_markdown(make_tables([en, zh, other])))
    assert [head.split(" ")[:2] for head in rows[0][1:]] == [
        ["m2-tiny", "zh"],
        ["m2-tiny", "en"],
        ["x", "en"],
    ]
    assert rows[2] == ["accuracy b", "5.0", "100.0", "5.0"]
    assert rows[3] == ["accuracy c", "10.0", "–", "10.0"]


def test_long_and_empty_names_are_taken_as_they_are():
    results = [made_result(model=model("长" * 10_000, "a")), made_result(model=model("", "b"))]
    assert len(cells(to_markdown(make_tables(results)))) == 3


# --- CSV -----------------------------------------------------------------------------------------


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_has_a_row_for_each_model_and_language_with_unrounded_shares():
    zh = made_result(protocol=CUSTOM)
    other = CUSTOM | {"id": "custom:english"}
    en = made_result(protocol=other, language="en", metrics={"t2i_r1": Metric(1 / 3, 3)})
    rows = read(to_csv(make_tables([zh, en])))
    assert [row["protocol"] for row in rows] == ["custom:0123456789ab", "custom:english"]
    assert [row["status"] for row in rows] == ["custom", "custom"]
    assert [row["language"] for row in rows] == ["zh", "en"]
    assert float(rows[1]["t2i_r1"]) == 1 / 3
    assert (rows[0]["t2i_r1_ci95_low"], rows[1]["t2i_r1_ci95_low"]) == ("0.7", "")
    assert rows[1]["mean_recall"] == ""
    assert rows[0]["fingerprint"] == "a1" * 32
    assert rows[0]["remarks"].startswith("custom data (zh)")


def test_csv_columns_do_not_depend_on_the_order_of_metrics_or_results():
    one = made_result()
    two = made_result(
        metrics={name: one.metrics[name] for name in reversed(list(one.metrics))},
        protocol=FLICKR_CN | {"id": "x"},
    )
    heads = {to_csv(make_tables(rs)).splitlines()[0] for rs in ([one, two], [two, one], [two])}
    assert len(heads) == 1


def test_csv_writes_nan_as_nothing_and_quotes_what_needs_it():
    result = made_result(metrics={"top1": undefined()}, model=model(EVIL, "a"))
    (row,) = read(to_csv(make_tables([result])))
    assert (row["top1"], row["model"]) == ("", EVIL)


# --- HTML ----------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_html_escapes_every_text_and_needs_nothing_else():
    data = {"path": EVIL}
    protocol = CUSTOM | {"notes": [EVIL]}
    result = made_result(model=model(EVIL, "a"), protocol=protocol, data=data)
    html = to_html(make_tables([result]))
    page = Tags(html)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert EVIL in page.text
    assert not re.search(r"url\(|@import|https?://", html)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_and_writes_each_format(tmp_path, capsys):
    folder = made_result().save(tmp_path / "结果").parent
    assert main(["eval", "table", str(folder)]) == 0
    assert "72.5 ±2.5" in capsys.readouterr().out
    assert main(["eval", "table", str(folder), "--format", "csv"]) == 0
    assert read(capsys.readouterr().out)[0]["t2i_r1"] == "0.725"
    out = tmp_path / "new" / "table.html"
    assert main(["eval", "table", str(folder), "--format", "html", "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert "72.5" in out.read_text("utf-8")


def test_the_command_says_what_is_missing_in_one_line(tmp_path, capsys):
    assert main(["eval", "table", str(tmp_path / "none.json")]) == 3
    assert capsys.readouterr().err.count("\n") == 1
