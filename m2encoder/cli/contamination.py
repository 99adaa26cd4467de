"""`m2enc eval contamination`: look for a test set in training data.

Not for the looking itself (eval/contamination.py).
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2encoder.cli.measured import aligned, finish

if TYPE_CHECKING:
    from m2encoder.eval.contamination import Contamination, Ways
    from m2encoder.eval.contamination_data import TestSet
    from m2encoder.eval.results import Result

SHOWN = 5
MEANING = {
    "image": "pictures",
    "image_file": "  the same file",
    "image_copy": "  a copy: encoded again, scaled or slightly cropped",
    "image_embedding": "  not counted: alike by the model's vectors",
    "caption": "captions",
    "caption_same": "  the same words",
    "caption_near": "  not counted: nearly the same words",
}


def contamination(
    *,
    train: list[Path],
    test: Path,
    images: Path | None = None,
    language: str | None = None,
    split: str | None = None,
    model: str | None = None,
    cosine: float = 0.95,
    near_captions: float | None = None,
    out: Path | None = None,
    json: bool = False,
    batch_size: int = 64,
    device: str = "auto",
) -> int:
    """Look for test pictures and captions in training data.

    Pictures are found as files, and as copies that were encoded again, scaled or slightly cropped;
    captions by their words. The result names what was found, for other results to leave it out.

    Args:
        train: Shard folders, webdataset tars or folders of pictures.
        test: A shard folder, webdataset tars, a file of captions or a folder of pictures.
        images: The folder of the pictures that a file of captions names.
        language: Of a file's captions, where it has several.
        split: Of a file that has several.
        model: A model folder, to find pictures that are alike by its vectors too.
        cosine: How much alike.
        near_captions: Find captions too that share so much of their character triples, such as 0.8.
        out: Folder to write the result into, as JSON, with a mask of what was found.
        json: Print JSON instead of a table.
        batch_size: Pictures that the model encodes at a time.
        device: Where the model computes: auto, cpu, cuda, ...
    """
    from m2encoder.eval.contamination import Ways, check_contamination
    from m2encoder.eval.contamination_data import TrainItems, open_test, total

    Ways(min_cosine=cosine, near_captions=near_captions)  # complains before the long work
    sources = [TrainItems(path) for path in train]
    tested = open_test(test, images=images, language=language, split=split)
    encoder = None
    if model is not None:
        from m2encoder.load import load_model

        encoder = load_model(model, device=device)
    ways = Ways(encoder, cosine, near_captions)
    began = time.perf_counter()
    found = check_contamination(
        (item for source in sources for item in source),
        tested,
        ways,
        train_paths=[str(path) for path in train],
        total=total(sources),
        batch_size=batch_size,
    )
    result = _result(found, tested, ways, time.perf_counter() - began)
    return finish([result], _lines(result, found), found.unread, out=out, json=json)


def _result(found: "Contamination", test: "TestSet", ways: "Ways", seconds: float) -> "Result":
    from m2encoder.eval.environment import environment
    from m2encoder.eval.result_facts import custom_protocol, skipped_facts
    from m2encoder.eval.results import Result

    protocol = test.protocol.facts() if test.protocol else None
    output = found.output()
    encoder = ways.encoder
    return Result(
        task="contamination",
        protocol=protocol or custom_protocol(test.pictures.content_key().encode()),
        language="all",
        data={
            "path": test.path,
            "images": len(test.pictures),
            "texts": len(test.texts),
            "skipped": skipped_facts(found.unread),
        },
        model={
            "name": encoder.name if encoder else "none",
            "fingerprint": encoder.fingerprint if encoder else "none",
        },
        metrics=output.metrics,
        settings={
            "train": found.details["train"]["paths"],
            "min_cosine": ways.min_cosine if encoder else None,
            "near_captions": ways.near_captions,
        },
        environment=environment(device=str(encoder.device) if encoder else "cpu"),
        seconds={"all": seconds},
        details=output.details,
        contamination=found.facts(),
        ranks=output.ranks,
    )


def _lines(result: "Result", found: "Contamination") -> list[str]:
    train = found.details["train"]
    unread = sum(train["unread"].values())
    said = f", {unread:,} of them unreadable" if unread else ""
    lines = [
        f"{result.data['path']} in {', '.join(train['paths'])}: {train['pairs']:,} training pairs"
        f"{said}",
        "",
    ]
    rows = [["", "found", "of", "%"]]
    for name, metric in result.metrics.items():
        count = round(metric.value * metric.n) if metric.n else 0
        share = f"{100 * metric.value:.1f}" if metric.n else "-"
        rows.append([MEANING[name.removesuffix("_share")], f"{count:,}", f"{metric.n:,}", share])
    lines += aligned(rows)
    if not result.metrics["image_share"].n:
        lines += ["", "no test picture can be read, so captions alone were looked for"]
    for what in ("images", "captions"):
        lines += _examples(what, found.details[what])
    if plain := found.details["test"]["too_plain_for_copies"]:
        lines += ["", f"{plain:,} test pictures are too plain to recognise copies of them"]
    if about := found.details.get("embedding"):
        lines += ["", _about_cosines(about)]
    for overlap in found.details["known_overlaps"]:
        lines += ["", f"known of this test: {overlap}"]
    return lines


def _examples(what: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    if not found:
        return []
    lines = ["", f"{what}, the first {min(SHOWN, len(found))} of {len(found):,}:"]
    for item in found[:SHOWN]:
        best = item["matches"][0]
        more = f" and {item['count'] - 1:,} more" if item["count"] > 1 else ""
        name = " ".join(item["name"].split())
        short = name if len(name) <= 40 else f"{name[:39]}…"
        lines.append(f"  {short}  {best['kind']} {best['score']:.3f}  {best['key']}{more}")
    return lines


def _about_cosines(about: Mapping[str, Any]) -> str:
    share = about["test_pairs_above"]
    nearest = about["nearest_cosine"]
    by_chance = "" if share is None else (
        f"; {100 * share:.2g} % of pairs of different test pictures are as much alike"
    )  # fmt: skip
    return (
        f"cosine above {about['min_cosine']:g}{by_chance}; the nearest training picture has "
        f"{nearest['p50']:.3f} in the median, {nearest['max']:.3f} at most"
    )
