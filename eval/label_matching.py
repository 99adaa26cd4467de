"""Compare class names and templates with the protocols that we know, and make tasks of them.

Not for reading lists (class_names.py), nor for captions (matching.py).
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2encoder.errors import DataError
from m2encoder.eval.class_names import ClassList, Names, has_gloss, repeated_names
from m2encoder.eval.matching import SHORT, canonical
from m2encoder.eval.protocols import (
    CUSTOM,
    EvalProtocol,
    LabelList,
    MatchedProtocol,
    get_protocol,
    known_protocols,
)
from m2encoder.zero_shot import ZeroShotClass, ZeroShotTask

DIGITS = 4
"""Hexadecimal digits that a protocol keeps of each name's sha256."""


def names_checksum(names: Names) -> str:
    """Return the sha256 of the names in their order, several names of a class joined by tabs."""
    return _sha256("\n".join("\t".join(map(canonical, of_class)) for of_class in names))


def templates_checksum(templates: Sequence[str]) -> str:
    """Return the sha256 of the templates; their order does not matter, since they are averaged."""
    return _sha256("\n".join(sorted(map(canonical, templates))))


def name_digests(names: Names) -> list[str]:
    """Return a short digest of each class's names: tells which ones differ, gives none away."""
    return [_sha256("\t".join(map(canonical, of_class)))[:DIGITS] for of_class in names]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def match_labels(
    protocol: str | None, classes: ClassList, num_images: int | None
) -> MatchedProtocol:
    """Say which zero-shot protocol a label list and the number of pictures follow.

    protocol: a name or alias, which they must then follow; None takes the one whose names,
    templates and pictures they have, or else none; `custom` takes none in any case.
    num_images: None leaves the pictures unchecked, and the protocol unverified.
    Raises DataError with the difference and, if it is known, with what the list is instead;
    also if two classes share a name and the protocol does not say so.
    """
    published = classes.as_published or classes.names
    sums = LabelList(
        classes.source,
        classes.source,
        len(published),
        names_checksum(published),
        num_templates=len(classes.templates),
        templates_checksum=templates_checksum(classes.templates),
    )
    found = {
        "images": num_images,
        "classes": len(published),
        "templates": len(classes.templates),
        "checksum": sums.both,
    }
    if protocol is not None and protocol != CUSTOM:
        return _match_known(_of_zero_shot(protocol), classes, sums, found)
    known = _with_both(sums)
    if protocol is None and known and num_images in (None, known.images):
        return _match_known(known, classes, sums, found)
    _refuse_new_repeats(classes, known.labels.repeated if known and known.labels else ())
    said = [f"class names and templates of {known.id}"] if known else []
    return MatchedProtocol(
        f"{CUSTOM}:{sums.both[:SHORT]}", "custom", sums.both, None, found,
        (*said, *class_notes(classes)),
    )  # fmt: skip


def _of_zero_shot(name: str) -> EvalProtocol:
    protocol = get_protocol(name)
    if protocol.task != "zero-shot" or protocol.labels is None:
        raise DataError(
            f"{protocol.id} is a retrieval protocol, the data has classes; name one of zero-shot, "
            f"or bring captions"
        )
    return protocol


def _match_known(
    protocol: EvalProtocol, classes: ClassList, sums: LabelList, found: dict[str, Any]
) -> MatchedProtocol:
    labels = protocol.labels
    assert labels is not None
    reason = _names_differ(labels, classes, sums) or _templates_differ(labels, sums)
    if not reason and found["images"] not in (None, protocol.images):
        reason = f"{found['images']:,} pictures, expected {protocol.images:,}"
    if reason:
        raise DataError(f"{protocol.id}: {reason}; correct that, or run it as {CUSTOM}")
    _refuse_new_repeats(classes, labels.repeated)
    matched = MatchedProtocol(
        protocol.id,
        "verified",
        found["checksum"],
        protocol.expected,
        found,
        (*protocol.overlaps, *class_notes(classes)),
    )
    if found["images"] is None:
        return matched.demoted("the number of pictures was not compared")
    if classes.as_published:
        return matched.demoted("glosses were cut off some class names")
    return matched


def _names_differ(labels: LabelList, classes: ClassList, sums: LabelList) -> str:
    if sums.checksum == labels.checksum:
        return ""
    others = (other for other in known_protocols().values() if other.labels is not None)
    same = next((o for o in others if o.labels and o.labels.checksum == sums.checksum), None)
    if sums.count != labels.count:
        said = f"{sums.count:,} class names, expected {labels.count:,}"
        return f"{said}; this is the list of {same.id}" if same else said
    digests = name_digests(classes.as_published or classes.names)
    wanted = [labels.digests[i : i + DIGITS] for i in range(0, len(labels.digests), DIGITS)]
    wrong = [k for k, (a, b) in enumerate(zip(digests, wanted, strict=True)) if a != b]
    if same:
        return (
            f"{len(wrong):,} of {sums.count:,} class names differ, because this is the list of "
            f"{same.id}"
        )
    first = " / ".join((classes.as_published or classes.names)[wrong[0]]) if wrong else ""
    where = f", the first is class {wrong[0]}, {first!r}" if wrong else ""
    return f"{len(wrong):,} of {sums.count:,} class names differ{where}"


def _templates_differ(labels: LabelList, sums: LabelList) -> str:
    if sums.templates_checksum == labels.templates_checksum:
        return ""
    for other in known_protocols().values():
        if other.labels and other.labels.templates_checksum == sums.templates_checksum:
            return f"the templates are those of {other.id}"
    if sums.num_templates != labels.num_templates:
        return f"{sums.num_templates:,} templates, expected {labels.num_templates:,}"
    return f"{sums.num_templates:,} templates as expected, but other ones"


def _with_both(sums: LabelList) -> EvalProtocol | None:
    everything = known_protocols().values()
    return next((p for p in everything if p.labels and p.labels.both == sums.both), None)


def _refuse_new_repeats(classes: ClassList, allowed: Sequence[str]) -> None:
    new = [name for name in repeated_names(classes.names) if name not in allowed]
    if new:
        rows = [str(k) for k, of_class in enumerate(classes.names) if new[0] in of_class]
        raise DataError(
            f"{classes.source}: name {new[0]!r} belongs to classes {' and '.join(rows)}, which "
            f"nothing can tell apart; names must differ, correct the list"
        )


def class_notes(classes: ClassList) -> tuple[str, ...]:
    """Return what a result should say about a list: shared names, glosses."""
    notes: list[str] = []
    if shared := repeated_names(classes.names):
        best = 1 - sum(count - 1 for count in shared.values()) / len(classes)
        names = ", ".join(map(repr, shared))
        notes.append(
            f"several classes share a name ({names}), so top-1 cannot reach 100 % (at most "
            f"{100 * best:.1f} % where classes are equally frequent)"
        )
    glossed = [name for of_class in classes.names for name in of_class if has_gloss(name)]
    if glossed:
        notes.append(
            f"class names with a gloss, which goes into the prompts as it is: {len(glossed):,}, "
            f"such as {glossed[0]!r}"
        )
    return tuple(notes)


def make_task(
    name: str,
    lists: Mapping[str, ClassList],
    *,
    labels: Sequence[str] | None = None,
    label_key: str = "class",
) -> ZeroShotTask:
    """Return what zero_shot.py measures, from one list per language (BCP-47 tag).

    labels: what the data calls the classes; by default their numbers. label_key: see ZeroShotTask.
    Raises DataError if the lists do not have the same number of classes.
    """
    sizes = {language: len(classes) for language, classes in lists.items()}
    if labels is not None:
        sizes["data"] = len(labels)
    if len(set(sizes.values())) != 1:
        said = ", ".join(f"{count:,} in {what}" for what, count in sizes.items())
        raise DataError(f"zero-shot task {name!r}: numbers of classes differ: {said}; correct them")
    called = labels or [str(k) for k in range(next(iter(sizes.values())))]
    classes = tuple(
        ZeroShotClass(label, {language: lists[language].names[k] for language in lists})
        for k, label in enumerate(called)
    )
    templates = {language: classes_of.templates for language, classes_of in lists.items()}
    shares = any(repeated_names(classes_of.names) for classes_of in lists.values())
    return ZeroShotTask(name, label_key, classes, templates, may_share_names=shares)


def align_labels(
    targets: NDArray[np.int64], labels: Sequence[str], classes: ClassList
) -> NDArray[np.int64]:
    """Return (N,) the class of each picture in the order of `classes`.

    targets: (N,) positions in `labels`, what the data calls its classes. They are matched by
    number ("17" is class 17), else by name, else by order if there are as many labels as classes.
    Raises DataError if none of this works.
    """
    if all(label.isdecimal() for label in labels):
        numbers = [int(label) for label in labels]
        if max(numbers) >= len(classes):
            raise DataError(
                f"the data has a class {max(numbers)}, the list of names ends at "
                f"{len(classes) - 1}; is it the list of this data?"
            )
        return np.asarray(numbers, np.int64)[targets]
    shared = repeated_names(classes.names)
    rows = {
        name: k for k, names in enumerate(classes.names) for name in names if name not in shared
    }
    if all(label in rows for label in labels):
        return np.asarray([rows[label] for label in labels], np.int64)[targets]
    if len(labels) == len(classes):
        return targets
    raise DataError(
        f"the data has {len(labels):,} classes ({', '.join(map(repr, labels[:3]))}, …), the list "
        f"{len(classes):,}; they must be as many, or the data must number its classes"
    )
