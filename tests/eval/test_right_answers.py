"""What counts as right: by index, by string, and as the released script has it.

Not for ranks and recalls of the first kind (test_retrieval.py).
"""

import json
from pathlib import Path

import numpy as np
import pytest
from retrieval_cases import as_tuples, true_ranks, true_scores, unit_case

from m2encoder.errors import DataError
from m2encoder.eval.exact_ranks import exact_ranks
from m2encoder.eval.retrieval import RetrievalSettings, measure_retrieval, retrieval_ranks
from m2encoder.eval.right_answers import clean_caption, right_pairs

OFFICIAL = Path(__file__).resolve().parents[1] / "fixtures/official"
RELEASED = Path(__file__).resolve().parents[3] / "shared/data/official"


def matrix(pairs, num_images, num_texts):
    """(I, T) right answers to images, and to texts."""
    for_image, for_text = np.zeros((2, num_images, num_texts), bool)
    for_text[pairs.image, pairs.text] = True
    for_image[pairs.image[pairs.for_image], pairs.text[pairs.for_image]] = True
    return for_image, for_text


def read_annotations(path):
    """Captions and the line that each is on."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    captions = [caption for line in lines for caption in line["caption"]]
    return captions, np.array([i for i, line in enumerate(lines) for _ in line["caption"]])


def released_answers(captions, owner):
    """The description of the released script, in dictionaries; (I, T) for images, for texts."""
    cleaned = [caption.lower().replace("“", '"').replace("”", '"') for caption in captions]
    last = {caption: place for place, caption in enumerate(cleaned)}
    for_image, for_text = np.zeros((2, owner.max() + 1, len(captions)), bool)
    for place, caption in enumerate(cleaned):
        for_image[owner[place], last[caption]] = True
        for_text[[i for i, c in zip(owner, cleaned, strict=True) if c == caption], place] = True
    return for_image, for_text


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A “Red” Cat", 'a "red" cat'),
        ("一隻「紅」貓，“大”的", '一隻「紅」貓，"大"的'),
        ("ＡＢＣ ‘x’", "ａｂｃ ‘x’"),
        ("👩‍👧 OK", "👩‍👧 ok"),
        ("", ""),
        ("É" * 10_000, "é" * 10_000),
    ],
)
def test_a_caption_is_cleaned_as_the_released_script_does(caption, cleaned):
    assert clean_caption(caption) == cleaned


def test_by_index_a_repeated_caption_is_wrong_for_other_images():
    for_image, for_text = matrix(right_pairs([0, 1, 1]), 2, 3)
    assert for_image.tolist() == for_text.tolist() == [[True, False, False], [False, True, True]]


def test_by_string_any_image_of_a_shared_caption_and_any_occurrence_is_right():
    pairs = right_pairs([0, 0, 1, 2], gt="string", texts=["一只猫", "A cat", "a CAT", "狗"])
    for_image, for_text = matrix(pairs, 3, 4)
    assert for_image.tolist() == [
        [True, True, True, False],
        [False, True, True, False],
        [False, False, False, True],
    ]
    assert np.array_equal(for_image, for_text)


def test_as_the_script_has_it_only_the_last_occurrence_is_right_for_an_image():
    pairs = right_pairs([0, 0, 1, 2], gt="m2", texts=["一只猫", "A cat", "a CAT", "狗"])
    for_image, for_text = matrix(pairs, 3, 4)
    assert for_image.tolist() == [
        [True, False, True, False],
        [False, False, True, False],
        [False, False, False, True],
    ]
    assert (
        for_text.tolist()
        == matrix(
            right_pairs([0, 0, 1, 2], gt="string", texts=["一只猫", "A cat", "a cat", "狗"]), 3, 4
        )[1].tolist()
    )


def test_a_caption_repeated_for_one_image_is_one_answer_by_the_script():
    pairs = right_pairs([0, 0], gt="m2", texts=["猫", "猫"])
    assert (pairs.text.tolist(), pairs.for_image.tolist()) == ([0, 1], [False, True])


@pytest.mark.parametrize("gt", ["string", "m2"])
@pytest.mark.parametrize("seed", range(20))
def test_ranks_by_string_equal_brute_force(gt, seed):
    """Equal captions have equal vectors, as an encoder gives them, so the script's rule ties."""
    rng = np.random.default_rng(seed)
    image, kinds, _ = unit_case(seed, 8, 6)
    word, owner = rng.integers(6, size=17), rng.integers(8, size=17)
    texts = [f"“字” {kind}" if place % 2 else f'"字" {kind}' for place, kind in enumerate(word)]
    scores = true_scores(image, kinds[word])
    right = right_pairs(owner, gt=gt, texts=texts)
    for_image, for_text = matrix(right, 8, 17)
    for ranks in (
        retrieval_ranks(image, kinds[word], owner, gt=gt, texts=texts),
        exact_ranks(image, kinds[word], right, tile=(3, 5)),
    ):
        assert as_tuples(ranks.i2t) == true_ranks(scores, for_image)
        assert as_tuples(ranks.t2i) == true_ranks(scores.T, for_text.T)


def test_a_text_may_be_right_for_several_images():
    also = [(0, 2), (0, 0), (1, 2)]  # the second says what the owner says already
    for_image, for_text = matrix(right_pairs([0, 1], also=also), 4, 2)
    assert for_image.tolist() == [[True, False], [False, True], [True, True], [False, False]]
    assert np.array_equal(for_image, for_text)
    by_string, _ = matrix(right_pairs([0, 1], also=also, gt="string", texts=["猫", "猫"]), 4, 2)
    assert by_string.tolist() == [[True, True], [True, True], [True, True], [False, False]]


@pytest.mark.parametrize("seed", range(10))
def test_ranks_with_several_right_images_equal_brute_force(seed):
    image, text, owner = unit_case(seed, 9, 12)
    also = np.random.default_rng(seed).integers((12, 9), size=(7, 2))
    scores = true_scores(image, text)
    right, _ = matrix(right_pairs(owner, also=also), 9, 12)
    found = measure_retrieval(image, text, owner, also=also)
    for direction, expected in (("i2t", true_ranks(scores, right)),
                                ("t2i", true_ranks(scores.T, right.T))):  # fmt: skip
        parts = [found.ranks[f"{direction}_{part}"] for part in ("above", "tied", "right")]
        assert as_tuples(parts) == expected
    assert found.ranks["i2t_image"].tolist() == np.flatnonzero(right.any(axis=1)).tolist()
    assert found.details["images_without_text"] == np.count_nonzero(~right.any(axis=1))


@pytest.mark.parametrize(
    ("also", "error", "message"),
    [
        ([(2, 0)], ValueError, "also names texts that do not exist, expected 0 to 1"),
        ([(0, 0), (1, 2)], DataError, "first is row 1 with image 2, expected 0 to 1"),
    ],
)
def test_further_pairs_of_what_does_not_exist_are_refused(also, error, message):
    with pytest.raises(error, match=message):
        retrieval_ranks(np.eye(2), np.eye(2), [0, 1], also=also)


def test_the_released_scripts_figures_are_reproduced():
    expected = json.loads((OFFICIAL / "retrieval_expected.json").read_text(encoding="utf-8"))
    captions, owner = read_annotations(OFFICIAL / "retrieval_annotations.jsonl")
    assert [clean_caption(caption) for caption in captions] == expected["texts_after_preprocessing"]
    for_image, for_text = matrix(right_pairs(owner, gt="m2", texts=captions), 60, len(captions))
    for right, name in ((for_image, "image_to_text"), (for_text.T, "text_to_image")):
        answers = [np.flatnonzero(row).tolist() for row in right]
        assert answers == [sorted(set(a)) for a in expected[f"{name}_ground_truth"]]
    features = np.load(OFFICIAL / "retrieval_features.npz")
    found = measure_retrieval(
        features["image_feats"],
        features["text_feats"],
        owner,
        texts=captions,
        settings=RetrievalSettings(gt="m2"),
    ).metrics
    shown = {name: round(100 * metric.value, 1) for name, metric in found.items()}
    t2i = [shown[f"t2i_r{k}"] for k in (1, 5, 10)]
    assert t2i == expected["text_to_image_R1_R5_R10"]  # nothing ties
    assert all(found[f"t2i_r{k}"].tie_low is None for k in (1, 5, 10))
    # The script leaves ties to the sort: 10.0/40.0/55.0 to 10.0/41.7/56.7, its mean 35.2 to 35.7.
    bounds = [
        [round(100 * (x if x is not None else found[name].value), 1) for x in ends]
        for name in ("i2t_r1", "i2t_r5", "i2t_r10", "mean_recall")
        for ends in [(found[name].tie_low, found[name].tie_high)]
    ]
    assert bounds == [[10.0, 10.0], [40.0, 41.7], [55.0, 56.7], [35.2, 35.7]]
    printed = [*expected["image_to_text_R1_R5_R10"], expected["mean_recall"]]
    assert all(low <= x <= high for x, (low, high) in zip(printed, bounds, strict=True))


@pytest.mark.skipif(not RELEASED.is_dir(), reason="the released annotations are not beside us")
@pytest.mark.parametrize("name", ["coco-cn_test", "f30k-cn_test", "f30k_caption_karpathy_test"])
def test_the_script_is_reproduced_on_its_own_annotations(name):
    """With random features, so that nothing ties and the whole sort is decided."""
    captions, owner = read_annotations(RELEASED / f"{name}.jsonl")
    image, text, _ = unit_case(11, owner.max() + 1, len(captions), dim=16)
    text = 0.3 * text + image[owner]
    found = measure_retrieval(
        image, text, owner, texts=captions, settings=RetrievalSettings(gt="m2", draws=2)
    ).metrics
    for_image, for_text = released_answers(captions, owner)
    scores = text.astype(np.float64) @ image.astype(np.float64).T
    for direction, sim, right in (("t2i", scores, for_text.T), ("i2t", scores.T, for_image)):
        order = np.argsort(-sim, axis=1)[:, :10]
        hits = np.take_along_axis(right, order, axis=1)
        for k in (1, 5, 10):
            assert found[f"{direction}_r{k}"].value == hits[:, :k].any(axis=1).mean()
            assert found[f"{direction}_r{k}"].tie_low is None


@pytest.mark.parametrize("gt", ["string", "m2"])
def test_captions_are_needed_one_for_each_owner(gt):
    with pytest.raises(ValueError, match="0 texts for 2 owners"):
        retrieval_ranks(np.eye(2), np.eye(2), [0, 1], gt=gt)
