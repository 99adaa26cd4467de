"""A two-thread training step beside other work, by how long OpenMP threads spin while waiting.

Prints one table: steps per second alone and beside two busy processes, for GNU OpenMP's default,
for GOMP_SPINCOUNT=10000 (what m2enc sets) and for no spinning at all. Medians of three turns.
"""

import multiprocessing
import os
import statistics
import subprocess
import sys
import time

STEP = """
import time, torch
torch.set_num_threads(2)
layers = [torch.nn.Linear(512, 512) for _ in range(20)]
x = torch.randn(256, 512)
def step():
    y = x
    for layer in layers:
        y = torch.nn.functional.gelu(layer(y))
    y.sum().backward()
step()
began, steps = time.perf_counter(), 0
while time.perf_counter() - began < 4:
    step()
    steps += 1
print(steps / (time.perf_counter() - began))
"""


def steps_per_s(spin_count: str | None) -> float:
    """Run the step in a fresh interpreter that spins so long; None leaves the default."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    if spin_count is not None:
        environment["GOMP_SPINCOUNT"] = spin_count
    ran = subprocess.run(
        [sys.executable, "-c", STEP], env=environment, capture_output=True, text=True, check=True
    )
    return float(ran.stdout)


def spin() -> None:
    """Keep one core busy until killed, at most a minute."""
    began = time.perf_counter()
    while time.perf_counter() - began < 60:
        pass


def main() -> None:
    """Measure and print."""
    print("| GOMP_SPINCOUNT | steps/s alone | beside two busy processes |\n|---|--:|--:|")
    for count in (None, "10000", "0"):
        alone = statistics.median(steps_per_s(count) for _ in range(3))
        others = [multiprocessing.Process(target=spin, daemon=True) for _ in range(2)]
        for other in others:
            other.start()
        beside = statistics.median(steps_per_s(count) for _ in range(3))
        for other in others:
            other.terminate()
            other.join()
        print(f"| {count or 'default'} | {alone:.2f} | {beside:.2f} |")


if __name__ == "__main__":
    main()
