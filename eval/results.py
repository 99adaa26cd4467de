"""One result: what one run measured on one task, with what it takes to trust and repeat it.

Not for measuring (tasks.py), nor for showing (table.py, compare.py, result_report.py).
"""

import hashlib
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from m2encoder.errors import DataError
from m2encoder.eval.environment import environment as environment
from m2encoder.eval.metric import Metric
from m2encoder.eval.result_fields import Facts, check_fields, plain

SCHEMA_VERSION = 1
PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9+-]*(?:[/:][a-z0-9][a-z0-9+-]*)*")


@dataclass(frozen=True, eq=False)
class Result:
    """One run on one task. Raises TypeError or ValueError where a field is not what it says."""

    task: str
    """`retrieval`, `zero-shot`, `hard-negatives`, `bilingual`, ..."""
    protocol: Facts
    """{"id", "status": "verified" | "unverified" | "custom", "checksum", "expected", "notes"}."""
    language: str
    """BCP-47 tag; `zh+en` where both are measured together."""
    data: Facts
    """{"path", "images", "texts", "captions_per_image", "skipped": [{"name", "reason"}]}."""
    model: Facts
    """{"name", "fingerprint", "config_hash", "parameters"}."""
    metrics: Mapping[str, Metric]
    preprocessing: Facts = field(default_factory=dict)
    """{"image_size_px", "resize", "text_normalization", "max_text_length", "truncated_texts"}."""
    settings: Facts = field(default_factory=dict)
    """What the user chose: gt, templates, candidates, seed, ..."""
    environment: Facts = field(default_factory=dict)
    """What `eval.environment.environment` returned."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """{"embed", "score", "all"}."""
    details: Facts = field(default_factory=dict)
    """Per class, per kind, examples."""
    contamination: Facts = field(default_factory=lambda: {"checked": False})
    """{"checked", "hits", ...}: whether test pictures were looked for in the training data."""
    ranks: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    """Per query, for comparisons: kept in an .npz beside the JSON."""

    def __post_init__(self) -> None:
        check_fields({each.name: getattr(self, each.name) for each in fields(self)})

    @property
    def name(self) -> str:
        """What `save` calls its files, without a suffix."""
        return result_name(self.task, self.protocol["id"], self.language)

    def to_json(self) -> dict[str, Any]:
        """Return plain values without the ranks; NaN and infinities become None."""
        content = {each.name: getattr(self, each.name) for each in fields(self)}
        del content["ranks"]
        content["metrics"] = {name: asdict(metric) for name, metric in self.metrics.items()}
        return {"schema_version": SCHEMA_VERSION, **plain(content)}

    def save(self, folder: Path, *, name: str | None = None) -> Path:
        """Write NAME.json, and NAME.npz if there are ranks; returns the path of the JSON.

        Each is complete or absent; ranks of another run than the JSON's are noticed by `load`.
        A result of the same name is replaced. Raises DataError if the folder cannot be written.
        """
        name = name or self.name
        path = folder / f"{name}.json"
        content = self.to_json() | {"ranks": None}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.ranks:
                packed = _packed(self.ranks)
                content["ranks"] = f"{name}.npz"
                content["ranks_sha256"] = hashlib.sha256(packed).hexdigest()
                _write(folder / f"{name}.npz", packed)
            text = json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
            # a lone surrogate, as in a file name that is no UTF-8, becomes JSON's own escape
            _write(path, text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(
                f"{path}: cannot be written ({reason}); choose a folder that can"
            ) from None
        return path


def result_name(task: str, protocol: str, language: str) -> str:
    """Return a file name without suffix: short lower-case ASCII, no two results' alike.

    ("retrieval", "flickr30k-cn/5k", "zh") becomes `retrieval__flickr30k-cn_5k__zh`; a part with
    other characters than ids have ends in a hash.
    """
    return "__".join(_safe(part) for part in (task, protocol, language))


def _safe(part: str) -> str:
    if len(part) <= 60 and PLAIN_NAME.fullmatch(part):
        return part.replace("/", "_").replace(":", ".")
    digest = hashlib.sha256(part.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    readable = re.sub("[^a-z0-9+-]+", "-", part.lower())[:40].strip("-+")
    return f"{readable or 'x'}.{digest}"


def load(path: Path, *, with_ranks: bool = True) -> Result:
    """Read what `Result.save` wrote. Raises DataError if it is missing, damaged or newer.

    with_ranks: read the .npz too; off where only the numbers are shown.
    """
    content = _read_json(path)
    if not isinstance(content, dict) or "schema_version" not in content:
        raise DataError(
            f"{path}: no schema_version, expected a result that m2enc eval wrote; check the path"
        )
    version = content["schema_version"]
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise DataError(
            f"{path}: result schema {version}, this version reads up to {SCHEMA_VERSION}; "
            f"upgrade m2encoder"
        )
    if version != SCHEMA_VERSION:
        raise _damaged(path, f"schema_version is {version!r}")
    ranks_name = content.get("ranks")
    known = {each.name for each in fields(Result)} - {"ranks"}
    try:
        given = {name: value for name, value in content.items() if name in known}
        given["metrics"] = {n: _metric(value) for n, value in given["metrics"].items()}
        if ranks_name is not None and Path(ranks_name).name != ranks_name:
            raise ValueError(f"ranks is {ranks_name!r}, expected the name of a file beside it")
        result = Result(**given)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, _reason(error)) from None
    if ranks_name is None or not with_ranks:
        return result
    ranks = _unpacked(path.parent / ranks_name, content.get("ranks_sha256"), path)
    return replace(result, ranks=ranks)


def load_many(paths: Sequence[Path], *, with_ranks: bool = False) -> list[Result]:
    """Read results in the order given, those of a folder by path and of its subfolders too.

    Other JSON files of a folder are passed over. Raises DataError if a result is damaged or a path
    gives none.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        files = [path.with_suffix(".json") if path.suffix == ".npz" else path]  # ranks beside it
        if path.is_dir():
            files = [each for each in sorted(path.rglob("*.json")) if _is_result(each)]
        if not files:
            raise DataError(f"{path}: holds no results, expected some that m2enc eval wrote")
        for each in files:
            found.setdefault(each.resolve(), each)
    return [load(path, with_ranks=with_ranks) for path in found.values()]


def _is_result(path: Path) -> bool:
    content = _read_json(path)
    return isinstance(content, dict) and "schema_version" in content and "task" in content


def _metric(value: Mapping[str, Any]) -> Metric:
    def number(given: Any) -> Any:
        return math.nan if given is None else given

    interval = value.get("ci95")
    return Metric(
        number(value["value"]),
        value["n"],
        None if interval is None else (number(interval[0]), number(interval[1])),
        value.get("tie_low"),
        value.get("tie_high"),
    )


def _read_json(path: Path) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(path.read_bytes().decode("utf-8"), parse_constant=refuse)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, expected a result; check the path") from None
    except OSError as error:
        reason = (error.strerror or "refused").lower()
        raise DataError(f"{path}: cannot be read ({reason}), expected a result; check it") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, _reason(error)) from None


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return " ".join(str(error).removeprefix("Result.__init__() ").split())


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: damaged result ({reason}); evaluate again")


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _packed(ranks: Mapping[str, NDArray[np.generic]]) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, **ranks)
    return stream.getvalue()


def _unpacked(path: Path, sha256: str | None, result: Path) -> dict[str, NDArray[np.generic]]:
    try:
        packed = path.read_bytes()
    except OSError:
        raise DataError(
            f"{path}: missing, expected the ranks of {result.name} beside it; evaluate again"
        ) from None
    if sha256 is not None and hashlib.sha256(packed).hexdigest() != sha256:
        raise DataError(
            f"{path}: damaged or of another run, expected the ranks of {result.name}; "
            f"evaluate again"
        )
    try:
        with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (AttributeError, EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise _damaged(path, _reason(error)) from None
