"""What the fields of a result must be, and how their values become plain JSON.

Not for reading and writing them (results.py).
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m2encoder.eval.metric import Metric

Facts = Mapping[str, Any]
"""Values that JSON holds; numpy's numbers and arrays are written as plain ones."""

IMMATERIAL = frozenset(
    {"batch_size", "device", "ks", "num_samples", "on_error", "out", "store", "tile", "workers"}
)
"""Settings that change how a number is computed or shown, but not what it means."""
STATUSES = ("verified", "unverified", "custom")
# Per field: its keys, whether each must be there, and what its value may be besides None where it
# need not be there.
REQUIRED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "protocol": {"id": str, "status": str},
    "data": {"path": str},
    "model": {"name": str, "fingerprint": str},
    "contamination": {"checked": bool},
}
OPTIONAL: dict[str, dict[str, type | tuple[type, ...]]] = {
    "protocol": {"checksum": str, "expected": Mapping, "notes": list},
    "data": {"images": int, "texts": int, "captions_per_image": Mapping, "skipped": list},
    "model": {"config_hash": str, "parameters": int},
    "preprocessing": {"image_size_px": int, "max_text_length": int, "truncated_texts": int},
}
PLAIN_FIELDS = ("protocol", "data", "model", "preprocessing", "settings", "environment", "details")


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError naming the first field that is not what it should be."""
    for name in ("task", "language"):
        _expect(name, fields[name], str)
        if not fields[name].strip():
            raise ValueError(f"{name} is empty, expected a name")
    for name in (*PLAIN_FIELDS, "contamination"):
        _expect(name, fields[name], Mapping)
        _check_plain(name, fields[name])
        for key, kind in REQUIRED.get(name, {}).items():
            if key not in fields[name]:
                raise ValueError(f"{name}.{key} is missing")
            _expect(f"{name}.{key}", fields[name][key], kind)
        for key, kind in OPTIONAL.get(name, {}).items():
            if fields[name].get(key) is not None:
                _expect(f"{name}.{key}", fields[name][key], kind)
    if not fields["protocol"]["id"].strip():
        raise ValueError("protocol.id is empty, expected a name")
    if fields["protocol"]["status"] not in STATUSES:
        found = fields["protocol"]["status"]
        raise ValueError(f"protocol.status is {found!r}, expected one of {', '.join(STATUSES)}")
    _expect("seconds", fields["seconds"], Mapping)
    for name, value in fields["seconds"].items():
        _expect(f"seconds.{name}", value, (int, float))
    _check_metrics(fields["metrics"])
    _check_ranks(fields["ranks"])


def _check_metrics(metrics: Any) -> None:
    _expect("metrics", metrics, Mapping)
    for name, metric in metrics.items():
        _expect(f"metrics.{name}", metric, Metric)
        _expect(f"metrics.{name}.value", metric.value, (int, float))
        _expect(f"metrics.{name}.n", metric.n, int)
        if metric.n < 0:
            raise ValueError(f"metrics.{name}.n is {metric.n}, expected 0 or more")
        if metric.ci95 is not None:
            _expect(f"metrics.{name}.ci95", metric.ci95, (tuple, list))
            if len(metric.ci95) != 2:
                raise ValueError(f"metrics.{name}.ci95 has {len(metric.ci95)} ends, expected 2")
        for key in ("tie_low", "tie_high"):
            if getattr(metric, key) is not None:
                _expect(f"metrics.{name}.{key}", getattr(metric, key), (int, float))
        for end in metric.ci95 or ():
            _expect(f"metrics.{name}.ci95", end, (int, float))


def _check_ranks(ranks: Any) -> None:
    _expect("ranks", ranks, Mapping)
    for name, array in ranks.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError(f"ranks: {name!r} is no name of an array, expected letters and digits")
        _expect(f"ranks.{name}", array, np.ndarray)
        if array.dtype.hasobject:
            raise TypeError(f"ranks.{name} holds Python objects, expected numbers or text")


def _expect(name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    """Raise TypeError if `value` is of another kind; numpy's numbers count as Python's."""
    found = value.item() if isinstance(value, np.generic) else value
    kinds = kind if isinstance(kind, tuple) else (kind,)
    is_bool = isinstance(found, bool)
    if not isinstance(found, kinds) or (is_bool and bool not in kinds):
        wanted = " or ".join(each.__name__ for each in kinds)
        raise TypeError(f"{name} is a {type(value).__name__}, expected {wanted}")


def _check_plain(name: str, value: Any) -> None:
    """Raise TypeError naming the first value that JSON cannot hold."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{name} has the key {key!r}, expected text")
            _check_plain(f"{name}.{key}", each)
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            _check_plain(f"{name}[{i}]", each)
    elif isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufU":
            raise TypeError(f"{name} is an array of {value.dtype}, expected numbers or text")
    elif not isinstance(value, str | int | float | bool | None | np.generic | os.PathLike):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a value that JSON holds")


def plain(value: Any) -> Any:
    """Return the value as JSON holds it: NaN and infinities as None, paths as text."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value
