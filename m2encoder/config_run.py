"""The sections of a training run's settings around the model: start, save, measure, log, guard.

Standard library only. Not for data (config_data.py) nor for the whole (config.py).
"""

from dataclasses import dataclass
from typing import Literal

from m2encoder.config_data import require


@dataclass(frozen=True)
class TowersFrom:
    """Towers of other libraries instead of our own (m2encoder/towers.py)."""

    image: str | None = None
    """`timm:NAME` with its pretrained weights; None is our own tower."""
    text: str | None = None
    """`hf:REPO` or the folder of a transformers text model with its tokenizer; None is our own."""


@dataclass(frozen=True)
class Init:
    """Weights to start from instead of random ones; the run says what was taken."""

    image: str | None = None
    """Model folder or name that the image tower starts from."""
    text: str | None = None
    """Model folder or name that the text tower starts from. The same as `image`: shared layers,
    projections and logit_scale come along."""


@dataclass(frozen=True)
class Locked:
    """Parameters that do not train (LiT, arXiv 2111.07991)."""

    pattern: str
    """Shell pattern on parameter names, such as image.*"""
    until: float = 1.0
    """Share of the run's steps after which they train; 1 locks them for good."""

    def __post_init__(self) -> None:
        require(
            0 < self.until <= 1,
            f"locked {self.pattern}: until must lie in (0, 1], got {self.until}",
        )


@dataclass(frozen=True)
class Save:
    """Checkpoints: when, and which of them stay. SIGTERM and SIGUSR1 save too."""

    every_steps: int = 200
    """A checkpoint per so many steps, and at the end."""
    every_minutes: float | None = 30.0
    """And whenever the last is this old; None counts steps alone."""
    keep_last: int = 2
    """How many of the newest stay."""
    keep_every_steps: int | None = None
    """Those of every so many steps stay too."""
    export_every_steps: int | None = None
    """Write a model folder to `exports/` per so many steps."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last", "keep_every_steps", "export_every_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"save.{name} must be at least 1, got {value}")
        require(
            self.every_minutes is None or self.every_minutes > 0,
            f"save.every_minutes must be > 0, got {self.every_minutes}",
        )


@dataclass(frozen=True)
class Evaluate:
    """What is measured while training, on shards, and how often; always at the end as well."""

    data: str | None = None
    """Shard folder; None measures nothing."""
    candidates: int | None = None
    """Pairs to measure retrieval on, drawn with the seed; None takes all."""
    retrieval_every_epochs: float = 1.0
    """Retrieval in Chinese and English after every so many epochs."""
    zero_shot_every_epochs: float = 1.0
    """Zero-shot classification, where the folder has classes."""

    def __post_init__(self) -> None:
        for name in ("retrieval_every_epochs", "zero_shot_every_epochs"):
            value = getattr(self, name)
            require(value > 0, f"evaluate.{name} must be > 0, got {value}")


@dataclass(frozen=True)
class Log:
    """What a run writes down beside checkpoints; metrics.jsonl always."""

    every_steps: int = 10
    """One row per so many steps."""
    writers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where rows go too. wandb needs its extra."""
    samples: bool = False
    """Write the keys that every process trained on to `samples/`, a line per step."""

    def __post_init__(self) -> None:
        require(
            self.every_steps >= 1, f"log.every_steps must be at least 1, got {self.every_steps}"
        )


@dataclass(frozen=True)
class Guard:
    """When to stop trusting a run."""

    max_bad_steps: int = 3
    """A step whose loss or gradient is not finite is skipped; after so many in a row the run goes
    back to the last checkpoint's weights and on with the data after them."""
    hang_timeout_s: float = 600.0
    """Without progress for so long a run names the rank that is missing, and ends."""

    def __post_init__(self) -> None:
        require(
            self.max_bad_steps >= 1,
            f"guard.max_bad_steps must be at least 1, got {self.max_bad_steps}",
        )
        require(
            self.hang_timeout_s > 0, f"guard.hang_timeout_s must be > 0, got {self.hang_timeout_s}"
        )
