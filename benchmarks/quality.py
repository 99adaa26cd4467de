"""What the demo recipes reach: train once per seed, evaluate on held-out shards, one table.

Run: python benchmarks/quality.py scenes|emoji [--seeds 0,1,2] [--archives A.tgz,B.tgz] [--out DIR]
Takes minutes per seed; a run that is complete is evaluated again, not trained again.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from m2encoder.cli.demo import CANDIDATES, demo_config, make_data
from m2encoder.cli.pretrain import run
from m2encoder.compat import mend_torchvision
from m2encoder.log import read_metrics

MEASURES = {
    "I>T R@1": ("retrieval", "i2t_r1"),
    "T>I R@1": ("retrieval", "t2i_r1"),
    "I>T R@10": ("retrieval", "i2t_r10"),
    "T>I R@10": ("retrieval", "t2i_r10"),
    "hard negatives": ("hard_negatives", "accuracy"),
}


def main() -> None:
    """Train and evaluate every seed, then print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", choices=("scenes", "emoji"), nargs="?", default="scenes")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--archives", default="")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    args = parser.parse_args()
    mend_torchvision()
    archives = [Path(path) for path in args.archives.split(",") if path]
    rows: list[dict[str, Any]] = []
    for seed in map(int, args.seeds.split(",")):
        rows += one_run(args.source, seed, archives, args.out)
    print_table(rows)


def one_run(source: Any, seed: int, archives: list[Path], out: Path) -> list[dict[str, Any]]:
    """Train one seed; returns a row of measures per language."""
    from m2encoder.eval.suite import evaluate
    from m2encoder.load import load_model

    folder = out / f"{source}-{seed}"
    make_data(folder / "data", source, archives, seed)
    encoder = load_model(run(demo_config(source, folder, seed, smoke=False)))
    results = evaluate(encoder, folder / "data/test", candidates=CANDIDATES[source], seed=seed)
    trained = [row for row in read_metrics(folder / "metrics.jsonl") if "seconds" in row][-1]
    parameters = sum(p.numel() for p in encoder.model.parameters())
    rows = []
    for language in ("zh", "en"):
        row: dict[str, Any] = {"seed": seed, "language": language}
        for name, (kind, key) in MEASURES.items():
            if found := results.get(kind, {}).get(language):
                row[name] = found[key]
        for task, found in results.get("zero_shot", {}).items():
            row[f"zero-shot {task}"] = found[language]["top1"]
        row["R@10 both ways"] = (row["I>T R@10"] + row["T>I R@10"]) / 2
        rows.append(row | {"minutes": trained["seconds"] / 60, "parameters": parameters})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows and their mean per language as Markdown; shares in percent."""
    names = list(rows[0])
    for language in ("zh", "en"):
        same = [row for row in rows if row["language"] == language]
        mean = {n: statistics.mean(row[n] for row in same) for n in names[2:]}
        rows.append({"seed": "mean", "language": language} | mean)
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(_shown(name, row[name]) for name in names) + " |")


def _shown(name: str, value: Any) -> str:
    if name == "parameters":
        return f"{value / 1e6:.2f} M"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1f}" if name == "minutes" else f"{100 * value:.1f}"


if __name__ == "__main__":
    main()
