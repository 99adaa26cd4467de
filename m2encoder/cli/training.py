"""What `m2enc pretrain` builds from a configuration: tokenizer, model, stream, evaluators, plan.

Not for running them (pretrain.py).
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2encoder.cli.configuration import to_yaml
from m2encoder.config import PretrainConfig
from m2encoder.errors import ConfigError

if TYPE_CHECKING:
    from m2encoder.data_pipeline.stream import TrainingStream
    from m2encoder.distributed import World
    from m2encoder.encoder import Encoder
    from m2encoder.eval.suite import Task
    from m2encoder.tokenizer import SentencePieceTokenizer
    from m2encoder.tokenizer_fast import TrainingTokenizer
    from m2encoder.train_parts import Evaluator

logger = logging.getLogger(__name__)


def prepare_tokenizer(
    cfg: PretrainConfig, world: "World | None" = None
) -> "SentencePieceTokenizer":
    """Return a started run's own tokenizer, else the configured one, else one trained anew.

    The first process of a world makes it, the others read it.
    """
    from m2encoder.data_pipeline.training_sources import source_texts
    from m2encoder.released_tokenizer import load_tokenizer
    from m2encoder.tokenizer import train_tokenizer

    own = Path(cfg.out) / "sp.model"
    is_maker = world is None or world.is_first
    if is_maker and not (own.is_file() and is_started(own.parent)):
        if cfg.tokenizer.path is not None:
            model = load_tokenizer(Path(cfg.tokenizer.path), max_length=2).model
        else:
            texts = source_texts(cfg.data)
            model = train_tokenizer(texts, vocab_size=cfg.tokenizer.vocab_size)
        write_whole(own, model)
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
    cfg: PretrainConfig,
    tokenizer: "TrainingTokenizer",
    world: "World | None" = None,
    *,
    image_size: int | None = None,
) -> "TrainingStream":
    """Return this process's share of the batches that this run trains on."""
    from m2encoder.data_pipeline.stream import TrainingStream
    from m2encoder.objectives import languages_of

    return TrainingStream(
        cfg.data,
        image_size=image_size or cfg.model.image_size,
        tokenizer=tokenizer,
        languages=languages_of(cfg.objectives),
        seed=cfg.seed,
        rank=world.rank if world else 0,
        world_size=world.size if world else 1,
    )


def new_encoder(cfg: PretrainConfig, tokenizer: "TrainingTokenizer | None") -> "Encoder":
    """Return a model to train with its preprocessing; the seed decides what starts at random.

    tokenizer: None where the text tower brings its own. Raises ConfigError or CheckpointError where
    towers or weights of others cannot be had.
    """
    import torch

    from m2encoder.init_towers import init_towers

    torch.manual_seed(cfg.seed)
    has_foreign = cfg.towers.image is not None or cfg.towers.text is not None
    encoder = _foreign_encoder(cfg, tokenizer) if has_foreign else _own_encoder(cfg, tokenizer)
    if cfg.init.image is not None or cfg.init.text is not None:
        for line in init_towers(encoder, image=cfg.init.image, text=cfg.init.text).lines():
            logger.info("%s", line)
    return encoder


def _own_encoder(cfg: PretrainConfig, tokenizer: Any) -> "Encoder":
    from m2encoder.encoder import Encoder
    from m2encoder.model.configuration_m2encoder import M2EncoderConfig
    from m2encoder.model.image_processing_m2encoder import M2EncoderImageProcessor
    from m2encoder.model.modeling_m2encoder import M2Encoder

    config = M2EncoderConfig(
        **asdict(cfg.model),
        pad_token_id=tokenizer.pad_id,
        eos_token_id=tokenizer.end_id,
        has_logit_bias=cfg.loss.kind == "sigmoid",
    )
    processor = M2EncoderImageProcessor(cfg.model.image_size, cfg.data.resize_mode)
    return Encoder(M2Encoder(config), processor, tokenizer.to_fast(), name=Path(cfg.out).name)


def _foreign_encoder(cfg: PretrainConfig, tokenizer: "TrainingTokenizer | None") -> "Encoder":
    from m2encoder.towers import build_encoder

    if cfg.loss.kind == "sigmoid":
        raise ConfigError("loss.kind sigmoid needs our own towers; choose infonce")
    encoder = build_encoder(
        image=cfg.towers.image or cfg.model,
        text=cfg.towers.text or cfg.model,
        projection_dim=cfg.model.projection_dim,
        tokenizer=None if tokenizer is None else tokenizer.to_fast(),
        resize_mode=cfg.data.resize_mode,
    )
    encoder.name = Path(cfg.out).name
    return encoder


def make_evaluators(cfg: PretrainConfig, world: "World | None" = None) -> "dict[str, Evaluator]":
    """Return what is measured while training: retrieval and zero-shot on evaluate.data.

    All processes of the world embed their share; each returns the same.

    Opens the data at once, so that what is missing or too small is found before training.
    """
    settings = cfg.evaluate
    if settings.data is None:
        return {}
    from m2encoder.eval.suite import evaluate, flat_metrics
    from m2encoder.eval.tasks import draw_candidates
    from m2encoder.shards import ShardReader
    from m2encoder.train_parts import Evaluator

    folder = Path(settings.data)
    count = len(ShardReader(folder))
    if settings.candidates is not None:
        draw_candidates(count, settings.candidates, cfg.seed)
    every = {"retrieval": settings.retrieval_every_epochs}
    if (folder / "zero_shot.json").is_file():
        every["zero-shot"] = settings.zero_shot_every_epochs

    def measure(tasks: "list[Task]", encoder: "Encoder") -> Mapping[str, float]:
        found = evaluate(
            encoder,
            folder,
            tasks=tasks,
            candidates=settings.candidates,
            seed=cfg.seed,
            world=world,
        )
        return flat_metrics(found)

    # what is due together embeds the pictures once
    together: dict[float, list[Task]] = {}
    for task, epochs in every.items():
        together.setdefault(epochs, []).append(task)  # pyright: ignore[reportArgumentType]
    return {
        f"{folder.name} {' and '.join(tasks)}": Evaluator(partial(measure, tasks), epochs)
        for epochs, tasks in together.items()
    }


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def make_plan(cfg: PretrainConfig, world_size: int, local_ranks: int) -> str:
    """Return what a run would do: resolved configuration, sizes, memory, steps, shard plan.

    local_ranks: processes of one machine at most, where torchrun or Slurm do not say.
    """
    from m2encoder.data_pipeline.training_sources import open_sources, plan_lines
    from m2encoder.errors import DataError
    from m2encoder.objectives import languages_of
    from m2encoder.plan import plan

    languages = languages_of(cfg.objectives)
    pairs, lines = None, []
    try:
        sources = open_sources(cfg.data, languages)
        pairs, lines = sum(source.pairs for source in sources), plan_lines(sources, cfg.data)
    except (ConfigError, DataError) as error:
        lines = [str(error)]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", min(world_size, local_ranks)))
    return plan(
        cfg,
        config_text=to_yaml(cfg),
        pairs=pairs,
        data_lines=lines,
        world_size=world_size,
        local_world_size=local,
    )
