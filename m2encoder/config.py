"""What a training run is made of, as frozen dataclasses; YAML and the command line fill them.

Standard library only. Not for reading files: m2encoder/cli/configuration.py does that.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from m2encoder.config_data import Augment, Data, Source, TokenizerConfig, require
from m2encoder.config_run import Evaluate, Guard, Init, Locked, Log, Save, TowersFrom
from m2encoder.model.architecture import Architecture

__all__ = [
    "Architecture", "Augment", "Data", "Evaluate", "Guard", "Init", "Locked", "Log", "Loss",
    "Objective", "Optim", "PretrainConfig", "Save", "Source", "TokenizerConfig", "TowersFrom",
]  # fmt: skip


@dataclass(frozen=True)
class Objective:
    """One term of the loss."""

    name: Literal["image-zh", "image-en", "zh-en"]
    """Contrastive loss between pictures and their captions in that language, or between the
    captions of both languages."""
    weight: float = 0.5
    """Factor in the sum of all terms."""

    def __post_init__(self) -> None:
        require(self.weight > 0, f"objective {self.name}: weight must be > 0, got {self.weight}")


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
        require(bool(is_grid), f"loss.grid is {self.grid!r}, expected auto or RxC, such as 2x4")
        require(
            self.group_ranks is None or self.group_ranks >= 1,
            f"loss.group_ranks must be at least 1, got {self.group_ranks}",
        )


@dataclass(frozen=True)
class Optim:
    """AdamW with linear warmup, then decay."""

    lr: float = 1e-3
    """Peak learning rate, reached after `warmup_steps`."""
    warmup_steps: int = 100
    """Optimizer steps of linear warmup."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After warmup. cosine falls to zero over the whole run. constant stays, and falls to zero in
    the cooldown, so that a run can be made longer."""
    cooldown: float = 0.2
    """Share of the steps, at the end, in which a constant rate falls to zero."""
    layer_decay: float = 1.0
    """Factor on the rate per layer below the last one; 1 trains all layers alike."""
    image_lr: float = 1.0
    """Factor on the rate of the image tower's own parameters."""
    text_lr: float = 1.0
    """Factor on the rate of the text tower's own parameters."""
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
        require(self.lr > 0, f"optim.lr must be positive, got {self.lr}")
        for name in ("warmup_steps", "weight_decay", "eps", "image_lr", "text_lr"):
            value = getattr(self, name)
            require(value >= 0, f"optim.{name} must not be negative, got {value}")
        for name in ("beta1", "beta2", "cooldown"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name} must lie in [0, 1), got {value}")
        require(
            0 < self.layer_decay <= 1,
            f"optim.layer_decay must lie in (0, 1], got {self.layer_decay}",
        )
        require(
            self.clip_grad_norm > 0, f"optim.clip_grad_norm must be > 0, got {self.clip_grad_norm}"
        )


@dataclass(frozen=True)
class PretrainConfig:
    """One training run. The resolved file in the run's folder reruns it."""

    model: Architecture = field(default_factory=Architecture)
    """Shape of the model; in YAML also the name of a preset."""
    towers: TowersFrom = field(default_factory=TowersFrom)
    """Towers of other libraries to train instead of our own."""
    init: Init = field(default_factory=Init)
    """Weights to start from."""
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
    locked: tuple[Locked, ...] = ()
    """Parameters that do not train, or not at first."""
    ema_decay: float | None = None
    """Keep a running mean of the weights with this decay, which is measured and exported; None
    keeps none."""
    interpolate: float | None = None
    """Export start + share x (trained - start), for models that start from others' weights
    (WiSE-FT, arXiv 2109.01903); None exports what was trained."""
    sharding: Literal["nnn", "ggg", "iii"] = "nnn"
    """Where parameters, gradients and optimizer state live, after PaRO (arXiv 2310.06003). nnn:
    whole on every process (DDP). ggg: split over all (FSDP). iii: split inside a group (HSDP)."""
    shard_ranks: int | None = None
    """Processes of a group of iii; None takes those of one machine."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the towers' matrix products. auto: bfloat16 on GPUs, float32 elsewhere. Weights, optimizer
    and loss are float32 always."""
    compile: bool = False
    """Compile the towers' blocks (torch.compile): slow to start, faster on GPUs."""
    checkpoint_activations: Literal["none", "selective", "full"] = "none"
    """Compute activations again in the backward pass instead of keeping them: all but the results
    of matrix products and attention, or all inside a block."""
    out: str = "runs/pretrain"
    """The run's folder: configuration, metrics, checkpoints and the exported model."""
    epochs: float = 10.0
    """Passes over the training pairs."""
    steps: int | None = None
    """Optimizer steps, instead of `epochs`."""
    seed: int = 0
    """Decides initial weights, order, crops and captions."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    """Measurements while training."""
    log: Log = field(default_factory=Log)
    """What is written down."""
    save: Save = field(default_factory=Save)
    """Checkpoints."""
    guard: Guard = field(default_factory=Guard)
    """What to do about numbers that are not finite, and about hangs."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest checkpoint in `out`; never refuses a folder that has one."""

    def __post_init__(self) -> None:
        require(bool(self.objectives), "objectives is empty, expected at least one")
        names = [objective.name for objective in self.objectives]
        require(len(set(names)) == len(names), f"objectives repeat a name: {', '.join(names)}")
        for name in ("patch_dropout", "unmasked_tail"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} must lie in [0, 1), got {value}")
        for name in ("steps", "accumulate", "shard_ranks"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        require(self.epochs > 0, f"epochs must be > 0, got {self.epochs:g}")
        for name in ("ema_decay", "interpolate"):
            value = getattr(self, name)
            require(value is None or 0 < value < 1, f"{name} must lie in (0, 1), got {value}")
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
