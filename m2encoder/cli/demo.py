"""`m2enc demo`: the whole product once, in one command, on data that it makes itself.

Not a benchmark: benchmarks/quality.py trains over several seeds and writes the tables.
"""

import logging
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from m2encoder.config import PretrainConfig

if TYPE_CHECKING:
    from m2encoder.encoder import Encoder
    from m2encoder.eval.report import Search
    from m2encoder.index import ImageIndex
    from m2encoder.shards import Pair

logger = logging.getLogger(__name__)

Source = Literal["scenes", "emoji"]
SMOKE_OPTIONS = ("--epochs", "1", "--data.batch-size", "32", "--optim.warmup-steps", "2")
SMOKE_PAIRS = 640
TITLES: dict[Source, str] = {
    "scenes": "Drawn scenes, found in Chinese and English",
    "emoji": "One artist's emoji, learned to find another's",
}
SUMMARIES: dict[Source, str] = {
    "scenes": "Trained from nothing on small drawings with captions in both languages; measured on "
    "objects in colours that never met in training.",
    "emoji": "Trained from nothing on Google's emoji pictures and their names in both languages; "
    "measured on Twitter's pictures, which it never saw.",
}
SMOKE_SUMMARY = (
    "A smoke run: a few steps to see that everything works. The model is as good as untrained; its "
    "numbers and search results mean nothing."
)
CANDIDATES: dict[Source, int | None] = {"scenes": 100, "emoji": None}
EVALUATED: dict[Source, str] = {"scenes": "val", "emoji": "test"}


@dataclass(frozen=True)
class Query:
    """A search of the demo in both languages, and the attributes of a picture that fits it."""

    zh: str
    en: str
    fits: dict[str, str] = field(default_factory=dict)
    """Subset of a Pair's meta; empty where nobody knows."""


QUERIES: dict[Source, list[Query]] = {
    "scenes": [  # with seed 0, objects and colours that never meet in training
        Query(
            "三颗红色的星星",
            "three red stars",
            {"object": "star", "colour": "red", "count": "3"},
        ),
        Query(
            "一条蓝色的鱼在一个橙色的月亮的左边",
            "a blue fish to the left of an orange moon",
            {"combination": "blue-fish-left-orange-moon"},
        ),
        Query(
            "一朵紫色的大花",
            "one big purple flower",
            {"object": "flower", "colour": "purple", "count": "1", "size": "big"},
        ),
    ],
    "emoji": [Query("笑脸", "smiling face"), Query("狗", "dog"), Query("红心", "red heart")],
}


def demo(
    *,
    out: Path = Path("runs/demo"),
    source: Source = "scenes",
    archives: list[Path] | None = None,
    seed: int = 0,
    smoke: bool = False,
    nproc: int = 1,
) -> int:
    """Make data, train, evaluate in Chinese and English, export, index, search, write a report.

    Running it again goes on where it stopped.

    Args:
        out: The folder to write everything into.
        source: Drawn scenes, which need no download, or emoji art from two npm archives.
        archives: The archives emoji-datasource-google and emoji-datasource-twitter (emoji).
        seed: Decides data, initial weights and order.
        smoke: A minute's worth of training, only to see that everything runs.
        nproc: Processes that train together.
    """
    from m2encoder.cli.pretrain import launch_training, run
    from m2encoder.eval.page import write_page
    from m2encoder.eval.run_report import read_run, render_run
    from m2encoder.eval.suite import format_table
    from m2encoder.index import build_index
    from m2encoder.load import load_model
    from m2encoder.shards import ShardReader

    started = time.perf_counter()
    make_data(out / "data", source, archives or [], seed, smoke=smoke)
    seconds = {"data": time.perf_counter() - started}
    cfg = demo_config(source, out, seed, smoke)
    if nproc == 1:
        run(cfg)
    elif code := launch_training(cfg, nproc):
        return code
    seconds["training"] = time.perf_counter() - started - seconds["data"]

    encoder = load_model(out / "model")
    results = _evaluate(encoder, out, source, seed)
    print(format_table(results))
    pairs = {pair.key: pair for pair in ShardReader(out / "data/test")}
    _write_photos(pairs.values(), out / "photos")
    index = build_index(encoder, out / "photos", out / "index")
    searches = [_search_both(encoder, index, pairs, query) for query in QUERIES[source]]
    seconds["all"] = time.perf_counter() - started
    steps = _next_steps(out, source)
    write_page(out / "training.html", render_run(read_run(out)))
    summary = SMOKE_SUMMARY if smoke else SUMMARIES[source]
    _write_report(out, source, summary, cfg, encoder, results, searches, seconds, steps)
    pages = {"report": "report", "every number": "evaluation", "how it trained": "training"}
    shown = ", ".join(f"{what}: {out / name}.html" for what, name in pages.items())
    print(f"\n{shown}\n\nnext:")
    print("\n".join(f"  {command}" for command, _ in steps))
    return 0


def demo_config(source: Source, out: Path, seed: int, smoke: bool) -> PretrainConfig:
    """Return the shipped configuration of this demo, writing into `out`."""
    from m2encoder.cli.options import call_with_options

    def given(cfg: PretrainConfig) -> PretrainConfig:
        return cfg

    given.options_class = PretrainConfig  # pyright: ignore[reportFunctionMemberAccess]
    words = ["--config", "demo" if source == "scenes" else f"demo-{source}"]
    words += ["--data.train", str(out / "data/train")]
    words += ["--evaluate.data", str(out / "data" / EVALUATED[source])]
    words += ["--out", str(out), "--seed", str(seed), *(SMOKE_OPTIONS if smoke else ())]
    return call_with_options(given, "demo", words)


def make_data(
    folder: Path, source: Source, archives: Sequence[Path], seed: int, *, smoke: bool = False
) -> None:
    """Write the data of a demo, unless it is there."""
    if (folder / "test" / "index.json").is_file():
        logger.info("data: %s is there already", folder)
        return
    if source == "emoji":
        from m2encoder.data_pipeline.emoji import make_emoji

        indexes = make_emoji(folder, archives=archives)
    else:
        from m2encoder.data_pipeline.scenes import make_scenes

        options: dict[str, int] = {"train_pairs": SMOKE_PAIRS} if smoke else {}
        indexes = make_scenes(folder, seed=seed, **options)
    for split, index in indexes.items():
        print(f"{folder / split}: {index.count:,} pairs, captions {index.captions}")
    if attribution := indexes["test"].attribution:
        print(attribution)


def _evaluate(encoder: "Encoder", out: Path, source: Source, seed: int) -> "dict[str, Any]":
    """Measure the test pictures: a result per measure and language, a page, and the short form.

    Also keeps beside the model from which score on a picture fits, for searching.
    """
    from m2encoder.embed import embed_pairs
    from m2encoder.eval.calibrate import calibrate
    from m2encoder.eval.page import write_page
    from m2encoder.eval.result_report import ResultReport, render_results
    from m2encoder.eval.shard_tasks import run_shards
    from m2encoder.eval.suite import summarise
    from m2encoder.eval.tasks import Running
    from m2encoder.folders import write_json
    from m2encoder.shards import ShardReader

    data = out / "data" / EVALUATED[source]
    found, _ = calibrate(encoder, embed_pairs(encoder, ShardReader(data)), data=data.name)
    found.save(out / "model")
    running = Running(seed=seed)
    candidates = CANDIDATES[source]
    results = run_shards(encoder, out / "data/test", running=running, candidates=candidates)
    for result in results:
        result.save(out / "eval")
    page = ResultReport(results, title=TITLES[source], images=None, published=False)
    write_page(out / "evaluation.html", render_results(page))
    summary = summarise(results)
    write_json(out / "results.json", summary)
    return summary


def _write_photos(pairs: "Iterable[Pair]", folder: Path) -> None:
    """Write the test pictures as files, for `m2enc search`."""
    folder.mkdir(parents=True, exist_ok=True)
    for pair in pairs:
        (folder / f"{pair.key}.{pair.image_ext}").write_bytes(pair.image)


def _search_both(
    encoder: "Encoder", index: "ImageIndex", pairs: "dict[str, Pair]", query: Query
) -> "tuple[Search, Search]":
    zh = _search(encoder, index, pairs, query.zh, "zh", query.fits)
    return zh, _search(encoder, index, pairs, query.en, "en", query.fits)


def _search(
    encoder: "Encoder",
    index: "ImageIndex",
    pairs: "dict[str, Pair]",
    words: str,
    language: str,
    fits: dict[str, str],
) -> "Search":
    """Search, print the hits and return them for the report."""
    from m2encoder.eval.report import FoundPicture, Search

    print(f"\n{words}")
    found: list[FoundPicture] = []
    for rank, hit in enumerate(index.search(encoder.encode_text(words), 5)[0], 1):
        print(f"{rank:>3}  {hit.score:.3f}  {hit.path}")
        pair = pairs[Path(hit.name).stem]
        fitting = fits.items() <= pair.meta.items() if fits else None
        found.append(FoundPicture(pair.image, hit.score, pair.captions[language][0], fitting))
    return Search(words, found)


def _write_report(
    out: Path,
    source: Source,
    summary: str,
    cfg: PretrainConfig,
    encoder: "Encoder",
    results: "dict[str, Any]",
    searches: "list[tuple[Search, Search]]",
    seconds: dict[str, float],
    next_steps: list[tuple[str, str]],
) -> None:
    from m2encoder.eval.report import ReportData, write_report
    from m2encoder.log import read_metrics
    from m2encoder.shards import ShardIndex

    parameters = sum(parameter.numel() for parameter in encoder.model.parameters())
    glance = [
        (f"{ShardIndex.load(out / 'data/train').count:,}", "training pairs"),
        (f"{parameters / 1e6:.1f} M", "parameters"),
        (f"{seconds['training'] / 60:.1f} min", "training"),
    ]
    report = ReportData(
        title=TITLES[source],
        summary=summary,
        glance=glance,
        results=results,
        metrics=read_metrics(out / "metrics.jsonl"),
        searches=searches,
        attribution=ShardIndex.load(out / "data/test").attribution,
        facts=_facts(cfg, parameters, seconds),
        next_steps=next_steps,
    )
    write_report(out / "report.html", run=report)


def _facts(
    cfg: PretrainConfig, parameters: int, seconds: dict[str, float]
) -> list[tuple[str, str]]:
    import os
    import platform

    import torch
    import transformers

    from m2encoder import __version__

    shape = cfg.model
    return [
        ("command", " ".join(["m2enc", *sys.argv[1:]])),
        ("versions", f"m2encoder {__version__}, torch {torch.__version__}, transformers "
         f"{transformers.__version__}, Python {platform.python_version()}"),
        ("machine", f"{platform.machine()}, {os.cpu_count()} CPU cores"),
        ("seed", str(cfg.seed)),
        ("shape", f"{parameters:,} parameters: width {shape.width}, {shape.image_layers} image, "
         f"{shape.text_layers} text and {shape.shared_layers} shared layers"),
        ("training", f"{cfg.epochs} epochs in batches of {cfg.data.batch_size}"),
        ("times", ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())),
    ]  # fmt: skip


def _next_steps(out: Path, source: Source) -> list[tuple[str, str]]:
    query = QUERIES[source][0]
    photos, model = out / "photos", out / "model"
    code = (
        f"from m2encoder import load_model; print(load_model('{model}').encode_text('{query.zh}'))"
    )
    return [
        (f'm2enc search {photos} "{query.zh}" --model {model}', "search a folder of pictures"),
        (
            f'm2enc search {photos} "{query.en}"',
            "the same in English; the index remembers the model",
        ),
        (f"m2enc eval retrieval {model} {out / 'data/test'}", "rank among all test pictures"),
        (f'python -c "{code}"', "vectors in Python"),
    ]
