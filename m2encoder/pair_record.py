"""One pair as a shard's index entry and its tar members hold it, written by us or by others.

Not for finding shards and their index (shards.py).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CAPTION_KEYS = ("caption", "text", "captions")
"""Where others' records keep captions that name no language."""
_TAGGED = re.compile(r"(?:caption|text)s?_([A-Za-z]{2}(?:-[A-Za-z0-9]+)*)")
_HAN = re.compile("[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


@dataclass(slots=True)
class Pair:
    """One picture and the captions that describe it."""

    key: str
    """Unique within a data set; no dots or slashes (webdataset splits names at the first dot)."""
    image: bytes
    """The encoded picture, as it lies in the tar."""
    captions: dict[str, list[str]]
    """BCP-47 tag (`zh`, `en`) to captions; a language may be missing."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Anything else that JSON can hold, for example attributes for zero-shot classes."""
    image_ext: str = "png"


def read_pair(entry: Mapping[str, Any], read: Callable[[int, int], bytes]) -> Pair:
    """Return an entry's pair; read(offset, size) gives bytes of its tar.

    Entry: "key", "image": [extension, offset, size], "json": [offset, size] and "languages" that
    have a caption. Entries of others' tars also have "plain", the language of captions that name
    none (or None), and instead of "json" or beside it "text": [offset, size], such a caption.
    Raises ValueError, KeyError or TypeError where the bytes are not that.
    """
    extension, offset, size = entry["image"]
    image = read(offset, size)
    if "plain" not in entry:
        record = json.loads(read(*entry["json"]))
        return Pair(entry["key"], image, record["captions"], record["meta"], extension)
    record = json.loads(read(*entry["json"])) if "json" in entry else {}
    text = read(*entry["text"]).decode("utf-8-sig") if "text" in entry else None
    captions = captions_of(record, text, plain=entry["plain"])
    return Pair(entry["key"], image, captions, _meta_of(record), extension)


def captions_of(record: object, text: str | None, *, plain: str | None) -> dict[str, list[str]]:
    """Return the captions of another's JSON record and text member by language.

    plain: the language of captions that name none; None tells it by script, one by one.
    """
    found: dict[str, list[str]] = {}

    def add(language: str | None, texts: object) -> None:
        for one in texts if isinstance(texts, list) else [texts]:
            if isinstance(one, str):
                found.setdefault(language or plain or language_of(one), []).append(one.strip())

    if isinstance(record, dict):
        if isinstance(tagged := record.get("captions"), dict):
            for language, texts in tagged.items():
                add(language, texts)
        for key, value in record.items():
            if named := _TAGGED.fullmatch(key):
                add(named[1], value)
        for key in CAPTION_KEYS:
            add(None, record.get(key))
    if text is not None:
        add(None, text)
    return {language: list(dict.fromkeys(texts)) for language, texts in found.items()}


def _meta_of(record: object) -> dict[str, Any]:
    if not isinstance(record, dict):
        return {}
    own = record.get("meta")
    rest = {k: v for k, v in record.items() if k not in (*CAPTION_KEYS, "meta")}
    return own if isinstance(own, dict) else {k: v for k, v in rest.items() if not _TAGGED.match(k)}


def language_of(text: str) -> str:
    """Return zh where a text has a Chinese character, else en."""
    return "zh" if _HAN.search(text) else "en"


def languages_with_text(captions: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the languages that have a caption of more than white space, sorted."""
    return sorted(tag for tag, texts in captions.items() if any(text.strip() for text in texts))
