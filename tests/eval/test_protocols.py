"""The registry of evaluation protocols: its files, its names, and the command that shows it."""

import json
import re

import pytest

from m2encoder.cli import main
from m2encoder.errors import ConfigError
from m2encoder.eval.metric_names import label
from m2encoder.eval.protocols import FOLDER, get_protocol, known_protocols

PROTOCOLS = list(known_protocols().values())
ROWS = [(protocol, row) for protocol in PROTOCOLS for row in protocol.published]


def test_every_protocol_that_users_ask_for_is_there():
    assert {protocol.id for protocol in PROTOCOLS} == {
        "imagenet/openai80",
        "imagenet-cn/wukong80",
        "imagenet-cn/cnclip183",
        "flickr30k/5k",
        "flickr30k/m2-1k",
        "coco/karpathy-25010",
        "coco/karpathy-25000",
        "flickr30k-cn/5k",
        "coco-cn/1053",
        "coco-cn/5k",
        "muge/valid",
        *(f"xm3600/{tag}" for tag in ("zh", "en", "zh-first", "en-first")),
        "xtd/zh",
        "xtd/en",
        *(f"cifar{n}/{tag}" for n in (10, 100) for tag in ("zh", "en")),
    }


def test_names_and_aliases_mean_one_protocol_each():
    names = [name for p in PROTOCOLS for name in (p.id, *p.aliases)]
    assert sorted(names) == sorted(set(names))
    assert all(name == name.lower().strip() for name in names)
    for protocol in PROTOCOLS:
        assert {get_protocol(name).id for name in (protocol.id, *protocol.aliases)} == {protocol.id}


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.id)
def test_counts_and_checksums_are_consistent(protocol):
    assert protocol.language in ("zh", "en")
    assert protocol.split
    assert protocol.title
    for checksum in (protocol.checksum, protocol.folded_checksum):
        assert checksum is None or re.fullmatch(r"[0-9a-f]{64}", checksum)
    assert bool(protocol.checksum) == bool(protocol.folded_checksum) == bool(protocol.checksum_from)
    if per_image := protocol.captions_per_image:
        assert sum(per_image.values()) == protocol.images
        assert sum(int(k) * count for k, count in per_image.items()) == protocol.texts
    assert (protocol.labels is None) == (protocol.task == "retrieval")
    assert bool(protocol.directions) == bool(protocol.mean_recall) == (protocol.labels is None)
    assert {part[:3] for part in protocol.mean_recall} == set(protocol.directions)
    assert protocol.image_preprocessing
    assert protocol.text_preprocessing


@pytest.mark.parametrize("protocol", [p for p in PROTOCOLS if p.labels], ids=lambda p: p.id)
def test_label_lists_have_a_digest_for_each_name(protocol):
    labels = protocol.labels
    assert re.fullmatch(rf"[0-9a-f]{{{4 * labels.count}}}", labels.digests)
    assert re.fullmatch(r"[0-9a-f]{64}", labels.checksum)
    assert re.fullmatch(r"[0-9a-f]{64}", labels.templates_checksum)
    assert labels.num_templates > 1


def test_both_imagenet_lists_differ_in_the_241_names_that_are_known():
    a, b = (get_protocol(f"imagenet-cn/{n}").labels for n in ("wukong80", "cnclip183"))
    assert a and b  # noqa: PT018
    pairs = [(a.digests[i : i + 4], b.digests[i : i + 4]) for i in range(0, 4000, 4)]
    assert sum(x != y for x, y in pairs) == 241


@pytest.mark.parametrize(("protocol", "row"), ROWS, ids=lambda v: getattr(v, "model", ""))
def test_published_figures_are_plausible_and_say_where_they_are_from(protocol, row):
    assert row.sources
    assert all(source.text for source in row.sources)
    assert row.values
    assert all(0 < value <= 100 for value in row.values.values())
    assert all(label(name) for name in row.values)
    assert set(row.computed) <= set(row.values)
    assert row.dataset == protocol.dataset
    assert row.language == protocol.language
    if row.protocol is not None:
        assert get_protocol(row.protocol).dataset == row.dataset
    for direction in ("t2i", "i2t"):
        recalls = [row.values.get(f"{direction}_r{k}") for k in (1, 5, 10)]
        known = [value for value in recalls if value is not None]
        assert known == sorted(known)


@pytest.mark.parametrize(
    ("protocol", "row"),
    [(p, r) for p, r in ROWS if {*p.mean_recall, "mean_recall"} <= set(r.values)],
    ids=lambda v: getattr(v, "model", ""),
)
def test_published_mean_recalls_are_the_means_of_their_figures(protocol, row):
    """Catches a wrong digit: printed figures are rounded, so their mean may be off by 0.1."""
    parts = protocol.mean_recall
    mean = sum(row.values[part] for part in parts) / len(parts)
    assert row.values["mean_recall"] == pytest.approx(mean, abs=0.11)


def test_m2_encoders_flickr30k_figures_are_those_of_one_caption():
    rows = [r for r in get_protocol("flickr30k/5k").published if r.model.startswith("M2-Encoder")]
    assert {row.protocol for row in rows} == {"flickr30k/m2-1k"}
    assert [row.values["mean_recall"] for row in rows] == [94.5, 95.4, 96.9]
    assert all(row.values["t2i_r1"] > row.values["i2t_r1"] for row in rows)


def test_own_figures_come_before_those_of_other_protocols():
    for protocol in PROTOCOLS:
        own = [row.protocol == protocol.id for row in protocol.published]
        assert own == sorted(own, reverse=True)


def test_second_hand_and_computed_figures_are_marked():
    rows = get_protocol("flickr30k-cn/5k").published
    assert {row.model for row in rows if row.second_hand} == {"FG-CLIP 2", "Meta CLIP 2"}
    computed = {row.model for row in rows if row.computed}
    assert computed == {"QA-CLIP L/14-336", "XLM-R ViT-H/14", "InternVL-C", "InternVL-G"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flickr30k-cn/5k", "905 of the 1,000 test pictures lie in the train split"),
        ("coco-cn/1053", "583 of the 1,000 test pictures lie in COCO train2014"),
        ("coco-cn/5k", "583 of the 1,000 test pictures lie in COCO train2014"),
    ],
)
def test_known_contamination_is_stated(name, said):
    assert said in " ".join(get_protocol(name).overlaps)


def test_muge_is_measured_in_one_direction_and_its_mean_says_so():
    muge = get_protocol("muge")
    assert muge.directions == ("t2i",)
    assert muge.mean_recall == ("t2i_r1", "t2i_r5", "t2i_r10")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flickr30k-cm/5k", r"no protocol 'flickr30k-cm/5k'; did you mean flickr30k-cn/5k"),
        ("imagenet-cn", r"measured in several ways, name one: imagenet-cn/wukong80, imagenet-cn/c"),
        ("一个不存在的协议", r"no protocol '一个不存在的协议'; see m2enc eval protocols"),
        ("", r"no protocol ''; see"),
    ],
)
def test_unknown_names_are_refused_with_what_was_perhaps_meant(name, message):
    with pytest.raises(ConfigError, match=message):
        get_protocol(name)


def test_names_are_found_whatever_their_case():
    assert get_protocol(" Flickr30K-CN/5K ").id == "flickr30k-cn/5k"


def test_every_file_is_json_that_is_kept_in_utf_8():
    for path in FOLDER.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert json.loads(text)
        assert "\\u" not in text


# ── the command ─────────────────────────────────────────────────────────────────────────────────


def test_command_lists_every_protocol(capsys):
    assert main(["eval", "protocols"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [p.id for p in PROTOCOLS]


def test_command_tells_everything_about_one_protocol(capsys):
    assert main(["eval", "protocols", "flickr30k/5k"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"M2-Encoder 0.4B +87.2 .* 94.5 +\[flickr30k/m2-1k\]", out)
    assert "measured under that protocol, not comparable" in out
    assert re.search(r"FG-CLIP 2 +85.0 .* 2nd ", out)


def test_command_marks_computed_means_and_unknown_protocols(capsys):
    assert main(["eval", "protocols", "coco-cn/1053"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"InternVL-C .* 85.8\* ", out)
    assert re.search(r"R2D2 0.4B .* \[\?\] ", out)
    assert "overlap       583 of the 1,000 test pictures" in out


def test_command_prints_json_of_one_and_of_all(capsys):
    assert main(["eval", "protocols", "imagenet-cn/wukong80", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["labels"]["repeated"] == ["太阳镜"]
    assert one["published"][0]["sources"] == [
        {"text": "OpenGVLab/InternVL, README.md", "second_hand": False}
    ]
    assert main(["eval", "protocols", "--json"]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert [entry["id"] for entry in everything] == [p.id for p in PROTOCOLS]
    assert all("published" not in entry for entry in everything)


def test_command_refuses_an_unknown_name_in_one_line(capsys):
    assert main(["eval", "protocols", "flikr30k-cn"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("m2enc: no protocol 'flikr30k-cn'; did you mean flickr30k-cn")
    assert err.count("\n") == 1
