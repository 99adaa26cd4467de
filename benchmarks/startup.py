"""How long `m2enc --help` takes, beside importing jsonargparse alone, in the same interpreter.

Prints one table: median of starts in milliseconds, spread, and the ratio (target: at most 2).
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -m m2encoder --help": ["-m", "m2encoder", "--help"],
    'python -c "import jsonargparse"': ["-c", "import jsonargparse"],
    'python -c ""': ["-c", ""],
}


def start_ms(words: list[str]) -> float:
    """Start the interpreter with these words and wait for its end; returns milliseconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=10, help="starts of each, after one to warm")
    starts = parser.parse_args().starts
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(starts + 1):  # in turn, so that a busy moment meets all of them
        for name, words in COMMANDS.items():
            taken = start_ms(words)
            if number:
                times[name].append(taken)
    print(f"Python {platform.python_version()}, {platform.machine()}, {starts} starts each\n")
    print("| command | median ms | min | max |\n|---|--:|--:|--:|")
    for name, taken in times.items():
        median, lowest, highest = statistics.median(taken), min(taken), max(taken)
        print(f"| `{name}` | {median:.0f} | {lowest:.0f} | {highest:.0f} |")
    ours, theirs, _ = (statistics.median(taken) for taken in times.values())
    print(f"\nratio of the first to the second: {ours / theirs:.2f} (target: at most 2)")


if __name__ == "__main__":
    main()
