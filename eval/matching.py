"""Compare captions with the protocols that we know: the checksum, the counts, the usual mistakes.

Not for label lists (class_names.py), nor for reading captions (datasets.py).
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from m2encoder.errors import DataError
from m2encoder.eval.protocols import (
    CUSTOM,
    EvalProtocol,
    MatchedProtocol,
    get_protocol,
    known_protocols,
)

SHORT = 12
"""Digits of a checksum in the name of a custom protocol and in messages."""
# A word with its part of speech, as segmenters write it: 一个/m, 男人/n, ，/w, street_NN.
TAGGED_WORD = re.compile(r"[^\s/_]+[/_][A-Za-z]{1,3}\d?")
HAN = re.compile(r"[\u3400-\u9fff]")
TAGGED_SHARE = 0.1
"""More captions than this with tags, and the file is a tagged one."""

Pair = tuple[int, int]


def canonical(text: str) -> str:
    """Return the text in NFC, every run of white space one space, none at the ends.

    What no reader of a caption can see is ignored; letter case, width and punctuation count.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def folded(text: str) -> str:
    """Return the text as clean-ups leave it: NFKC, case-folded, straight quotes."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return canonical(plain.translate({0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'"}))


def caption_groups(
    texts: Sequence[str], owner: Sequence[int], num_images: int, also: Sequence[Pair] = ()
) -> list[list[str]]:
    """Return the captions of each picture. also: further right (text, picture) pairs."""
    groups: list[list[str]] = [[] for _ in range(num_images)]
    for text, image in zip(texts, owner, strict=True):
        groups[image].append(text)
    for text_row, image in also:
        groups[image].append(texts[text_row])
    return groups


def caption_checksum(groups: Sequence[Sequence[str]], *, fold: bool = False) -> str:
    """Return the sha256 of the captions of each picture.

    Captions are `canonical` (or `folded`) and sorted within a picture, pictures are sorted by their
    captions; pictures without any count. So the order and the names of pictures do not matter:
    they differ between a JSON file and the shards made of it, and change no number.
    """
    plain = folded if fold else canonical
    lines = sorted(json.dumps(sorted(map(plain, g)), ensure_ascii=False) for g in groups)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def histogram(groups: Sequence[Sequence[str]]) -> dict[str, int]:
    """Return number of captions, as a string, to number of pictures that have so many."""
    return {str(k): n for k, n in sorted(Counter(map(len, groups)).items())}


def match(
    protocol: str | None,
    texts: Sequence[str],
    owner: Sequence[int],
    num_images: int,
    *,
    also: Sequence[Pair] = (),
) -> MatchedProtocol:
    """Say which protocol the captions follow.

    protocol: a name or alias, which the captions must then follow; None takes the one whose
    checksum they have, or else none; `custom` takes none in any case.
    owner: the picture of each text. also: further right (text, picture) pairs.
    Raises DataError with the difference, and with what the captions look like instead; ConfigError
    if there is no such protocol or it has no captions.
    """
    groups = caption_groups(texts, owner, num_images, also)
    checksum = caption_checksum(groups)
    found = {
        "images": num_images,
        "texts": len(texts),
        "captions_per_image": histogram(groups),
        "checksum": checksum,
    }
    if protocol is not None and protocol != CUSTOM:
        return _match_known(_of_retrieval(protocol), texts, groups, found)
    known = identify(checksum) if protocol is None else None
    if known:
        return _verified(known, found)
    return MatchedProtocol(
        f"{CUSTOM}:{checksum[:SHORT]}", "custom", checksum, None, found, _custom_notes(texts, found)
    )


def identify(checksum: str) -> EvalProtocol | None:
    """Return the protocol whose captions have this checksum."""
    return next((p for p in known_protocols().values() if p.checksum == checksum), None)


def _of_retrieval(name: str) -> EvalProtocol:
    protocol = get_protocol(name)
    if protocol.task != "retrieval":
        raise DataError(
            f"{protocol.id} is a zero-shot protocol, the data has captions; name one of retrieval, "
            f"or bring labelled pictures"
        )
    return protocol


def _verified(protocol: EvalProtocol, found: dict[str, Any]) -> MatchedProtocol:
    return MatchedProtocol(
        protocol.id, "verified", found["checksum"], protocol.expected, found, protocol.overlaps
    )


def _match_known(
    protocol: EvalProtocol,
    texts: Sequence[str],
    groups: list[list[str]],
    found: dict[str, Any],
) -> MatchedProtocol:
    if protocol.checksum == found["checksum"]:
        return _verified(protocol, found)
    differences = [_difference(protocol, found), _known_fault(protocol, texts, groups, found)]
    if any(differences):
        said = "; ".join(filter(None, differences))
        raise DataError(f"{protocol.id}: {said}; bring its data, or run this as {CUSTOM}")
    is_counted = protocol.images is not None and protocol.texts is not None
    what = "no checksum is known for it, only the counts were compared"
    note = what if is_counted else "neither a checksum nor all counts are known for it"
    notes = (note, *protocol.overlaps)
    return MatchedProtocol(
        protocol.id, "unverified", found["checksum"], protocol.expected, found, notes
    )


def _difference(protocol: EvalProtocol, found: dict[str, Any]) -> str:
    """Return how the data differs from a protocol, as far as that is known; or nothing."""
    wanted = protocol.expected
    if any(wanted[key] not in (None, found[key]) for key in ("images", "texts")):
        return (
            f"found {_counts(found['images'], found['texts'])}, "
            f"expected {_counts(wanted['images'], wanted['texts'])}"
        )
    per_image = wanted["captions_per_image"]
    if per_image not in (None, found["captions_per_image"]):
        return (
            f"found {_per_image(found['captions_per_image'])}, expected {_per_image(per_image)}, "
            f"with the same totals"
        )
    if protocol.checksum:
        return (
            f"the counts are right, but the captions differ (checksum "
            f"{found['checksum'][:SHORT]}…, expected {protocol.checksum[:SHORT]}…)"
        )
    return ""


def _counts(images: int | None, texts: int | None) -> str:
    said = [f"{n:,} {what}" for n, what in ((images, "pictures"), (texts, "captions")) if n]
    return " and ".join(said) or "nothing"


def _per_image(counts: dict[str, int]) -> str:
    shown = sorted(counts.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{n:,} pictures with {k} captions" for k, n in shown)


def _known_fault(
    protocol: EvalProtocol,
    texts: Sequence[str],
    groups: list[list[str]],
    found: dict[str, Any],
) -> str:
    """Say what the data looks like instead, or nothing if it looks like nothing that we know."""
    if tagged := tagged_captions(texts):
        return _say_tagged(tagged, len(texts))
    if other := identify(found["checksum"]):
        return f"this is {other.id} ({other.title}), so ask for {other.id}"
    if wrong := _wrong_script(protocol.language, texts):
        return wrong
    if protocol.folded_checksum and protocol.folded_checksum == caption_checksum(groups, fold=True):
        return "only case, width or quotes differ, so somebody normalised this copy"
    if _has_counts_of(protocol, found):
        return ""
    for other in known_protocols().values():
        if other.dataset == protocol.dataset and _has_counts_of(other, found):
            return f"these are the counts of {other.id} ({other.title})"
    if found["texts"] == found["images"] == protocol.images:
        return "one caption for each picture, so perhaps only the first of several was kept"
    return ""


def _has_counts_of(protocol: EvalProtocol, found: dict[str, Any]) -> bool:
    return (protocol.images, protocol.texts) == (found["images"], found["texts"])


def tagged_captions(texts: Sequence[str]) -> list[str]:
    """Return the captions whose words carry part-of-speech tags, if there are more than a few."""
    tagged = [text for text in texts if _is_tagged(text)]
    return tagged if len(tagged) > TAGGED_SHARE * len(texts) else []


def _is_tagged(text: str) -> bool:
    words = text.split()
    hits = sum(TAGGED_WORD.fullmatch(word) is not None for word in words)
    return hits >= 2 and 2 * hits > len(words)


def _say_tagged(tagged: list[str], total: int) -> str:
    example = tagged[0] if len(tagged[0]) <= 40 else tagged[0][:39] + "…"
    return (
        f"{len(tagged):,} of {total:,} captions carry part-of-speech tags, such as {example!r}: "
        f"take a file without tags"
    )


def _wrong_script(language: str, texts: Sequence[str]) -> str:
    """Say so where Chinese captions are expected and others found, or the other way round."""
    if language not in ("zh", "en") or not texts:
        return ""
    share = sum(HAN.search(text) is not None for text in texts) / len(texts)
    if language == "zh" and share < 0.5:
        return (
            f"only {share:.0%} of the captions hold Chinese characters, is this another language?"
        )
    if language == "en" and share > 0.5:
        return f"{share:.0%} of the captions hold Chinese characters, expected English"
    return ""


def _custom_notes(texts: Sequence[str], found: dict[str, Any]) -> tuple[str, ...]:
    notes = [_say_tagged(tagged, len(texts))] if (tagged := tagged_captions(texts)) else []
    same = [
        protocol.id for protocol in known_protocols().values() if _has_counts_of(protocol, found)
    ]
    if same:
        notes.append(f"as many pictures and captions as {', '.join(same)}, but other captions")
    return tuple(notes)
