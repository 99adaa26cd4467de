"""Results made by hand, for tests of what reads them: few numbers, easy to check on paper."""

from typing import Any

import numpy as np

from m2encoder.eval.metric import Metric
from m2encoder.eval.results import Result

FLICKR_CN = {
    "id": "flickr30k-cn/5k",
    "status": "verified",
    "checksum": "c0ffee",
    "expected": {"images": 1000, "texts": 5000},
    "notes": ["905 of its 1,000 pictures lie in the English train split"],
}
CUSTOM = {"id": "custom:0123456789ab", "status": "custom", "checksum": "0123456789ab"}


def made_ranks(group: str, above: Any, tied: Any = 0, right: Any = 1) -> dict[str, Any]:
    """Return the arrays of one group of queries."""
    count = len(above)
    columns = {"above": above, "tied": tied, "right": right}
    return {
        f"{group}_{name}": np.broadcast_to(np.asarray(values, np.int64), (count,)).copy()
        for name, values in columns.items()
    }


def made_result(**fields: Any) -> Result:
    """Return a valid result of Chinese retrieval; keywords replace its fields."""
    known: dict[str, Any] = {
        "task": "retrieval",
        "protocol": FLICKR_CN,
        "language": "zh",
        "data": {
            "path": "数据/测试",
            "images": 4,
            "texts": 8,
            "captions_per_image": {"2": 4},
            "skipped": [{"name": "坏.jpg", "reason": "damaged picture"}],
        },
        "model": {"name": "m2-tiny", "fingerprint": "a1" * 32, "config_hash": "b2" * 32}
        | {"parameters": 1_000_000},
        "preprocessing": {"image_size_px": 224, "resize": "squash", "text_normalization": "lower"}
        | {"max_text_length": 52, "truncated_texts": 3},
        "settings": {"gt": "index", "candidates": None, "seed": 0},
        "environment": {"torch": "2.13.0", "device": "cpu", "precision": "float32"},
        "seconds": {"embed": 1.5, "score": 0.25, "all": 1.75},
        "metrics": {
            "t2i_r1": Metric(0.725, 8, (0.7, 0.75)),
            "t2i_r5": Metric(0.924, 8, None, 0.92, 0.93),
            "i2t_r1": Metric(0.879, 4),
            "mean_recall": Metric(0.912, 12),
            "t2i_median_rank": Metric(1.0, 8),
        },
        "details": {"examples": {"t2i": [], "i2t": []}},
        "ranks": made_ranks("t2i", [0, 0, 3, 1, 0, 7, 0, 0]) | made_ranks("i2t", [0, 0, 2, 0]),
    }
    return Result(**known | fields)
