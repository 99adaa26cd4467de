"""Class names and templates: our own lists, lists of packages and of users, and their protocols.

The packages' lists are held only where they are installed (open_clip: the peers' environment).
"""

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from made_pictures import put_lines

from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.class_names import (
    ClassList,
    has_gloss,
    load_classes,
    our_classes,
    read_classes,
    read_names,
    read_templates,
    repeated_names,
    strip_gloss,
    strip_glosses,
)
from m2encoder.eval.label_matching import (
    align_labels,
    make_task,
    match_labels,
    templates_checksum,
)
from m2encoder.eval.protocols import get_protocol

needs_clip_benchmark = pytest.mark.skipif(
    find_spec("clip_benchmark") is None,
    reason="clip-benchmark is not installed (pip install --no-deps clip-benchmark)",
)
needs_open_clip = pytest.mark.skipif(
    find_spec("open_clip") is None, reason="open_clip is not installed"
)
needs_cn_clip = pytest.mark.skipif(
    find_spec("cn_clip") is None,
    reason="cn_clip is not installed (pip install --no-deps cn_clip)",
)
needs_none = pytest.mark.skipif(
    bool(find_spec("open_clip") or find_spec("clip_benchmark")), reason="the packages are there"
)


def classes(*names, language="zh", templates=("一张{}的照片。",)):
    several = tuple((name,) if isinstance(name, str) else name for name in names)
    return ClassList(language, several, tuple(templates), "a list")


# ── our own lists ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("key", ["cifar10", "cifar100"])
@pytest.mark.parametrize("language", ["zh", "en"])
def test_our_lists_are_verified_and_have_no_two_names_alike(key, language):
    protocol = get_protocol(f"{key}/{language}")
    found = load_classes(protocol)
    matched = match_labels(protocol.id, found, 10_000)
    assert (matched.status, matched.notes) == ("verified", ())
    assert matched.found == matched.expected
    assert len(found) == int(key.removeprefix("cifar"))
    assert repeated_names(found.names) == {}
    assert not any(has_gloss(name) for names in found.names for name in names)
    task = make_task(key, {language: found})
    assert len(task.prompts(language)[0]) == len(found.templates)


def test_our_chinese_names_are_chinese_and_our_labels_are_those_of_the_data_set():
    for key in ("cifar10", "cifar100"):
        entries = our_classes(key)["classes"]
        labels = [entry["label"] for entry in entries]
        assert labels == sorted(labels)
        for entry in entries:
            assert all("\u4e00" <= character <= "\u9fff" for character in entry["zh"])
            assert entry["en"] == entry["label"].replace("_", " ")


# ── lists of packages ───────────────────────────────────────────────────────────────────────────


@needs_open_clip
def test_open_clips_names_are_read_without_importing_it():
    protocol = get_protocol("imagenet/openai80")
    found = load_classes(protocol)
    matched = match_labels(protocol.id, found, 50_000)
    assert matched.status == "verified"
    assert "'missile', 'sunglasses'" in matched.notes[0]
    assert "at most 99.8 %" in matched.notes[0]
    code = (
        "import sys; from m2encoder.eval.class_names import load_classes; "
        "from m2encoder.eval.protocols import get_protocol; "
        "load_classes(get_protocol('imagenet')); print({'torch', 'open_clip'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


@needs_clip_benchmark
def test_clip_benchmarks_chinese_list_is_wukongs():
    protocol = get_protocol("imagenet-cn/wukong80")
    found = load_classes(protocol)
    matched = match_labels(protocol.id, found, 50_000)
    assert matched.status == "verified"
    assert match_labels(None, found, 50_000) == matched
    assert "('太阳镜')" in matched.notes[0]
    assert "goes into the prompts as it is: 44, such as '鸢（猛禽）'" in matched.notes[1]
    assert make_task("imagenet", {"zh": found}).may_share_names
    with pytest.raises(
        DataError, match="imagenet-cn/cnclip183: 241 of 1,000 class names differ, b"
    ):
        match_labels("imagenet-cn/cnclip183", found, 50_000)
    short = strip_glosses(found)
    assert match_labels(protocol.id, short, 50_000).status == "unverified"
    assert repeated_names(short.names) == {"太阳镜": 2}


@needs_clip_benchmark
def test_one_wrong_name_among_a_thousand_is_named():
    found = load_classes(get_protocol("imagenet-cn/wukong80"))
    names = (*found.names[:388], ("熊猫",), *found.names[389:])
    wrong = ClassList("zh", names, found.templates, "mine")
    with pytest.raises(
        DataError, match="1 of 1,000 class names differ, the first is class 388, '熊猫'"
    ):
        match_labels("imagenet-cn/wukong80", wrong, 50_000)
    exchanged = ClassList("zh", (*found.names[1::-1], *found.names[2:]), found.templates, "mine")
    with pytest.raises(DataError, match="2 of 1,000 class names differ, the first is class 0"):
        match_labels("imagenet-cn/wukong80", exchanged, 50_000)


@needs_cn_clip
def test_cn_clips_183_templates_are_read_from_its_package(tmp_path):
    protocol = get_protocol("imagenet-cn/cnclip183")
    found = load_classes(protocol, names_file=put_lines(tmp_path / "label_cn.txt", ["猫", "狗"]))
    assert protocol.labels is not None
    assert len(found.templates) == 183
    assert len(set(found.templates)) == 179
    assert templates_checksum(found.templates) == protocol.labels.templates_checksum


@needs_none
@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (
            "imagenet/openai80",
            r"open_clip_torch or clip-benchmark, not installed here; install with",
        ),
        ("imagenet-cn/wukong80", r"pip install --no-deps clip-benchmark, or give a file of names"),
        ("imagenet-cn/cnclip183", r"in no package; give a file of them \(names: .*label_cn.txt"),
    ],
)
def test_a_missing_package_is_one_line_with_the_command(protocol, message):
    with pytest.raises(DataError, match=message) as caught:
        load_classes(get_protocol(protocol))
    assert "\n" not in str(caught.value)


@needs_none
@pytest.mark.parametrize("content", ['{"imagenet": []}', "[]", "{"])
def test_a_package_that_keeps_its_lists_elsewhere(tmp_path, monkeypatch, content):
    folder = tmp_path / "clip_benchmark/datasets"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "cn_classnames.json").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match="clip-benchmark: this version keeps its lists elsewhere"):
        load_classes(get_protocol("imagenet-cn/wukong80"))


# ── lists of users ──────────────────────────────────────────────────────────────────────────────


def test_names_from_lines_and_from_json(tmp_path):
    lines = put_lines(tmp_path / "names.txt", ["猫", " 龍貓 ", "Ａ🐼", "长" * 10_000])
    assert read_names(lines) == ((("猫",), ("龍貓",), ("Ａ🐼",), ("长" * 10_000,)), None)
    several = tmp_path / "names.json"
    several.write_text(json.dumps(["cat", ["dog", "hound"]]))
    assert read_names(several) == ((("cat",), ("dog", "hound")), None)
    both = {"names": ["猫", "狗"], "templates": ["{c}的照片", "一只{}"]}
    several.write_text(json.dumps(both), encoding="utf-8-sig")
    assert read_names(several) == ((("猫",), ("狗",)), ("{}的照片", "一只{}"))


def test_a_users_files_take_the_place_of_the_protocols(tmp_path):
    names = put_lines(tmp_path / "names.txt", ["猫", "狗"])
    templates = put_lines(tmp_path / "templates.txt", ["{c}的照片", "一只{}"])
    found = load_classes(get_protocol("cifar10/zh"), names_file=names, templates_file=templates)
    assert (found.names, found.templates) == ((("猫",), ("狗",)), ("{}的照片", "一只{}"))
    assert str(names) in found.source


def test_a_users_classes_need_no_protocol_and_get_our_templates(tmp_path):
    names = put_lines(tmp_path / "names.txt", ["猫", "狗"])
    found = read_classes(names, language="zh")
    assert found.templates == load_classes(get_protocol("cifar10/zh")).templates
    assert match_labels(None, found, 7).status == "custom"
    own = read_classes(names, language="ja", templates_file=put_lines(tmp_path / "t.txt", ["{}だ"]))
    assert (own.language, own.templates) == ("ja", ("{}だ",))
    with pytest.raises(DataError, match="no templates in ja, we only have some in zh and en; give"):
        read_classes(names, language="ja")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("猫\n\n狗\n", r"class 1 has an empty name; every class needs one"),
        ("", r"class 0 has an empty name"),
        ('{"classes": []}', r"holds 'classes', expected 'names' and perhaps 'templates'"),
        ('{"names": {}}', r"no list of class names, expected at least two"),
        ('["a", 5]', r"class 1 is 5, expected a name or a list of names"),
        ('["a", []]', r"class 1 has an empty name"),
        ('["a", [""]]', r"class 1 has an empty name"),
        ('{"names": ["a"], "templates": ["photo"]}', r"template 0 is 'photo', expected one \{\}"),
        ('{"names": ["a"], "templates": []}', r"no list of templates, expected sentences"),
        ('["a"', r"not JSON \(.*\); correct the file"),
    ],
)
def test_wrong_lists_of_names(tmp_path, content, message):
    path = tmp_path / ("names.json" if content[:1] in ("[", "{") else "names.txt")
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_names(path)


def test_lists_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="no such file, expected a list"):
        read_names(tmp_path / "none.txt")
    (tmp_path / "gbk.txt").write_bytes("熊猫的照片".encode("gbk"))
    with pytest.raises(DataError, match=r"cannot be read \(not UTF-8\); save it as UTF-8 text"):
        read_names(tmp_path / "gbk.txt")
    with pytest.raises(DataError, match=r"template 1 is '\{\} 和 \{\}', expected one \{\} in it"):
        read_templates(put_lines(tmp_path / "t.txt", ["{}", "{} 和 {}"]))


def test_retrieval_protocols_have_no_class_names():
    with pytest.raises(ConfigError, match="coco-cn/5k is a retrieval protocol, it has no class na"):
        load_classes(get_protocol("coco-cn/5k"))
    with pytest.raises(DataError, match="coco-cn/5k is a retrieval protocol, the data has classes"):
        match_labels("coco-cn/5k", classes("猫", "狗"), 3)


# ── lists against protocols ─────────────────────────────────────────────────────────────────────


def test_a_list_of_the_wrong_length_or_with_other_templates():
    ours = load_classes(get_protocol("cifar10/zh"))
    fewer = ClassList("zh", ours.names[:9], ours.templates, "mine")
    with pytest.raises(DataError, match="cifar10/zh: 9 class names, expected 10; correct that, or"):
        match_labels("cifar10/zh", fewer, 10_000)
    hundred = load_classes(get_protocol("cifar100/zh"))
    with pytest.raises(
        DataError, match="100 class names, expected 10; this is the list of cifar10"
    ):
        match_labels("cifar10/zh", hundred, 10_000)
    other = ClassList("zh", ours.names, ("{}",) * 5, "mine")
    with pytest.raises(DataError, match="5 templates as expected, but other ones"):
        match_labels("cifar10/zh", other, 10_000)
    other = ClassList("zh", ours.names, ("{}",), "mine")
    with pytest.raises(DataError, match="1 templates, expected 5"):
        match_labels("cifar10/zh", other, 10_000)
    english = load_classes(get_protocol("cifar10/en"))
    mixed = ClassList("zh", ours.names, english.templates, "mine")
    with pytest.raises(DataError, match="the templates are those of cifar10/en"):
        match_labels("cifar10/zh", mixed, 10_000)


def test_the_order_of_names_matters_and_that_of_templates_does_not():
    ours = load_classes(get_protocol("cifar10/zh"))
    turned = ClassList("zh", ours.names, ours.templates[::-1], "mine")
    assert match_labels("cifar10/zh", turned, 10_000).status == "verified"
    turned = ClassList("zh", ours.names[::-1], ours.templates, "mine")
    with pytest.raises(
        DataError, match="10 of 10 class names differ, the first is class 0, '卡车'"
    ):
        match_labels("cifar10/zh", turned, 10_000)


def test_other_pictures_than_the_protocols_are_refused_or_custom():
    ours = load_classes(get_protocol("cifar10/zh"))
    with pytest.raises(DataError, match="cifar10/zh: 2,000 pictures, expected 10,000; correct"):
        match_labels("cifar10/zh", ours, 2000)
    for protocol in (None, "custom"):
        found = match_labels(protocol, ours, 2000)
        assert found.id == f"custom:{found.checksum[:12]}"
        assert found.notes == ("class names and templates of cifar10/zh",)
    unseen = match_labels("cifar10/zh", ours, None)
    assert (unseen.status, unseen.notes) == (
        "unverified",
        ("the number of pictures was not compared",),
    )


def test_shared_names_are_refused_where_no_protocol_says_so():
    with pytest.raises(
        DataError, match="name '猫' belongs to classes 0 and 2, which nothing can t"
    ):
        match_labels("custom", classes("猫", "狗", ("豹", "猫")), 3)
    twice = classes(("猫", "猫"), "狗")  # the same class twice is no mistake
    assert match_labels(None, twice, 3).status == "custom"


# ── glosses ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("鸢（猛禽）", "鸢"),
        ("（小儿用的）围嘴", "围嘴"),
        ("食蜂鸟；蜂虎", "食蜂鸟"),
        ("小鹅笛；球形笛(管身椭圆形)", "小鹅笛"),
        ("kite (bird of prey)", "kite"),
        ("baluster / handrail", "baluster"),
        ("CD播放器", "CD播放器"),
        ("T恤衫", "T恤衫"),
        ("A/C unit", "A/C unit"),
        ("（全在括号里）", "（全在括号里）"),
        ("", ""),
    ],
)
def test_glosses_are_cut_off(name, short):
    assert strip_gloss(name) == short
    assert has_gloss(name) == (name != short)


def test_a_short_name_that_two_classes_would_share_stays_long():
    short = strip_glosses(classes("鹤（鸟）", "鹤（机器）", "蜂虎；食蜂鸟"))
    assert short.names == (("鹤（鸟）",), ("鹤（机器）",), ("蜂虎",))
    assert short.as_published == (("鹤（鸟）",), ("鹤（机器）",), ("蜂虎；食蜂鸟",))
    plain = classes("猫", "狗")
    assert strip_glosses(plain) is plain


# ── tasks and labels ────────────────────────────────────────────────────────────────────────────


def test_a_task_holds_both_languages_and_may_share_names():
    zh = classes("导弹", "导弹", "坦克")
    en = classes("missile", "projectile", "tank", language="en", templates=["a {}.", "the {}."])
    task = make_task("three", {"zh": zh, "en": en}, label_key="cls")
    assert task.labels == ["0", "1", "2"]
    assert task.prompts("zh") == [["一张导弹的照片。"], ["一张导弹的照片。"], ["一张坦克的照片。"]]
    assert task.prompts("en")[2] == ["a tank.", "the tank."]
    assert not make_task("three", {"en": en}).may_share_names
    with pytest.raises(
        DataError, match="numbers of classes differ: 3 in zh, 2 in en; correct them"
    ):
        make_task("x", {"zh": zh, "en": classes("a", "b")})
    with pytest.raises(DataError, match="3 in zh, 2 in data"):
        make_task("x", {"zh": zh}, labels=["a", "b"])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["0", "2"], [0, 2, 0]),
        (["002", "000"], [2, 0, 2]),
        (["马", "猫"], [2, 0, 2]),
        (["n01", "n02", "n03"], [0, 1, 0]),
    ],
)
def test_labels_are_aligned_by_number_by_name_or_by_order(labels, expected):
    targets = np.asarray([0, 1, 0])
    assert align_labels(targets, labels, classes("猫", "狗", "马")).tolist() == expected


def test_labels_that_fit_no_class_are_refused():
    targets = np.asarray([0, 1])
    with pytest.raises(DataError, match="the data has a class 3, the list of names ends at 2"):
        align_labels(targets, ["0", "3"], classes("猫", "狗", "马"))
    with pytest.raises(DataError, match=r"the data has 2 classes \('n01', '猫', …\), the list 3"):
        align_labels(targets, ["n01", "猫"], classes("猫", "狗", "马"))
    with pytest.raises(DataError, match="the data has 2 classes"):  # the name says two classes
        align_labels(targets, ["猫", "马"], classes("猫", "猫", "马"))
