"""A result says the same after writing and reading, and nothing damaged passes for one."""

import json
import math
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_results import FLICKR_CN, made_result

from m2encoder import __version__
from m2encoder.errors import DataError
from m2encoder.eval.metric import Metric, undefined
from m2encoder.eval.results import environment, load, load_many, result_name

numbers = st.floats(allow_nan=True, allow_infinity=False)
metrics = st.builds(
    Metric,
    numbers,
    st.integers(0, 10**9),
    st.none() | st.tuples(numbers, numbers),
    st.none() | st.floats(0, 1),
    st.none() | st.floats(0, 1),
)
texts = st.text(max_size=20) | st.sampled_from(
    ["", "测试，全角", "繁體", "😀", "a" * 10_000, "\ud800"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda each: st.lists(each, max_size=3) | st.dictionaries(texts, each, max_size=3),
    max_leaves=8,
)


def same(found, expected):
    return json.dumps(found.to_json(), sort_keys=True) == json.dumps(
        expected.to_json(), sort_keys=True
    )


@settings(max_examples=60, deadline=None)
@given(
    found=st.dictionaries(texts, metrics, max_size=4),
    details=st.dictionaries(texts, values, max_size=4),
    language=st.sampled_from(["zh", "en", "zh+en", "zh-Hant"]),
    ranks=st.lists(st.integers(0, 2**62), max_size=5),
)
def test_what_is_written_reads_the_same(tmp_path_factory, found, details, language, ranks):
    result = made_result(
        metrics=found,
        details=details,
        language=language,
        ranks={"t2i_above": np.asarray(ranks, np.int64), "名": np.asarray(["狗", "a dog"])},
    )
    again = load(result.save(tmp_path_factory.mktemp("results")))
    assert same(again, result)
    assert again.ranks.keys() == result.ranks.keys()
    for name, array in result.ranks.items():
        np.testing.assert_array_equal(again.ranks[name], array)
        assert again.ranks[name].dtype == array.dtype


def test_nan_is_null_in_strict_json_and_nan_again_when_read(tmp_path):
    result = made_result(
        metrics={"top1": undefined(), "top5": Metric(0.5, 2, (math.nan, math.nan))},
        details={"worst": [math.nan, math.inf, np.float32("nan"), np.arange(2)]},
    )
    path = result.save(tmp_path)
    content = json.loads(path.read_text("utf-8"), parse_constant=pytest.fail)
    assert content["metrics"]["top1"] == asdict(undefined()) | {"value": None}
    assert content["details"]["worst"] == [None, None, None, [0, 1]]
    again = load(path)
    assert math.isnan(again.metrics["top1"].value)
    assert again.metrics["top5"].ci95 is not None
    assert all(math.isnan(end) for end in again.metrics["top5"].ci95)


def test_chinese_is_readable_and_schema_and_ranks_are_named(tmp_path):
    path = made_result().save(tmp_path)
    text = path.read_bytes().decode("utf-8")
    assert "数据/测试" in text
    content = json.loads(text)
    assert content["schema_version"] == 1
    assert content["ranks"] == path.with_suffix(".npz").name
    assert {each.name for each in tmp_path.iterdir()} == {path.name, content["ranks"]}


def test_numpy_numbers_are_written_as_plain_ones(tmp_path):
    result = made_result(
        metrics={"top1": Metric(cast(Any, np.float32(0.5)), cast(Any, np.int64(3)))},
        details={"n": np.int64(3), "ok": np.bool_(True), "ks": (1, 5)},
    )
    content = json.loads(result.save(tmp_path).read_text("utf-8"))
    assert content["details"] == {"n": 3, "ok": True, "ks": [1, 5]}
    assert content["metrics"]["top1"] == asdict(Metric(0.5, 3)) | {"ci95": None}


def test_without_ranks_there_is_one_file(tmp_path):
    path = made_result(ranks={}).save(tmp_path / "new" / "folder")
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert load(path).ranks == {}


def test_the_same_run_gives_the_same_bytes(tmp_path):
    paths = [made_result().save(tmp_path / name) for name in "ab"]
    for suffix in (".json", ".npz"):
        first, second = (path.with_suffix(suffix).read_bytes() for path in paths)
        assert first == second


# --- names ---------------------------------------------------------------------------------------


def test_a_name_says_task_protocol_and_language():
    assert result_name("retrieval", "flickr30k-cn/5k", "zh") == "retrieval__flickr30k-cn_5k__zh"
    assert result_name("probe", "custom:0123456789ab", "en") == "probe__custom.0123456789ab__en"


@given(st.text(min_size=1, max_size=80), st.text(min_size=1, max_size=80))
def test_names_are_safe_everywhere_and_differ_where_ids_do(one, other):
    names = [result_name("retrieval", each, "zh-Hant") for each in (one, other)]
    for name in names:
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._+-")
        assert len(name) < 200
    assert (names[0].lower() == names[1].lower()) == (one == other)


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    return made_result().save(tmp_path)


def rewrite(path, change):
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("task"), r"missing 1 required positional argument: 'task'"),
        (lambda c: c.update(task=""), "task is empty"),
        (lambda c: c.update(language=3), "language is a int, expected str"),
        (lambda c: c["protocol"].pop("id"), "protocol.id is missing"),
        (lambda c: c["protocol"].update(status="fine"), "protocol.status is 'fine'"),
        (lambda c: c["data"].update(images="4"), "data.images is a str, expected int"),
        (lambda c: c["model"].update(fingerprint=None), "model.fingerprint is a NoneType"),
        (lambda c: c["metrics"]["t2i_r1"].pop("n"), "n is missing"),
        (lambda c: c["metrics"]["t2i_r1"].update(n=True), "n is a bool, expected int"),
        (lambda c: c["metrics"]["t2i_r1"].update(value="x"), "value is a str"),
        (lambda c: c["metrics"]["t2i_r1"].update(ci95=3), "not subscriptable"),
        (lambda c: c["contamination"].update(checked="no"), "contamination.checked is a str"),
        (lambda c: c.update(ranks="../secret.npz"), "expected the name of a file beside it"),
        (lambda c: c.update(schema_version="1"), "schema_version is '1'"),
    ],
)
def test_a_field_that_is_not_what_it_should_be_is_named(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(DataError, match=message) as caught:
        load(saved)
    assert str(caught.value).startswith(f"{saved}: damaged result (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_json_is_damaged(saved, content):
    saved.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged result \(") as caught:
        load(saved)
    assert "\n" not in str(caught.value)


def test_cut_off_results_are_damaged(saved):
    whole = saved.read_bytes()
    for size in range(0, len(whole) - 2, 97):
        saved.write_bytes(whole[:size])
        with pytest.raises(DataError, match="damaged result"):
            load(saved)


def test_other_json_newer_schemas_and_missing_files_say_so(saved, tmp_path):
    rewrite(saved, lambda content: content.update(schema_version=2))
    with pytest.raises(DataError, match="schema 2, this version reads up to 1; upgrade m2encoder"):
        load(saved)
    saved.write_text('{"format": 1}', "utf-8")
    with pytest.raises(DataError, match="no schema_version, expected a result"):
        load(saved)
    with pytest.raises(DataError, match=r"nothing\.json: no such file"):
        load(tmp_path / "nothing.json")
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path)


def test_ranks_that_are_missing_damaged_or_of_another_run_are_refused(saved):
    ranks = saved.with_suffix(".npz")
    other = made_result(ranks={"t2i_above": np.zeros(3, np.int64)}).save(saved.parent / "other")
    ranks.write_bytes(other.with_suffix(".npz").read_bytes())
    with pytest.raises(DataError, match="of another run, expected the ranks of"):
        load(saved)
    ranks.write_bytes(ranks.read_bytes()[:-10])
    with pytest.raises(DataError, match="damaged or of another run"):
        load(saved)
    ranks.unlink()
    with pytest.raises(DataError, match="missing, expected the ranks of"):
        load(saved)
    assert load(saved, with_ranks=False).ranks == {}


def test_ranks_never_run_code(saved, tmp_path):
    ranks = saved.with_suffix(".npz")
    np.savez(ranks, t2i_above=np.asarray([{}], dtype=object))
    rewrite(saved, lambda content: content.pop("ranks_sha256"))
    with pytest.raises(DataError, match="damaged result"):
        load(saved)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": {"t2i_r1": 0.5}}, "metrics.t2i_r1 is a float, expected Metric"),
        ({"metrics": {"t2i_r1": Metric(0.5, -1)}}, "n is -1"),
        ({"details": {"a": {"b": [object()]}}}, r"details.a.b\[0\] is a object"),
        ({"details": {1: 2}}, "details has the key 1"),
        ({"ranks": {"a/b": np.zeros(2)}}, "'a/b' is no name"),
        ({"ranks": {"a": [1]}}, "ranks.a is a list"),
        ({"ranks": {"a": np.asarray([None])}}, "Python objects"),
        ({"protocol": FLICKR_CN | {"id": " "}}, "protocol.id is empty"),
        ({"seconds": {"all": "long"}}, "seconds.all is a str"),
    ],
)
def test_a_result_cannot_be_made_of_anything_else(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        made_result(**fields)


def test_a_place_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        made_result().save(tmp_path / "file")


# --- many ----------------------------------------------------------------------------------------


def test_a_folder_gives_its_results_once_and_passes_over_other_files(tmp_path):
    zh = made_result().save(tmp_path / "b")
    en = made_result(language="en").save(tmp_path / "a")
    (tmp_path / "calibration.json").write_text('{"threshold": 0.2}', "utf-8")
    found = load_many([zh, tmp_path / "a" / ".." / "b" / zh.name, tmp_path])
    assert [result.language for result in found] == ["zh", "en"]
    assert [result.language for result in load_many([tmp_path])] == ["en", "zh"]
    en.write_text("{", "utf-8")
    with pytest.raises(DataError, match="damaged result"):
        load_many([tmp_path])


def test_a_folder_without_results_says_so(tmp_path):
    with pytest.raises(DataError, match="holds no results"):
        load_many([tmp_path])


# --- where it was measured -----------------------------------------------------------------------


def test_the_environment_has_versions_but_no_names_of_hosts_or_users():
    import getpass
    import platform

    found = environment(device="cpu", precision="float32")
    assert " ".join(found) == "m2encoder python torch numpy faiss device precision machine"
    assert found["m2encoder"] == __version__
    assert found["numpy"] == np.__version__
    words = " ".join(map(str, found.values())).split()
    assert platform.node() not in words
    assert getpass.getuser() not in words
    assert made_result(environment=found).to_json()["environment"] == found
