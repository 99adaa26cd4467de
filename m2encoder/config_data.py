"""The data side of a training run's settings: sources, batches, augmentation, the tokenizer.

Standard library only. Not for the rest of a run (config.py).
"""

from dataclasses import dataclass, field
from typing import Literal

from m2encoder.errors import ConfigError


def require(ok: bool, message: str) -> None:
    """Raise ConfigError with the message unless ok."""
    if not ok:
        raise ConfigError(message)


@dataclass(frozen=True)
class Augment:
    """Random changes to training pictures; every draw depends on (seed, sample position) alone."""

    crop_scale_min: float = 0.8
    """Smallest share of the picture's area that a random resized crop keeps; 1 crops nothing."""
    crop_ratio_max: float = 1.2
    """Most that a crop is stretched, as width / height or its inverse."""
    flip: bool = False
    """Mirror half of the pictures. Off where captions name left and right."""
    rotate_degrees: float = 0.0
    """Turn by up to this many degrees either way; corners take the edge's mean colour."""
    color_jitter: float = 0.0
    """Change brightness, contrast and saturation by up to this share. Off where captions name
    colours."""

    def __post_init__(self) -> None:
        require(
            0 < self.crop_scale_min <= 1,
            f"data.augment.crop_scale_min must lie in (0, 1], got {self.crop_scale_min}",
        )
        require(
            self.crop_ratio_max >= 1,
            f"data.augment.crop_ratio_max must be at least 1, got {self.crop_ratio_max}",
        )
        require(
            0 <= self.color_jitter < 1,
            f"data.augment.color_jitter must lie in [0, 1), got {self.color_jitter}",
        )


@dataclass(frozen=True)
class Source:
    """One shard folder among several to train on."""

    path: str
    """Folder, or an address that fsspec reads, such as s3://bucket/shards."""
    weight: float = 1.0
    """Pairs drawn from here, as a share of all sources' weights."""
    languages: tuple[Literal["zh", "en"], ...] = ()
    """Captions to read from here; empty takes all. Name a folder twice with different languages to
    weigh its languages."""

    def __post_init__(self) -> None:
        require(self.weight > 0, f"data.train: {self.path}: weight must be > 0, got {self.weight}")


@dataclass(frozen=True)
class Data:
    """Where pairs come from and how they become batches."""

    train: str | tuple[Source, ...] = "data/train"
    """Shard folder to train on, or a list of sources that are mixed by weight in every batch."""
    order: Literal["exact", "resampled"] = "exact"
    """exact: every pair of a source once before any comes again. resampled: shards are drawn with
    replacement."""
    cache: str | None = None
    """Folder for shards that are read from far away; the sources' addresses need it."""
    cache_gb: float = 100.0
    """Most that the cache holds, in 10^9 bytes; the least recently read shards go first."""
    batch_size: int = 128
    """Pairs per optimizer step, of all processes together."""
    workers: int = 0
    """Processes that read, decode and tokenise ahead; 0 does it in the training process."""
    max_bad_fraction: float = 0.01
    """Stop when more than this share of the pairs read so far could not be used."""
    resize_mode: Literal["squash", "shortest"] = "squash"
    """How pictures become square outside training, saved with the model: squash scales both sides
    (released M2-Encoder), shortest scales the shorter one and crops the centre (CLIP)."""
    augment: Augment = field(default_factory=Augment)
    """Random changes to training pictures."""

    def __post_init__(self) -> None:
        require(bool(self.train), "data.train is empty, expected a folder or a list of sources")
        is_list = isinstance(self.train, str) and self.train.lstrip().startswith("[")
        require(
            not is_list,
            f"data.train: no list of sources: {self.train}; each has a path, and may have a weight "
            f"and languages",
        )
        require(self.cache_gb > 0, f"data.cache_gb must be > 0, got {self.cache_gb}")
        require(self.batch_size >= 2, f"data.batch_size must be at least 2, got {self.batch_size}")
        require(self.workers >= 0, f"data.workers must not be negative, got {self.workers}")
        require(
            0 <= self.max_bad_fraction <= 1,
            f"data.max_bad_fraction must lie in [0, 1], got {self.max_bad_fraction}",
        )

    @property
    def train_sources(self) -> tuple[Source, ...]:
        """What `train` names, a single folder being one source."""
        return (Source(self.train),) if isinstance(self.train, str) else self.train


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: one that exists, or one trained on the captions of `data.train`."""

    path: str | None = None
    """An `sp.model` of ours (`m2enc tokenizer train`); None trains one."""
    vocab_size: int = 4000
    """Pieces to train at most."""
    truncation_side: Literal["left", "right"] = "left"
    """Which end of a too long text is dropped; left is the released behaviour."""
