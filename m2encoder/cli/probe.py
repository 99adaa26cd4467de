"""`m2enc eval probe`: train a classifier on a model's picture vectors and measure it.

Not for the measuring (eval/probe.py, few_shot.py).
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from m2encoder.cli.measured import OnError, finish, metric_table

if TYPE_CHECKING:
    from m2encoder.encoder import BadItem, Encoder
    from m2encoder.eval.datasets import LabelledData
    from m2encoder.eval.metric import TaskOutput
    from m2encoder.eval.probe import Features, Split
    from m2encoder.eval.results import Result

Method = Literal["linear", "knn", "few-shot"]
METHODS = {
    "linear": "logistic regression on all train pictures",
    "knn": "vote of the nearest train pictures",
    "few-shot": "a few train pictures of each class",
}
NAMED = 5


def probe(
    model: str,
    *,
    train: Path,
    test: Path,
    method: Method = "linear",
    label: str | None = None,
    k: int = 20,
    shots: list[int] | None = None,
    draws: int = 5,
    seed: int = 0,
    store: Path | None = None,
    out: Path | None = None,
    json: bool = False,
    on_error: OnError = "raise",
    batch_size: int = 64,
    device: str = "auto",
) -> int:
    """Train a classifier on the vectors of labelled pictures and measure it on others.

    Args:
        model: A model folder.
        train: Labelled pictures: a folder for each class, a shard folder, tars, CIFAR or .jsonl.
        test: Others with the same labels.
        method: Logistic regression, nearest neighbours, or a few pictures of each class.
        label: Key of a shard folder's meta that holds the label, such as colour.
        k: Nearest neighbours that vote.
        shots: Pictures of each class, for few-shot; 1 2 4 8 16 by default.
        draws: How often they are drawn anew.
        seed: Draws them, the held-out part of train, and the bootstrap samples.
        store: Folder that keeps the vectors for the next run.
        out: Folder to write the result into, as JSON.
        json: Print JSON instead of a table.
        on_error: Stop at a missing or unreadable picture, or leave it out (exit code 4).
        batch_size: Pictures at a time.
        device: Where to compute: auto, cpu, cuda, ...
    """
    from m2encoder.errors import MissingExtraError
    from m2encoder.eval.datasets import read_labelled
    from m2encoder.eval.few_shot import SHOTS
    from m2encoder.eval.logistic import has_sklearn
    from m2encoder.eval.probe import join
    from m2encoder.load import load_model

    if method == "linear" and not has_sklearn():  # before the long work
        raise MissingExtraError("scikit-learn", extra="probe")
    data = [read_labelled(path, label_key=label, on_error=on_error) for path in (train, test)]
    encoder = load_model(model, device=device)
    began = time.perf_counter()
    options = {"batch_size": batch_size, "on_error": on_error, "store": store}
    skipped: list[BadItem] = []
    split = join(*(_features(encoder, each, options, skipped) for each in data))
    embedded = time.perf_counter()
    settings: dict[str, Any] = {"method": method, "label": label, "seed": seed, "train": str(train)}
    chosen = {"knn": {"k": k}, "few-shot": {"shots": shots or [*SHOTS], "draws": draws}}
    settings |= chosen.get(method, {})
    output = _measure(split, settings)
    seconds = {"embed": embedded - began, "score": time.perf_counter() - embedded}
    result = _result(encoder, data, split, output, settings, seconds, skipped)
    return finish([result], _lines(result, method), skipped, out=out, json=json)


def _features(
    encoder: "Encoder", data: "LabelledData", options: dict[str, Any], skipped: "list[BadItem]"
) -> "Features":
    from m2encoder.embed import embed_pictures
    from m2encoder.eval.probe import Features
    from m2encoder.vector_store import VectorStore

    store = VectorStore(options["store"]) if options["store"] else None
    changed: dict[str, Any] = {**options, "store": store}
    found = embed_pictures(encoder, data.pictures, **changed)
    skipped += found.skipped
    return Features(found.vectors, data.targets[found.kept], data.labels)


def _measure(split: "Split", settings: dict[str, Any]) -> "TaskOutput":
    from m2encoder.eval.few_shot import measure_few_shot
    from m2encoder.eval.probe import measure_knn, measure_linear_probe

    seed = settings["seed"]
    if settings["method"] == "linear":
        return measure_linear_probe(split, seed=seed)
    if settings["method"] == "knn":
        return measure_knn(split, k=settings["k"], seed=seed)
    return measure_few_shot(split, shots=settings["shots"], draws=settings["draws"], seed=seed)


def _result(
    encoder: "Encoder",
    data: "Sequence[LabelledData]",
    split: "Split",
    output: "TaskOutput",
    settings: dict[str, Any],
    seconds: dict[str, float],
    skipped: "Sequence[BadItem]",
) -> "Result":
    from m2encoder.eval.result_facts import DataFacts, custom_protocol, result_of, skipped_facts

    train, test = data
    content = "\n".join(
        [train.pictures.content_key(), test.pictures.content_key(), *split.labels]
    ).encode("utf-8", "surrogatepass")
    facts: dict[str, Any] = {**test.facts(), "images": len(split.test.targets)}
    facts["skipped"] = [*facts["skipped"], *skipped_facts(skipped)]
    return result_of(
        encoder,
        f"probe-{settings['method']}",
        DataFacts(custom_protocol(content), facts, "none"),
        output,
        settings=settings,
        seconds=seconds | {"all": sum(seconds.values())},
    )


def _lines(result: "Result", method: Method) -> list[str]:
    details = result.details
    head = (
        f"{METHODS[method]}: {details['train_pictures']:,} of {details['train_classes']:,} classes"
    )
    lines = metric_table(head, result.metrics, list(result.metrics))
    if method == "linear":
        edge = ", at the edge of what was tried" if details["strength_at_edge"] else ""
        lines.append(f"C {details['strength']:g}, chosen on {details['held_out']:,} held out{edge}")
        if not details["converged"]:
            lines.append(f"not converged after {details['iterations']:,} iterations")
    if method == "few-shot" and details["logistic"].startswith("left out"):
        lines.append(f"logistic regression {details['logistic']}")
    if missing := details["missing_from_train"]:
        more = ", ..." if len(missing) > NAMED else ""
        lines.append(
            f"missing from train: {', '.join(missing[:NAMED])}{more} "
            f"({details['pictures_missing_from_train']:,} test pictures)"
        )
    return lines
