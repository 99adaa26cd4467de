"""`m2enc search` and `m2enc index`: queries of words and pictures, first use, updates, output.

Not for the index itself (test_index*.py).
"""

import csv
import io
import json
import shutil

import numpy as np
import pytest
from indexed import changed_encoder, write_photos
from PIL import Image

from m2encoder.calibration import Calibration, LanguageCalibration
from m2encoder.cli import main
from m2encoder.cli.search import OWN_INDEX, open_for_search, search
from m2encoder.errors import ConfigError, DataError
from m2encoder.index import build_index, index_vectors, read_meta
from m2encoder.index_query import MINUS_WEIGHT, Term, encode_terms, is_picture, read_terms
from m2encoder.model_folder import save_model_folder
from m2encoder.shards import ShardReader


@pytest.fixture(scope="module")
def shards(tiny_shards):
    return tiny_shards / "test"


@pytest.fixture
def photos(shards, tmp_path):
    return write_photos(tmp_path / "照片", shards)


@pytest.fixture
def model_folder(tiny_model_folder):
    return str(tiny_model_folder)


# ── queries ─────────────────────────────────────────────────────────────────────────────────────


def test_terms_are_read_with_their_weights(photos):
    picture = photos / "图 01.png"
    more = {"plus": ["日落", "a red sky^2"], "minus": ["人", "a^0.25"]}
    assert read_terms("雪山", image=picture, **more) == [
        Term("雪山", 1), Term(picture, 1), Term("日落", 1), Term("a red sky", 2),
        Term("人", -MINUS_WEIGHT), Term("a", -0.25),
    ]  # fmt: skip
    assert read_terms("2^3") == [Term("2^3", 1)]  # the query itself is taken as it is
    assert read_terms(plus=[f"{picture}^3"]) == [Term(picture, 3)]


@pytest.mark.parametrize(
    ("terms", "error", "message"),
    [
        ({}, ConfigError, "nothing to search for"),
        ({"minus": ["人"]}, ConfigError, "nothing to search for"),
        ({"query": " "}, DataError, "empty"),
        ({"query": "雪山", "minus": [""]}, DataError, "empty"),
        ({"query": "雪山", "plus": ["没有.jpg^2"]}, DataError, "no such picture"),
    ],
)
def test_terms_that_say_nothing_are_refused(terms, error, message):
    with pytest.raises(error, match=message):
        read_terms(**terms)


def test_a_missing_image_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such picture"):
        read_terms("雪山", image=tmp_path / "none.png")


def test_terms_add_up_to_one_unit_vector(tiny_encoder, photos):
    picture = photos / "图 01.png"
    terms = read_terms("雪山", image=picture, plus=["日落^2"], minus=["人"])
    texts = tiny_encoder.encode_text(["雪山", "日落", "人"])
    total = texts[0] + 2 * texts[1] - MINUS_WEIGHT * texts[2]
    total += tiny_encoder.encode_image(picture)[0]
    expected = total / np.linalg.norm(total)
    # Batches of one: sums in another order.
    np.testing.assert_allclose(encode_terms(tiny_encoder, terms)[0], expected, atol=1e-5)


def test_a_picture_asked_with_is_turned_upright_as_the_indexed_ones_are(
    tiny_encoder, photos, tmp_path
):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(photos / "图 01.png") as picture:
        picture.convert("RGB").save(photos / "turned.png", exif=exif)
    index = build_index(tiny_encoder, photos, tmp_path / "index")
    vector = encode_terms(tiny_encoder, read_terms(str(photos / "turned.png")))
    best = index.search(vector, 1)[0][0]
    assert (best.name, best.score) == ("turned.png", pytest.approx(1, abs=1e-5))


def test_terms_that_cancel_each_other_out_are_refused(tiny_encoder):
    with pytest.raises(DataError, match="cancel each other out"):
        encode_terms(tiny_encoder, [Term("雪山", 1), Term("雪山", -1)])


def test_a_minus_term_lowers_what_is_like_it(tiny_encoder, photos, tmp_path):
    index = build_index(tiny_encoder, photos, tmp_path / "index")
    picture = photos / "图 01.png"

    def rank(**more):
        vector = encode_terms(tiny_encoder, read_terms("一颗星星", **more))
        return [hit.name for hit in index.search(vector, 12)[0]].index("图 01.png")

    ranks = [rank(minus=[f"{picture}^{weight}"]) for weight in (0.2, 1, 5)]
    assert ranks == sorted(ranks)
    assert ranks[-1] == 11
    assert rank(plus=[f"{picture}^5"]) == 0


def test_words_of_any_length_are_no_picture():
    assert not is_picture("雪山日落 🏔️")
    assert not is_picture("word " * 20_000)
    assert not is_picture("nul \0 inside")


@pytest.mark.parametrize(
    ("query", "message"), [("", "empty"), ("  ", "empty"), ("猫.JPG", "no such")]
)
def test_an_empty_query_or_missing_picture_is_refused(query, message):
    with pytest.raises(DataError, match=message):
        is_picture(query)


# ── m2enc search ────────────────────────────────────────────────────────────────────────────────


def test_a_first_search_needs_a_model_and_later_ones_remember_it(photos, model_folder, capsys):
    with pytest.raises(ConfigError, match="--model FOLDER"):
        search(photos, "一颗星星")
    assert search(photos, "一颗星星", model=model_folder, k=3) == 4
    first = capsys.readouterr()
    assert "broken.jpg" in first.err
    assert search(photos, "一颗星星", k=3) == 0
    assert capsys.readouterr().out == first.out
    assert len(first.out.splitlines()) == 3


def test_json_holds_rank_score_path_and_metadata(photos, model_folder, capsys):
    search(photos, str(photos / "图 01.png"), model=model_folder, k=2, json=True)
    found = json.loads(capsys.readouterr().out)
    assert [hit["rank"] for hit in found["hits"]] == [1, 2]
    best = found["hits"][0]
    assert best["path"] == str(photos / "图 01.png")
    assert best["score"] == pytest.approx(1, abs=1e-5)
    assert (best["match"], found["threshold"]) == (None, None)
    assert best["date"][:2] == "20"


def test_csv_and_paths_hold_the_same_pictures(photos, model_folder, capsys):
    search(photos, "一颗星星", model=model_folder, k=4, output="csv")
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    search(photos, "一颗星星", k=4, output="paths")
    paths = capsys.readouterr().out.splitlines()
    assert [row["path"] for row in rows] == paths
    assert all(row["name"] in row["path"] for row in rows)


def test_the_command_line_takes_pictures_plus_minus_and_conditions(photos, model_folder, capsys):
    words = [
        "search",
        str(photos),
        "--image",
        str(photos / "图 01.png"),
        "--plus",
        "星星",
        "红色^0.5",
    ]
    words += ["--minus", "人", "--where", "name GLOB 旅行/*", "size>0", "--k", "9"]
    assert main([*words, "--model", model_folder, "--output", "paths"]) == 4
    paths = capsys.readouterr().out.splitlines()
    assert sorted(paths) == [str(photos / "旅行" / f"图 {i:02d}.png") for i in (0, 3, 6, 9)]
    assert main(["search", str(photos), "星", "--where", "nonsense"]) == 2
    assert "condition 'nonsense'" in capsys.readouterr().err


def test_k_below_one_is_refused(photos):
    with pytest.raises(ConfigError, match="k is 0"):
        search(photos, "星", k=0)


def test_only_what_changed_is_embedded_at_the_next_search(photos, model_folder, shards, caplog):
    open_for_search(photos, model_folder)
    assert open_for_search(photos, None)[2] is False
    (photos / "new.png").write_bytes(ShardReader(shards)[30].image)
    (photos / "图 01.png").unlink()
    shutil.copy(photos / "图 02.png", photos / "copy.png")
    with caplog.at_level("INFO"):
        index, _, is_new = open_for_search(photos, None)
    assert is_new
    assert {"new.png", "copy.png"} < set(index.names)
    assert "图 01.png" not in index.names
    assert "2 added, 1 removed; 1 embedded" in caplog.text


def test_the_index_is_made_again_for_another_model(photos, model_folder, tiny_encoder, tmp_path):
    other = changed_encoder(tiny_encoder)
    save_model_folder(other, tmp_path / "other")
    open_for_search(photos, model_folder)
    index, encoder, is_new = open_for_search(photos, str(tmp_path / "other"))
    assert is_new
    assert index.meta.model_fingerprint == encoder.fingerprint == other.fingerprint


def test_an_index_of_the_first_format_is_made_again_with_its_model(photos, model_folder, capsys):
    (photos / OWN_INDEX).mkdir()
    said = {"format": 1, "model_path": model_folder}
    (photos / OWN_INDEX / "index_meta.json").write_text(json.dumps(said), encoding="utf-8")
    assert search(photos, "一颗星星") == 4
    assert read_meta(photos / OWN_INDEX).format == 2


def test_an_index_folder_is_searched_with_the_model_that_made_it(
    tiny_encoder, shards, tmp_path, capsys
):
    build_index(tiny_encoder, shards, tmp_path / "index").close()
    assert search(tmp_path / "index", "two trees", k=2) == 0
    keys = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert set(keys) <= set(ShardReader(shards).keys)


def test_a_model_that_is_gone_is_named(photos, tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    open_for_search(photos, str(folder))
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="model, which is gone"):
        open_for_search(photos, None)


def test_an_index_that_knows_no_model_asks_for_it(tiny_encoder, tmp_path):
    vectors = np.eye(tiny_encoder.dim, dtype=np.float32)[:2]
    maker = changed_encoder(tiny_encoder)
    index_vectors(maker, vectors, ["a", "b"], tmp_path / "index").close()
    with pytest.raises(ConfigError, match="its index knows no model folder"):
        search(tmp_path / "index", "猫")


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected a folder of pictures or an index"):
        search(tmp_path / "nothing", "猫")


# ── "no match" ──────────────────────────────────────────────────────────────────────────────────


def calibrate(folder, encoder, threshold):
    measured = LanguageCalibration(threshold, 0.9, 0.5, None, 0.8, None, 10, 10)
    languages = {"zh": measured}
    Calibration(encoder.fingerprint, 0.9, "made for this test", languages).save(folder)


def test_hits_below_the_threshold_are_marked(
    photos, tiny_model_folder, tiny_encoder, tmp_path, capsys
):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    open_for_search(photos, str(folder))
    search(photos, "一颗星星", k=3, json=True)
    scores = [hit["score"] for hit in json.loads(capsys.readouterr().out)["hits"]]
    calibrate(folder, tiny_encoder, scores[1])
    assert search(photos, "一颗星星", k=3) == 0
    printed = capsys.readouterr()
    assert [line.endswith("(no match)") for line in printed.out.splitlines()] == [
        False, False, True
    ]  # fmt: skip
    assert "no match" not in printed.err
    calibrate(folder, tiny_encoder, 0.999)
    assert search(photos, "一颗星星", k=3) == 0
    printed = capsys.readouterr()
    assert "no match: every picture scores below 0.999" in printed.err
    assert printed.out.count("(no match)") == 3


@pytest.mark.parametrize("more", [{"plus": ["红色"]}, {"minus": ["人"]}])
def test_nothing_is_marked_where_nobody_measured(
    photos, tiny_model_folder, tiny_encoder, tmp_path, capsys, more
):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    calibrate(folder, tiny_encoder, 0.999)
    open_for_search(photos, str(folder))
    for query, others in (("一颗星星", more), ("a star", {}), (str(photos / "图 01.png"), {})):
        assert search(photos, query, **others) == 0
        printed = capsys.readouterr()
        assert "no match" not in printed.out + printed.err


# ── m2enc index ─────────────────────────────────────────────────────────────────────────────────


def test_index_commands_build_describe_and_change(photos, model_folder, shards, tmp_path, capsys):
    folder = str(tmp_path / "index")
    assert main(["index", model_folder, str(photos), "--out", folder]) == 4
    assert "12 pictures" in capsys.readouterr().out
    (photos / "new.png").write_bytes(ShardReader(shards)[30].image)
    assert main(["index", "info", folder, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["pictures"], facts["is_current"], facts["left_out"]) == (12, False, 1)
    assert main(["index", "update", folder]) == 4
    assert "1 added; 1 embedded" in capsys.readouterr().out
    assert main(["index", "remove", folder, "旅行/*", "new.png"]) == 0
    assert "5 removed" in capsys.readouterr().out
    assert main(["index", "add", folder, str(photos / "旅行"), str(photos / "new.png")]) == 4
    assert "5 added" in capsys.readouterr().out
    assert main(["index", "info", folder]) == 0
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert table["pictures"] == "13"
    assert table["is_current"] == "yes"
    assert table["search"] == "searched exactly"


def test_index_info_shows_the_measured_recall(shards, model_folder, tmp_path, capsys):
    words = ["index", model_folder, str(shards), "--out", str(tmp_path / "i"), "--flat-limit", "9"]
    assert main([*words, "--recall", "0.9"]) == 0
    assert "ivf with" in capsys.readouterr().out
    main(["index", "info", str(tmp_path / "i"), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["recall_at_10"]["pictures"] >= 0.9
    assert facts["recall_queries"] == {"pictures": 40, "words": 32}


def test_index_commands_say_what_is_wrong_in_one_line(photos, model_folder, tmp_path, capsys):
    folder = str(tmp_path / "index")
    for words, code in (
        (["index", "info", folder], 3),
        (["index", "update", folder], 3),
        (["index", "remove", folder, "a"], 3),
        (["index", model_folder, str(photos)], 2),
        (["index", model_folder, str(photos), "--out", folder, "--kind", "annoy"], 2),
        (["index", model_folder, str(photos), "--out", str(photos)], 3),
    ):
        assert main(words) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        assert len(printed.err.splitlines()) == 1
