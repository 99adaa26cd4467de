"""What a run would do, as text: `m2enc pretrain --dry-run`. Needs no GPU, tokenizer or weights.

Not for what a step costs (step_costs.py, flops.py), which this writes down.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch

from m2encoder.config import PretrainConfig
from m2encoder.distributed import World, ranks_per_machine
from m2encoder.errors import ConfigError
from m2encoder.flops import training_flops
from m2encoder.grid import Placement, place
from m2encoder.locked import apply_locks, check_locks
from m2encoder.model.configuration_m2encoder import M2EncoderConfig
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.objectives import languages_of
from m2encoder.patch_dropout import num_kept
from m2encoder.sharding import check_sharding
from m2encoder.step_costs import Sizes, Work, gibibytes, memory, sent_bytes

WIRE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def plan(
    cfg: PretrainConfig,
    *,
    config_text: str,
    pairs: int | None,
    data_lines: Sequence[str] = (),
    world_size: int = 1,
    local_world_size: int | None = None,
) -> str:
    """Return resolved configuration, sizes, memory, bytes sent, steps, samples and shard plan.

    config_text: the configuration as YAML. pairs, data_lines: of the training stream; None where
    the data is not there. local_world_size: processes of one machine, by default what torchrun
    says, else all.
    Raises PlacementError where processes cannot be arranged as asked, ConfigError where they cannot
    share a batch or a lock matches nothing.
    """
    local = local_world_size or ranks_per_machine(World(0, world_size))
    if cfg.data.batch_size % world_size:
        raise ConfigError(
            f"data.batch_size {cfg.data.batch_size} is no multiple of the {world_size} processes; "
            f"choose another"
        )
    check_sharding(cfg.sharding, world_size, shard_ranks=cfg.shard_ranks, local_world_size=local)
    placement = place(
        0,
        world_size,
        grid=cfg.loss.grid,
        group_ranks=cfg.loss.group_ranks,
        ranks_per_node=local,
    )
    machines = -(-world_size // local)
    lines = [
        config_text.rstrip(),
        "---",
        f"processes: {world_size} on {machines} machine{'s' if machines > 1 else ''}, "
        f"sharding {cfg.sharding}, loss on a grid of {placement.rows}x{placement.columns}",
    ]
    foreign = [name for name in (cfg.towers.image, cfg.towers.text) if name is not None]
    if foreign:
        lines.append(
            f"parameters, memory: known once {' and '.join(foreign)} "
            f"{'are' if len(foreign) > 1 else 'is'} read, when the run starts"
        )
    else:
        lines += _size_lines(cfg, placement, world_size, local)
    return "\n".join([*lines, *_step_lines(cfg, pairs), *(f"data: {x}" for x in data_lines)])


def _size_lines(
    cfg: PretrainConfig, placement: Placement, world_size: int, local: int
) -> list[str]:
    model = meta_model(cfg)
    sizes = Sizes.of(model)
    check_locks(model, cfg.locked)
    forever = [lock for lock in cfg.locked if lock.until >= 1]
    apply_locks(model, forever, step=0, total_steps=1)
    trained = Sizes.of(model)
    shape, work = model.config.architecture, _work(cfg, world_size, local)
    parts = {
        **{f"{part} tower": sizes.all[part] for part in ("image", "text")},
        "shared layers": sizes.all["shared"],
        "projections and scale": sizes.all["rest"],
    }
    lines = [
        f"parameters: {sizes.total:,} ("
        + ", ".join(f"{name} {count:,}" for name, count in parts.items())
        + ")"
    ]
    if cfg.locked:
        stages = (f"{lock.pattern} for {lock.until:.0%} of the steps" for lock in cfg.locked)
        lines.append(
            f"locked: {', '.join(stages)}; {trained.total_trained:,} parameters train in the end"
        )
    found = memory(shape, trained, work, placement)
    items = ", ".join(f"{name} {count / 2**30:.2f}" for name, count in found.items())
    lines.append(f"memory per process, estimated: {gibibytes(found.values()):.2f} GiB ({items})")
    lines.append(
        f"  for {work.pictures_at_once:,} pictures of {work.image_tokens} tokens and "
        f"{work.captions_at_once:,} captions of {work.text_tokens} at once, in "
        f"{'bfloat16' if work.bfloat16 else 'float32'}, activations kept: "
        f"{_kept(cfg.checkpoint_activations)}"
    )
    wire = WIRE_BYTES[cfg.loss.wire_dtype]
    sent = sent_bytes(trained, work, placement, dim=shape.projection_dim, wire_bytes=wire)
    items = ", ".join(f"{name} {count / 1e9:.3f}" for name, count in sent.items())
    lines.append(f"sent per process and step: {sum(sent.values()) / 1e9:.3f} GB ({items})")
    lengths = [float(work.text_tokens)] * work.languages
    flops = training_flops(model, text_lengths=lengths, kept_patches=work.image_tokens - 1)
    lines.append(
        f"computed per pair: {flops / 1e9:,.1f} GFLOP, per process and step: "
        f"{flops * work.pairs / 1e12:,.2f} TFLOP (texts at full length)"
    )
    return lines


def meta_model(cfg: PretrainConfig) -> M2Encoder:
    """Return the model that a run trains, without memory; its towers must be our own.

    Without a tokenizer file the vocabulary is the most that will be trained.
    """
    shape = cfg.model
    if cfg.tokenizer.path is None:
        shape = replace(shape, vocab_size=cfg.tokenizer.vocab_size)
    with torch.device("meta"):
        return M2Encoder(
            M2EncoderConfig(**asdict(shape), has_logit_bias=cfg.loss.kind == "sigmoid")
        )


def _work(cfg: PretrainConfig, world_size: int, local: int) -> Work:
    group = {"nnn": 1, "ggg": world_size, "iii": cfg.shard_ranks or local}[cfg.sharding]
    patches = cfg.model.grid**2
    patches = num_kept(patches, cfg.patch_dropout)
    on_gpu = torch.cuda.is_available()
    return Work(
        sharding=cfg.sharding if world_size > 1 else "nnn",
        world_size=world_size,
        group_ranks=min(group, world_size),
        bfloat16=cfg.precision == "bfloat16" or (cfg.precision == "auto" and on_gpu),
        checkpoint_activations=cfg.checkpoint_activations,
        pairs=cfg.data.batch_size // world_size,
        accumulate=cfg.accumulate,
        languages=len(languages_of(cfg.objectives)),
        image_tokens=1 + patches,
        text_tokens=cfg.model.max_text_length,
        ema=cfg.ema_decay is not None,
    )


def _kept(checkpoint_activations: str) -> str:
    return {
        "none": "all",
        "selective": "matrix products and attention",
        "full": "what enters each block",
    }[checkpoint_activations]


def _step_lines(cfg: PretrainConfig, pairs: int | None) -> list[str]:
    batch = cfg.data.batch_size
    if cfg.steps is not None:
        steps = cfg.steps
    elif pairs is None:
        return [f"steps: known once the data is there; {cfg.epochs:g} epochs of its pairs"]
    else:
        steps = max(1, int(cfg.epochs * pairs) // batch)
    epochs = "" if pairs is None else f", {steps * batch / pairs:.2f} epochs of {pairs:,} pairs"
    return [f"steps: {steps:,} of {batch:,} pairs, {steps * batch:,} samples{epochs}"]
