"""Whole tasks through the command line: data, protocol, model in; a result that says what it is."""

import json
from typing import Any

import pytest
from made_pictures import picture, put_lines, put_pictures

from m2encoder.cli.contamination import contamination
from m2encoder.cli.evaluate import retrieval, zero_shot
from m2encoder.distributed import World
from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.datasets import read_retrieval
from m2encoder.eval.results import load_many
from m2encoder.eval.retrieval import measure_retrieval
from m2encoder.eval.tasks import Running, drawn_candidates, run_retrieval
from m2encoder.load import load_model

TEXTS = ["一只红色的猫", "龍貓在樹下", "ＡＢＣ，。", "a red cat 🐈", "long " * 200, "一只红色的猫"]
PICTURES = [f"p{i}.png" for i in range(5)]


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return str(tiny_model_folder)


@pytest.fixture
def captions(tmp_path):
    """Five pictures; the first has two captions, the last none of its own kind twice."""
    put_pictures(tmp_path, PICTURES)
    lines = [
        {"image": PICTURES[0], "captions": TEXTS[:2], "lang": "zh"},
        *({"image": PICTURES[i], "captions": [TEXTS[i + 1]], "lang": "zh"} for i in range(1, 5)),
    ]
    return put_lines(tmp_path / "captions.jsonl", lines)


def one_result(folder):
    [result] = load_many([folder], with_ranks=True)
    return result


def test_a_file_of_captions_becomes_a_result(model, captions, tmp_path, capsys):
    out = tmp_path / "results"
    assert retrieval(model, captions, out=out) == 0
    result = one_result(out)
    encoder = load_model(model, device="cpu")
    image = encoder.encode_image([tmp_path / name for name in PICTURES])
    expected = measure_retrieval(image, encoder.encode_text(TEXTS), [0, 0, 1, 2, 3, 4])
    for name, metric in expected.metrics.items():
        assert result.metrics[name].value == pytest.approx(metric.value, abs=1e-6), name
    assert (result.task, result.language, result.protocol["status"]) == (
        "retrieval", "zh", "custom",
    )  # fmt: skip
    assert result.data["captions_per_image"] == {"1": 4, "2": 1}
    assert result.preprocessing["truncated_texts"] == 1
    assert result.model["fingerprint"] == encoder.fingerprint
    assert result.contamination == {"checked": False}
    assert set(result.details["examples"]) == {"t2i", "i2t"}
    assert "R@1" in capsys.readouterr().out


def test_an_unreadable_picture_stops_or_is_left_out_with_its_captions(
    model, captions, tmp_path, capsys
):
    (tmp_path / PICTURES[0]).write_bytes(picture(0)[:30])
    with pytest.raises(DataError, match=r"p0\.png: "):
        retrieval(model, captions)
    out = tmp_path / "results"
    assert retrieval(model, captions, on_error="skip", out=out) == 4
    assert "p0.png" in capsys.readouterr().err
    result = one_result(out)
    assert (result.data["images"], result.data["texts"]) == (4, 4)
    assert result.data["captions_per_image"] == {"1": 4}


def test_equal_captions_count_by_string_where_asked(model, captions, tmp_path):
    found = {}
    modes: tuple[Any, ...] = ("index", "string", "m2")
    for gt in modes:
        assert retrieval(model, captions, gt=gt, out=tmp_path / gt) == 0
        result = one_result(tmp_path / gt)
        assert result.settings["gt"] == gt
        found[gt] = result.metrics["t2i_r1"].value
    assert found["index"] < found["string"] == found["m2"]


def test_one_caption_of_flickr_is_refused_by_name(model, tmp_path):
    """The fault of the published English figures, in small: the counts of the protocol are not
    there."""
    put_pictures(tmp_path, PICTURES)
    path = put_lines(
        tmp_path / "f30k.jsonl",
        [{"image": name, "caption": ["A man."]} for name in PICTURES],
    )
    with pytest.raises(DataError, match="flickr30k/5k: ") as refusal:
        retrieval(model, path, protocol="flickr30k/5k")
    assert "\n" not in str(refusal.value)


def test_another_language_than_the_protocols_is_refused(model, captions):
    with pytest.raises(ConfigError, match="is measured in en, not in zh"):
        retrieval(model, captions, protocol="flickr30k/5k", language="zh")


def test_a_text_with_several_right_pictures_hits_any_of_them(model, tmp_path):
    """MUGE's layout: a query names the ids of all its products."""
    import base64

    rows = [f"{i}\t{base64.b64encode(picture(40 * i)).decode()}" for i in range(4)]
    (tmp_path / "valid_imgs.tsv").write_text("\n".join(rows) + "\n")
    put_lines(
        tmp_path / "valid_texts.jsonl",
        [
            {"text_id": 0, "text": "红色连衣裙", "image_ids": [0, 1, 2, 3]},
            {"text_id": 1, "text": "龍貓", "image_ids": [3]},
        ],
    )
    assert retrieval(model, tmp_path, protocol="muge/valid", out=tmp_path / "out") == 0
    result = one_result(tmp_path / "out")
    assert result.ranks["t2i_above"][0] == 0  # whatever comes first is right
    assert not any(name.startswith("i2t") for name in result.metrics)
    assert result.protocol["status"] == "unverified"


def test_candidates_are_drawn_by_the_seed_and_make_another_data_set(captions):
    data = read_retrieval(captions)
    some = drawn_candidates(data, 3, seed=1)
    assert len(some.pictures) == 3
    assert some.protocol.id != data.protocol.id
    names = [some.pictures.name(row) for row in some.owner]
    whole = {(data.pictures.name(o), t) for o, t in zip(data.owner, data.texts, strict=True)}
    assert set(zip(names, some.texts, strict=True)) <= whole
    assert any("3 of 5 pictures, drawn by seed 1" in note for note in some.protocol.notes)


def test_a_result_says_what_was_found_of_its_data_in_training(model, tiny_shards, tmp_path):
    test = tiny_shards / "test"
    train = [tiny_shards / "train", test]  # of which the second is the test set itself
    assert contamination(train=train, test=test, out=tmp_path / "found") == 0
    [checked] = (tmp_path / "found").glob("*.json")
    out = tmp_path / "results"
    assert retrieval(model, test, contamination=checked, out=out) == 0
    for result in load_many([out]):
        assert result.contamination["checked"] is True
        assert result.contamination["hits"] == result.data["images"]
    with pytest.raises(DataError, match="was checked, but"):
        retrieval(model, tiny_shards / "val", contamination=checked)


def ranks_of_rank(rank, world_size, model, path):
    running = Running(world=World(rank, world_size), batch_size=2)
    result = run_retrieval(load_model(model, device="cpu"), read_retrieval(path), running=running)
    return {name: array.tolist() for name, array in result.ranks.items()}


def test_two_processes_find_what_one_finds(gloo, model, captions):
    alone = ranks_of_rank(0, 1, model, captions)
    assert gloo(2).run(ranks_of_rank, model, captions) == [alone] * 2


def test_a_text_tower_that_has_collapsed_scores_chance_with_bounds(model, tmp_path):
    encoder = load_model(model, device="cpu")
    text = encoder.model.text
    text.token_embed.weight.data[:] = text.token_embed.weight.data[:1]  # all words are one
    text.positions.data.zero_()
    words = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    lengths = [len(ids) for ids in encoder.tokenizer(words)["input_ids"]]
    same = [word for word, n in zip(words, lengths, strict=True) if n == lengths[0]][:5]
    assert len(same) == 5
    put_pictures(tmp_path, PICTURES)
    lines = [
        {"image": name, "captions": [word], "lang": "en"}
        for name, word in zip(PICTURES, same, strict=True)
    ]
    data = read_retrieval(put_lines(tmp_path / "words.jsonl", lines))
    metrics = run_retrieval(encoder, data, running=Running()).metrics
    found = metrics["i2t_r1"]
    assert (found.tie_low, found.tie_high) == (0, 1)
    assert found.value == pytest.approx(1 / 5)
    assert metrics["t2i_r1"].value == pytest.approx(1 / 5)  # all ask for the same picture


def test_classes_and_pictures_of_another_count_are_refused(model, tmp_path):
    for label in ("plane", "car"):
        put_pictures(tmp_path / label, ["a.png", "b.png"])
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"names": ["飞机", "汽车"], "templates": ["一张{}的照片"]}))
    options: dict[str, Any] = {"protocol": "cifar10/zh", "classes": str(names)}
    with pytest.raises(DataError, match="cifar10/zh: "):
        zero_shot(model, tmp_path, **options)
