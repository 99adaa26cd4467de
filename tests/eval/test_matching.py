"""Captions against known protocols: the checksum, and every planted fault caught by its name."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.matching import (
    caption_checksum,
    caption_groups,
    match,
    tagged_captions,
)

OFFICIAL = Path(__file__).resolve().parents[3] / "shared/data/official"
needs_official = pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason="the released annotation files are not beside this checkout"
)
RELEASED = {
    "coco/karpathy-25010": ("coco_caption_karpathy_test.jsonl", 5000, 25010),
    "coco-cn/1053": ("coco-cn_test.jsonl", 1000, 1053),
    "flickr30k-cn/5k": ("f30k-cn_test.jsonl", 1000, 5000),
    "flickr30k/m2-1k": ("f30k_caption_karpathy_test.jsonl", 1000, 1000),
}

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20) | st.sampled_from(
    [
        "",
        "雪山日落",
        "雪山 日落。",
        "龍貓",
        "ＡＢＣ１２３",
        "🐼 熊猫",
        "café",
        "cafe\u0301",
        "长" * 10_000,
    ]
)
GROUPS = st.lists(st.lists(TEXT, max_size=4), min_size=1, max_size=6)


def released_groups(protocol: str) -> list[list[str]]:
    lines = (OFFICIAL / RELEASED[protocol][0]).read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["caption"] for line in lines if line]


def flat(groups: list[list[str]]) -> tuple[list[str], list[int], int]:
    texts = [text for group in groups for text in group]
    return texts, [row for row, group in enumerate(groups) for _ in group], len(groups)


def made(num_images: int, per_image: int, sentence: str = "图{i}的第{j}句") -> list[list[str]]:
    return [[sentence.format(i=i, j=j) for j in range(per_image)] for i in range(num_images)]


# ── the checksum ────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None)  # a busy machine is no fault
@given(GROUPS, st.randoms(use_true_random=False))
def test_order_of_pictures_and_of_their_captions_does_not_matter(groups, random):
    shuffled = [random.sample(group, len(group)) for group in groups]
    random.shuffle(shuffled)
    assert caption_checksum(shuffled) == caption_checksum(groups)


@settings(deadline=None)  # a busy machine is no fault
@given(GROUPS)
def test_white_space_and_unicode_composition_do_not_matter(groups):
    padded = [[f"\t {text.replace(' ', '  ')}\u3000\n" for text in group] for group in groups]
    decomposed = [[unicodedata.normalize("NFD", text) for text in group] for group in groups]
    assert caption_checksum(padded) == caption_checksum(groups)
    assert caption_checksum(decomposed) == caption_checksum(groups)


@settings(deadline=None)  # a busy machine is no fault
@given(GROUPS, st.data())
def test_one_more_caption_or_picture_makes_another_checksum(groups, data):
    row = data.draw(st.integers(0, len(groups) - 1))
    more = [[*group, "多"] if i == row else group for i, group in enumerate(groups)]
    assert caption_checksum(more) != caption_checksum(groups)
    assert caption_checksum([*groups, []]) != caption_checksum(groups)


def test_moving_a_caption_to_another_picture_makes_another_checksum():
    assert caption_checksum([["猫", "狗"], ["马"]]) != caption_checksum([["猫"], ["狗", "马"]])


@pytest.mark.parametrize(("a", "b"), [("A", "a"), ("猫。", "猫."), ("１", "1"), ("龍", "龙")])
def test_case_width_and_script_matter(a, b):
    assert caption_checksum([[a]]) != caption_checksum([[b]])


@pytest.mark.parametrize(("a", "b"), [("A", "a"), ("猫！", "猫!"), ("１", "1"), ("“猫”", '"猫"')])
def test_folding_forgets_case_width_and_quotes(a, b):
    assert caption_checksum([[a]], fold=True) == caption_checksum([[b]], fold=True)


def test_captions_cannot_be_glued_together_to_the_same_checksum():
    assert caption_checksum([['a", "b']]) != caption_checksum([["a", "b"]])
    assert caption_checksum([["a\nb"]]) != caption_checksum([["a"], ["b"]])


def test_a_text_with_several_pictures_counts_at_each():
    assert caption_groups(["红", "蓝"], [0, 1], 3, also=[(0, 2)]) == [["红"], ["蓝"], ["红"]]


# ── the released files ──────────────────────────────────────────────────────────────────────────


@needs_official
@pytest.mark.parametrize("protocol", RELEASED)
def test_released_file_is_verified_and_recognised_without_being_named(protocol):
    groups = released_groups(protocol)
    named = match(protocol, *flat(groups))
    assert (named.id, named.status) == (protocol, "verified")
    assert named.found == named.expected
    assert (named.found["images"], named.found["texts"]) == RELEASED[protocol][1:]
    assert match(None, *flat(groups)) == named


@needs_official
def test_cut_to_five_captions_coco_is_the_other_protocol():
    groups = [group[:5] for group in released_groups("coco/karpathy-25010")]
    assert match("coco/karpathy-25000", *flat(groups)).status == "verified"
    with pytest.raises(DataError, match=r"25,000 captions, expected .* 25,010 .* this is coco/k"):
        match("coco/karpathy-25010", *flat(groups))


@needs_official
def test_custom_is_custom_even_for_a_known_file():
    found = match("custom", *flat(released_groups("coco-cn/1053")))
    assert found.status == "custom"
    assert found.id == f"custom:{found.checksum[:12]}"


@needs_official
def test_one_caption_flickr30k_is_told_from_five():
    with pytest.raises(
        DataError,
        match=r"^flickr30k/5k: found 1,000 pictures and 1,000 captions, expected 1,000 pictures "
        r"and 5,000 captions; this is flickr30k/m2-1k \(.* one long caption .*\), so ask for flick",
    ):
        match("flickr30k/5k", *flat(released_groups("flickr30k/m2-1k")))


@needs_official
@pytest.mark.parametrize("protocol", RELEASED)
def test_lower_cased_copy_of_a_released_file_is_named_so(protocol):
    groups = [
        [text.lower().replace("“", '"').replace("”", '"').replace("，", ",") for text in group]
        for group in released_groups(protocol)
    ]
    with pytest.raises(DataError, match=r"captions differ .*; only case, width or quotes differ"):
        match(protocol, *flat(groups))


@needs_official
def test_one_changed_caption_in_25010_is_found():
    groups = released_groups("coco/karpathy-25010")
    groups[4321][2] += "!"
    with pytest.raises(DataError, match=r"the counts are right, but the captions differ \(checks"):
        match("coco/karpathy-25010", *flat(groups))


@needs_official
def test_captions_of_two_pictures_exchanged_are_found():
    groups = released_groups("flickr30k-cn/5k")
    groups[0], groups[1] = [groups[1][0], *groups[0][1:]], [groups[0][0], *groups[1][1:]]
    with pytest.raises(DataError, match="the counts are right, but the captions differ"):
        match("flickr30k-cn/5k", *flat(groups))


# ── planted faults without the released files ───────────────────────────────────────────────────


@pytest.mark.parametrize(
    "tagged", ["一个/m 男人/n 骑/v 马/n{i}{j}", "一个_m 男人_n 在_p 街{i}_{j}"]
)
def test_part_of_speech_tags_are_named_with_an_example(tagged):
    groups = made(1000, 5, tagged)
    with pytest.raises(DataError, match=r"5,000 of 5,000 captions carry part-of-speech tags, such"):
        match("flickr30k-cn/5k", *flat(groups))


def test_part_of_speech_tags_are_noted_where_no_protocol_is_named():
    found = match(None, *flat(made(3, 2, "一个/m 男人/n {i}{j}")))
    assert found.status == "custom"
    assert "6 of 6 captions carry part-of-speech tags, such as '一个/m 男人/n 00'" in found.notes[0]


@pytest.mark.parametrize(
    "text",
    [
        "a black and/or white dog",
        "24/7 营业的商店",
        "http://a.b/c d",
        "snake_case word",
        "一个男人",
        "",
    ],
)
def test_ordinary_slashes_are_no_tags(text):
    assert tagged_captions([text] * 10) == []


def test_a_few_tagged_captions_among_many_are_no_tagged_file():
    assert tagged_captions(["一个/m 男人/n", *["一个男人"] * 99]) == []


@pytest.mark.parametrize(
    ("asked", "images", "per_image", "message"),
    [
        ("coco-cn/1053", 1000, 5, r"5,000 captions, expected .* 1,053 .*the counts of coco-cn/5k"),
        ("flickr30k-cn/5k", 1000, 1, "one caption for each picture, so perhaps only the first"),
        ("flickr30k-cn/5k", 999, 5, r"found 999 pictures and 4,995 captions, expected 1,000 pict"),
        ("xm3600/zh", 3599, 2, r"found 3,599 pictures and 7,198 captions, expected 3,600 pictures"),
    ],
)
def test_wrong_counts_are_said_with_what_they_look_like(asked, images, per_image, message):
    with pytest.raises(DataError, match=message):
        match(asked, *flat(made(images, per_image)))


def test_coco_cn_1053_is_told_from_5k():
    groups = [[f"图{i}"] for i in range(948)] + [[f"图{i}", "又"] for i in range(51)] + [["一"] * 3]
    with pytest.raises(DataError, match=r"1,053 captions, expected .* the counts of coco-cn/1053"):
        match("coco-cn/5k", *flat(groups))


def test_equal_totals_with_another_spread_are_refused():
    groups = made(1000, 5)
    groups[0].append(groups[1].pop())
    with pytest.raises(DataError, match=r"found 998 pictures with 5 captions, 1 pictures with 4"):
        match("coco-cn/5k", *flat(groups))


@pytest.mark.parametrize(
    ("asked", "images", "per_image", "sentence", "message"),
    [
        ("xtd/zh", 1000, 1, "picture {i} {j}", "only 0% of the captions hold Chinese characters"),
        ("flickr30k/5k", 1000, 5, "图{i}，{j}", "100% of the captions hold Chinese characters"),
    ],
)
def test_captions_in_the_other_language_are_named(asked, images, per_image, sentence, message):
    with pytest.raises(DataError, match=message):
        match(asked, *flat(made(images, per_image, sentence)))


def test_right_counts_without_a_known_checksum_are_unverified():
    found = match("coco-cn/5k", *flat(made(1000, 5)))
    assert found.status == "unverified"
    assert found.notes[0] == "no checksum is known for it, only the counts were compared"
    assert "583 of the 1,000 test pictures" in found.notes[1]
    assert match("muge", ["红色连衣裙"], [0], 3).notes[0].startswith("neither a checksum nor all")


def test_unknown_captions_are_custom_with_twelve_digits_of_their_checksum():
    found = match(None, *flat(made(1000, 5, "图{i}，🐼{j}")))
    assert found.status == "custom"
    assert found.expected is None
    assert found.id == f"custom:{found.checksum[:12]}"
    assert found.notes == (
        "as many pictures and captions as coco-cn/5k, flickr30k-cn/5k, flickr30k/5k, but other "
        "captions",
    )


def test_what_a_result_records_is_plain_json():
    facts = match("coco-cn/5k", *flat(made(1000, 5))).facts()
    assert json.loads(json.dumps(facts)) == facts
    assert set(facts) == {"id", "status", "checksum", "expected", "notes"}


def test_leaving_something_out_ends_being_verified_but_not_being_custom():
    custom = match(None, *flat(made(2, 1)))
    assert custom.demoted("1 picture was left out").status == "custom"
    known = match("coco-cn/5k", *flat(made(1000, 5)))
    assert known.demoted("x").notes[-1] == "x"


def test_a_zero_shot_protocol_or_an_unknown_one_is_refused():
    with pytest.raises(DataError, match="imagenet/openai80 is a zero-shot protocol, the data has"):
        match("imagenet", ["a"], [0], 1)
    with pytest.raises(ConfigError, match="no protocol 'flickr31k'"):
        match("flickr31k", ["a"], [0], 1)
