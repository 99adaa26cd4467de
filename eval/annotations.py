"""Read captions of pictures from the files that data sets are released as.

Pictures are named here, not looked for (datasets.py). Not for tars and shards (foreign_tars.py).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2encoder.errors import ConfigError, DataError
from m2encoder.images import IMAGE_SUFFIXES

TEXTS_SUFFIX = "_texts.jsonl"
"""CN-CLIP's and MUGE's files of texts are called `valid_texts.jsonl`."""
NAMES_FILE = "test_image_names.txt"
"""XTD names its pictures in this file, line by line as its captions."""
LINES_SUFFIXES = frozenset({".txt", ".token", ".csv"})
# 1000092795.jpg#0<TAB>caption (Flickr30K) · 1007129816#zhm#0 caption (Flickr30K-CN)
NUMBERED = re.compile(r"([^\s#]+)#(?:[A-Za-z]+#)?\d+\s+(.*)")
# 1000092795.jpg,caption (CLIP_benchmark); the caption may hold ".jpg," again
SEPARATED = re.compile(r"(.+?\.(?:jpe?g|png|webp)),(.*)", re.IGNORECASE)


@dataclass
class Captions:
    """Captions in one language and the pictures that they describe, in the file's order."""

    images: list[str] = field(default_factory=list)
    """What the file calls each picture; no name twice."""
    texts: list[str] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    """(T,) the picture of each text."""
    also: list[tuple[int, int]] = field(default_factory=list)
    """Further right (text, picture) pairs, where a text has several right pictures."""
    language: str | None = None
    """The language that the file states."""
    notes: list[str] = field(default_factory=list)
    _rows: dict[str, int] = field(default_factory=dict)
    _repeated: set[str] = field(default_factory=set)

    def image_row(self, name: str) -> int:
        """Return the picture's row; a name that is new gets the next one."""
        if name not in self._rows:
            self._rows[name] = len(self.images)
            self.images.append(name)
        return self._rows[name]

    def add(self, name: str, texts: list[str], *, may_repeat: bool = False) -> None:
        """Add captions of one picture. may_repeat: the format has a line for each caption."""
        if name in self._rows and not may_repeat:
            self._repeated.add(name)
        row = self.image_row(name)
        self.texts += texts
        self.owner += [row] * len(texts)

    def finished(self) -> "Captions":
        """Note what was put together, and return itself."""
        if self._repeated:
            self.notes.append(
                f"{len(self._repeated):,} pictures are listed more than once, such as "
                f"{min(self._repeated)}; their captions were put together"
            )
        return self


def read_annotations(
    path: Path, *, language: str | None = None, split: str | None = None
) -> Captions:
    """Read a file of captions, whichever of the known formats it has.

    JSONL or a JSON list of {"image", "caption" or "captions", "lang"}; Crossmodal-3600's JSONL;
    CN-CLIP's {"text_id", "text", "image_ids"}; Karpathy's and COCO's JSON; lines of Flickr's
    `name#0 caption` and of `name,caption`; XTD's captions beside its names of pictures.
    language: take these captions where a file has several languages. split: of Karpathy's JSON.
    Raises DataError naming the line that is wrong, ConfigError if a language must be chosen.
    """
    if path.suffix.lower() == ".jsonl":
        return _from_records(path, _json_lines(path), language)
    if path.suffix.lower() == ".json":
        return _from_json(path, language, split)
    if path.suffix.lower() in LINES_SUFFIXES:
        return _from_lines(path)
    raise DataError(
        f"{path}: expected captions in .jsonl, .json, {', '.join(sorted(LINES_SUFFIXES))}; convert "
        f'it to lines of {{"image": ..., "captions": [...]}}'
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, expected captions; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"{path}: cannot be read ({reason}); save it as UTF-8 text") from None


def text_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file, cut at line feeds alone. Raises DataError."""
    return [line.removesuffix("\r") for line in _read_text(path).removesuffix("\n").split("\n")]


Records = Iterator[tuple[str, dict[str, Any]]]


def _json_lines(path: Path) -> Records:
    """Yield where each record stands, for messages, and the record."""
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _record(where, _parsed(where, line))


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); correct it") from None


def _record(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{where}: {str(value)[:40]!r}, expected {{"image": ..., "captions": ...}}')
    return value


def _from_json(path: Path, language: str | None, split: str | None) -> Captions:
    raw = _parsed(str(path), _read_text(path))
    if isinstance(raw, list):
        return _from_records(path, _listed(path, raw), language)
    images = raw.get("images") if isinstance(raw, dict) else None
    try:
        if isinstance(images, list) and "annotations" in raw:
            return _from_coco(images, raw["annotations"])
        if isinstance(images, list):
            return _from_karpathy(path, images, split or "test")
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: neither Karpathy's nor COCO's format ({reason})") from None
    raise DataError(
        f"{path}: no list of captions; expected a list of records, or Karpathy's or COCO's format"
    )


def _listed(path: Path, values: list[Any]) -> Records:
    for number, value in enumerate(values, 1):
        where = f"{path}, entry {number}"
        yield where, _record(where, value)


def _from_coco(images: list[Any], annotations: list[Any]) -> Captions:
    found = Captions()
    names = {image["id"]: str(image["file_name"]) for image in images}
    for image in images:  # pictures without captions are candidates too
        found.image_row(str(image["file_name"]))
    for entry in annotations:
        found.add(names[entry["image_id"]], [str(entry["caption"])], may_repeat=True)
    return found.finished()


def _from_karpathy(path: Path, images: list[Any], split: str) -> Captions:
    found = Captions()
    for image in images:
        if image["split"] == split:
            name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
            found.add(name, [str(sentence["raw"]) for sentence in image["sentences"]])
    if not found.images:
        known = ", ".join(sorted({str(image["split"]) for image in images}))
        raise DataError(f"{path}: no pictures of split {split!r}; it has {known}")
    return found.finished()


def _from_records(path: Path, records: Records, language: str | None) -> Captions:
    found = Captions()
    stated: set[str] = set()
    for where, record in records:
        if "text_id" in record:
            _add_query(found, where, record)
            continue
        if record.get("lang") is not None:
            stated.add(str(record["lang"]))
            if language is not None and record["lang"] != language:
                continue
        if isinstance(record.get("captions"), dict):
            stated |= record["captions"].keys()
        name = _image_of(where, record)
        captions = captions_of(where, record, language)
        found.add(name, captions, may_repeat=isinstance(record.get("caption"), str))
    if language is None and len(stated) > 1:
        raise ConfigError(f"{path}: captions in {', '.join(sorted(stated))}; say which language")
    if stated and language is not None and language not in stated:
        raise DataError(f"{path}: no captions in {language}, it has {', '.join(sorted(stated))}")
    found.language = next(iter(stated)) if len(stated) == 1 else None
    return found.finished()


def _image_of(where: str, record: dict[str, Any]) -> str:
    if "image/key" in record:  # Crossmodal-3600
        return f"{record['image/key']}.jpg"
    image = record.get("image")
    if not isinstance(image, str) or not image:
        keys = ", ".join(map(repr, record)) or "nothing"
        raise DataError(f"{where}: has {keys}, expected 'image' with a path; correct it")
    return image


def captions_of(where: str, record: dict[str, Any], language: str | None) -> list[str]:
    """Return a record's captions, from `captions` or `caption`: a text, a list, or by language.

    Raises DataError if there is no such key or it holds something else, ConfigError if they are in
    several languages and none was chosen.
    """
    value = record.get("captions", record.get("caption"))
    if "image/key" in record:
        value = {key: v["caption"] for key, v in record.items() if isinstance(v, dict)}
    if isinstance(value, dict):
        if language is None and len(value) > 1:
            raise ConfigError(f"{where}: captions in {', '.join(value)}; say which language")
        value = value.get(language) if language is not None else next(iter(value.values()), [])
        value = [] if value is None else value
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DataError(
            f"{where}: captions are {str(value)[:40]!r}, expected a text or a list of texts under "
            f"'captions' or 'caption'; correct it"
        )
    return value


def _add_query(found: Captions, where: str, record: dict[str, Any]) -> None:
    """Add a line of CN-CLIP's format: a text with the pictures that it fits."""
    ids, text = record.get("image_ids"), record.get("text")
    if not isinstance(ids, list) or not isinstance(text, str):
        raise DataError(f"{where}: expected 'text' and 'image_ids' beside 'text_id'; correct it")
    if not ids:
        raise DataError(
            f"{where}: no image_ids, so the right pictures of this text are not known; take a "
            f"split whose answers are public"
        )
    rows = [found.image_row(str(image)) for image in dict.fromkeys(ids)]
    found.texts.append(text)
    found.owner.append(rows[0])
    found.also += [(len(found.texts) - 1, row) for row in rows[1:]]


def _from_lines(path: Path) -> Captions:
    names = path.with_name(NAMES_FILE)
    if names != path and names.is_file():
        return _from_xtd(path, names)
    found = Captions()
    for number, line in enumerate(text_lines(path), 1):
        if number == 1 and line.lower().replace(" ", "").startswith("image,"):
            continue  # the heading of a table
        if not line.strip():
            continue
        hit = NUMBERED.fullmatch(line) or SEPARATED.fullmatch(line)
        if not hit:
            raise DataError(
                f"{path}, line {number}: {line[:40]!r}, expected 'picture.jpg#0 caption' or "
                f"'picture.jpg,caption'; correct it"
            )
        has_suffix = Path(hit[1]).suffix.lower() in IMAGE_SUFFIXES
        name = hit[1] if has_suffix else f"{hit[1]}.jpg"
        found.add(name, [_unquoted(hit[2].strip())], may_repeat=True)
    return found.finished()


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] == '"'
    return text[1:-1].replace('""', '"') if quoted else text


def _from_xtd(path: Path, names_path: Path) -> Captions:
    names, texts = text_lines(names_path), text_lines(path)
    if len(names) != len(texts):
        raise DataError(
            f"{path}: {len(texts):,} captions for {len(names):,} names in {names_path.name}; they "
            f"must be as many, copy both files again"
        )
    found = Captions()
    for name, text in zip(names, texts, strict=True):
        found.add(name.strip(), [text])
    return found.finished()
