"""How long recalls of a retrieval take, in how much memory, beside two other ways, in one run.

Run: python benchmarks/eval.py [--images 5000] [--texts 25010] [--width 768] [--rounds 5]
Prints one table, each way in a process of its own: seconds of the first time, when memory is fresh,
as where one script scores one model; median seconds of the times after it; the ratios to ours; peak
memory above that of the embeddings. Ours comes with intervals and tie bounds; "without
AMX" is ours as it runs where the processor multiplies no bfloat16 matrices. "Released script" is
written anew from the description of M2-Encoder's eval_retrieval.py, not its code: two float64
products, each fully sorted, looked up in dense tables of right answers by loops over ten places.
CLIP_benchmark runs its own recall_at_k and batchify, batches of 64, if it is installed. Embeddings
are random: a caption is its picture plus noise. Linux only.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m2encoder.compat import mend_torchvision
from m2encoder.eval.environment import environment
from m2encoder.eval.retrieval import measure_retrieval
from m2encoder.eval.screens import Bfloat16Screen

KS = (1, 5, 10)
NOISE = 7.0
"""Length of a caption's noise, that of its picture being 1: about 60 % of texts find it at once."""
Recalls = list[float]
"""In percent: image to text at each k, then text to image."""


def make_embeddings(num_images: int, num_texts: int, width: int) -> tuple[Any, Any, Any]:
    """Return unit vectors of images and texts, float32, and the image of each text."""
    chance = np.random.default_rng(0)
    image = _unit(chance.standard_normal((num_images, width), dtype=np.float32))
    owner = np.sort(np.arange(num_texts) % num_images)
    text = chance.standard_normal((num_texts, width), dtype=np.float32)
    text *= NOISE / np.sqrt(width)
    text += image[owner]
    return image, _unit(text), owner


def _unit(vectors: Any) -> Any:
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def ours(image: Any, text: Any, owner: Any) -> Recalls:
    """Measure with intervals and tie bounds, as every result does."""
    metrics = measure_retrieval(image, text, owner).metrics
    assert metrics["mean_recall"].ci95 is not None
    return [100 * metrics[f"{way}_r{k}"].value for way in ("i2t", "t2i") for k in KS]


def without_amx(image: Any, text: Any, owner: Any) -> Recalls:
    """Measure as on a processor that has none; for the rest of this process."""
    Bfloat16Screen.is_fast = staticmethod(lambda: False)
    return ours(image, text, owner)


def released_script(image: Any, text: Any, owner: Any) -> Recalls:
    """Compute what the released script does, as it is described; float64."""
    is_right = np.zeros((len(image), len(text)))
    is_right[owner, np.arange(len(text))] = 1
    text_is_right = np.zeros((len(text), len(image)))
    text_is_right[np.arange(len(text)), owner] = 1
    text_scores = text @ image.T
    text_order = np.argsort(-text_scores, axis=1)
    image_scores = image @ text.T
    image_order = np.argsort(-image_scores, axis=1)
    return [
        *_looked_up(image_order, is_right),
        *_looked_up(text_order, text_is_right),
    ]


def _looked_up(order: Any, right: Any) -> Recalls:
    found = np.zeros((len(order), max(KS)))
    for i in range(len(order)):
        for place in range(max(KS)):
            if right[i][order[i][place]] == 1:
                found[i][place] = 1
    found = np.cumsum(found, axis=1)
    hits = [0] * max(KS)
    for i in range(len(order)):
        for place in range(max(KS)):
            if found[i][place] > 0:
                hits[place] += 1
    return [100 * hits[k - 1] / len(order) for k in KS]


def clip_benchmark(image: Any, text: Any, owner: Any) -> Recalls:
    """Call CLIP_benchmark's functions as its own `evaluate` does."""
    from clip_benchmark.metrics.zeroshot_retrieval import (  # pyright: ignore[reportMissingImports]
        batchify,
        recall_at_k,
    )

    scores = torch.from_numpy(text) @ torch.from_numpy(image).t()
    right = torch.zeros_like(scores, dtype=torch.bool)
    right[torch.arange(len(scores)), torch.from_numpy(owner)] = True
    return [
        100 * (batchify(recall_at_k, *sides, 64, "cpu", k=k) > 0).float().mean().item()
        for sides in ((scores.T, right.T), (scores, right))
        for k in KS
    ]


Way = Callable[[Any, Any, Any], Recalls]
WAYS: dict[str, Way] = {
    "ours, with intervals": ours,
    "ours, without AMX": without_amx,
    "released script, written anew": released_script,
    "CLIP_benchmark": clip_benchmark,
}
SLOW = ("released script, written anew", "CLIP_benchmark")
"""Ways that run only twice."""


def measure(name: str, sizes: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """Return seconds of each round, peak bytes above the embeddings, and recalls."""
    image, text, owner = make_embeddings(*sizes)
    if name == "released script, written anew":
        image, text = image.astype(np.float64), text.astype(np.float64)
    few = min(300, sizes[0])
    mine = owner < few
    WAYS[name](image[:few], text[mine], owner[mine])  # threads, kernels, imports
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before, seconds, recalls = _memory("VmRSS"), [], []
    for _ in range(rounds):
        began = time.perf_counter()
        recalls = WAYS[name](image, text, owner)
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "bytes": _memory("VmHWM") - before, "recalls": recalls}


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--texts", type=int, default=25_010)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5, help="times of ours; the slow ones take 2")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = args.images, args.texts, args.width
    mend_torchvision()
    if args.measure:
        print(json.dumps(measure(args.measure, sizes, args.rounds)))
        return
    print(
        f"{args.images:,} images x {args.texts:,} texts x {args.width}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}, "
        f"{torch.get_num_threads()} threads; {environment()['machine']}\n"
    )
    print(
        "| way | s, first | of ours | s, again | range | of ours | MiB above the embeddings | "
        "I>T R@1/5/10 | T>I R@1/5/10 |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    base = None
    for name in WAYS:
        if name == "CLIP_benchmark" and not _is_installed("clip-benchmark"):
            print(f"| {name} | not installed | | | | | | | |")
            continue
        found = _in_process(name, sizes, 2 if name in SLOW else max(2, args.rounds))
        first, *again = found["seconds"]
        median = statistics.median(again)
        base = base or (first, median)
        shown = [f"{recall:.2f}" for recall in found["recalls"]]
        print(
            f"| {name} | {first:.2f} | {first / base[0]:.1f} | {median:.2f} | {min(again):.2f} to "
            f"{max(again):.2f} | {median / base[1]:.1f} | {found['bytes'] / 2**20:,.0f} | "
            f"{' / '.join(shown[:3])} | {' / '.join(shown[3:])} |",
            flush=True,
        )


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _in_process(name: str, sizes: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    options = [f"--{key}={n}" for key, n in zip(("images", "texts", "width"), sizes, strict=True)]
    words = [sys.executable, __file__, f"--measure={name}", f"--rounds={rounds}", *options]
    ran = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
