"""The training loop: a model, a stream of batches and evaluators in, a run folder out.

It receives what it trains on and what it is measured by as arguments; cli/pretrain.py builds them.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from m2encoder.batch import BatchStream
from m2encoder.checkpoint import Progress, list_checkpoints, load_checkpoint, save_checkpoint
from m2encoder.config import PretrainConfig
from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, DataError, M2EncoderError
from m2encoder.log import MetricsLog
from m2encoder.objectives import compute_losses
from m2encoder.optim import learning_rate, make_optimizer

logger = logging.getLogger(__name__)

MAX_LOG_SCALE = math.log(100)  # CLIP (arXiv 2103.00020, section 2.5)

Evaluator = Callable[[Encoder], Mapping[str, float]]


def pretrain(
    cfg: PretrainConfig,
    encoder: Encoder,
    stream: BatchStream,
    evaluators: Mapping[str, Evaluator],
    *,
    show_progress: bool | None = None,
) -> dict[str, float]:
    """Train the encoder's model in place and return the last evaluation.

    evaluators: name to a function of the encoder; its values are logged as `eval/name/value`.
    Writes metrics.jsonl and checkpoints/ in cfg.out. Resumes there: step n after a resume equals
    step n of a run that never stopped, to the bit. Raises DataError when too many pairs are
    unusable, CheckpointError when the folder's checkpoint does not fit, M2EncoderError on a loss
    that is not finite.
    """
    # --- setup ---
    model, out = encoder.model, Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    optimizer = make_optimizer(model, cfg.optim)
    steps_per_epoch = stream.steps_per_epoch
    total_steps = cfg.epochs * steps_per_epoch

    # --- resume ---
    progress = resume(cfg, model, optimizer, steps_per_epoch)
    log = MetricsLog(out / "metrics.jsonl", from_step=progress.step)
    dropped, trained_s = progress.dropped, progress.seconds
    results: dict[str, float] = {}
    if progress.step >= total_steps:
        logger.info("this run is complete: %d of %d steps done", progress.step, total_steps)
        return evaluate(encoder, evaluators)

    # --- loop ---
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
        dropped += len(batch.dropped)
        samples = (step + 1) * cfg.data.batch_size
        check_dropped(batch.dropped, dropped, samples, cfg.data.max_bad_fraction)

        lr = learning_rate(step, total_steps=total_steps, settings=cfg.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = compute_losses(model, batch, cfg.objectives)
        optimizer.zero_grad()
        losses.total.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_grad_norm)
        check_finite(step, losses.total, grad_norm, batch.keys)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_LOG_SCALE)
        samples_at_log += len(batch.keys)

        done = step + 1
        is_last = done == total_steps
        if done % cfg.log_every_steps == 0 or is_last:
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

        if bar.disable and (is_last or done % steps_per_epoch == 0):
            seconds = trained_s + time.perf_counter() - time_at_log
            left_s = (seconds - started_s) / (done - progress.step) * (total_steps - done)
            logger.info(
                "step %d of %d, epoch %.1f, loss %.3f, %.0f s, about %.0f s left",
                *(done, total_steps, done / steps_per_epoch, losses.total.item(), seconds, left_s),
            )

        if is_last or (done % (cfg.evaluate_every_epochs * steps_per_epoch) == 0):
            paused_at = time.perf_counter()
            results = evaluate(encoder, evaluators)
            if results:
                log.write(done, results)
            time_at_log += time.perf_counter() - paused_at

        if is_last or done % cfg.save_every_steps == 0:
            seconds = trained_s + time.perf_counter() - time_at_log
            now = Progress(done, samples, dropped, seconds, steps_per_epoch)
            save_checkpoint(out / "checkpoints", model, optimizer, now, cfg.keep_checkpoints)
    return results


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
    newly: list[tuple[str, str]], dropped: int, samples: int, max_bad_fraction: float
) -> None:
    """Log each unusable pair; raise DataError when they are more than the stated share.

    One bad pair is forgiven however early it comes, unless the share is 0.
    """
    for _, reason in newly:
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
