"""Metrics are called, ordered and written as people write them."""

import pytest

from m2encoder.eval.metric import Metric
from m2encoder.eval.metric_names import label, ordered, write_interval, write_value


@pytest.mark.parametrize(
    ("name", "value", "shown", "text"),
    [
        ("t2i_r1", 0.7251, "T2I R@1", "72.5"),
        ("i2t_r10", 1.0, "I2T R@10", "100.0"),
        ("t2i_median_rank", 1.5, "T2I median rank", "1.5"),
        ("t2i_median_rank", 5.0, "T2I median rank", "5"),
        ("top5", 0.999, "top-5", "99.9"),
        ("rank_correlation", -0.25, "rank correlation", "-0.250"),
        ("threshold", 0.21345, "threshold", "0.213"),
        ("no_match_auroc", 0.9, "no match AUROC", "90.0"),
        ("zh_to_en_r1", 0.5, "zh→en R@1", "50.0"),
        ("overlap_at_5", 0.5, "overlap@5", "50.0"),
        ("accuracy_count", 0.53, "accuracy count", "53.0"),
        ("cosine_offset", -0.0123, "cosine offset", "-0.012"),
    ],
)
def test_metrics_are_written_as_people_write_them(name, value, shown, text):
    assert (label(name), write_value(name, value)) == (shown, text)


def test_recalls_come_in_rising_order():
    assert ordered(["t2i_r10", "mean_recall", "t2i_r5", "i2t_r1", "t2i_r1", "zeta", "alpha"]) == [
        *("t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "mean_recall", "alpha", "zeta")
    ]


def test_signs_and_what_is_not_finite():
    assert write_value("top1", -0.00001, signed=True) == "0.0"
    assert write_value("top1", 0.01, signed=True) == "+1.0"
    assert write_value("t2i_r1_gap", 0.01) == "+1.0"
    assert write_interval("t2i_r1_gap", Metric(0.5, 2, (0.25, 0.75))) == "±25.0"
    assert write_value("top1", float("nan")) == "–"
    assert write_interval("top1", Metric(0.5, 2, (float("nan"), 0.5))) == ""
