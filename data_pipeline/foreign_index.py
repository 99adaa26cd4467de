"""Write the index that webdataset tars of others lack; the tars stay as they are.

Not for reading pairs by it (m2encoder.shards, stream.py), nor for a tar's layout (tar_members.py).
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from m2encoder.errors import ConfigError, DataError
from m2encoder.images import IMAGE_SUFFIXES
from m2encoder.pair_record import captions_of, languages_with_text
from m2encoder.shards import INDEX_FORMAT, INDEX_NAME, Shard, ShardIndex, sha256_of
from m2encoder.tar_members import Member, grouped_members, list_tars


class Indexed(NamedTuple):
    """What was found: samples = index.count + those dropped, by reason."""

    folder: Path
    index: ShardIndex
    samples: int
    dropped: Counter[str]


class _Unusable(Exception):
    """Why a sample is no pair."""


def index_tars(tars: list[Path], *, text_language: str | None = None) -> Indexed:
    """Index the tars of one folder, given by its name or theirs, and write index.json beside them.

    A pair is a picture with captions in a .txt member or a .json one: under "captions" by language,
    "caption_zh" and the like, or "caption" or "text" without a language.
    text_language: the language of captions that name none; None tells it by script.
    Samples that are no pair are left out and counted. Keys that an earlier tar has too get their
    tar's name in front. Raises DataError on a damaged tar or when nothing is left; ConfigError
    where the tars lie in several folders, or there is an index already.
    """
    folder, tars = _folder_of(tars)
    path = folder / INDEX_NAME
    if path.exists():
        raise ConfigError(f"{path}: there is an index already; remove it to write another")
    shards: list[Shard] = []
    captions: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    keys: set[str] = set()
    samples = 0
    for tar in tqdm(tars, desc="indexing", unit="tar", disable=None):
        groups = grouped_members(tar)
        entries = _entries(groups, tar.stem, text_language, keys, captions, dropped)
        samples += len(groups)
        name = tar.relative_to(folder).as_posix()
        shards.append(Shard(name, tar.stat().st_size, sha256_of(tar), entries))
    count = sum(len(shard.pairs) for shard in shards)
    if not count:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped.most_common())
        raise DataError(
            f"{folder}: no pair in {samples:,} samples ({reasons or 'the tars are empty'}); "
            f"expected pictures with .txt or .json captions"
        )
    index = ShardIndex(INDEX_FORMAT, count, dict(sorted(captions.items())), "", shards)
    index.save(folder)
    return Indexed(folder, index, samples, dropped)


def _folder_of(tars: list[Path]) -> tuple[Path, list[Path]]:
    if len(tars) == 1 and tars[0].is_dir():
        folder, tars = tars[0], list_tars(tars[0])
    else:
        folder = tars[0].parent
        if other := [tar for tar in tars if tar.parent != folder]:
            raise ConfigError(
                f"{other[0]}: expected a tar of {folder}, as the first is; "
                f"an index serves one folder, call it for each"
            )
    if not tars:
        raise DataError(f"{folder}: no .tar files, expected some; check the path")
    if absent := [tar for tar in tars if not tar.is_file()]:
        raise DataError(f"{absent[0]}: no such file, expected a tar; check the path")
    return folder, sorted(tars)


def _entries(
    groups: Mapping[str, Mapping[str, Member]],
    tar_name: str,
    text_language: str | None,
    keys: set[str],
    captions: Counter[str],
    dropped: Counter[str],
) -> list[dict[str, Any]]:
    """Return one tar's entries; adds to keys, captions and dropped."""
    entries = []
    for key, members in groups.items():
        try:
            entry, found = _entry(members, text_language)
        except _Unusable as error:
            dropped[str(error)] += 1
            continue
        while key in keys:
            key = f"{tar_name}/{key}"
        keys.add(key)
        captions.update({language: len(texts) for language, texts in found.items()})
        entries.append({"key": key, **entry})
    return entries


def _entry(
    members: Mapping[str, Member], text_language: str | None
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Return where a sample's picture and captions lie, and the captions."""
    pictures = [(x, member) for x, member in members.items() if f".{x}" in IMAGE_SUFFIXES]
    if len(pictures) != 1:
        raise _Unusable("with several pictures" if pictures else "without a picture")
    ((extension, picture),) = pictures
    entry: dict[str, Any] = {"image": [extension, picture.offset, picture.size]}
    record, text = None, None
    try:
        if "json" in members:
            record = json.loads(members["json"].read())
            entry["json"] = [members["json"].offset, members["json"].size]
        if "txt" in members:
            text = members["txt"].read().decode("utf-8-sig")
            entry["text"] = [members["txt"].offset, members["txt"].size]
    except UnicodeDecodeError:
        raise _Unusable("with text that is not UTF-8") from None
    except ValueError:
        raise _Unusable("with JSON that cannot be read") from None
    captions = captions_of(record, text, plain=text_language)
    languages = languages_with_text(captions)
    if not languages:
        raise _Unusable("without a caption")
    return entry | {"plain": text_language, "languages": languages}, captions
