"""Image search: building an index, what it finds and how fast, and `m2enc search` cold and warm.

Prints tables: for each size and each kind of made vectors, flat and IVF-SQ8 through the same public
call, one query at a time, with recall@10 against the flat results; then the demo's own vectors and
the command, if there is a demo (--demo FOLDER, by default runs/demo).
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as m2enc does, before faiss is imported

import faiss
import numpy as np
from numpy.typing import NDArray

from m2encoder.embed import embed_folder
from m2encoder.index import Hit, ImageIndex, IndexSettings, VectorMaker, index_vectors
from m2encoder.load import load_model

Vectors = NDArray[np.float32]
DIM = 128
MAKER = VectorMaker("made", "0" * 64, DIM)
QUERIES = 1_000
COLUMNS = [
    "index", "build s", "disk MB", "own MB", "mapped MB", "ms/query", "p99", "ms in batches",
    "recall@10", "flat / this",
]  # fmt: skip
TIES = 1e-6


class Made(NamedTuple):
    """A kind of unit vectors: Gaussian noise, perhaps around centres."""

    title: str
    centres: Callable[[int], int] | None = None
    """Number of centres, random directions, for an index of so many vectors."""
    spread: float = 1.0
    """Length of the noise around a centre of length 1."""
    falls: float = 0.0
    """The noise's standard deviation on axis i is in proportion to i to the minus this."""

    def vectors(self, count: int, seed: int, *, size: int) -> Vectors:
        """Draw `count` vectors of the kind that an index of `size` holds.

        The centres do not depend on `seed`, so that queries of another seed are of the same kind.
        """
        rng = np.random.default_rng(seed)
        found = rng.standard_normal((count, DIM), np.float32)
        found *= np.arange(1, DIM + 1, dtype=np.float32) ** -self.falls
        if self.centres is not None:
            middle = np.random.default_rng(99).standard_normal(
                (self.centres(size), DIM), np.float32
            )
            middle /= np.linalg.norm(middle, axis=1, keepdims=True)
            found *= self.spread / DIM**0.5
            for start in range(0, count, 65_536):
                some = found[start : start + 65_536]
                some += middle[rng.integers(0, len(middle), len(some))]
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        return found


KINDS = {
    "mixture": Made(
        "Gaussian mixture, 1,000 centres, spread 1.2 (cosines within one about 0.4)",
        centres=lambda size: 1_000,
        spread=1.2,
    ),
    "small": Made(
        "Gaussian mixture, a centre per 100 vectors, spread 0.8 (cosines within one about 0.6)",
        centres=lambda size: size // 100,
        spread=0.8,
    ),
    "falling": Made(
        "one Gaussian whose deviations fall with the root of the axis' number: no clusters",
        falls=0.5,
    ),
    "uniform": Made("uniform on the sphere, the hardest case: no neighbourhoods at all"),
}


def one_by_one(index: ImageIndex, queries: Vectors) -> tuple[NDArray[np.float64], Vectors]:
    """Return seconds and best ten scores per query, searched one at a time."""
    seconds, scores = [], []
    for query in queries:
        began = time.perf_counter()
        hits = index.search(query[None], 10)[0]
        seconds.append(time.perf_counter() - began)
        scores += scores_of([hits]).tolist()
    return np.array(seconds), np.array(scores, np.float32)


def scores_of(found: list[list[Hit]]) -> Vectors:
    """Return the scores of the hits, (Q, k)."""
    return np.array([[hit.score for hit in hits] for hits in found], np.float32)


def in_batches(index: ImageIndex, queries: Vectors) -> float:
    """Return seconds per query in batches of 100."""
    began = time.perf_counter()
    for start in range(0, len(queries), 100):
        index.search(queries[start : start + 100], 10)
    return (time.perf_counter() - began) / len(queries)


def build(vectors: Vectors, folder: Path, settings: IndexSettings) -> tuple[ImageIndex, float]:
    """Return an index and how long it took."""
    began = time.perf_counter()
    names = [f"{i:07d}.jpg" for i in range(len(vectors))]
    index = index_vectors(MAKER, vectors, names, folder, settings=settings)
    return index, time.perf_counter() - began


def memory_of(folder: Path, queries: Vectors) -> tuple[float, float]:
    """Return MB that a fresh process holds after 200 queries: its own, and mapped from files."""
    np.save(folder.with_suffix(".npy"), queries[:200])
    command = [sys.executable, __file__, "--child", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    own, mapped = json.loads(ran.stdout)
    return own, mapped


def child(folder: Path) -> None:
    """Open, search, and print how much more memory that took."""

    def held() -> tuple[float, float]:
        lines = Path("/proc/self/status").read_text().splitlines()
        found = {line.split(":")[0]: line.split() for line in lines if line.startswith("Rss")}
        return float(found["RssAnon"][1]) / 1e3, float(found["RssFile"][1]) / 1e3

    before = held()
    index = ImageIndex.open(folder, encoder=MAKER)
    one_by_one(index, np.load(folder.with_suffix(".npy")))
    after = held()
    print(json.dumps([after[0] - before[0], after[1] - before[1]]))


def megabytes(folder: Path) -> float:
    """Return the size of the files."""
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def compare(title: str, vectors: Vectors, queries: Vectors, work: Path) -> None:
    """Print flat and IVF on the same vectors, and what ten thousand queries cost."""
    print(f"\n{title}: {len(vectors):,} x {DIM}\n\n| {' | '.join(COLUMNS)} |")
    print("|---|" + "--:|" * (len(COLUMNS) - 1))
    flat, flat_build = build(vectors, work / "flat", IndexSettings(kind="flat"))
    true = scores_of(flat.search(queries, 10))
    base = measure(flat, flat_build, queries[:200], true, None)
    flat.close()
    ivf, ivf_build = build(vectors, work / "ivf", IndexSettings(kind="ivf"))
    measure(ivf, ivf_build, queries, true, base)
    told = ivf.meta.ann.recall_at_10 if ivf.meta.ann else {}
    print(f"\nrecall@10 as the index states it: {told['pictures']:.4f}; {steadiness(ivf, queries)}")
    ivf.close()


def measure(
    index: ImageIndex, build_s: float, queries: Vectors, true: Vectors, base: float | None
) -> float:
    """Print one row; returns the median seconds per query."""
    in_batches(index, queries[:100])  # warm
    each, scores = one_by_one(index, queries)
    recall = float((scores >= true[: len(scores), -1:] - TIES).mean())
    own, mapped = memory_of(index.folder, queries)
    ann = index.meta.ann
    median = float(np.median(each))
    row = [
        "flat" if ann is None else f"IVF-SQ8, {ann.probes} of {ann.lists} lists",
        f"{build_s:.1f}",
        f"{megabytes(index.folder):,.0f}",
        f"{own:,.0f}",
        f"{mapped:,.0f}",
        f"{median * 1e3:.2f}",
        f"{np.quantile(each, 0.99) * 1e3:.2f}",
        f"{in_batches(index, queries[:500]) * 1e3:.2f}",
        f"{recall:.4f}",
        f"{(base or median) / median:.1f}",
    ]
    print(f"| {' | '.join(row)} |")
    return median


def steadiness(index: ImageIndex, queries: Vectors) -> str:
    """Say how time and memory go over 10,000 queries."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    medians = []
    for _ in range(10):
        each, _ = one_by_one(index, queries[:1_000])
        medians.append(float(np.median(each)) * 1e3)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    return (
        f"10,000 queries: median ms of each thousand {min(medians):.2f} to {max(medians):.2f}, the "
        f"last {medians[-1]:.2f}; {grown:.1f} MB more at the end"
    )


def demo(folder: Path, work: Path) -> None:
    """Print the same for the demo's own vectors, and the command cold and warm."""
    model, photos = folder / "model", folder / "photos"
    if not (model.is_dir() and photos.is_dir()):
        print(f"\nno demo at {folder}: run make demo first, or give --demo FOLDER")
        return
    encoder = load_model(model, device="cpu")
    found = embed_folder(encoder, photos)
    words = ["三颗红色的星星", "three red stars", "一条蓝色的鱼", "a blue fish", "一朵花", "a tree"]
    texts = encoder.encode_text(words)
    print(f"\nthe demo's pictures: {len(found.names):,} x {encoder.dim}\n")
    print("| index | queries | recall@10 |\n|---|---|--:|")
    flat = index_vectors(encoder, found.vectors, found.names, work / "demo-flat")
    ivf = index_vectors(
        encoder, found.vectors, found.names, work / "demo-ivf", settings=IndexSettings(kind="ivf")
    )
    ann = ivf.meta.ann
    for name, queries in (("its pictures", found.vectors), ("texts", texts)):
        true, scores = scores_of(flat.search(queries, 10)), scores_of(ivf.search(queries, 10))
        recall = float((scores >= true[:, -1:] - TIES).mean())
        said = f"{ann.probes} of {ann.lists} lists" if ann else ""
        print(f"| ivf, {said} | {len(queries):,} {name} | {recall:.4f} |")
    commands(model, photos, work)


def commands(model: Path, photos: Path, work: Path) -> None:
    """Print how long `m2enc search` takes on a fresh folder, and afterwards."""
    copied = shutil.copytree(photos, work / "photos", ignore=shutil.ignore_patterns(".m2enc-index"))
    count = len(list(copied.iterdir()))
    command = [sys.executable, "-m", "m2encoder", "search", str(copied), "三颗红色的星星"]

    def run(*more: str) -> float:
        began = time.perf_counter()
        subprocess.run([*command, *more], capture_output=True, check=True)
        return time.perf_counter() - began

    cold = run("--model", str(model))
    warm = [run() for _ in range(5)]
    for i, path in enumerate(sorted(copied.glob("*.png"))[:10]):
        path.write_bytes(path.read_bytes() + bytes([i]))
    changed = run()
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import m2encoder.load, m2encoder.index"], check=True)
    importing = time.perf_counter() - began
    print(f"\n`m2enc search` on {count:,} pictures\n\n| run | s |\n|---|--:|")
    print(f"| first, which indexes | {cold:.1f} |")
    print(f"| later (median of 5) | {statistics.median(warm):.2f} |")
    print(f"| after ten pictures changed | {changed:.2f} |")
    print(f"| of each, importing torch, faiss and the rest | {importing:.2f} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args: Any = parser.parse_args()
    if args.child:
        child(args.child)
        return
    print(
        f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, faiss "
        f"{faiss.__version__}, {faiss.omp_get_max_threads()} threads; {QUERIES:,} fresh queries"
    )
    for size in args.sizes:
        for kind in (KINDS[name] for name in args.kinds):
            with tempfile.TemporaryDirectory() as work:
                vectors = kind.vectors(size, 0, size=size)
                queries = kind.vectors(QUERIES, 1, size=size)
                compare(kind.title, vectors, queries, Path(work))
    with tempfile.TemporaryDirectory() as work:
        demo(args.demo, Path(work))


if __name__ == "__main__":
    main()
