"""`m2enc pretrain`: build stream, model and evaluators from a configuration, train, export."""

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from m2encoder.cli.configuration import to_yaml
from m2encoder.cli.launch import is_first, is_worker, launch
from m2encoder.config import PretrainConfig
from m2encoder.errors import ConfigError

if TYPE_CHECKING:
    from m2encoder.data_pipeline.stream import TrainingStream
    from m2encoder.distributed import World
    from m2encoder.encoder import Encoder
    from m2encoder.tokenizer import SentencePieceTokenizer

logger = logging.getLogger(__name__)


def pretrain(cfg: PretrainConfig, *, dry_run: bool = False, nproc: int | None = None) -> int:
    """Train a model and export it to OUT/model.

    On several GPUs it starts one process each. Several machines: start it with torchrun.

    Args:
        dry_run: print the plan and stop
        nproc: processes to start on this machine; without it one per GPU, or one
    """
    if dry_run:
        print(plan(cfg))
        return 0
    if not is_worker():
        nproc = count_gpus() if nproc is None else nproc
        if nproc != 1:
            return launch_training(cfg, nproc)
    folder = run(cfg)
    if is_first():
        print(folder)
    return 0


pretrain.options_class = PretrainConfig  # pyright: ignore[reportFunctionMemberAccess]


def count_gpus() -> int:
    """Return how many processes train on this machine unless told: one per GPU, at least one."""
    import torch

    return max(1, torch.cuda.device_count())


def launch_training(cfg: PretrainConfig, nproc: int) -> int:
    """Run the configuration in nproc processes; returns the exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.yaml"
        path.write_text(to_yaml(cfg), encoding="utf-8")
        return launch(["pretrain", "--config", str(path)], nproc)


def run(cfg: PretrainConfig, *, show_progress: bool | None = None) -> Path:
    """Train as configured; returns the exported model folder. Running it again resumes.

    In a world of several processes all of them call this; they share the folder `out`.
    """
    from m2encoder.card import write_model_card
    from m2encoder.distributed import joined_world
    from m2encoder.model_folder import save_model_folder
    from m2encoder.train import pretrain as train

    out = Path(cfg.out)
    with joined_world() as world:
        out.mkdir(parents=True, exist_ok=True)
        tokenizer = prepare_tokenizer(cfg, world)
        cfg = replace(cfg, model=replace(cfg.model, vocab_size=tokenizer.vocab_size))
        if world.is_first:
            write_config(cfg, out / "config.yaml")
        stream = make_stream(cfg, tokenizer, world)
        encoder = new_encoder(cfg, tokenizer)
        encoder.model.to(world.device)
        evaluators = make_evaluators(cfg, world)
        results = train(cfg, encoder, stream, evaluators, world=world, show_progress=show_progress)
        if world.is_first:
            encoder.model.eval()
            save_model_folder(encoder, out / "model", sp_model=tokenizer.model)
            write_model_card(out / "model", cfg, encoder, results)
    return out / "model"


def prepare_tokenizer(
    cfg: PretrainConfig, world: "World | None" = None
) -> "SentencePieceTokenizer":
    """Return a started run's own tokenizer, else the configured one, else one trained anew.

    The first process of a world makes it, the others read it.
    """
    from m2encoder.cli.tokenizer import read_texts
    from m2encoder.released_tokenizer import load_tokenizer
    from m2encoder.tokenizer import train_tokenizer

    own = Path(cfg.out) / "sp.model"
    is_maker = world is None or world.is_first
    if is_maker and not (own.is_file() and is_started(own.parent)):
        if cfg.tokenizer.path is not None:
            model = load_tokenizer(Path(cfg.tokenizer.path), max_length=2).model
        else:
            texts = read_texts([Path(cfg.data.train)])
            model = train_tokenizer(texts, vocab_size=cfg.tokenizer.vocab_size)
        _write_whole(own, model)
    if world is not None:
        world.wait()
    return load_tokenizer(
        own,
        max_length=cfg.model.max_text_length,
        truncation_side=cfg.tokenizer.truncation_side,
    )


def is_started(out: Path) -> bool:
    """Say whether a run's folder holds anything that another configuration would spoil."""
    from m2encoder.checkpoint import list_checkpoints

    return bool(list_checkpoints(out / "checkpoints")) or (out / "model").is_dir()


def make_stream(
    cfg: PretrainConfig, tokenizer: "SentencePieceTokenizer", world: "World | None" = None
) -> "TrainingStream":
    """Return this process's share of the batches that this run trains on."""
    from m2encoder.data_pipeline.stream import TrainingStream
    from m2encoder.objectives import languages_of

    return TrainingStream(
        cfg.data,
        image_size=cfg.model.image_size,
        tokenizer=tokenizer,
        languages=languages_of(cfg.objectives),
        seed=cfg.seed,
        rank=world.rank if world else 0,
        world_size=world.size if world else 1,
    )


def new_encoder(cfg: PretrainConfig, tokenizer: "SentencePieceTokenizer") -> "Encoder":
    """Return a freshly initialised model with its preprocessing; the seed decides its weights."""
    import torch

    from m2encoder.encoder import Encoder
    from m2encoder.model.configuration_m2encoder import M2EncoderConfig
    from m2encoder.model.image_processing_m2encoder import M2EncoderImageProcessor
    from m2encoder.model.modeling_m2encoder import M2Encoder

    torch.manual_seed(cfg.seed)
    config = M2EncoderConfig(
        **asdict(cfg.model),
        pad_token_id=tokenizer.pad_id,
        eos_token_id=tokenizer.end_id,
        has_logit_bias=cfg.loss.kind == "sigmoid",
    )
    processor = M2EncoderImageProcessor(cfg.model.image_size, cfg.data.resize_mode)
    return Encoder(M2Encoder(config), processor, tokenizer.to_fast(), name=Path(cfg.out).name)


def make_evaluators(
    cfg: PretrainConfig, world: "World | None" = None
) -> dict[str, "Callable[[Encoder], Mapping[str, float]]"]:
    """Return what is measured after each epoch: retrieval and zero-shot on data.evaluate.

    All processes of the world embed their share; each returns the same.

    Opens the data at once, so that what is missing or too small is found before training.
    """
    if cfg.data.evaluate is None:
        return {}
    from m2encoder.eval.suite import evaluate, flat_metrics
    from m2encoder.eval.tasks import draw_candidates
    from m2encoder.shards import ShardReader

    folder = Path(cfg.data.evaluate)
    count = len(ShardReader(folder))
    if cfg.evaluate_candidates is not None:
        draw_candidates(count, cfg.evaluate_candidates, cfg.seed)
    name = folder.name

    def measure(encoder: "Encoder") -> Mapping[str, float]:
        candidates = cfg.evaluate_candidates
        found = evaluate(encoder, folder, candidates=candidates, seed=cfg.seed, world=world)
        return flat_metrics(found)

    return {name: measure}


FIXED = (
    *("model", "data.train", "data.batch_size", "data.augment", "data.resize_mode", "tokenizer"),
    *("objectives", "loss.kind", "loss.group_ranks", "loss.wire_dtype", "loss.duplicates"),
    *("patch_dropout", "unmasked_tail", "optim", "epochs", "seed"),
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
    _write_whole(path, text.encode())


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def plan(cfg: PretrainConfig) -> str:
    """Return what a run would do: resolved configuration, parameters, samples, steps, memory."""
    import torch

    from m2encoder.model.configuration_m2encoder import M2EncoderConfig
    from m2encoder.model.modeling_m2encoder import M2Encoder
    from m2encoder.shards import ShardIndex

    with torch.device("meta"):
        model = M2Encoder(M2EncoderConfig(**asdict(cfg.model)))
    parameters = sum(p.numel() for p in model.parameters())
    lines = [to_yaml(cfg).rstrip(), "---", f"parameters: {parameters:,}"]
    lines.append(
        f"weights, gradients and optimizer state: {parameters * 16 / 2**30:.2f} GiB "
        f"(float32 AdamW; activations come on top)"
    )
    if not (Path(cfg.data.train) / "index.json").is_file():
        return "\n".join([*lines, f"data: {cfg.data.train} is not there yet"])
    count = ShardIndex.load(Path(cfg.data.train)).count
    steps = count // cfg.data.batch_size
    lines.append(f"data: {count:,} pairs, {steps:,} steps per epoch of {cfg.data.batch_size} pairs")
    lines.append(
        f"total: {steps * cfg.epochs:,} steps, {steps * cfg.epochs * cfg.data.batch_size:,} pairs"
    )
    return "\n".join(lines)
