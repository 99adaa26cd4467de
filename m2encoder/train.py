"""The training loop: a model, a stream of batches and evaluators in, a run folder out.

It receives what it trains on and what it is measured by as arguments; cli/pretrain.py builds them.
Its parts: train_parts.py.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from m2encoder.batch import BatchStream
from m2encoder.blocks import prepare_blocks
from m2encoder.checkpoint import Checkpoints, Progress, TrainState
from m2encoder.config import PretrainConfig
from m2encoder.distributed import World
from m2encoder.ema import Ema
from m2encoder.encoder import Encoder
from m2encoder.errors import StoppedError
from m2encoder.locked import apply_locks, check_locks
from m2encoder.log import RunLog
from m2encoder.log_line import log_line
from m2encoder.loss import make_loss
from m2encoder.optim import learning_rate, make_optimizer, set_learning_rate
from m2encoder.profiling import profiled
from m2encoder.sharding import clip_grad_norm, shard, sync_plain_gradients
from m2encoder.signals import AskedToSave
from m2encoder.step_clock import StepClock, longest_waiting
from m2encoder.train_parts import (
    Cadence,
    Evaluator,
    Guardian,
    SampleLog,
    Utilisation,
    agree,
    check_dropped,
    clamp_scale,
    evaluate,
    facts_of,
    guarded_step,
    on_device,
    resume,
    steps_in_all,
    whole_encoder,
)
from m2encoder.training_step import StepSettings, Towers
from m2encoder.watchdog import Watchdog

logger = logging.getLogger(__name__)

Export = Callable[[Encoder, Path, Mapping[str, float]], None]


def pretrain(
    cfg: PretrainConfig,
    encoder: Encoder,
    stream: BatchStream,
    evaluators: Mapping[str, Evaluator],
    *,
    world: World | None = None,
    export: Export | None = None,
    profile: bool = False,
    show_progress: bool | None = None,
) -> dict[str, float]:
    """Train the encoder's model in place and return the last evaluation.

    evaluators: name to what is measured and how often; values are logged as `eval/name/value`.
    Every process calls them at the same time, so that they can share the work.
    world: the processes that train together, each calling this with its share of the stream; None
    for this one alone. They share the folder cfg.out, from where all resume: step n after a resume
    equals step n of a run that never stopped, to the bit with as many processes.
    export: called by the first process with the encoder as it is exported (the weights' running
    mean, or nearer to the start, where the configuration says so), a folder and the last results.
    profile: trace a few steps and log the largest costs.
    Raises DataError when too many pairs are unusable, CheckpointError when the folder's checkpoint
    does not fit or the last one cannot be written, StoppedError after a SIGTERM, M2EncoderError
    when numbers do not become finite again.
    """
    # --- setup ---
    model, out = encoder.model, Path(cfg.out)
    world = world or World(device=encoder.device)
    out.mkdir(parents=True, exist_ok=True)
    bfloat16 = cfg.precision == "bfloat16" or (cfg.precision, world.device.type) == ("auto", "cuda")
    total_steps = steps_in_all(cfg, stream)
    cadence = Cadence(cfg.data.batch_size, stream.pairs, total_steps)
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

    # --- model and optimizer ---
    start = None
    if cfg.interpolate is not None:
        start = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
    check_locks(model, cfg.locked)
    prepare_blocks(model, compile=cfg.compile, checkpoint_activations=cfg.checkpoint_activations)
    apply_locks(model, cfg.locked, step=0, total_steps=total_steps)

    def wrapped() -> torch.nn.Module:
        return shard(
            Towers(model, bfloat16=bfloat16),
            world,
            sharding=cfg.sharding,
            shard_ranks=cfg.shard_ranks,
            bfloat16=bfloat16,
        )

    towers = wrapped()
    optimizer = make_optimizer(model, cfg.optim)
    ema = None if cfg.ema_decay is None else Ema(model, cfg.ema_decay)

    def exported() -> Encoder:
        return whole_encoder(encoder, ema, start, cfg.interpolate)

    # --- resume ---
    state = TrainState(model, optimizer, ema)
    checkpoints = Checkpoints(
        out / "checkpoints",
        world,
        keep_last=cfg.save.keep_last,
        keep_every_steps=cfg.save.keep_every_steps,
    )
    progress = resume(cfg, checkpoints, state, stream.steps_per_epoch)
    if progress.step >= total_steps:
        logger.info("this run is complete: %d of %d steps done", progress.step, total_steps)
        whole = exported()
        results = evaluate(whole, evaluators)
        if export and world.is_first:
            export(whole, out / "model", results)
        return results
    dropped, trained_s = progress.dropped, progress.seconds
    results: dict[str, float] = {}
    clock, speed = StepClock(), Utilisation(model, world.device)
    guardian = Guardian(out, world, checkpoints, state, cfg.guard.max_bad_steps)
    sample_log = SampleLog(out, world, from_step=progress.step) if cfg.log.samples else None
    log = None
    if world.is_first:
        log = RunLog(
            out,
            from_step=progress.step,
            writers=cfg.log.writers,
            resolved_config=asdict(cfg),
            facts=facts_of(cfg, world, total_steps, bfloat16=bfloat16),
        )
    watchdog = Watchdog(out, world.rank, world.size, cfg.guard.hang_timeout_s)

    # --- loop ---
    unmasked_from = round(total_steps * (1 - cfg.unmasked_tail))
    batches = clock.batches(stream.batches(progress.step, total_steps))
    is_hidden = None if show_progress is None else not show_progress  # None: unless on a terminal
    bar = tqdm(
        profiled(batches, out) if profile and world.is_first else batches,
        desc="training",
        total=total_steps,
        initial=progress.step,
        unit="step",
        disable=is_hidden if world.is_first else True,
    )
    samples_at_log = 0
    saved_at = began_at = time.monotonic()
    with AskedToSave() as asked, log or nullcontext(), checkpoints, watchdog:
        watchdog.enter("waiting for data", progress.step)
        for step, batch in enumerate(bar, start=progress.step):
            watchdog.enter("training", step, batch.keys)
            model.train()
            if apply_locks(towers, cfg.locked, step=step, total_steps=total_steps):
                towers = wrapped() if cfg.sharding == "nnn" else towers
            speed.add(batch)
            with clock.transfer():
                batch = on_device(batch, world.device)
            is_old = cfg.save.every_minutes is not None and (
                time.monotonic() - saved_at > 60 * cfg.save.every_minutes
            )
            bad_pairs, wants_save, wants_stop = agree(
                world, len(batch.dropped), asked.save or (world.is_first and is_old), asked.stop
            )
            done, samples = step + 1, (step + 1) * cfg.data.batch_size
            if bad_pairs:
                newly_dropped = world.concatenated(batch.dropped)
                dropped += bad_pairs
                limit = cfg.data.max_bad_fraction
                check_dropped(newly_dropped, dropped, samples, limit, world)

            lr = learning_rate(step, total_steps=total_steps, settings=cfg.optim)
            set_learning_rate(optimizer, lr)
            optimizer.zero_grad()
            masked = cfg.patch_dropout if step < unmasked_from else 0.0
            settings = replace(settings, patch_dropout=masked)
            trouble, losses = guarded_step(towers, batch, settings, world)
            grad_norm = torch.zeros(())
            if losses is not None:
                sync_plain_gradients(towers, world)
                grad_norm = clip_grad_norm(model.parameters(), cfg.optim.clip_grad_norm)
                trouble = guardian.judge(losses.total, grad_norm)
            if trouble is not None:
                losses = None
                guardian.bad(step, trouble, batch, log)
            elif losses is not None and losses.terms:  # else nobody had anything to compare
                optimizer.step()
                clamp_scale(model)
                if ema is not None:
                    ema.update()
                guardian.good()
            if sample_log is not None:
                sample_log.write(done, batch.keys)
            samples_at_log += cfg.data.batch_size - bad_pairs

            # --- write down ---
            is_last = done == total_steps
            if done % cfg.log.every_steps == 0 or is_last:
                trained_s += clock.seconds
                row = longest_waiting(clock.row(samples_at_log, world.size), world)
                samples_at_log = 0
                if log is not None:
                    if losses is not None:  # it was not skipped
                        row |= {"loss": losses.total.item(), "grad_norm": grad_norm.item()}
                        row |= {name: value.item() for name, value in losses.terms.items()}
                    row |= {
                        "lr": lr,
                        "logit_scale": model.logit_scale.exp().item(),
                        "epoch": cadence.epochs(done),
                        "samples": samples,
                        "dropped": dropped,
                        "seconds": trained_s,
                    }
                    row |= speed.row(row["samples_per_s_per_device"], masked)
                    log.write(done, row)
                    left_s = (time.monotonic() - began_at) / (done - progress.step)
                    left_s *= total_steps - done
                    if losses is not None:
                        bar.set_postfix_str(
                            f"loss {row['loss']:.3f}, {row['samples_per_s']:.0f} samples/s"
                        )
                    if bar.disable:
                        said = log_line(row, step=done, total_steps=total_steps, left_s=left_s)
                        logger.info("%s", said)

            # --- measure ---
            due = {n: e for n, e in evaluators.items() if cadence.is_due(done, e.every_epochs)}
            if due:
                with clock.paused(), watchdog.paused("evaluating", done):
                    measured = evaluate(exported(), due)
                    results |= measured
                    if log is not None and measured:
                        log.write(done, measured)
                    world.wait()

            # --- save ---
            failure = checkpoints.poll()
            if log is not None:
                log.saved(checkpoints.completed, stall_s=checkpoints.stall_s)
                if failure is not None:
                    log.event(done, "save failed", reason=failure)
            is_due = wants_save or done % cfg.save.every_steps == 0
            # not among bad steps: going back must lead to weights that gave a good one
            if is_last or wants_stop or (is_due and trouble is None):
                with clock.paused(), watchdog.paused("saving", done):
                    seconds = trained_s + clock.seconds
                    now = Progress(done, samples, dropped, seconds, stream.steps_per_epoch)
                    checkpoints.save(state, now, wait=bool(is_last or wants_stop))
                    saved_at, asked.save = time.monotonic(), False
            if wants_stop and not is_last:
                if log is not None:
                    log.saved(checkpoints.completed, stall_s=checkpoints.stall_s)
                raise StoppedError(
                    f"stopped by SIGTERM after step {done} of {total_steps}, which is saved; "
                    f"the same command goes on from there"
                )
            exporting = cfg.save.export_every_steps
            if export and exporting and done % exporting == 0 and not is_last:
                with clock.paused(), watchdog.paused("exporting", done):
                    whole = exported()
                    if world.is_first:
                        export(whole, out / f"exports/step-{done:08d}", results)
                    world.wait()
            watchdog.enter("waiting for data", done)

    # --- end ---
    if export:
        whole = exported()
        if world.is_first:
            export(whole, out / "model", results)
    if log is not None:
        log.saved(checkpoints.completed, stall_s=checkpoints.stall_s)
        log.event(total_steps, "finished")
    return results
