"""Comparisons say by how much, how surely and on which queries; unlike runs are refused by name."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_results import CUSTOM, FLICKR_CN, made_ranks, made_result

from m2encoder.cli import main
from m2encoder.errors import DataError
from m2encoder.eval.bootstrap import mcnemar, paired_bootstrap, paired_bootstrap_of_groups
from m2encoder.eval.compare import compare, compare_many, first_difference
from m2encoder.eval.compare_text import comparison_markdown, verdict, write_p
from m2encoder.eval.metric import Metric, undefined
from m2encoder.eval.results import Result

DATA = {"path": "x", "images": 2, "texts": 4}


def run(above: Any, tied: Any = 0, **fields: Any) -> Result:
    """Return a run of four captions of two pictures, with the recalls that its ranks give."""
    above = np.asarray(above)
    metrics = {f"t2i_r{k}": Metric(float(np.mean(above < k)), len(above)) for k in (1, 5)}
    ranks = made_ranks("t2i", above, tied) | {"t2i_image": np.asarray([0, 0, 1, 1])}
    known: dict[str, Any] = {"data": DATA, "metrics": metrics, "ranks": ranks}
    return made_result(**{**known, **fields})


A, B = [0, 9, 0, 2], [0, 0, 1, 2]


def change_of(comparison, name):
    return next(each for each in comparison.metrics if each.metric == name)


# --- what is measured ----------------------------------------------------------------------------


def test_differences_wins_and_losses_by_hand():
    found = compare(run(A), run(B))
    first = change_of(found, "t2i_r1")
    assert (first.first, first.second, first.difference, first.n) == (0.5, 0.5, 0.0, 4)
    assert (first.only_first, first.only_second, first.p_value) == (1, 1, 1.0)
    fifth = change_of(found, "t2i_r5")
    assert (fifth.difference, fifth.p_value) == (0.25, None)
    (group,) = found.groups
    assert (group.name, group.better, group.worse, group.same) == ("t2i", 1, 1, 2)
    assert [(c.query, c.first, c.second) for c in group.gains] == [(1, 10.0, 1.0)]
    assert [(c.query, c.first, c.second) for c in group.losses] == [(2, 1.0, 2.0)]


def test_intervals_and_tests_are_those_of_the_bootstrap_clustered_by_picture():
    hits = [(np.asarray(above) == 0).astype(float) for above in (A, B)]
    found = change_of(compare(run(A), run(B), seed=3), "t2i_r1")
    expected = paired_bootstrap(hits[1], hits[0], np.asarray([0, 0, 1, 1]), seed=3)
    assert found.ci95 == expected.ci95
    assert found.p_value == mcnemar(hits[0] == 1, hits[1] == 1).p_value


@pytest.mark.parametrize(
    ("name", "times"), [("mean_recall", 1), ("t2i_mean_recall", 1), ("rsum", 2)]
)
def test_a_mean_or_sum_of_recalls_gets_the_interval_of_its_parts_together(name, times):
    def with_mean(above):
        result = run(above)
        mean = times * float(np.mean([metric.value for metric in result.metrics.values()]))
        return run(above, metrics={**result.metrics, name: Metric(mean, 8)})

    found = change_of(compare(with_mean(A), with_mean(B), seed=5), name)
    assert found.difference == pytest.approx(0.125 * times)
    hits = [[(np.asarray(above) < k) * 1.0 for k in (1, 5)] for above in (A, B)]
    clusters = [np.asarray([0, 0, 1, 1])] * 2
    low, high = paired_bootstrap_of_groups(hits[1], hits[0], clusters, seed=5).ci95 or (0, 0)
    assert found.ci95 == (times * low, times * high)


def test_ties_count_as_their_chance_in_means_and_as_wrong_in_the_test():
    tied = run([0] * 4, [1] * 4, metrics={"t2i_r1": Metric(0.5, 4, None, 0.0, 1.0)})
    sure = run([0] * 4, metrics={"t2i_r1": Metric(1.0, 4)})
    found = change_of(compare(tied, sure), "t2i_r1")
    assert (found.difference, found.only_first, found.only_second) == (0.5, 0, 4)
    assert found.ci95 == (0.5, 0.5)


def test_a_metric_that_its_ranks_do_not_give_has_no_interval():
    odd = {"t2i_r1": Metric(0.9, 4), "top1": Metric(0.5, 4), "gap": Metric(0.1, 4)}
    found = compare(run(A, metrics=odd), run(B, metrics=odd))
    assert [each.ci95 for each in found.metrics] == [None] * 3


def test_classes_are_compared_by_their_ranks():
    def classified(above):
        share = float(np.mean(np.asarray(above) == 0))
        ranks = made_ranks("class", above)
        return made_result(task="zero-shot", metrics={"top1": Metric(share, 3)}, ranks=ranks)

    found = change_of(compare(classified([0, 1, 2]), classified([0, 0, 0])), "top1")
    assert found.difference == pytest.approx(2 / 3)
    assert (found.only_first, found.only_second) == (0, 2)


def test_queries_without_their_picture_are_said_to_stand_alone():
    ranks = {name: array for name, array in run(A).ranks.items() if name != "t2i_image"}
    notes = compare(run(A, ranks=ranks), run(B, ranks=ranks)).notes
    assert any(
        note.startswith("t2i: which picture a query is about was not kept") for note in notes
    )
    assert not any("was not kept" in note for note in compare(run(A), run(B)).notes)


def test_per_class_recall_is_compared_with_every_class_counting_the_same():
    def classified(above):
        ranks = made_ranks("class", above) | {"class_target": np.asarray([4, 4, 4, 7])}
        hits = np.asarray(above) == 0
        metrics = {"mean_per_class_recall": Metric(float((hits[:3].mean() + hits[3]) / 2), 4)}
        return made_result(task="zero-shot", metrics=metrics, ranks=ranks)

    found = change_of(compare(classified([0, 0, 0, 1]), classified([0, 1, 1, 0])),
                      "mean_per_class_recall")  # fmt: skip
    assert found.difference == pytest.approx(1 / 6)
    assert found.ci95 is not None
    assert found.ci95[0] <= 1 / 6 <= found.ci95[1]
    assert found.p_value is None


def test_shares_kept_per_query_are_compared_too():
    def kept(values):
        ranks = {"accuracy_correct": np.asarray(values), "accuracy_cluster": np.arange(3)}
        metrics = {"accuracy": Metric(float(np.mean(values)), 3)}
        return made_result(task="hard-negatives", metrics=metrics, ranks=ranks)

    found = change_of(compare(kept([0.0, 0.5, 1.0]), kept([1.0, 0.5, 1.0])), "accuracy")
    assert found.difference == pytest.approx(1 / 3)
    assert found.ci95 is not None
    assert found.p_value is None  # a half is neither right nor wrong


def test_directions_are_compared_for_each_language():
    def both(above):
        ranks = made_ranks("t2i_zh", above) | {"cluster": np.asarray([0, 0, 1])}
        ranks |= {"overlap_at_5": np.asarray([0.2, 0.4, 0.6])}
        share = float(np.mean(np.asarray(above) == 0))
        metrics = {"t2i_r1_zh": Metric(share, 3), "overlap_at_5": Metric(0.4, 3)}
        return made_result(task="bilingual", language="zh+en", metrics=metrics, ranks=ranks)

    found = compare(both([0, 1, 1]), both([0, 0, 1]))
    assert change_of(found, "t2i_r1_zh").ci95 == pytest.approx((0, 0.5))
    assert change_of(found, "overlap_at_5").ci95 == (0, 0)


def test_what_was_not_measured_stays_so():
    found = compare(run(A, metrics={"t2i_r1": undefined()}), run(B))
    (change,) = found.metrics
    assert np.isnan(change.difference)
    assert "t2i_r5 was measured in one of the runs only" in found.notes
    assert found.to_json()["metrics"][0]["difference"] is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=4, max_size=4))
def test_exchanging_the_runs_turns_every_sign(ranks):
    one, other = (run(list(column)) for column in zip(*ranks, strict=True))
    there, back = compare(one, other), compare(other, one)
    for first, second in zip(there.metrics, back.metrics, strict=True):
        assert first.difference == -second.difference
        assert (first.only_first, first.p_value) == (second.only_second, second.p_value)
    assert there.groups[0].better == back.groups[0].worse


def test_a_run_does_not_differ_from_itself():
    found = compare(run(A), run(A))
    assert {change.difference for change in found.metrics} == {0.0}
    assert found.groups[0].gains == found.groups[0].losses == []
    assert "both runs are of the same model" in found.notes


# --- what is refused -----------------------------------------------------------------------------

OTHER = FLICKR_CN | {"id": "flickr30k-cn/other"}


@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        ({"task": "probe"}, "task is retrieval in the first and probe in the second"),
        ({"language": "en"}, "language is zh in the first and en"),
        ({"protocol": OTHER}, "protocol.id is flickr30k-cn/5k in the first and flickr30k-cn/other"),
        ({"protocol": FLICKR_CN | {"checksum": None}}, "protocol.checksum is c0ffee in .* unset"),
        ({"data": DATA | {"images": 3}}, "data.images is 2 in the first and 3"),
        ({"data": DATA | {"texts": 5}}, "data.texts is 4 in the first and 5"),
        (
            {"data": DATA | {"skipped": [{"name": "坏.jpg", "reason": "x"}]}},
            r"what was left out is nothing in the first and 1 items \(坏.jpg\)",
        ),
        ({"settings": {"gt": "string", "candidates": None, "seed": 0}}, "settings.gt is index"),
        ({"settings": {"gt": "index", "candidates": 9, "seed": 0}}, "candidates is unset in the"),
        (
            {"settings": {"gt": "index", "seed": 0, "templates": ["一张{}"]}},
            "settings.templates is",
        ),
        ({"ranks": made_ranks("t2i", [0] * 5)}, "number of t2i queries is 4 in the first and 5"),
    ],
)
def test_unlike_runs_are_refused_by_name(fields, difference):
    with pytest.raises(DataError, match=f"^unlike runs of retrieval.*: .*{difference}") as caught:
        compare(run(A), run(B, **fields))
    assert "\n" not in str(caught.value)


def test_text_normalization_matters_only_where_equal_texts_are_right():
    plain: dict[str, Any] = {"preprocessing": {"text_normalization": None}}
    assert first_difference(run(A), run(B, **plain)) is None
    note = "text normalization: lower in the first, unset in the second"
    assert note in compare(run(A), run(B, **plain)).notes
    string: dict[str, Any] = {"settings": {"gt": "string"}}
    difference = first_difference(run(A, **string), run(B, **string, **plain))
    assert difference is not None
    assert difference.startswith("preprocessing.text_normalization is lower")


def test_how_a_number_was_computed_does_not_matter():
    given_settings = {"gt": "index", "candidates": None, "seed": 0}
    other = run(B, settings=given_settings | {"batch_size": 7, "device": "cuda"})
    assert first_difference(run(A), other) is None


# --- folders -------------------------------------------------------------------------------------


def test_folders_are_compared_where_both_have_a_result():
    english = {"language": "en", "metrics": {"t2i_r1": Metric(0.5, 4)}}
    found = compare_many([run(A), run(A, **english)], [run(B), run(B, protocol=CUSTOM)])
    assert [each.language for each in found.comparisons] == ["zh"]
    assert found.alone == [
        "first only: retrieval flickr30k-cn/5k en",
        "second only: retrieval custom:0123456789ab zh",
    ]


def test_of_several_runs_the_like_one_is_taken():
    string = run(B, settings={"gt": "string"})
    alike = run(B, settings={"gt": "index", "candidates": None, "seed": 0, "batch_size": 3})
    found = compare_many([run(A)], [string, alike])
    assert len(found.comparisons) == 1
    assert found.alone == ["second only: retrieval flickr30k-cn/5k zh"]
    with pytest.raises(DataError, match=r"settings.candidates is|settings.gt is"):
        compare_many([run(A)], [string, string])


def test_folders_without_anything_in_common_say_so():
    with pytest.raises(DataError, match="nothing to compare: first only: retrieval"):
        compare_many([run(A), run(A, language="en")], [run(B, language="ja")])


# --- how it is shown -----------------------------------------------------------------------------


def test_markdown_names_both_and_shows_signs_and_queries():
    texts = np.asarray(["一只狗，在跑", "a | b", "😀", "长" * 200])
    ranks = run(A).ranks
    first = run(A, ranks={**ranks, "t2i_query": texts}, model={"name": "甲", "fingerprint": "a"})
    text = comparison_markdown(compare_many([first], [run(B)]))
    assert "A: 甲" in text
    assert "B: m2-tiny" in text
    assert "+25.0" in text
    assert "higher for 1 of 4 queries, lower for 1" in text
    assert "- a \\| b: rank 10 → 1" in text
    assert "- 😀: rank 1 → 2" in text
    assert max(map(len, text.splitlines())) < 200


def test_a_verdict_needs_an_interval_without_zero():
    change = change_of(compare(run(A), run(B)), "t2i_r1")
    assert verdict(change._replace(ci95=(0.1, 0.2))) == "better"
    assert verdict(change._replace(ci95=(-0.2, -0.1))) == "worse"
    assert verdict(change._replace(metric="t2i_median_rank", ci95=(0.1, 0.2))) == "worse"
    assert verdict(change._replace(metric="t2i_r1_gap", ci95=(0.1, 0.2))) == ""
    assert verdict(change._replace(ci95=(-0.1, 0.2))) == verdict(change._replace(ci95=None)) == ""
    assert (write_p(0.0), write_p(0.0499), write_p(1.0)) == ("<0.001", "0.050", "1.000")


def test_the_command_prints_markdown_and_strict_json(tmp_path, capsys):
    a, b = run(A).save(tmp_path / "a"), run(B).save(tmp_path / "b")
    assert main(["eval", "compare", str(a), str(b)]) == 0
    assert "| T2I R@5 |" in capsys.readouterr().out
    assert main(["eval", "compare", str(a.parent), str(b.parent), "--json"]) == 0
    content = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    (found,) = content["comparisons"]
    assert [each["metric"] for each in found["metrics"]] == ["t2i_r1", "t2i_r5"]
    assert found["groups"][0]["gains"][0]["query"] == 1


def test_the_command_refuses_unlike_runs_in_one_line(tmp_path, capsys):
    a, b = run(A).save(tmp_path / "a"), run(B, language="en").save(tmp_path / "b")
    assert main(["eval", "compare", str(a), str(b)]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "language is zh in the first and en in the second" in captured.err
