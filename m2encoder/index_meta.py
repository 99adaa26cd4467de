"""What an index says about itself and how it is to be made: plain values, kept as JSON.

Not for the pictures' own facts (index_items.py).
"""

import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol

from m2encoder.errors import ConfigError

FORMAT = 2
SourceKind = Literal["pictures", "shards", "embeddings", "vectors"]
SearchKind = Literal["flat", "ivf", "hnsw"]


class Maker(Protocol):
    """What an index must know of the model whose vectors it holds; an Encoder is one."""

    @property
    def name(self) -> str:
        """What people call the model."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal means equal vectors: weights, tokenizer and preprocessing."""
        ...

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        ...

    @property
    def folder(self) -> Path | None:
        """The model folder, if it came from one."""
        ...


@dataclass(frozen=True)
class VectorMaker:
    """A Maker of which only the facts are known: for vectors that come from elsewhere."""

    name: str
    fingerprint: str
    dim: int
    folder: Path | None = None


@dataclass(frozen=True)
class IndexSettings:
    """How an index is to be searched."""

    kind: Literal["auto", "flat", "ivf", "hnsw"] = "auto"
    """flat compares with every vector; ivf reads a few lists of 8-bit vectors; hnsw is a read-only
    graph. auto: flat while the index is small, ivf above."""
    flat_limit: int = 200_000
    """auto: the most pictures that are searched flat."""
    memory_budget_mb: int | None = None
    """auto: search flat only while the float32 vectors fit; None: `flat_limit` alone decides."""
    few_rows: int = 50_000
    """Conditions that leave no more pictures than this are answered exactly."""
    recall: float = 0.95
    """Share of the true ten nearest that a search must find; decides how many lists it reads."""
    slack_rows: int = 4096
    """Additions and removals that may wait outside the lists before these are written anew; a
    twentieth of the index if that is more."""
    seed: int = 0
    """Decides the samples for training and measuring."""

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise ConfigError(f"recall must be above 0 and at most 1, got {self.recall}")
        for name in ("flat_limit", "memory_budget_mb", "few_rows", "slack_rows"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} must not be negative, got {value}")


@dataclass(frozen=True)
class Ann:
    """The approximate index beside the vectors, and what it was measured to find."""

    file: str
    bytes: int
    kind: Literal["ivf", "hnsw"]
    rows: int
    """It knows the rows of the vectors' file below this; later ones are compared with directly."""
    count: int
    """Vectors in it, those of pictures that are gone included."""
    trained_on: int
    """Pictures in the index when it was trained; from twice as many on it is trained anew."""
    lists: int
    """ivf: number of lists; hnsw: links per vector."""
    probes: int
    """ivf: lists read per query; hnsw: length of the candidate list (efSearch)."""
    recall_at_10: dict[str, float]
    """Share of the ten nearest that were found, on queries that `probes` was not chosen with:
    `pictures` (of the index, without themselves) and, if a model was at hand, `words`."""
    queries: dict[str, int]
    """How many queries each recall was measured on."""


@dataclass(frozen=True)
class IndexMeta:
    """What a finished index says."""

    format: int
    model: str
    model_path: str | None
    """The model folder, absolute; None if the model did not come from one."""
    model_fingerprint: str
    dim: int
    count: int
    """Pictures that can be found."""
    source: str
    """The folder that was indexed; relative if the index lies inside it, so both can move."""
    kind: SourceKind
    root: str | None
    """Where the names begin as paths; relative as `source`. None: the pictures are no files."""
    stamp: str
    """The source's stamp when it was read; another one today means that it has changed."""
    segment: str
    """The file of vectors."""
    rows: int
    """Rows of it that belong to this index, those of pictures that are gone included."""
    settings: IndexSettings = field(default_factory=IndexSettings)
    ann: Ann | None = None
    """None: every vector is compared with."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "IndexMeta":
        """Read them back. Raises KeyError, TypeError or ValueError on anything else."""
        missing = {f.name for f in fields(cls)} - raw.keys()
        if missing:
            raise ValueError(f"state lacks {', '.join(sorted(missing))}")
        ann = Ann(**raw["ann"]) if raw["ann"] is not None else None
        return cls(**raw | {"settings": IndexSettings(**raw["settings"]), "ann": ann})

    def source_path(self, folder: Path) -> Path:
        """Return the indexed folder, given where the index lies."""
        return _short(folder / self.source)

    def root_path(self, folder: Path) -> Path | None:
        """Return the folder that the names are paths below, given where the index lies."""
        return None if self.root is None else _short(folder / self.root)


@dataclass(frozen=True)
class Staging:
    """Vectors that are written already but belong to no finished index yet."""

    fingerprint: str
    source: str
    segment: str
    rows: int
    """Rows of the segment that are written: those of the finished index, then the staged ones."""


def path_from(folder: Path, path: Path) -> str:
    """Write `path` as seen from `folder`: relative if the folder lies inside it, else absolute."""
    inside = folder.resolve().is_relative_to(path.resolve())
    return os.path.relpath(path.resolve(), folder.resolve()) if inside else str(path.resolve())


def _short(path: Path) -> Path:
    short = Path(os.path.normpath(path))  # photos, rather than photos/.m2enc-index/..
    return short if short.resolve() == path.resolve() else path
