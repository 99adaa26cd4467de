"""`m2enc eval retrieval`, `zero-shot` and `suite`: measure a model on what the user has.

Not for the measuring (eval/tasks.py, eval/shard_tasks.py); this finds data and shows results.
Started by torchrun, the processes share the work and the first one speaks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from m2encoder.cli.measured import OnError, finish
from m2encoder.errors import ConfigError

if TYPE_CHECKING:
    from m2encoder.encoder import BadItem, Encoder
    from m2encoder.eval.class_names import ClassList
    from m2encoder.eval.results import Result
    from m2encoder.eval.suites import SuiteTask
    from m2encoder.eval.tasks import Running

GroundTruth = Literal["index", "string", "m2"]
Precision = Literal["float32", "bfloat16", "float16"]


def retrieval(
    model: str,
    data: Path,
    *,
    protocol: str | None = None,
    images: Path | None = None,
    language: str | None = None,
    gt: GroundTruth = "index",
    candidates: int | None = None,
    seed: int = 0,
    cache: Path | None = None,
    contamination: Path | None = None,
    out: Path | None = None,
    json: bool = False,
    on_error: OnError = "raise",
    batch_size: int = 64,
    precision: Precision = "float32",
    device: str = "auto",
) -> int:
    """Measure recall at 1, 5 and 10 between pictures and their captions.

    Args:
        model: A model folder or name.
        data: A shard folder, a file of captions (JSONL, the released files as they are), or tars.
        protocol: What the data must follow, as m2enc eval protocols names it; custom for none.
        images: Folder of the pictures that a file of captions names.
        language: The captions' language, zh or en; by default the data's, or both of shards.
        gt: What is right: by index, by equal captions, or as the released script counts.
        candidates: Rank among that many pairs, drawn at random, instead of all.
        seed: Draws candidates, examples and bootstrap samples.
        cache: Folder that keeps vectors; a run that was stopped goes on from there.
        contamination: What m2enc eval contamination found of this data, for the results to say.
        out: Folder to write the results into, a JSON file each.
        json: Print JSON instead of a table.
        on_error: Stop at missing or unreadable items, or leave them out (exit code 4).
        batch_size: Pictures or texts at a time.
        precision: What the model computes in.
        device: Where to compute: auto, cpu, cuda, ...
    """
    from m2encoder.eval.datasets import read_retrieval
    from m2encoder.eval.tasks import drawn_candidates, run_retrieval

    both = protocol is None and language is None and (data / "index.json").is_file()
    languages = _languages_in(data) if both else [language]
    with _running(batch_size, on_error, cache, precision, seed, device) as running:
        encoder = _load(model, running)
        results = []
        for each in languages:
            found = read_retrieval(
                data, images=images, language=each, protocol=protocol, on_error=on_error
            )
            if candidates is not None:
                found = drawn_candidates(found, candidates, seed=seed)
            done = run_retrieval(encoder, found, gt=gt, candidates=candidates, running=running)
            results.append(done)
        return _show(results, running, contamination, out=out, json=json)


def zero_shot(
    model: str,
    data: Path,
    *,
    protocol: str | None = None,
    classes: str | None = None,
    templates: Path | None = None,
    language: str | None = None,
    label: str | None = None,
    seed: int = 0,
    cache: Path | None = None,
    contamination: Path | None = None,
    out: Path | None = None,
    json: bool = False,
    on_error: OnError = "raise",
    batch_size: int = 64,
    precision: Precision = "float32",
    device: str = "auto",
) -> int:
    """Measure how often the right class, described in words, fits a picture best.

    Args:
        model: A model folder or name.
        data: A shard folder with a zero_shot.json; with a protocol, labelled pictures of any kind.
        protocol: What classes and pictures must follow, for example imagenet-cn/wukong80.
        classes: Take these classes: a protocol's name, or a file of class names.
        templates: File of templates, instead of the protocol's own.
        language: Language of a file of class names that follows no protocol.
        label: Key of the label in shards of labelled pictures.
        seed: Draws the bootstrap samples.
        cache: Folder that keeps vectors; a run that was stopped goes on from there.
        contamination: What m2enc eval contamination found of this data, for the results to say.
        out: Folder to write the results into, a JSON file each.
        json: Print JSON instead of a table.
        on_error: Stop at missing or unreadable pictures, or leave them out (exit code 4).
        batch_size: Pictures or texts at a time.
        precision: What the model computes in.
        device: Where to compute: auto, cpu, cuda, ...
    """
    from m2encoder.eval.shard_tasks import run_shards

    with _running(batch_size, on_error, cache, precision, seed, device) as running:
        encoder = _load(model, running)
        if protocol is None and classes is None:
            results = run_shards(encoder, data, running=running, tasks=("zero-shot",))
        else:
            found = _classes(protocol, classes, templates, language)
            results = [_zero_shot_of(encoder, data, found, protocol, running, label=label)]
        return _show(results, running, contamination, out=out, json=json)


def suite(
    model: str,
    suite: str,
    *,
    data: Path,
    cache: Path | None = None,
    seed: int = 0,
    contamination: Path | None = None,
    out: Path | None = None,
    json: bool = False,
    on_error: OnError = "raise",
    batch_size: int = 64,
    precision: Precision = "float32",
    device: str = "auto",
) -> int:
    """Run every task of a suite whose data is there; the others are named (exit code 4).

    Args:
        model: A model folder or name.
        suite: smoke, zh, en, bilingual, full, or a YAML file like those (m2enc config cp eval/zh).
        data: The folder that the suite's paths start from.
        cache: Folder that keeps vectors; a run that was stopped goes on from there.
        seed: Draws candidates, examples and bootstrap samples.
        contamination: What m2enc eval contamination found of this data, for the results to say.
        out: Folder to write the results into, a JSON file each.
        json: Print JSON instead of a table.
        on_error: Stop at missing or unreadable items, or leave them out (exit code 4).
        batch_size: Pictures or texts at a time.
        precision: What the model computes in.
        device: Where to compute: auto, cpu, cuda, ...
    """
    from m2encoder.cli.configuration import find_config, read_yaml
    from m2encoder.encoder import BadItem
    from m2encoder.eval.suites import suite_from

    path = find_config(suite, kind="eval")
    tasks = suite_from(read_yaml(path), str(path)).tasks
    absent = [
        BadItem(-1, task.protocol or task.data[0], f"no data at {data / task.data[0]}")
        for task in tasks
        if task.find(data) is None
    ]
    if len(absent) == len(tasks):
        raise ConfigError(f"{data}: holds data of none of the {len(tasks)} tasks; check --data")
    results: list[Result] = []
    with _running(batch_size, on_error, cache, precision, seed, device) as running:
        encoder = _load(model, running)
        for task in tasks:
            if (where := task.find(data)) is not None:
                done = _run_task(encoder, task, where, data, running)
                results += done
                if out is not None and running.is_first:  # what is done stays, whatever comes
                    for result in done:
                        result.save(out)
        return _show(results, running, contamination, out=out, json=json, left_out=absent)


def _languages_in(shards: Path) -> list[str | None]:
    """Return the languages that a shard folder has captions in, Chinese first."""
    from m2encoder.shards import ShardIndex

    counts = ShardIndex.load(shards).captions
    return [*sorted((each for each in counts if counts[each]), reverse=True)] or [None]


def _run_task(
    encoder: "Encoder", task: "SuiteTask", where: Path, root: Path, running: "Running"
) -> "list[Result]":
    from m2encoder.eval.datasets import read_retrieval
    from m2encoder.eval.shard_tasks import run_shards
    from m2encoder.eval.tasks import run_retrieval

    protocol = task.known
    if protocol is None:
        return run_shards(encoder, where, running=running, candidates=task.candidates)
    if protocol.task == "retrieval":
        images = root / task.images if task.images and where.is_file() else None
        found = read_retrieval(
            where, images=images, protocol=protocol.id, on_error=running.on_error
        )
        return [run_retrieval(encoder, found, running=running)]
    names = str(root / task.names_file) if task.names_file else None
    templates = root / task.templates_file if task.templates_file else None
    classes = _classes(protocol.id, names, templates, None)
    return [_zero_shot_of(encoder, where, classes, protocol.id, running)]


def _classes(
    protocol: str | None, classes: str | None, templates: Path | None, language: str | None
) -> "ClassList":
    """Return the classes that the options name. Raises ConfigError where one is missing."""
    from m2encoder.eval.class_names import load_classes, read_classes
    from m2encoder.eval.protocols import CUSTOM, get_protocol

    file = Path(classes) if classes is not None and Path(classes).is_file() else None
    named = classes if file is None and classes is not None else protocol
    if named not in (None, CUSTOM):
        return load_classes(get_protocol(named), names_file=file, templates_file=templates)
    if file is None:
        raise ConfigError(
            f"protocol {protocol} names no classes; say which with --classes, a protocol or a file"
        )
    if language is None:
        raise ConfigError(f"{file}: does not say its language; say it with --language")
    return read_classes(file, language=language, templates_file=templates)


def _zero_shot_of(
    encoder: "Encoder",
    data: Path,
    classes: "ClassList",
    protocol: str | None,
    running: "Running",
    *,
    label: str | None = None,
) -> "Result":
    from m2encoder.eval.datasets import read_labelled
    from m2encoder.eval.label_matching import match_labels
    from m2encoder.eval.tasks import run_zero_shot

    found = read_labelled(data, label_key=label, on_error=running.on_error)
    matched = match_labels(protocol, classes, len(found.pictures)).noted(*found.notes)
    return run_zero_shot(encoder, found, classes, matched, running=running)


@contextmanager
def _running(
    batch_size: int,
    on_error: OnError,
    cache: Path | None,
    precision: Precision,
    seed: int,
    device: str,
) -> "Iterator[Running]":
    """Yield how to run tasks, inside the world that torchrun made, if there is one."""
    from m2encoder.distributed import joined_world
    from m2encoder.eval.tasks import Running
    from m2encoder.vector_store import VectorStore

    with joined_world("cpu" if device == "cpu" else None) as world:
        yield Running(
            batch_size=batch_size,
            on_error=on_error,
            store=VectorStore(cache) if cache else None,
            world=world,
            precision=precision,
            seed=seed,
            device=str(world.device) if world.size > 1 else device,
        )


def _load(model: str, running: "Running") -> "Encoder":
    from m2encoder.load import load_model

    return load_model(model, device=running.device)


def _show(
    results: "Sequence[Result]",
    running: "Running",
    contamination: Path | None,
    *,
    out: Path | None,
    json: bool,
    left_out: "Sequence[BadItem]" = (),
) -> int:
    """Write and print results in the first process; returns the exit code."""
    from m2encoder.encoder import BadItem
    from m2encoder.eval.result_facts import note_contamination
    from m2encoder.eval.results import load_many
    from m2encoder.eval.table import make_tables
    from m2encoder.eval.table_formats import to_markdown

    skipped: dict[Any, BadItem] = {}
    for result in results:
        for bad in result.data.get("skipped") or ():
            item = BadItem(-1, bad["name"], bad["reason"])
            skipped.setdefault(item, item)
    if not running.is_first:
        return 0
    if contamination is not None:
        for checked in load_many([contamination]):
            results = note_contamination(results, checked)
    tables = [] if json else [to_markdown(make_tables(results))]
    return finish(results, tables, [*skipped.values(), *left_out], out=out, json=json)
