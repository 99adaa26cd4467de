"""Named evaluation protocols: what data, texts and label lists a number was measured on.

The registry is data (protocols/*.json). Not for comparing data with it (matching.py), nor for
reading data (datasets.py).
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from m2encoder.errors import ConfigError

FOLDER = Path(__file__).resolve().parent / "protocols"
SOURCES_NAME = "sources.json"

Task = Literal["retrieval", "zero-shot"]
Status = Literal["verified", "unverified", "custom"]
CUSTOM = "custom"


@dataclass(frozen=True)
class Source:
    """Where a published figure was read."""

    text: str
    second_hand: bool
    """It was read in a page about the work, not in the work itself."""


@dataclass(frozen=True)
class Published:
    """Figures that somebody printed for one model, in percent."""

    dataset: str
    language: str
    model: str
    values: Mapping[str, float]
    """Our names of metrics (`t2i_r1`, `mean_recall`, `top1`) to percent."""
    protocol: str | None
    """What they were measured under; None where the source does not say."""
    sources: tuple[Source, ...]
    computed: tuple[str, ...] = ()
    """Names of values that are not printed there but follow from those that are."""
    note: str = ""

    @property
    def second_hand(self) -> bool:
        """Say whether no source is the work itself."""
        return all(source.second_hand for source in self.sources)


@dataclass(frozen=True)
class LabelList:
    """What is known of a protocol's class names and templates; the texts themselves lie elsewhere.

    Checksums are those of class_names.py.
    """

    source: str
    """`open_clip`, `clip_benchmark:cn`, `ours:cifar10`, or `file`: only from a user's file."""
    templates_source: str
    count: int
    checksum: str
    digests: str = ""
    """Four hexadecimal digits for each name, in order, to tell which ones differ."""
    repeated: tuple[str, ...] = ()
    """Names that several classes share: top-1 cannot reach 100 %."""
    num_templates: int = 0
    templates_checksum: str = ""

    @property
    def both(self) -> str:
        """The checksum of names and templates together."""
        return hashlib.sha256(f"{self.checksum}\n{self.templates_checksum}".encode()).hexdigest()


@dataclass(frozen=True)
class EvalProtocol:
    """One way of measuring, under one name."""

    id: str
    title: str
    task: Task
    language: str
    """BCP-47 tag of captions or class names."""
    split: str
    images: int | None
    """Pictures; None where nobody counted them for us."""
    texts: int | None
    captions_per_image: Mapping[str, int] | None = None
    """Number of captions to number of pictures that have so many."""
    checksum: str | None = None
    """`matching.caption_checksum` of the captions; None where no file was at hand."""
    folded_checksum: str | None = None
    """The same after folding case, width and quotes: recognises copies that somebody normalised."""
    checksum_from: str | None = None
    first_captions: int | None = None
    """Only so many captions of each picture count, in the file's order."""
    directions: tuple[str, ...] = ("t2i", "i2t")
    mean_recall: tuple[str, ...] = ()
    """The metrics that this protocol's mean recall averages."""
    labels: LabelList | None = None
    text_preprocessing: tuple[str, ...] = ()
    image_preprocessing: tuple[str, ...] = ()
    overlaps: tuple[str, ...] = ()
    """Known contamination: training sets that hold pictures or captions of this test."""
    notes: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    published: tuple[Published, ...] = field(default=(), repr=False)
    """Everything printed about the data set, this protocol's own figures first."""

    @property
    def dataset(self) -> str:
        """The part of the name before the slash."""
        return self.id.partition("/")[0]

    @property
    def expected(self) -> dict[str, Any]:
        """What data must have, as plain values; None where unknown."""
        counts: dict[str, Any] = {"images": self.images}
        if self.task == "retrieval":
            counts["texts"] = self.texts
            counts["captions_per_image"] = (
                dict(self.captions_per_image) if self.captions_per_image else None
            )
            return counts | {"checksum": self.checksum}
        labels = self.labels
        return counts | {
            "classes": labels.count if labels else None,
            "templates": labels.num_templates if labels else None,
            "checksum": labels.both if labels else None,
        }


@dataclass(frozen=True)
class MatchedProtocol:
    """Which protocol some data follows, and how sure that is."""

    id: str
    """A protocol's name, or `custom:` and 12 digits of the checksum."""
    status: Status
    """verified: counts and checksum agree. unverified: no checksum is known, or data was left
    out. custom: none of the known protocols."""
    checksum: str
    expected: Mapping[str, Any] | None
    found: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return what a result records of it, as plain values."""
        return {
            "id": self.id,
            "status": self.status,
            "checksum": self.checksum,
            "expected": dict(self.expected) if self.expected is not None else None,
            "notes": list(self.notes),
        }

    def noted(self, *notes: str) -> "MatchedProtocol":
        """Return it with further notes."""
        return replace(self, notes=(*self.notes, *notes))

    def demoted(self, note: str) -> "MatchedProtocol":
        """Return it with a note, and no longer verified: something of the data was left out."""
        status: Status = "unverified" if self.status == "verified" else self.status
        return replace(self, status=status, notes=(*self.notes, note))


@cache
def known_protocols() -> dict[str, EvalProtocol]:
    """Return every protocol by its name, in the order of the files."""
    protocols: dict[str, EvalProtocol] = {}
    for path in sorted(FOLDER.glob("*.json")):
        if path.name != SOURCES_NAME:
            for protocol in _load(path):
                assert protocol.id not in protocols, protocol.id
                protocols[protocol.id] = protocol
    return protocols


def get_protocol(name: str) -> EvalProtocol:
    """Return the protocol called so, by name or alias. Raises ConfigError naming the nearest."""
    protocols = known_protocols()
    wanted = name.strip().lower()
    if wanted in protocols:
        return protocols[wanted]
    aliases = {alias: p for p in protocols.values() for alias in p.aliases}
    if wanted in aliases:
        return aliases[wanted]
    of_dataset = [key for key in protocols if key.partition("/")[0] == wanted]
    if of_dataset:
        raise ConfigError(
            f"{name!r} is measured in several ways, name one: {', '.join(of_dataset)}"
        )
    near = difflib.get_close_matches(wanted, [*protocols, *aliases], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "see m2enc eval protocols"
    raise ConfigError(f"no protocol {name!r}; {hint}")


@cache
def _sources() -> dict[str, Source]:
    raw = json.loads((FOLDER / SOURCES_NAME).read_text(encoding="utf-8"))
    return {key: Source(**value) for key, value in raw.items()}


def _load(path: Path) -> list[EvalProtocol]:
    """Read one data set's file. A mistake in it is ours, so it is a KeyError or TypeError."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    defaults = {"dataset": raw["dataset"], "language": raw.get("language")}
    rows = [_published(defaults | row) for row in raw["published"]]
    return [_protocol(entry, rows) for entry in raw["protocols"]]


def _protocol(raw: dict[str, Any], rows: list[Published]) -> EvalProtocol:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    if labels := raw.get("labels"):
        values["labels"] = LabelList(**labels | {"repeated": tuple(labels["repeated"])})
    about = (raw["id"].partition("/")[0], raw["language"])
    shown = [row for row in rows if (row.dataset, row.language) == about]
    shown.sort(key=lambda row: row.protocol != raw["id"])
    protocol = EvalProtocol(**values, published=tuple(shown))
    assert protocol.task in get_args(Task), protocol.id
    return protocol


def _published(raw: dict[str, Any]) -> Published:
    """Rows are short in the file: `t2i` and `i2t` list R@1, R@5, R@10, or R@1 alone."""
    values = {
        f"{direction}_r{k}": value
        for direction in ("t2i", "i2t")
        for k, value in zip((1, 5, 10), raw.get(direction, ()), strict=False)
    }
    values |= {key: raw[key] for key in ("mean_recall", "top1") if key in raw}
    return Published(
        raw["dataset"],
        raw["language"],
        raw["model"],
        values | raw.get("values", {}),
        raw["protocol"],
        tuple(_sources()[key] for key in raw["sources"]),
        tuple(raw.get("computed", ())),
        raw.get("note", ""),
    )
