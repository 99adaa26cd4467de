"""What the training loop is made of: when things are due, what a bad step leads to, whole weights.

Not the loop itself (train.py).
"""

import copy
import json
import logging
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2encoder import __version__
from m2encoder.bad_steps import BadSteps, write_bad_samples
from m2encoder.batch import Batch, BatchStream, Captions
from m2encoder.checkpoint import Checkpoints, Progress, TrainState
from m2encoder.config import PretrainConfig
from m2encoder.distributed import World
from m2encoder.ema import Ema
from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, DataError, FeatureError, M2EncoderError
from m2encoder.flops import mfu, training_flops
from m2encoder.interpolate import interpolate
from m2encoder.log import MetricsLog, RunLog
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.objectives import Losses
from m2encoder.patch_dropout import num_kept
from m2encoder.sharding import evaluation_model
from m2encoder.training_step import StepSettings, backward_step

logger = logging.getLogger(__name__)

MAX_LOG_SCALE = math.log(100)  # CLIP (arXiv 2103.00020, section 2.5)


class Evaluator(NamedTuple):
    """Something to measure while training."""

    run: Callable[[Encoder], Mapping[str, float]]
    every_epochs: float = 1.0


def steps_in_all(cfg: PretrainConfig, stream: BatchStream) -> int:
    """Return the optimizer steps of the whole run: those asked for, or the epochs' full batches."""
    return cfg.steps or max(1, int(cfg.epochs * stream.pairs) // cfg.data.batch_size)


class Cadence(NamedTuple):
    """When something that comes every so many epochs is due; always after the last step."""

    batch_size: int
    pairs: int
    total_steps: int

    def epochs(self, done: int) -> float:
        """Passes over the data after `done` steps."""
        return done * self.batch_size / self.pairs

    def is_due(self, done: int, every_epochs: float) -> bool:
        """Whether step `done` (counted from 1) is the first with another multiple behind it."""
        if done == self.total_steps:
            return True
        periods = [self.epochs(n) / every_epochs + 1e-9 for n in (done - 1, done)]
        return math.floor(periods[1]) > math.floor(periods[0])


def agree(world: World, *numbers: float) -> list[int]:
    """Return the sums of whole numbers over all ranks: how many dropped, who wants what."""
    if world.size == 1:
        return [int(number) for number in numbers]
    total = torch.tensor([int(number) for number in numbers])
    dist.all_reduce(total)  # on the CPU, so that no GPU is waited for
    return total.tolist()


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with what the towers take on the device; the rest stays."""
    if device.type == "cpu":
        return batch
    captions = {
        language: Captions(*(tensor.to(device, non_blocking=True) for tensor in each))
        for language, each in batch.captions.items()
    }
    pixels = batch.pixels.to(device, non_blocking=True)
    return replace(batch, pixels=pixels, captions=captions)


def clamp_scale(model: nn.Module) -> None:
    """Keep the similarity's scale at most 100, as CLIP does."""
    with torch.no_grad():
        model.logit_scale.clamp_(0, MAX_LOG_SCALE)  # pyright: ignore[reportCallIssue]


def facts_of(
    cfg: PretrainConfig, world: World, total_steps: int, *, bfloat16: bool
) -> dict[str, str | int]:
    """Return what a start of the run runs on."""
    gpu = world.device.type == "cuda"
    return {
        "world_size": world.size,
        "total_steps": total_steps,
        "sharding": cfg.sharding,
        "precision": "bfloat16" if bfloat16 else "float32",
        "device": torch.cuda.get_device_name(world.device) if gpu else platform.machine(),
        "versions": f"m2encoder {__version__}, torch {torch.__version__}",
    }


# --- bad steps -----------------------------------------------------------------------------------


class Trouble(NamedTuple):
    """Why a step cannot be used; the same on every rank."""

    reason: str
    rank: int | None = None
    row: int | None = None
    """Of that rank's share."""


def guarded_step(
    towers: nn.Module, batch: Batch, settings: StepSettings, world: World
) -> tuple[Trouble | None, Losses | None]:
    """Add the batch's gradients; where a feature is not finite say whose instead."""
    try:
        return None, backward_step(towers, batch, settings)
    except FeatureError as error:
        if error.row is None or error.rank is None:
            raise
        key = batch.keys[error.row] if world.rank == error.rank else ""
        key = world.share(key, source=error.rank)
        return Trouble(f"{error}; it is pair {key!r}", error.rank, error.row), None


class Guardian:
    """Skips steps that are not finite, and after some in a row goes back to the last checkpoint.

    The data goes on: what came between is passed over.
    """

    def __init__(
        self, out: Path, world: World, checkpoints: Checkpoints, state: TrainState, limit: int
    ) -> None:
        self._out, self._world = out, world
        self._checkpoints, self._state = checkpoints, state
        self._count = BadSteps(limit)
        self._limit = limit
        self._is_rewound = False  # and no step was good since

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Trouble | None:
        """Return what is wrong with a step, None where loss and gradient are finite."""
        if torch.isfinite(loss) and torch.isfinite(grad_norm):
            return None
        return Trouble(f"loss {loss.item():g}, gradient norm {grad_norm.item():g}")

    def good(self) -> None:
        """Say that a step was used."""
        self._count.good()
        self._is_rewound = False

    def bad(self, step: int, trouble: Trouble, batch: Batch, log: RunLog | None) -> None:
        """Keep the samples of a step that is not used; go back when it is one too many.

        Raises M2EncoderError when there is nothing to go back to, or going back did not help.
        """
        world, reason = self._world, trouble.reason
        if trouble.rank in (None, world.rank):
            rows = None if trouble.row is None else [trouble.row]
            write_bad_samples(self._out, step, world.rank, batch, rows, reason)
        where = f"{self._out}/bad-steps/step-{step:08d}"
        who = ""
        if trouble.rank is None:
            who = f"; the batch holds {', '.join(batch.keys[:5])}, ..."
        if log is not None:
            logger.warning("step %d: %s%s; skipped, see %s", step, reason, who, where)
            log.event(step, "bad step", reason=reason, rank=trouble.rank)
        if not self._count.bad():
            return
        newest = self._checkpoints.latest()
        if newest is None or self._is_rewound:
            why = "no checkpoint to go back to" if newest is None else "going back did not help"
            raise M2EncoderError(
                f"step {step}: {reason}; {self._limit} steps in a row were not finite and {why}; "
                f"lower optim.lr or check the data, samples in {where}"
            )
        back = self._checkpoints.load(newest, self._state)
        self._is_rewound = True
        if log is not None:
            logger.warning(
                "step %d: %d steps in a row were not finite; weights of step %d again, the data "
                "goes on",
                *(step, self._limit, back.step),
            )
            log.event(step, "rewound", to_step=back.step)


def check_dropped(
    newly: Sequence[tuple[str, str]],
    dropped: int,
    samples: int,
    max_bad_fraction: float,
    world: World,
) -> None:
    """Log each unusable pair; raise DataError when they are more than the stated share.

    One bad pair is forgiven however early it comes, unless the share is 0.
    """
    for _, reason in newly if world.is_first else ():
        logger.warning("dropped: %s", reason)
    if newly and dropped > max(1.0 * (max_bad_fraction > 0), max_bad_fraction * samples):
        listed = "; ".join(reason for _, reason in newly[-5:])
        raise DataError(
            f"{dropped} of the first {samples} pairs could not be used, more than "
            f"data.max_bad_fraction {max_bad_fraction:g} allows; the last: {listed}"
        )


# --- resuming and measuring ----------------------------------------------------------------------


def resume(
    cfg: PretrainConfig, checkpoints: Checkpoints, state: TrainState, steps_per_epoch: int
) -> Progress:
    """Load the newest checkpoint, if there is one, and return where to go on."""
    newest = checkpoints.latest()
    if newest is None:
        return Progress(0, 0, 0, 0.0, steps_per_epoch)
    if cfg.resume == "never":
        raise CheckpointError(
            f"{cfg.out}: already holds {newest.name}; "
            f"choose another --out, or go on with --resume auto"
        )
    progress = checkpoints.load(newest, state)
    consumed = progress.step * cfg.data.batch_size
    if (progress.steps_per_epoch, progress.samples) != (steps_per_epoch, consumed):
        raise CheckpointError(
            f"{newest}: made with {progress.steps_per_epoch} steps per epoch and "
            f"{progress.samples} samples consumed, this run has {steps_per_epoch} and {consumed}; "
            f"use the same data and batch size, or another --out"
        )
    logger.info("resumed from %s", newest)
    return progress


@torch.no_grad()
def whole_encoder(
    encoder: Encoder, ema: Ema | None, start: Mapping[str, Tensor] | None, share: float | None
) -> Encoder:
    """Return the encoder with the weights that are measured and exported, whole on every rank.

    All ranks call this. The encoder itself where it holds them already.
    """
    model = evaluation_model(encoder.model, ema)
    if start is not None and share is not None:
        model = copy.deepcopy(model) if model is encoder.model else model
        model.load_state_dict(interpolate(start, model.state_dict(), share))
    if model is encoder.model:
        return encoder
    return Encoder(model, encoder.image_processor, encoder.tokenizer, name=encoder.name)


def evaluate(encoder: Encoder, evaluators: Mapping[str, Evaluator]) -> dict[str, float]:
    """Run every evaluator on the model as it stands; returns `eval/name/value` to number.

    What an evaluator's own name has after a space is left out: two measures of one data set.
    """
    encoder.model.eval()
    encoder.__dict__.pop("fingerprint", None)  # cached, and of earlier weights
    return {
        f"eval/{name.split(' ')[0]}/{key}": value
        for name, evaluator in evaluators.items()
        for key, value in evaluator.run(encoder).items()
    }


# --- writing down --------------------------------------------------------------------------------


class SampleLog:
    """The keys that this rank trained on, a line per step, in OUT/samples."""

    def __init__(self, out: Path, world: World, *, from_step: int) -> None:
        folder = out / "samples"
        if world.is_first:
            folder.mkdir(exist_ok=True)
            for path in folder.glob("rank-*.jsonl"):  # also those of more ranks than there are now
                MetricsLog(path, from_step=from_step)
        world.wait()
        self._path = folder / f"rank-{world.rank:05d}.jsonl"

    def write(self, done: int, keys: Sequence[str]) -> None:
        """Append the keys of the step that is done."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": done, "keys": list(keys)}, ensure_ascii=False) + "\n")


class Utilisation:
    """What share of the GPU's best the run reaches (MFU), from the lengths of what it sees."""

    def __init__(self, model: M2Encoder, device: torch.device) -> None:
        self._model = model
        self._device = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        self._tokens: dict[str, int] = {}
        self._pairs = 0

    def add(self, batch: Batch) -> None:
        """Count a batch."""
        if self._device is None:
            return
        self._pairs += len(batch.keys)
        for language, captions in batch.captions.items():
            self._tokens[language] = self._tokens.get(language, 0) + int(captions.mask.sum())

    def row(self, pairs_per_s: float, patch_dropout: float) -> dict[str, float]:
        """Return {"mfu": share} since the last call; nothing on a CPU or an unknown GPU."""
        if self._device is None or not self._pairs:
            return {}
        lengths = [tokens / self._pairs for tokens in self._tokens.values()]
        patches = self._model.config.architecture.grid**2
        kept = num_kept(patches, patch_dropout) if patch_dropout else None
        flops = training_flops(self._model, text_lengths=lengths, kept_patches=kept)
        self._tokens, self._pairs = {}, 0
        share = mfu(pairs_per_s, flops, self._device)
        return {} if share is None else {"mfu": share}
