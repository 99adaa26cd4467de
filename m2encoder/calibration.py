"""From which score on a picture fits a text: a threshold per language, kept beside the model.

Lies as `calibration.json` in the model folder and changes neither weights nor fingerprint. Not for
measuring it (eval/calibrate.py).
"""

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, DataError

logger = logging.getLogger(__name__)

CALIBRATION = "calibration.json"
FORMAT = 1


@dataclass(frozen=True)
class LanguageCalibration:
    """What was measured with the queries of one language."""

    threshold: float | None
    """The lowest cosine from which on matches have the precision asked for; None: no cosine has."""
    precision: float
    """Share of matches among all pairs from `threshold` on. Without one: the best that any cosine
    reached."""
    recall: float
    """Share of matches from there on."""
    precision_held_out: float | None
    """The same precision with the threshold chosen on other pictures; None if none was found."""
    auroc: float
    """How surely the best score tells queries whose picture is there from those whose is not."""
    auroc_ci95: tuple[float, float] | None
    n: int
    """Queries: each gives one match and one best wrong picture."""
    pictures: int
    """Pictures that each query was compared with. Among many more, wrong ones score higher."""


@dataclass(frozen=True)
class Calibration:
    """When to say that nothing fits. One match to one miss is assumed, as it was measured."""

    fingerprint: str
    """Of the model that it was measured with."""
    precision: float
    """What was asked for, 0..1."""
    data: str
    """The data that it was measured on."""
    languages: Mapping[str, LanguageCalibration]
    """By BCP-47 tag of the query."""

    def __post_init__(self) -> None:
        if not 0 < self.precision <= 1:
            raise ValueError(f"precision is {self.precision}, expected more than 0, at most 1")
        for language, found in self.languages.items():
            if found.threshold is not None and not math.isfinite(found.threshold):
                raise ValueError(f"the {language} threshold is {found.threshold}")

    def threshold(self, language: str) -> float | None:
        """Return the cosine from which on a picture fits; None where none was found or measured."""
        found = self.languages.get(language)
        return None if found is None else found.threshold

    def is_match(self, score: float, language: str) -> bool | None:
        """Say whether a picture with this cosine fits a query in `language`; None: not known."""
        threshold = self.threshold(language)
        return None if threshold is None else bool(score >= threshold)

    def save(self, folder: Path) -> Path:
        """Write `folder/calibration.json`, complete or not at all; returns its path.

        Raises DataError if it cannot be written.
        """
        path = folder / CALIBRATION
        temporary = path.with_name(CALIBRATION + ".tmp")
        content = {"format": FORMAT, **asdict(self)}
        try:
            temporary.write_text(
                json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n",
                encoding="utf-8",
            )
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            reason = error.strerror or str(error)
            raise DataError(f"{path}: cannot be written ({reason}); check the folder") from None
        return path


def read_calibration(folder: Path) -> Calibration | None:
    """Read `folder/calibration.json`; None if there is none.

    Raises CheckpointError if it is damaged or was written by a newer version.
    """
    path = folder / CALIBRATION
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    if isinstance(content, dict) and content.get("format") not in (None, FORMAT):
        raise CheckpointError(
            f"{path}: format {content['format']!r}, this version reads {FORMAT}; upgrade "
            f"m2encoder, or calibrate again with m2enc eval calibrate"
        )
    try:
        languages = {
            str(language): _language(found) for language, found in content["languages"].items()
        }
        return Calibration(
            str(content["fingerprint"]),
            float(content["precision"]),
            str(content["data"]),
            languages,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def load_calibration(encoder: Encoder) -> Calibration | None:
    """Return the calibration beside the model; None without one, or where it is another model's.

    Warns in the second case: weights, tokenizer or preprocessing have changed since.
    Raises CheckpointError if the file is damaged.
    """
    found = read_calibration(encoder.folder) if encoder.folder is not None else None
    if found is not None and found.fingerprint != encoder.fingerprint:
        logger.warning(
            "%s: %s is another model's or of other settings, so it is not used; calibrate again "
            "with m2enc eval calibrate",
            encoder.name,
            CALIBRATION,
        )
        return None
    return found


def keep_calibration(encoder: Encoder, folder: Path) -> None:
    """Write the encoder's calibration into a new folder of the same model.

    One that weights, tokenizer or settings have outgrown stays behind, as does a damaged one, of
    which a warning tells.
    """
    try:
        found = read_calibration(encoder.folder) if encoder.folder is not None else None
    except CheckpointError as error:
        logger.warning("%s", error)
        return
    if found is not None and found.fingerprint == encoder.fingerprint:
        found.save(folder)


def _language(found: dict[str, Any]) -> LanguageCalibration:
    known = {each.name for each in fields(LanguageCalibration)}
    given = {name: value for name, value in found.items() if name in known}
    for name, value in given.items():
        may_lack = name in ("threshold", "precision_held_out", "auroc_ci95")
        numbers = value if name == "auroc_ci95" and value is not None else [value]
        if not all(
            (isinstance(each, int | float) and not isinstance(each, bool))
            or (each is None and may_lack)
            for each in numbers
        ):
            raise TypeError(f"{name} is {value!r}")
    interval = given.get("auroc_ci95")
    given["auroc_ci95"] = None if interval is None else (interval[0], interval[1])
    return LanguageCalibration(**given)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return CheckpointError(
        f"{path}: damaged ({missing}); calibrate again with m2enc eval calibrate, or delete it"
    )
