"""What a training run is made of, as frozen dataclasses; YAML and the command line fill them.

Standard library only. Not for reading files: m2encoder/cli/configuration.py does that.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from m2encoder.errors import ConfigError
from m2encoder.model.architecture import Architecture


def _require(ok: bool, message: str) -> None:
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
        _require(
            0 < self.crop_scale_min <= 1,
            f"data.augment.crop_scale_min must lie in (0, 1], got {self.crop_scale_min}",
        )
        _require(
            self.crop_ratio_max >= 1,
            f"data.augment.crop_ratio_max must be at least 1, got {self.crop_ratio_max}",
        )
        _require(
            0 <= self.color_jitter < 1,
            f"data.augment.color_jitter must lie in [0, 1), got {self.color_jitter}",
        )


@dataclass(frozen=True)
class Data:
    """Where pairs come from and how they become batches."""

    train: str = "data/train"
    """Shard folder to train on."""
    evaluate: str | None = None
    """Shard folder to evaluate on after each epoch; None evaluates nothing."""
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
        _require(self.batch_size >= 2, f"data.batch_size must be at least 2, got {self.batch_size}")
        _require(self.workers >= 0, f"data.workers must not be negative, got {self.workers}")
        _require(
            0 <= self.max_bad_fraction <= 1,
            f"data.max_bad_fraction must lie in [0, 1], got {self.max_bad_fraction}",
        )


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: one that exists, or one trained on the captions of `data.train`."""

    path: str | None = None
    """An `sp.model` of ours (`m2enc tokenizer train`); None trains one."""
    vocab_size: int = 4000
    """Pieces to train at most."""
    truncation_side: Literal["left", "right"] = "left"
    """Which end of a too long text is dropped; left is the released behaviour."""


@dataclass(frozen=True)
class Objective:
    """One term of the loss."""

    name: Literal["image-zh", "image-en", "zh-en"]
    """Contrastive loss between pictures and their captions in that language, or between the
    captions of both languages."""
    weight: float = 0.5
    """Factor in the sum of all terms."""

    def __post_init__(self) -> None:
        _require(self.weight > 0, f"objective {self.name}: weight must be > 0, got {self.weight}")


@dataclass(frozen=True)
class Loss:
    """How the objectives compare a batch, and among which processes (m2encoder/loss.py)."""

    kind: Literal["infonce", "sigmoid"] = "infonce"
    """infonce: softmax over all candidates (CLIP). sigmoid: each pair by itself (SigLIP), with a
    learned bias."""
    grid: str = "auto"
    """RxC: rows and columns of processes, for example 2x4; exact whatever the shape. auto sends
    least between nodes."""
    group_ranks: int | None = None
    """Processes that share negatives, M2-Encoder's grouped aggregation: fewer negatives, less
    traffic. None: all of them, exact."""
    wire_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision that features travel in; gradients travel in float32."""
    duplicates: Literal["mask", "keep"] = "mask"
    """mask: pairs with the same caption are not negatives of each other. keep: they are."""

    def __post_init__(self) -> None:
        is_grid = re.fullmatch(r"auto|[1-9]\d*x[1-9]\d*", self.grid)
        _require(bool(is_grid), f"loss.grid is {self.grid!r}, expected auto or RxC, such as 2x4")
        _require(
            self.group_ranks is None or self.group_ranks >= 1,
            f"loss.group_ranks must be at least 1, got {self.group_ranks}",
        )


@dataclass(frozen=True)
class Optim:
    """AdamW with linear warmup and cosine decay to zero."""

    lr: float = 1e-3
    """Peak learning rate, reached after `warmup_steps`."""
    warmup_steps: int = 100
    """Optimizer steps of linear warmup."""
    weight_decay: float = 0.1
    """Decoupled; never on norms, biases, positions, CLS token and logit_scale."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.98
    """Decay of the squared gradient's running mean."""
    eps: float = 1e-6
    """Added to the denominator of the update."""
    clip_grad_norm: float = 1.0
    """Scale gradients down to this global norm."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optim.lr must be positive, got {self.lr}")
        for name in ("warmup_steps", "weight_decay", "eps"):
            value = getattr(self, name)
            _require(value >= 0, f"optim.{name} must not be negative, got {value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optim.{name} must lie in [0, 1), got {value}")
        _require(
            self.clip_grad_norm > 0, f"optim.clip_grad_norm must be > 0, got {self.clip_grad_norm}"
        )


@dataclass(frozen=True)
class PretrainConfig:
    """One training run. The resolved file in the run's folder reruns it."""

    model: Architecture = field(default_factory=Architecture)
    """Shape of the model; in YAML also the name of a preset."""
    data: Data = field(default_factory=Data)
    """Pairs and batches."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Text to ids."""
    objectives: tuple[Objective, ...] = (Objective("image-zh"), Objective("image-en"))
    """Terms of the loss."""
    loss: Loss = field(default_factory=Loss)
    """How the terms are computed."""
    accumulate: int = 1
    """Micro-batches per optimizer step: only one is held with its activations at a time. The result
    is that of the whole batch at once, unless a tower has batch normalisation, which sees micro-
    batches; each tower runs forward twice."""
    patch_dropout: float = 0.0
    """Share of a picture's patches that training leaves out (FLIP)."""
    unmasked_tail: float = 0.05
    """Share of the steps, at the end, that see whole pictures again."""
    optim: Optim = field(default_factory=Optim)
    """The optimizer and its schedule."""
    out: str = "runs/pretrain"
    """The run's folder: configuration, metrics, checkpoints and the exported model."""
    epochs: int = 10
    """Passes over the training pairs."""
    seed: int = 0
    """Decides initial weights, order, crops and captions."""
    evaluate_every_epochs: int = 1
    """Evaluate after every so many epochs, and at the end."""
    evaluate_candidates: int | None = None
    """Pairs to evaluate retrieval on, drawn with the seed; None takes all."""
    log_every_steps: int = 10
    """One row in metrics.jsonl per so many steps."""
    save_every_steps: int = 200
    """A checkpoint per so many steps, and at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest checkpoint in `out`; never refuses a folder that has one."""

    def __post_init__(self) -> None:
        _require(bool(self.objectives), "objectives is empty, expected at least one")
        names = [objective.name for objective in self.objectives]
        _require(len(set(names)) == len(names), f"objectives repeat a name: {', '.join(names)}")
        for name in ("patch_dropout", "unmasked_tail"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} must lie in [0, 1), got {value}")
        at_least_one = ("epochs", "evaluate_every_epochs", "log_every_steps", "save_every_steps")
        for name in (*at_least_one, "keep_checkpoints", "accumulate"):
            _require(
                getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}"
            )
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
