"""The drawn demo data: what is held out, what captions say, and that a seed fixes every byte."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2encoder.data_pipeline.scene_captions import LANGUAGES, caption, scene_words, templates
from m2encoder.data_pipeline.scene_drawing import BACKGROUNDS, PAINT, draw_scene
from m2encoder.data_pipeline.scene_grammar import (
    COLOURS,
    OBJECTS,
    OPPOSITE,
    SIZES,
    THINGS,
    Group,
    Relation,
    Thing,
    change_kinds,
    change_one,
    combination_id,
    held_out_things,
    random_scene,
    turn_around,
)
from m2encoder.data_pipeline.scenes import choose_scenes, make_scenes
from m2encoder.errors import ConfigError
from m2encoder.images import open_image
from m2encoder.shards import Pair, ShardReader


def _things(pair: Pair) -> set[Thing]:
    meta = pair.meta
    if meta["kind"] == "group":
        return {Thing(meta["object"], meta["colour"])}
    return {
        Thing(meta["first_object"], meta["first_colour"]),
        Thing(meta["other_object"], meta["other_colour"]),
    }


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small but complete data set, seed 0."""
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, train_pairs=300, test_pairs=120)
    return folder


# ── splits ──────────────────────────────────────────────────────────────────────────────────────


def test_the_same_seed_gives_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    make_scenes(tmp_path, train_pairs=300, test_pairs=120)
    assert _bytes(tmp_path) == _bytes(demo)


def test_another_seed_gives_other_pictures_and_other_held_out_combinations(
    demo: Path, tmp_path: Path
) -> None:
    make_scenes(tmp_path, seed=1, train_pairs=50, test_pairs=10)
    ours = {pair.image for pair in ShardReader(demo / "train")}
    assert not ours & {pair.image for pair in ShardReader(tmp_path / "train")}
    assert held_out_things(0) != held_out_things(1)


@pytest.mark.parametrize("seed", range(50))
def test_fifteen_percent_are_held_out_and_both_splits_show_every_word(
    seed: int,
) -> None:
    held_out = held_out_things(seed)
    seen = set(THINGS) - held_out
    assert len(held_out) == 12
    for things in (held_out, seen):
        assert {thing.object for thing in things} == set(OBJECTS)
        assert {thing.colour for thing in things} == set(COLOURS)


@pytest.mark.parametrize("split", ["train", "val"])
def test_held_out_combinations_never_occur_in_training_or_validation(
    demo: Path, split: str
) -> None:
    held_out = held_out_things(0)
    assert not [pair.key for pair in ShardReader(demo / split) if _things(pair) & held_out]


def test_every_test_scene_shows_a_held_out_combination(demo: Path) -> None:
    held_out = held_out_things(0)
    assert all(_things(pair) & held_out for pair in ShardReader(demo / "test"))


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_pairs_have_pairwise_different_attributes(demo: Path, split: str) -> None:
    combinations = [pair.meta["combination"] for pair in ShardReader(demo / split)]
    assert len(set(combinations)) == len(combinations)


def test_validation_shows_training_combinations_in_new_pictures(demo: Path) -> None:
    train, val = ShardReader(demo / "train"), ShardReader(demo / "val")
    assert {pair.meta["combination"] for pair in val} <= {
        pair.meta["combination"] for pair in train
    }
    assert not {pair.image for pair in val} & {pair.image for pair in train}


def test_the_default_sizes_are_12000_400_and_400_with_96_groups_in_test() -> None:
    scenes = choose_scenes(0, train_pairs=12_000, test_pairs=400)
    assert {split: len(chosen) for split, chosen in scenes.items()} == {
        "train": 12_000,
        "val": 400,
        "test": 400,
    }
    assert sum(isinstance(scene, Group) for scene in scenes["test"]) == 96


def test_every_attribute_value_is_about_equally_frequent_in_training() -> None:
    scenes = choose_scenes(3, train_pairs=6_000, test_pairs=1)["train"]
    groups = [scene for scene in scenes if isinstance(scene, Group)]
    for values in (
        [scene.size for scene in groups],
        [scene.count for scene in groups],
        [scene.relation for scene in scenes if isinstance(scene, Relation)],
        ["group" if isinstance(scene, Group) else "relation" for scene in scenes],
    ):
        counts = Counter(values).values()
        assert min(counts) > 0.8 * max(counts)  # 5 standard deviations at about 750 each


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_pairs": 0}, "train_pairs 0"),
        ({"test_pairs": 0}, "test_pairs 0"),
        ({"size_px": 8}, "size_px 8"),
        ({"test_pairs": 10_000}, "the grammar has 3624; ask for fewer"),
    ],
)
def test_numbers_that_the_grammar_cannot_serve_are_refused_in_one_line(
    tmp_path: Path, settings: dict[str, int], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        make_scenes(tmp_path, **{"train_pairs": 5, "test_pairs": 5} | settings)
    assert "\n" not in str(caught.value)


# ── captions ────────────────────────────────────────────────────────────────────────────────────


def test_each_pair_has_two_different_captions_per_language(demo: Path) -> None:
    for pair in ShardReader(demo / "train"):
        assert {language: len(set(texts)) for language, texts in pair.captions.items()} == {
            "zh": 2,
            "en": 2,
        }


def test_there_are_at_least_four_templates_per_kind_and_language() -> None:
    for kind in ("group_templates", "relation_templates"):
        assert all(len(set(scene_words()[kind][language])) >= 4 for language in LANGUAGES)


def test_different_scenes_never_share_a_caption() -> None:
    """An ambiguous caption, or one that leaves an attribute out, would show up here."""
    rng = random.Random(0)
    owner: dict[str, str] = {}
    for scene in (random_scene(rng, THINGS) for _ in range(3_000)):
        for language in LANGUAGES:
            for template in templates(scene, language):
                text = caption(scene, language, template)
                assert owner.setdefault(text, combination_id(scene)) == combination_id(scene)


@pytest.mark.parametrize(
    ("scene", "language", "expected"),
    [
        (Group(Thing("fish", "red"), 2, "big"), "zh", "两条红色的大鱼"),
        (Group(Thing("tree", "white"), 3, "small"), "zh", "三棵白色的小树"),
        (Group(Thing("star", "black"), 1, "big"), "zh", "一颗黑色的大星星"),
        (Group(Thing("house", "blue"), 4, "small"), "zh", "四座蓝色的小房子"),
        (Group(Thing("flower", "purple"), 1, "small"), "zh", "一朵紫色的小花"),
        (Group(Thing("fish", "orange"), 1, "big"), "en", "a big orange fish"),
        (Group(Thing("fish", "orange"), 2, "big"), "en", "two big orange fish"),
        (Group(Thing("house", "red"), 4, "small"), "en", "four small red houses"),
        (
            Relation(Thing("star", "orange"), "left", Thing("tree", "green")),
            "en",
            "an orange star to the left of a green tree",
        ),
        (
            Relation(Thing("star", "orange"), "below", Thing("tree", "green")),
            "zh",
            "一颗橙色的星星在一棵绿色的树的下方",
        ),
    ],
)
def test_captions_use_the_right_measure_words_plurals_and_articles(
    scene: Group | Relation, language: str, expected: str
) -> None:
    assert expected in [
        caption(scene, lang, t) for lang in LANGUAGES for t in templates(scene, lang)
    ]
    assert any("\u4e00" <= letter <= "\u9fff" for letter in expected) == (language == "zh")


def test_chinese_captions_never_count_with_er_and_hold_no_english() -> None:
    rng = random.Random(1)
    for scene in (random_scene(rng, THINGS) for _ in range(500)):
        for template in templates(scene, "zh"):
            text = caption(scene, "zh", template)
            assert "二" not in text
            assert not any(letter.isascii() for letter in text)


# ── hard negatives and zero-shot tasks ──────────────────────────────────────────────────────────


def test_hard_negatives_differ_from_the_pairs_own_caption_in_the_same_template(demo: Path) -> None:
    for pair in ShardReader(demo / "test"):
        negatives, kinds = pair.meta["hard_negatives"], pair.meta["hard_negative_kinds"]
        for language in LANGUAGES:
            texts = negatives[language]
            assert len(texts) == len(kinds) == len(set(texts))
            assert not set(texts) & set(pair.captions[language])


def test_a_change_touches_exactly_the_attribute_it_names() -> None:
    rng = random.Random(2)
    for scene in (random_scene(rng, THINGS) for _ in range(1_000)):
        for kind in change_kinds(scene):
            changed = change_one(scene, kind, rng)
            assert combination_id(changed) != combination_id(scene)
            before, after = _attributes(scene), _attributes(changed)
            different = [name for name, value in before.items() if after[name] != value]
            assert [name.removeprefix("other_") for name in different] == [kind]


def _attributes(scene: Group | Relation) -> dict[str, Any]:
    first: dict[str, Any] = {"object": scene.thing.object, "colour": scene.thing.colour}
    if isinstance(scene, Group):
        return first | {"count": scene.count, "size": scene.size}
    other = {"other_object": scene.other.object, "other_colour": scene.other.colour}
    return first | other | {"relation": scene.relation}


def test_a_scene_told_from_the_other_side_is_the_same_combination() -> None:
    scene = Relation(Thing("star", "red"), "right", Thing("tree", "green"))
    assert combination_id(turn_around(scene)) == combination_id(scene)
    mirrored = Relation(scene.thing, OPPOSITE[scene.relation], scene.other)
    assert combination_id(mirrored) != combination_id(scene)


@pytest.mark.parametrize("split", ["val", "test"])
def test_zero_shot_labels_are_classes_of_their_task_and_every_class_occurs(
    demo: Path, split: str
) -> None:
    tasks = json.loads((demo / split / "zero_shot.json").read_text(encoding="utf-8"))["tasks"]
    assert [task["name"] for task in tasks] == ["colour", "object", "count", "size", "relation"]
    metas = [pair.meta for pair in ShardReader(demo / split)]
    for task in tasks:
        labels = {meta[task["label"]] for meta in metas if task["label"] in meta}
        assert labels == {one["label"] for one in task["classes"]}


def test_zero_shot_prompts_are_distinct_and_filled_in_both_languages() -> None:
    for task in scene_words()["tasks"]:
        for language in LANGUAGES:
            assert all(template.count("{}") == 1 for template in task["templates"][language])
            names = [name for one in task["classes"] for name in one[language]]
            assert len(set(names)) == len(names) >= 2


# ── pictures ────────────────────────────────────────────────────────────────────────────────────


def _pixels(scene: Group | Relation, seed: int = 0, size_px: int = 64) -> np.ndarray:
    return np.asarray(draw_scene(scene, random.Random(seed), size_px=size_px)).astype(int)


def _mask(pixels: np.ndarray, colour: tuple[int, int, int]) -> Any:
    """Return where a picture (H, W, 3) shows a colour, up to its random shade (8 of 255)."""
    return np.all(np.abs(pixels - colour) <= 12, axis=-1)


@pytest.mark.parametrize("thing", THINGS, ids=str)
def test_every_thing_shows_its_colour_at_64_px(thing: Thing) -> None:
    for seed in range(3):
        assert _mask(_pixels(Group(thing, 1, "small"), seed), PAINT[thing.colour]).sum() >= 20


def test_colours_and_backgrounds_are_far_apart() -> None:
    colours = np.array([*PAINT.values(), *BACKGROUNDS])
    apart = np.abs(colours[:, None] - colours[None]).max(axis=-1)
    is_pair = ~np.eye(len(colours), dtype=bool)
    is_pair[len(PAINT) :, len(PAINT) :] = False  # backgrounds may resemble each other
    assert apart[is_pair].min() >= 30  # shades move each by at most 8


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_as_many_separate_circles_as_the_count_says(count: int, size: str) -> None:
    for seed in range(10):
        scene = Group(Thing("circle", "red"), count, "big" if size == "big" else "small")
        assert _count_blobs(_mask(_pixels(scene, seed), PAINT["red"])) == count


def _count_blobs(mask: Any) -> int:
    """Count 4-connected regions by flooding them one after the other."""
    todo = set(zip(*np.nonzero(mask), strict=True))
    blobs = 0
    while todo:
        blobs += 1
        edge = [todo.pop()]
        while edge:
            y, x = edge.pop()
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in todo:
                    todo.remove(near)
                    edge.append(near)
    return blobs


@pytest.mark.parametrize("name", OBJECTS)
def test_big_things_cover_more_than_twice_the_pixels_of_small_ones(name: str) -> None:
    thing = next(thing for thing in THINGS if thing.object == name and thing.colour == "blue")
    big = [_mask(_pixels(Group(thing, 1, "big"), s), PAINT["blue"]).sum() for s in range(5)]
    small = [_mask(_pixels(Group(thing, 1, "small"), s), PAINT["blue"]).sum() for s in range(5)]
    assert min(big) > 2 * max(small)


@pytest.mark.parametrize("relation", ["left", "right", "above", "below"])
def test_things_lie_where_the_relation_says(relation: str) -> None:
    for seed in range(10):
        scene = Relation(
            Thing("star", "red"),
            next(name for name in OPPOSITE if name == relation),
            Thing("heart", "blue"),
        )
        pixels = _pixels(scene, seed)
        red, blue = (
            np.argwhere(_mask(pixels, PAINT[colour])).mean(axis=0) for colour in ("red", "blue")
        )
        down, right = blue - red  # from the star to the heart
        along = {"left": right, "right": -right, "above": down, "below": -down}[relation]
        across = down if relation in ("left", "right") else right
        assert along > 20
        assert abs(across) < along / 2


@pytest.mark.parametrize("size_px", [32, 64, 224])
def test_pictures_have_the_size_that_was_asked_for(tmp_path: Path, size_px: int) -> None:
    make_scenes(tmp_path, train_pairs=2, test_pairs=2, size_px=size_px)
    assert open_image(ShardReader(tmp_path / "train")[0].image).size == (size_px, size_px)
