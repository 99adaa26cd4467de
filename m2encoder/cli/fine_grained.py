"""`m2enc eval fine-grained`: captions that differ in one thing.

Not for the measuring (eval/fine_grained.py, hard_negatives.py).
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from m2encoder.cli.measured import LANGUAGES, OnError, embed_shards, finish, metric_table
from m2encoder.errors import ConfigError, DataError

if TYPE_CHECKING:
    from m2encoder.embed import PairEmbeddings
    from m2encoder.eval.caption_edits import Language
    from m2encoder.eval.hard_negatives import WrongCaptions
    from m2encoder.eval.results import Result


def fine_grained(
    model: str,
    source: Path,
    *,
    images: Path | None = None,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
    on_error: OnError = "raise",
    batch_size: int = 64,
    device: str = "auto",
) -> int:
    """Score captions that differ in one thing: of SugarCrepe, Winoground or a shard folder.

    A shard folder is asked with the wrong captions that it carries, else with ones made by rules:
    another colour or count, left for right, two colours exchanged.

    Args:
        model: A model folder.
        source: SugarCrepe's file or folder of files, Winoground's examples, or a shard folder.
        images: The folder with the pictures that SugarCrepe or Winoground name.
        seed: Draws the bootstrap samples, and the words that rules put in.
        out: Folder to write the results into, as JSON, and captions that were made by rules.
        json: Print JSON instead of tables.
        on_error: Stop at a missing or unreadable picture, or leave it out (exit code 4).
        batch_size: Pictures or texts at a time.
        device: Where to compute: auto, cpu, cuda, ...
    """
    from m2encoder.shards import INDEX_NAME

    if (source / INDEX_NAME).is_file():
        if images is not None:
            raise ConfigError(f"{source}: a shard folder holds its pictures; leave out --images")
        return _shards(
            model, source, seed=seed, out=out, json=json,
            on_error=on_error, batch_size=batch_size, device=device,
        )  # fmt: skip
    return _files(
        model, source, images, seed=seed, out=out, json=json,
        on_error=on_error, batch_size=batch_size, device=device,
    )  # fmt: skip


def _files(
    model: str,
    source: Path,
    images: Path | None,
    *,
    seed: int,
    out: Path | None,
    json: bool,
    on_error: OnError,
    batch_size: int,
    device: str,
) -> int:
    from m2encoder.eval.fine_grained import measure_fine_grained, read_fine_grained
    from m2encoder.eval.result_facts import DataFacts, custom_protocol, result_of, skipped_facts
    from m2encoder.load import load_model

    items = read_fine_grained(source)
    if images is None:
        raise ConfigError(f"{source}: names pictures by file; say where they are with --images DIR")
    encoder = load_model(model, device=device)
    began = time.perf_counter()
    output, skipped = measure_fine_grained(
        encoder, items, images, batch_size=batch_size, on_error=on_error, seed=seed
    )
    data = {
        "path": str(source),
        "images": len({name for own in items.pictures for name in own}) - len(skipped),
        "texts": len({text for own in items.captions for text in own}),
        "skipped": skipped_facts(skipped),
    }
    facts = DataFacts(custom_protocol(items.content()), data, items.language)
    seconds = {"all": time.perf_counter() - began}
    settings = {"seed": seed, "format": items.format}
    result = result_of(encoder, items.format, facts, output, settings=settings, seconds=seconds)
    head = f"{items.format}, {len(items.names):,} items"
    lines = metric_table(head, result.metrics, list(result.metrics))
    chance = ", ".join(f"{name} {100 * x:.1f} %" for name, x in output.details["chance"].items())
    return finish([result], [*lines, f"chance: {chance}"], skipped, out=out, json=json)


def _shards(
    model: str,
    source: Path,
    *,
    seed: int,
    out: Path | None,
    json: bool,
    on_error: OnError,
    batch_size: int,
    device: str,
) -> int:
    from m2encoder.eval.hard_negatives import measure_hard_negatives, to_rows
    from m2encoder.eval.result_facts import caption_facts, result_of
    from m2encoder.folders import write_jsonl

    encoder, pairs, embed_s = embed_shards(
        model, source, device=device, batch_size=batch_size, on_error=on_error
    )
    results: list[Result] = []
    for language in LANGUAGES:
        if language not in pairs.texts:
            continue
        began = time.perf_counter()
        wrong, made = _wrong_captions(pairs, language, seed)
        if not wrong.texts:
            continue
        output = measure_hard_negatives(
            encoder, pairs, language, wrong, batch_size=batch_size, seed=seed
        )
        seconds = {"embed": embed_s, "score": time.perf_counter() - began}
        settings = {"seed": seed, "captions": "rules" if made else "given"}
        facts = caption_facts(source, pairs, [language])
        results.append(
            result_of(encoder, "hard-negatives", facts, output, settings=settings, seconds=seconds)
        )
        if out is not None and made:
            out.mkdir(parents=True, exist_ok=True)
            rows = to_rows(pairs.texts[language], wrong, pairs.keys)
            write_jsonl(out / f"hard-negatives-{language}.jsonl", rows)
    if not results:
        raise DataError(
            f"{source}: carries no hard negatives, and rules made none of its captions; expected "
            f"colours, counts or positions in zh or en captions"
        )
    return finish(results, _tables(results), pairs.skipped, out=out, json=json)


def _wrong_captions(
    pairs: "PairEmbeddings", language: str, seed: int
) -> "tuple[WrongCaptions, bool]":
    """Return the captions that the data carries, else ones made by rules, and which it was."""
    from m2encoder.eval.hard_negatives import given_hard_negatives, template_hard_negatives

    given = given_hard_negatives(pairs, language)
    if given.texts:
        return given, False
    captions = pairs.texts[language]
    return template_hard_negatives(captions, cast("Language", language), seed=seed), True


def _tables(results: Sequence["Result"]) -> list[str]:
    lines: list[str] = []
    for result in results:
        head = f"{result.language}, captions {result.settings['captions']}"
        lines += ["", *metric_table(head, result.metrics, list(result.metrics))]
        for kind, reasons in result.details["left_out"].items():
            told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
            lines += [f"{kind}: left out {told}"] if told else []
    return lines[1:]
