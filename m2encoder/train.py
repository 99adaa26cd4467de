"""The training loop: a model, a stream of batches and evaluators in, a run folder out.

It receives what it trains on and what it is measured by as arguments; cli/pretrain.py builds them.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from m2encoder.batch import Batch, BatchStream
from m2encoder.checkpoint import Progress, list_checkpoints, load_checkpoint, save_checkpoint
from m2encoder.config import PretrainConfig
from m2encoder.distributed import World
from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, DataError, FeatureError, M2EncoderError
from m2encoder.log import MetricsLog
from m2encoder.loss import make_loss
from m2encoder.objectives import Losses
from m2encoder.optim import learning_rate, make_optimizer
from m2encoder.training_step import StepSettings, Towers, backward_step

logger = logging.getLogger(__name__)

MAX_LOG_SCALE = math.log(100)  # CLIP (arXiv 2103.00020, section 2.5)

Evaluator = Callable[[Encoder], Mapping[str, float]]


def pretrain(
    cfg: PretrainConfig,
    encoder: Encoder,
    stream: BatchStream,
    evaluators: Mapping[str, Evaluator],
    *,
    world: World | None = None,
    show_progress: bool | None = None,
) -> dict[str, float]:
    """Train the encoder's model in place and return the last evaluation.

    evaluators: name to a function of the encoder; its values are logged as `eval/name/value`. Every
    process calls them at the same time, so that they can share the work.
    world: the processes that train together, each calling this with its share of the stream; None
    for this one alone. The first one writes metrics.jsonl and checkpoints/ in cfg.out, from where
    all resume: step n after a resume equals step n of a run that never stopped, to the bit.
    Raises DataError when too many pairs are unusable, CheckpointError when the folder's checkpoint
    does not fit, M2EncoderError on features or a loss that are not finite.
    """
    # --- setup ---
    model, out = encoder.model, Path(cfg.out)
    world = world or World(device=encoder.device)
    out.mkdir(parents=True, exist_ok=True)
    loss = make_loss(
        rank=world.rank,
        world_size=world.size,
        kind=cfg.loss.kind,
        grid=cfg.loss.grid,
        group_ranks=cfg.loss.group_ranks,
        wire_dtype=cfg.loss.wire_dtype,
    )
    settings = StepSettings(
        cfg.objectives, loss, cfg.loss.duplicates, cfg.accumulate, cfg.patch_dropout, cfg.seed
    )
    optimizer = make_optimizer(model, cfg.optim)
    steps_per_epoch = stream.steps_per_epoch
    total_steps = cfg.epochs * steps_per_epoch

    # --- resume ---
    progress = resume(cfg, model, optimizer, steps_per_epoch)
    show_progress = show_progress if world.is_first else False
    log = MetricsLog(out / "metrics.jsonl", from_step=progress.step) if world.is_first else None
    dropped, trained_s = progress.dropped, progress.seconds
    results: dict[str, float] = {}
    if progress.step >= total_steps:
        logger.info("this run is complete: %d of %d steps done", progress.step, total_steps)
        return evaluate(encoder, evaluators)

    # --- loop ---
    towers = world.wrap(Towers(model))
    unmasked_from = round(total_steps * (1 - cfg.unmasked_tail))
    bar = tqdm(
        stream.batches(progress.step, total_steps),
        desc="training",
        total=total_steps,
        initial=progress.step,
        unit="step",
        disable=None if show_progress is None else not show_progress,
    )
    samples_at_log, time_at_log, started_s = 0, time.perf_counter(), trained_s
    for step, batch in enumerate(bar, start=progress.step):
        model.train()
        newly_dropped = world.concatenated(batch.dropped)
        dropped += len(newly_dropped)
        samples = (step + 1) * cfg.data.batch_size
        check_dropped(newly_dropped, dropped, samples, cfg.data.max_bad_fraction, world)

        lr = learning_rate(step, total_steps=total_steps, settings=cfg.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        masked = cfg.patch_dropout if step < unmasked_from else 0.0
        settings = replace(settings, patch_dropout=masked)
        losses = guarded_step(towers, batch, settings, step, world)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_grad_norm)
        check_finite(step, losses.total, grad_norm, batch.keys)
        if losses.terms:  # else all processes' pairs together left nothing to compare
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, MAX_LOG_SCALE)
        samples_at_log += cfg.data.batch_size - len(newly_dropped)

        done = step + 1
        is_last = done == total_steps
        if log and (done % cfg.log_every_steps == 0 or is_last):
            elapsed_s = time.perf_counter() - time_at_log
            row = {
                "loss": losses.total.item(),
                **{name: value.item() for name, value in losses.terms.items()},
                "lr": lr,
                "grad_norm": grad_norm.item(),
                "logit_scale": model.logit_scale.exp().item(),
                "epoch": done / steps_per_epoch,
                "samples": samples,
                "dropped": dropped,
                "samples_per_s": samples_at_log / elapsed_s,
                "seconds": trained_s + elapsed_s,
            }
            log.write(done, row)
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['samples_per_s']:.0f} samples/s")
            trained_s += elapsed_s
            samples_at_log, time_at_log = 0, time.perf_counter()

        if world.is_first and bar.disable and (is_last or done % steps_per_epoch == 0):
            seconds = trained_s + time.perf_counter() - time_at_log
            left_s = (seconds - started_s) / (done - progress.step) * (total_steps - done)
            logger.info(
                "step %d of %d, epoch %.1f, loss %.3f, %.0f s, about %.0f s left",
                *(done, total_steps, done / steps_per_epoch, losses.total.item(), seconds, left_s),
            )

        if is_last or (done % (cfg.evaluate_every_epochs * steps_per_epoch) == 0):
            paused_at = time.perf_counter()
            results = evaluate(encoder, evaluators)
            if log and results:
                log.write(done, results)
            world.wait()
            time_at_log += time.perf_counter() - paused_at

        if is_last or done % cfg.save_every_steps == 0:
            seconds = trained_s + time.perf_counter() - time_at_log
            now = Progress(done, samples, dropped, seconds, steps_per_epoch)
            if world.is_first:
                save_checkpoint(out / "checkpoints", model, optimizer, now, cfg.keep_checkpoints)
            world.wait()
    return results


def guarded_step(
    towers: nn.Module, batch: Batch, settings: StepSettings, step: int, world: World
) -> Losses:
    """Add the batch's gradients; M2EncoderError naming step and sample where a feature is bad."""
    try:
        return backward_step(towers, batch, settings)
    except FeatureError as error:
        if error.row is None or error.rank is None:
            raise
        key = batch.keys[error.row] if world.rank == error.rank else ""
        key = world.share(key, source=error.rank)
        raise M2EncoderError(f"step {step}: {error}; it is pair {key!r}") from None


def resume(
    cfg: PretrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> Progress:
    """Load the newest checkpoint of cfg.out, if there is one, and return where to go on."""
    checkpoints = list_checkpoints(Path(cfg.out) / "checkpoints")
    if not checkpoints:
        return Progress(0, 0, 0, 0.0, steps_per_epoch)
    if cfg.resume == "never":
        raise CheckpointError(
            f"{cfg.out}: already holds {checkpoints[-1].name}; "
            f"choose another --out, or go on with --resume auto"
        )
    progress = load_checkpoint(checkpoints[-1], model, optimizer)
    consumed = progress.step * cfg.data.batch_size
    if (progress.steps_per_epoch, progress.samples) != (steps_per_epoch, consumed):
        raise CheckpointError(
            f"{checkpoints[-1]}: made with {progress.steps_per_epoch} steps per epoch and "
            f"{progress.samples} samples consumed, this run has {steps_per_epoch} and {consumed}; "
            f"use the same data and batch size, or another --out"
        )
    logger.info("resumed from %s", checkpoints[-1])
    return progress


def evaluate(encoder: Encoder, evaluators: Mapping[str, Evaluator]) -> dict[str, float]:
    """Run every evaluator on the model as it stands; returns `eval/name/value` to number."""
    encoder.model.eval()
    encoder.__dict__.pop("fingerprint", None)  # cached, and of earlier weights
    return {
        f"eval/{name}/{key}": value
        for name, run in evaluators.items()
        for key, value in run(encoder).items()
    }


def check_dropped(
    newly: list[tuple[str, str]],
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
        raise DataError(
            f"{dropped} of the first {samples} pairs could not be used, more than "
            f"data.max_bad_fraction {max_bad_fraction:g} allows; the last: {newly[-1][1]}"
        )


def check_finite(step: int, loss: torch.Tensor, grad_norm: torch.Tensor, keys: list[str]) -> None:
    """Raise M2EncoderError naming step and samples when loss or gradient is not finite."""
    if not (torch.isfinite(loss) and torch.isfinite(grad_norm)):
        raise M2EncoderError(
            f"step {step}: loss {loss.item()}, gradient norm {grad_norm.item()}, expected finite "
            f"numbers; the batch holds {', '.join(keys[:5])}, ...; lower optim.lr or check the data"
        )
