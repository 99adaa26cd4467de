"""SugarCrepe and Winoground: read their files as released, and score what a model prefers.

From local files and a folder of pictures; nothing is downloaded. Not for captions made wrong by
our own rules (hard_negatives.py).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from m2encoder.embed import embed_pictures
from m2encoder.encoder import BadItem, Encoder, OnError, language_of
from m2encoder.errors import DataError
from m2encoder.eval.bootstrap import DRAWS
from m2encoder.eval.means import mean_metric
from m2encoder.eval.metric import Metric, TaskOutput
from m2encoder.eval.scores import check_vectors, paired_scores
from m2encoder.images import IMAGE_SUFFIXES
from m2encoder.pictures import FilePictures

Format = Literal["sugarcrepe", "winoground"]
CHANCE = {
    "sugarcrepe": {"accuracy": 1 / 2},
    "winoground": {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6},
}


@dataclass(frozen=True)
class FineGrained:
    """Items of one file. Row i of every tuple belongs together."""

    format: Format
    names: tuple[str, ...]
    kinds: tuple[tuple[str, ...], ...]
    """The category or the tags of each item; an item counts for each of them."""
    pictures: tuple[tuple[str, ...], ...]
    """Names below the picture folder: one per item, two in Winoground."""
    captions: tuple[tuple[str, str], ...]
    """SugarCrepe: the right and the wrong one. Winoground: that of the first and of the second."""

    @property
    def language(self) -> str:
        """The language of most captions, `zh` or `en`."""
        chinese = sum(language_of(text) == "zh" for own in self.captions for text in own)
        return "zh" if chinese > len(self.captions) else "en"

    def content(self) -> bytes:
        """Return what a checksum is made of: all of it, whatever file it came in."""
        return json.dumps(asdict(self), ensure_ascii=False).encode("utf-8", "surrogatepass")


def read_fine_grained(path: Path) -> FineGrained:
    """Read a SugarCrepe file or folder, or Winoground's examples, told apart by their fields.

    SugarCrepe: {"0": {"filename", "caption", "negative_caption"}, ...}, one file per category,
    whose name is the category; a folder is all of its JSON files.
    Winoground: JSON lines, or a JSON list, of {"id", "image_0", "image_1", "caption_0",
    "caption_1", "tag", ...}.
    Raises DataError if it is missing, empty, damaged or of neither format.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: holds no .json, expected SugarCrepe's categories; check the path")
    parts = [_read_file(file) for file in files]
    if len({part.format for part in parts}) > 1:
        raise DataError(f"{path}: holds files of two formats; keep each in a folder of its own")
    joined = (sum((getattr(p, name) for p in parts), ()) for name in _COLUMNS)
    return FineGrained(parts[0].format, *joined)


_COLUMNS = ("names", "kinds", "pictures", "captions")


def _read_file(path: Path) -> FineGrained:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = (error.strerror or "refused").lower()
        raise DataError(
            f"{path}: cannot be read ({reason}), expected SugarCrepe or Winoground; check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start:,}; convert it") from None
    try:
        try:
            content = json.loads(text)
        except ValueError:
            content = [json.loads(line) for line in text.split("\n") if line.strip()]
        if isinstance(content, dict) and "caption_0" in content:
            content = [content]  # JSON lines of one line
        if isinstance(content, dict):
            found = _read_sugarcrepe(content, path.stem)
        else:
            found = _read_winoground(content)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{path}: neither SugarCrepe nor Winoground ({missing}); check the file"
        ) from None
    if not found.names:
        raise DataError(f"{path}: holds no items, expected at least one; check the file")
    return found


def _read_sugarcrepe(content: dict[str, Any], category: str) -> FineGrained:
    items = list(content.items())
    return FineGrained(
        "sugarcrepe",
        tuple(f"{category}/{key}" for key, _ in items),
        tuple((category,) for _ in items),
        tuple((_text(item, "filename"),) for _, item in items),
        tuple((_text(item, "caption"), _text(item, "negative_caption")) for _, item in items),
    )


def _read_winoground(content: list[dict[str, Any]]) -> FineGrained:
    tags = [
        [item.get("tag"), item.get("secondary_tag"), item.get("collapsed_tag")] for item in content
    ]
    return FineGrained(
        "winoground",
        tuple(str(item.get("id", row)) for row, item in enumerate(content)),
        tuple(tuple(dict.fromkeys(str(t) for t in found if t)) for found in tags),
        tuple((_text(item, "image_0"), _text(item, "image_1")) for item in content),
        tuple((_text(item, "caption_0"), _text(item, "caption_1")) for item in content),
    )


def _text(item: dict[str, Any], key: str) -> str:
    value = item[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is {value!r}, expected text")
    return value


# ── scores ──────────────────────────────────────────────────────────────────────────────────────


def score_two_way(
    right: NDArray[np.floating],
    wrong: NDArray[np.floating],
    kinds: Sequence[Sequence[str]],
    *,
    clusters: NDArray[np.int64] | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> TaskOutput:
    """Measure how often the right caption scores above the wrong one; a tie counts 1/2.

    right, wrong: (N,) cosines of each picture with either caption. clusters: (N,) the picture.
    `accuracy`, `accuracy_KIND` for each kind, and `mean_accuracy` over the kinds, which is what
    SugarCrepe's authors average. Raises DataError on NaN or no items.
    """
    right, wrong = np.asarray(right)[:, None], np.asarray(wrong)[:, None]
    check_vectors(np.concatenate([right, wrong], axis=1), "scores")
    above, reached = (right > wrong)[:, 0], (right >= wrong)[:, 0]
    expected = np.mean([above, reached], axis=0)
    found = _by_kind("accuracy", above, reached, expected, kinds, clusters, seed, draws)
    per_kind = [metric for name, metric in found.items() if name != "accuracy"]
    if per_kind:
        found["mean_accuracy"] = Metric(
            float(np.mean([metric.value for metric in per_kind])), len(per_kind)
        )
    return TaskOutput(found, {"chance": CHANCE["sugarcrepe"]}, {"right": expected})


def score_winoground(
    scores: NDArray[np.floating],
    kinds: Sequence[Sequence[str]],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> TaskOutput:
    """Measure text, image and group score as Thrush et al. (arXiv 2204.03162) define them.

    scores: (N, 2, 2), [i, c, p] is the cosine of item i's caption c with its picture p.
    text: both pictures prefer their own caption. image: both captions prefer their own picture.
    group: both. As in the paper a tie is a miss; the bounds say what it would be as a hit.
    """
    scores = np.asarray(scores)
    if scores.shape[1:] != (2, 2):
        raise ValueError(f"scores have shape {scores.shape}, expected (N, 2, 2)")
    check_vectors(scores.reshape(-1, 4), "scores")
    first, second = scores[:, 0, 0], scores[:, 1, 1]
    text_rival = (scores[:, 1, 0], scores[:, 0, 1])
    image_rival = (scores[:, 0, 1], scores[:, 1, 0])
    metrics: dict[str, Metric] = {}
    hits: dict[str, NDArray[np.bool_]] = {}
    reached: dict[str, NDArray[np.bool_]] = {}
    for name, (one, other) in (("text_score", text_rival), ("image_score", image_rival)):
        hits[name] = (first > one) & (second > other)
        reached[name] = (first >= one) & (second >= other)
    for found in (hits, reached):
        found["group_score"] = found["text_score"] & found["image_score"]
    for name, strict in hits.items():
        metrics |= _by_kind(name, strict, reached[name], strict, kinds, None, seed, draws)
    return TaskOutput(metrics, {"chance": CHANCE["winoground"]}, hits)


def _by_kind(
    name: str,
    low: NDArray[np.generic],
    high: NDArray[np.generic],
    value: NDArray[np.generic],
    kinds: Sequence[Sequence[str]],
    clusters: NDArray[np.int64] | None,
    seed: int,
    draws: int,
) -> dict[str, Metric]:
    """Return the metric over all items as `name`, and over those of each kind as `name_KIND`."""
    if len(kinds) != len(value):
        raise ValueError(f"{len(kinds)} kinds for {len(value)} items")
    clusters = np.arange(len(value)) if clusters is None else np.asarray(clusters)
    known = dict.fromkeys(kind for of_item in kinds for kind in of_item)
    chosen = {name: np.ones(len(value), bool)}
    chosen |= {f"{name}_{kind}": np.asarray([kind in found for found in kinds]) for kind in known}
    return {
        key: mean_metric(
            value[rows], clusters[rows], low=low[rows], high=high[rows], seed=seed, draws=draws
        )
        for key, rows in chosen.items()
    }


# ── with a model ────────────────────────────────────────────────────────────────────────────────


def measure_fine_grained(
    encoder: Encoder,
    items: FineGrained,
    images_dir: Path,
    *,
    batch_size: int = 64,
    on_error: OnError = "raise",
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[TaskOutput, list[BadItem]]:
    """Encode every picture and caption once, score the items; returns what was left out too.

    on_error: "skip" leaves out items whose picture is missing or cannot be read.
    Raises DataError otherwise on the first of them, or if no item is left.
    """
    names = list(dict.fromkeys(name for of_item in items.pictures for name in of_item))
    pictures = FilePictures(names, [_find(images_dir, name) for name in names])
    found = embed_pictures(encoder, pictures, batch_size=batch_size, on_error=on_error)
    vectors = dict(zip(found.names, found.vectors, strict=True))
    kept = [i for i, own in enumerate(items.pictures) if all(name in vectors for name in own)]
    if not kept:
        raise DataError(f"{images_dir}: no item has all of its pictures there; check the folder")
    texts = list(dict.fromkeys(text for i in kept for text in items.captions[i]))
    rows = encoder.encode_text(texts, batch_size=batch_size, show_progress=False)
    text = dict(zip(texts, rows, strict=True))
    kinds = [items.kinds[i] for i in kept]
    scores = np.stack(
        [
            [
                paired_scores(
                    [text[items.captions[i][c]] for i in kept],
                    [vectors[items.pictures[i][p]] for i in kept],
                )
                for p in range(len(items.pictures[0]))
            ]
            for c in (0, 1)
        ]
    ).transpose(2, 0, 1)  # items, captions, pictures
    options = {"seed": seed, "draws": draws}
    if items.format == "winoground":
        return score_winoground(scores, kinds, **options), found.skipped
    place = {name: row for row, name in enumerate(names)}
    clusters = np.asarray([place[items.pictures[i][0]] for i in kept])
    right, wrong = scores[:, 0, 0], scores[:, 1, 0]
    return score_two_way(right, wrong, kinds, clusters=clusters, **options), found.skipped


def _find(folder: Path, name: str) -> Path:
    """Return the path of a picture; Winoground leaves out the suffix."""
    path = folder / name
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return path
    with_suffix = (folder / f"{name}{suffix}" for suffix in sorted(IMAGE_SUFFIXES))
    return next((each for each in with_suffix if each.is_file()), path)
