"""`m2enc pretrain`: build stream, model and evaluators from a configuration, train, export."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from m2encoder.cli.configuration import to_yaml
from m2encoder.cli.launch import is_first, is_worker, launch
from m2encoder.cli.training import (
    is_started,
    make_evaluators,
    make_plan,
    make_stream,
    new_encoder,
    prepare_tokenizer,
    write_whole,
)
from m2encoder.config import PretrainConfig
from m2encoder.errors import ConfigError

if TYPE_CHECKING:
    from m2encoder.encoder import Encoder


LOCK_TIMEOUT_S = 10.0
"""How long a run waits for the folder: one that was just killed may still be saving."""
GPUS_PER_MACHINE = 8
"""What a dry run of a cluster assumes; the plan says it."""


def pretrain(
    cfg: PretrainConfig, *, dry_run: bool = False, nproc: int | None = None, profile: bool = False
) -> int:
    """Train a model and export it to OUT/model.

    On several GPUs it starts one process each. Several machines: start it with torchrun.

    Args:
        dry_run: print the plan and stop; more than 8 processes are then several machines
        nproc: processes to start on this machine; without it one per GPU, or one
        profile: trace a few steps to OUT/profile and name the largest costs
    """
    if dry_run:
        print(make_plan(cfg, world_size(nproc), GPUS_PER_MACHINE))
        return 0
    if not is_worker():
        nproc = count_gpus() if nproc is None else nproc
        if nproc != 1:
            return launch_training(cfg, nproc, profile=profile)
    folder = run(cfg, profile=profile)
    if is_first():
        print(folder)
    return 0


pretrain.options_class = PretrainConfig  # pyright: ignore[reportFunctionMemberAccess]


def world_size(nproc: int | None) -> int:
    """Return how many processes a run has: as started, as asked for, or as there are GPUs."""
    if is_worker():
        return int(os.environ["WORLD_SIZE"])
    return count_gpus() if nproc is None else nproc


def count_gpus() -> int:
    """Return how many processes train on this machine unless told: one per GPU, at least one."""
    import torch

    return max(1, torch.cuda.device_count())


def launch_training(cfg: PretrainConfig, nproc: int, *, profile: bool = False) -> int:
    """Run the configuration in nproc processes; returns the exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.yaml"
        path.write_text(to_yaml(cfg), encoding="utf-8")
        words = ["pretrain", "--config", str(path), *(["--profile"] if profile else [])]
        return launch(words, nproc)


def run(cfg: PretrainConfig, *, profile: bool = False, show_progress: bool | None = None) -> Path:
    """Train as configured; returns the exported model folder. Running it again resumes.

    In a world of several processes all of them call this; they share the folder `out`.
    """
    from m2encoder.card import write_model_card
    from m2encoder.distributed import joined_world
    from m2encoder.model_folder import save_model_folder
    from m2encoder.tokenizer_fast import FastTokenizer
    from m2encoder.train import pretrain as train

    out = Path(cfg.out)
    with joined_world() as world, the_only_run_in(out) if world.is_first else nullcontext():
        own = None
        if cfg.towers.text is None:
            own = prepare_tokenizer(cfg, world)
            cfg = replace(cfg, model=replace(cfg.model, vocab_size=own.vocab_size))
        if world.is_first:
            write_config(cfg, out / "config.yaml")
        encoder = new_encoder(cfg, own)
        tokenizer = own or FastTokenizer(encoder.tokenizer)
        size = encoder.model.config.image_size
        stream = make_stream(cfg, tokenizer, world, image_size=size)
        encoder.model.to(world.device)

        def export(whole: "Encoder", folder: Path, results: Mapping[str, float]) -> None:
            whole.model.eval()
            save_model_folder(whole, folder, sp_model=own and own.model)
            write_model_card(folder, cfg, whole, results)

        train(
            cfg,
            encoder,
            stream,
            make_evaluators(cfg, world),
            world=world,
            export=export,
            profile=profile,
            show_progress=show_progress,
        )
    return out / "model"


@contextmanager
def the_only_run_in(out: Path) -> Iterator[None]:
    """Hold the run's folder; ConfigError when another process trains into it."""
    from filelock import FileLock, Timeout

    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")  # the system frees it however the process ends
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    except Timeout:
        raise ConfigError(
            f"{out}: another process trains into this folder; wait for its end, or choose another "
            f"--out"
        ) from None
    try:
        yield
    finally:
        lock.release()


FIXED = (
    *("model", "towers", "init", "tokenizer", "objectives"),
    *("data.train", "data.order", "data.batch_size", "data.augment", "data.resize_mode"),
    *("loss.kind", "loss.group_ranks", "loss.wire_dtype", "loss.duplicates"),
    *("patch_dropout", "unmasked_tail", "optim", "locked", "ema_decay", "interpolate"),
    *("precision", "epochs", "steps", "seed"),
)
"""Settings that decide what a run becomes, which a started run keeps."""


def _value(config: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        config = config.get(part, {})
    return config


def write_config(cfg: PretrainConfig, path: Path) -> None:
    """Write the resolved configuration; `m2enc pretrain --config FILE` reruns it.

    Raises ConfigError when the folder belongs to a started run with another model, data or
    schedule.
    """
    text = to_yaml(cfg)
    if path.is_file() and is_started(path.parent):
        before, now = yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(text)
        changed = [key for key in FIXED if _value(before, key) != _value(now, key)]
        if changed:
            raise ConfigError(
                f"{path.parent}: holds a run with another {', '.join(changed)}; choose "
                f"another --out, or repeat its settings with --config {path}"
            )
    write_whole(path, text.encode())
